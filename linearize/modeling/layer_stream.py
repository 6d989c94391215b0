"""Run a causal language model one decoder layer at a time, on a machine that cannot hold it.

1. The model is built without weights: buffers (rotary frequencies) are real, parameters are not.
2. The family's own forward runs once with its layers bypassed. It embeds the tokens, builds masks and positions, and
   hands every layer its arguments, which are recorded.
3. Layer by layer: the weights of one layer are read from the safetensors, every batch of rows goes through it, the
   weights are dropped. The hidden states between layers are all that stays.
4. Backward the same way round: each layer is recomputed from its recorded input.

Weights are read through the files' memory maps. They are copied only where their type changes or transformers merges
several tensors into one (experts). Shapes: B rows, T tokens, D hidden size.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from linearize.checkpoint.weights import read_weights
from linearize.device import return_freed_memory
from linearize.errors import CheckpointError
from linearize.modeling.readout import Readout, readout_of
from linearize.progress import counting

# bytes of layer inputs that stay in memory for the way back
RECORDED_BYTES = 256 << 20
LAYER_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass
class LayerCall:
    """The arguments with which the family's forward calls one layer, the hidden states apart."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass
class StreamedBatch:
    """A batch of rows on its way through the layers.

    Attributes:
        hidden: [B, T, D], the input of the layer that comes next.
        calls: one for every layer.
        inputs: the input [B, T, D] of every layer that was passed, or its file, if recorded for the way back.
    """

    hidden: Tensor
    calls: list[LayerCall]
    inputs: list[Tensor | Path] = field(default_factory=list)


class LayerStream:
    """A model that runs one decoder layer after another.

    Args:
        model: the model itself, or one without weights (modeling/loading.py).
        folder: the safetensors from which the weights of each layer are read when it runs; None if `model` has them.
        device: computes the layers.
    """

    def __init__(self, model: PreTrainedModel, folder: Path | None = None, *, device: str | torch.device = "cpu"):
        self.model, self.folder, self.device = model, folder, device
        self.layers: nn.ModuleList = model.base_model.layers
        self.recorded_bytes = 0
        self.recordings: tempfile.TemporaryDirectory[str] | None = None
        if folder is not None:
            return_freed_memory()
            self._find_tensors(folder)

    def _find_tensors(self, folder: Path) -> None:
        """Sort the checkpoint's tensors by layer; load those of no layer, but for embedding and readout."""
        self.conversions = get_model_conversion_mapping(self.model)
        self.file_of = {name: folder / info.file for name, info in read_weights(folder).tensors.items()}
        self.layer_tensors: list[list[str]] = [[] for _ in self.layers]
        other_tensors = []
        for name in self.file_of:
            if (match := LAYER_NAME.search(name)) is None:
                other_tensors.append(name)
            elif int(match[1]) < len(self.layers):
                self.layer_tensors[int(match[1])].append(name)
        self.unloaded = [
            [name for name, parameter in layer.named_parameters() if parameter.is_meta] for layer in self.layers
        ]
        self.embedding = self._name_on_disk(self.model.get_input_embeddings())
        tied = self.model.config.get_text_config().tie_word_embeddings
        self.head = self.embedding if tied else self._name_on_disk(self.model.get_output_embeddings())
        self._load([name for name in other_tensors if name not in (self.embedding, self.head)])

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Provide one decoder layer with its weights."""
        layer = self.layers[index]
        if self.folder is not None:
            self._load(self.layer_tensors[index])
        try:
            yield layer
        finally:
            if self.folder is not None:
                _drop_weights(layer, self.unloaded[index])

    @torch.no_grad()
    def start(self, rows: Sequence[Tensor], position_ids: Sequence[Tensor | None] | None = None) -> list[StreamedBatch]:
        """Embed batches of token ids [B, T]; return them in front of the first layer."""
        positions = position_ids or [None] * len(rows)
        with self._embedding(rows) as embedded:
            return [self.recorded(hidden, at) for hidden, at in zip(embedded, positions, strict=True)]

    @torch.no_grad()
    def forward(self, batches: Sequence[StreamedBatch], *, record: bool = False) -> None:
        """Send every batch through all layers.

        Args:
            record: record the layers' inputs for `backward`.
        """
        with counting(len(self.layers) * len(batches)) as advance:
            for index in range(len(self.layers)):
                with self.layer(index) as layer:
                    for batch in batches:
                        if record:
                            batch.inputs.append(self._recorded_input(batch.hidden))
                        batch.hidden = run_layer(layer, batch.hidden, batch.calls[index])
                        advance()

    @torch.enable_grad()
    def backward(
        self,
        batches: Sequence[StreamedBatch],
        gradients: Sequence[Tensor],
        parameters: Callable[[int], Sequence[Tensor]],
        collect: Callable[[int, int, Sequence[Tensor]], None],
    ) -> None:
        """Send the gradients of the last layer's output back through all layers.

        Args:
            batches: passed forward with `record`; their recorded inputs are used up.
            gradients: [B, T, D] for every batch.
            parameters: returns the tensors of layer `index` whose gradients are collected.
            collect: is called with the layer, the batch's number and these gradients.
        """
        gradients = list(gradients)
        with counting(len(self.layers) * len(batches)) as advance:
            for index in reversed(range(len(self.layers))):
                with self.layer(index) as layer:
                    for number, batch in enumerate(batches):
                        hidden = _read_back(batch.inputs.pop()).to(self.device).requires_grad_()
                        output = run_layer(layer, hidden, batch.calls[index])
                        *collected, gradients[number] = torch.autograd.grad(
                            output, [*parameters(index), hidden], gradients[number]
                        )
                        collect(index, number, collected)
                        advance()
        self.recorded_bytes = 0

    def _recorded_input(self, hidden: Tensor) -> Tensor | Path:
        """Keep an input for the way back: in memory, beyond RECORDED_BYTES in a temporary folder."""
        self.recorded_bytes += hidden.nbytes
        if self.recorded_bytes <= RECORDED_BYTES:
            return hidden
        if self.recordings is None:  # removed with this stream, or at exit
            self.recordings = tempfile.TemporaryDirectory(prefix="linearize-activations-")
        path = Path(self.recordings.name) / f"{self.recorded_bytes}.safetensors"
        save_file({"hidden": hidden.contiguous().cpu()}, path)
        return path

    def normalised(self, hidden: Tensor) -> Tensor:
        """Return the last layer's output [B, T, D] behind the final norm."""
        return self._bypassed(hidden, {}, lambda *_, **__: hidden).last_hidden_state

    def last_hidden(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the hidden states [T, D] behind the final norm of every row of token ids [T]."""
        batches = self.start([row[None] for row in rows])
        self.forward(batches)
        with torch.no_grad():
            return [self.normalised(batch.hidden)[0] for batch in batches]

    @contextlib.contextmanager
    def readout(self) -> Iterator[Readout]:
        """Provide the readout with its weight."""
        head = self.model.get_output_embeddings()
        if self.folder is None:
            yield readout_of(self.model)
            return
        with self._opened([self.head]) as tensors:
            weight = tensors[self.head][:].to(self.device, head.weight.dtype)
        with _weight(head, weight):
            yield readout_of(self.model)

    @contextlib.contextmanager
    def _embedding(self, rows: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Provide the embeddings [B, T, D] of token ids, scaled as the family's embedding does."""
        embedding = self.model.get_input_embeddings()
        if self.folder is None:
            yield [embedding(ids.to(self.device)) for ids in rows]
            return
        # only the embeddings of tokens that occur are read
        used, places = torch.unique(torch.cat([ids.flatten() for ids in rows]), return_inverse=True)
        with self._opened([self.embedding]) as tensors:
            weight = tensors[self.embedding][:][used].to(self.device, embedding.weight.dtype)
        parts = places.to(self.device).split([ids.numel() for ids in rows])
        # the token of padding has no place among the used ones; it only matters for gradients
        with _weight(embedding, weight), _attribute(embedding, "padding_idx", None):
            embedded = [embedding(part.view(ids.shape)) for part, ids in zip(parts, rows, strict=True)]
        yield embedded

    def recorded(self, embedded: Tensor, position_ids: Tensor | None = None) -> StreamedBatch:
        """Run the family's forward on embeddings with the layers bypassed, and record how it calls them."""
        first: list[Tensor] = []
        calls: list[LayerCall] = []

        def bypass(hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            first.append(hidden)
            calls.append(LayerCall(arguments, keywords))
            return hidden

        options = {} if position_ids is None else {"position_ids": position_ids.to(self.device)}
        self._bypassed(embedded, options, bypass)
        return StreamedBatch(first[0], calls)

    def _bypassed(self, embedded: Tensor, options: dict[str, Any], bypass: Callable[..., Tensor]) -> Any:
        """Run the family's forward with `bypass` in place of every layer's forward."""

        def stand_in(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            return bypass(hidden_states, *arguments, **keywords)

        for layer in self.layers:
            layer.forward = stand_in
        try:
            return self.model.base_model(inputs_embeds=embedded, use_cache=False, **options)
        finally:
            for layer in self.layers:
                del layer.forward

    def _name_on_disk(self, module: nn.Module) -> str:
        """Return the name that a checkpoint gives the weight of an embedding."""
        name = next(name for name, parameter in self.model.named_parameters() if parameter is module.weight)
        return next(iter(revert_weight_conversion(self.model, {name: module.weight})))

    @contextlib.contextmanager
    def _opened(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Provide slices of tensors by name, not yet read."""
        with contextlib.ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(file, framework="pt"))
                for file in {self.file_of[name] for name in names}
            }
            yield {name: files[self.file_of[name]].get_slice(name) for name in names}

    def _load(self, names: Sequence[str]) -> None:
        """Read tensors into the model as transformers does, its conversions included."""
        with self._opened(names) as tensors:
            options = LoadStateDictConfig(
                device_map={"": self.device}, dtype=self.model.dtype, weight_mapping=self.conversions
            )
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, options)
        if odd := sorted(map(str, info.mismatched_keys)) or sorted(info.conversion_errors):
            raise CheckpointError(f"{self.folder}: tensor '{odd[0]}' does not fit the model")


def _read_back(recorded: Tensor | Path) -> Tensor:
    """Return a recorded input; its file is removed."""
    if isinstance(recorded, Tensor):
        return recorded
    hidden = load_file(recorded)["hidden"]
    recorded.unlink()
    return hidden


def run_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Run one layer; some families' layers return a tuple."""
    output = layer(hidden, *call.arguments, **call.keywords)
    return output[0] if isinstance(output, tuple) else output


def _weight(module: nn.Module, weight: Tensor) -> contextlib.AbstractContextManager[None]:
    """Give a module another weight for a while."""
    return _attribute(module, "weight", nn.Parameter(weight, requires_grad=False))


@contextlib.contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module another value for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _drop_weights(layer: nn.Module, names: Sequence[str]) -> None:
    """Replace parameters of a layer by their shapes."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = layer.get_submodule(path)
        shape = torch.empty_like(getattr(module, attribute), device="meta")
        setattr(module, attribute, nn.Parameter(shape, requires_grad=False))
