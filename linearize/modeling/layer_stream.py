"""Run a causal language model one decoder layer at a time, on a machine that cannot hold it.

1. The model is built without weights: buffers (rotary frequencies) are real, parameters are not.
2. The family's own forward runs once with its layers bypassed. It embeds the tokens, builds masks and positions, and
   hands every layer its arguments, which are recorded.
3. Layer by layer: the weights of one layer are read from the safetensors, every batch of rows goes through it, the
   weights are dropped. The hidden states between layers are all that stays.
4. Backward the same way round: each layer is recomputed from its recorded input.

On a CUDA device the next layer's weights are copied while this one computes (next_layer.py). An interrupted pass over a
model that is read from its files goes on with the layers that are left (layer_pass.py).

Weights are read through the files' memory maps. They are copied only where their type changes or transformers merges
several tensors into one (experts). Shapes: B rows, T tokens, D hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from linearize.checkpoint.names import LAYER_NUMBER
from linearize.checkpoint.weights import read_weights
from linearize.device import return_freed_memory
from linearize.errors import CheckpointError
from linearize.modeling.layer_pass import LayerPass
from linearize.modeling.next_layer import NextLayer
from linearize.modeling.readout import Readout, readout_of
from linearize.progress import counting


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
        device: gets the rows, and computes the layers unless Accelerate has spread them over several devices.
        unfinished: where a pass over a model in files waits that is interrupted; None keeps nothing.
        ahead: load the next layer while one computes; None: on a CUDA device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path | None = None,
        *,
        device: str | torch.device = "cpu",
        unfinished: Path | None = None,
        ahead: bool | None = None,
    ):
        self.model, self.folder, self.device = model, folder, torch.device(device)
        self.layers: nn.ModuleList = model.base_model.layers
        self.unfinished = None if folder is None else unfinished
        self.next_layer: NextLayer | None = None
        self.unplaced: set[str] = set()
        if folder is not None:
            return_freed_memory()
            self._find_tensors(folder)
            if self.device.type == "cuda" if ahead is None else ahead:
                self.next_layer = NextLayer(self.layers, self._load_layer, self.device)

    def _find_tensors(self, folder: Path) -> None:
        """Sort the checkpoint's tensors by layer; load those of no layer, but for embedding and readout."""
        self.conversions = get_model_conversion_mapping(self.model)
        self.file_of = {name: folder / info.file for name, info in read_weights(folder).tensors.items()}
        self.layer_tensors: list[list[str]] = [[] for _ in self.layers]
        other_tensors = []
        for name in self.file_of:
            if (match := LAYER_NUMBER.search(name)) is None:
                other_tensors.append(name)
            elif int(match[1]) < len(self.layers):
                self.layer_tensors[int(match[1])].append(name)
        self.unloaded = [
            [name for name, parameter in layer.named_parameters() if parameter.is_meta] for layer in self.layers
        ]
        self.embedding = self._name_on_disk(self.model.get_input_embeddings())
        self.head = self._name_on_disk(self.model.get_output_embeddings())
        if self.model.config.get_text_config().tie_word_embeddings:
            # where the files have both, which may differ, transformers takes each
            stored = [name for name in self._tied_names() if name in self.file_of]
            self.head = next(iter(stored), self.embedding)
            self.embedding = self.embedding if self.embedding in self.file_of else self.head
        self._load([name for name in other_tensors if name not in (self.embedding, self.head)], self.device)

    def _load_layer(self, index: int) -> None:
        """Read a layer's weights: into memory if a copy beside the compute takes them on, else onto the device."""
        self._load(self.layer_tensors[index], self.device if self.next_layer is None else torch.device("cpu"))

    @contextlib.contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """Provide one decoder layer with its weights.

        Args:
            following: the layer that is asked for next.
        """
        layer = self.layers[index]
        if self.next_layer is not None:
            self.next_layer.wait_for(index)
            if following is not None and 0 <= following < len(self.layers):
                self.next_layer.begin(following)
        elif self.folder is not None:
            self._load_layer(index)
        if lacking := [name for name, parameter in layer.named_parameters() if parameter.is_meta]:
            raise CheckpointError(f"{self.folder}: holds no tensor for '{lacking[0]}' of layer {index}")
        try:
            yield layer
        finally:
            if self.folder is not None:
                _drop_weights(layer, self.unloaded[index])

    @torch.no_grad()
    def start(self, rows: Sequence[Tensor], options: Sequence[dict[str, Any]] | None = None) -> list[StreamedBatch]:
        """Embed batches of token ids [B, T]; return them in front of the first layer.

        Args:
            options: other arguments of the model's forward for each batch: positions, a mask, a cache.
        """
        with self._embedding(rows) as embedded:
            given = options or [{}] * len(rows)
            return [self.recorded(hidden, **of_batch) for hidden, of_batch in zip(embedded, given, strict=True)]

    def kept_pass(self, name: str) -> LayerPass:
        """Return a pass that goes on from where one of that name was interrupted, with the same rows and weights."""
        return LayerPass(self.unfinished, name)

    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[StreamedBatch],
        kept: LayerPass | None = None,
        *,
        record: bool = False,
        state: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        """Send every batch through all layers, or through those that an interrupted pass has left.

        Args:
            record: record the layers' inputs for `backward`.
            state: returns what else to save between two layers.
        """
        kept = kept or LayerPass()
        first = _go_on(batches, kept, record)

        def present() -> dict[str, Tensor]:
            return {f"hidden.{row}": batch.hidden for row, batch in enumerate(batches)} | state()

        with counting((len(self.layers) - first) * len(batches)) as advance:
            for index in range(first, len(self.layers)):
                with self.layer(index, index + 1) as layer:
                    for row, batch in enumerate(batches):
                        if record:
                            batch.inputs.append(kept.record(batch.hidden, index, row))
                        batch.hidden = run_layer(layer, batch.hidden, batch.calls[index])
                        advance()
                kept.save("forward", index + 1, present)

    @torch.enable_grad()
    def backward(
        self,
        batches: Sequence[StreamedBatch],
        slopes: Callable[[], Sequence[Tensor]],
        parameter: Callable[[int], Tensor | None],
        kept: LayerPass | None = None,
    ) -> dict[int, Tensor]:
        """Send gradients back through all layers, or through those that an interrupted pass has left.

        Args:
            batches: passed forward with `record`; their recorded inputs are used up.
            slopes: returns the gradients [B, T, D] of the last layer's output for every batch.
            parameter: returns a tensor of layer `index`, or None.
            kept: the pass that recorded the inputs.

        Returns:
            For every layer with such a tensor its gradient, summed over batches.
        """
        kept = kept or LayerPass()
        done, saved = kept.load("backward")
        gradients = [saved[f"gradient.{row}"].to(self.device) for row in range(len(batches))] if saved else [*slopes()]
        sums = {int(name.removeprefix("sum.")): tensor for name, tensor in saved.items() if name.startswith("sum.")}

        def present() -> dict[str, Tensor]:
            waiting = {f"gradient.{row}": gradient for row, gradient in enumerate(gradients)}
            return waiting | {f"sum.{index}": of_layer for index, of_layer in sums.items()}

        kept.save("backward", done, present, now=True)
        with counting((len(self.layers) - done) * len(batches)) as advance:
            for index in reversed(range(len(self.layers) - done)):
                with self.layer(index, index - 1) as layer:
                    for row, batch in enumerate(batches):
                        hidden = kept.read_back(batch.inputs.pop()).to(gradients[row].device).requires_grad_()
                        output = run_layer(layer, hidden, batch.calls[index])
                        wanted = [tensor for tensor in (parameter(index), hidden) if tensor is not None]
                        given = gradients[row].to(output.device)
                        *of_layer, gradients[row] = torch.autograd.grad(output, wanted, given)
                        if of_layer:
                            sums[index] = of_layer[0].cpu() + sums.get(index, 0)
                        advance()
                kept.save("backward", len(self.layers) - index, present)
        return sums

    def normalised(self, hidden: Tensor) -> Tensor:
        """Return the last layer's output [B, T, D] behind the final norm."""
        return self._bypassed(hidden, {}, lambda *_, **__: hidden).last_hidden_state

    def last_hidden(self, rows: Sequence[Tensor], kept: LayerPass | None = None) -> list[Tensor]:
        """Return the hidden states [T, D] behind the final norm of every row of token ids [T]."""
        batches = self.start([row[None] for row in rows])
        self.forward(batches, kept)
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

    def recorded(self, embedded: Tensor, **options: Any) -> StreamedBatch:
        """Run the family's forward on embeddings with the layers bypassed, and record how it calls them."""
        first: list[Tensor] = []
        calls: list[LayerCall] = []

        def bypass(hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            first.append(hidden)
            calls.append(LayerCall(arguments, keywords))
            return hidden

        self._bypassed(embedded, options, bypass)
        return StreamedBatch(first[0], calls)

    def _bypassed(self, embedded: Tensor, options: dict[str, Any], bypass: Callable[..., Tensor]) -> Any:
        """Run the family's forward with `bypass` in place of every layer's forward."""

        def stand_in(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            return bypass(hidden_states, *arguments, **keywords)

        # a layer's own attribute: Accelerate's hooks
        own = [vars(layer).get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = stand_in
        try:
            return self.model.base_model(inputs_embeds=embedded, **{"use_cache": False, **options})
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _name_on_disk(self, module: nn.Module) -> str:
        """Return the name that a checkpoint gives the weight of an embedding."""
        name = next(name for name, parameter in self.model.named_parameters() if parameter is module.weight)
        return next(iter(revert_weight_conversion(self.model, {name: module.weight})))

    def _tied_names(self) -> list[str]:
        """Return the names that a checkpoint gives to weights that are tied to the embedding."""
        weights = self.model.state_dict()
        tied = {name: weights[name] for name in self.model.all_tied_weights_keys if name in weights}
        return list(revert_weight_conversion(self.model, tied))

    @contextlib.contextmanager
    def _opened(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Provide slices of tensors by name, not yet read."""
        with contextlib.ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(file, framework="pt"))
                for file in {self.file_of[name] for name in names}
            }
            yield {name: files[self.file_of[name]].get_slice(name) for name in names}

    def _load(self, names: Sequence[str], device: torch.device) -> None:
        """Read tensors into the model as transformers does, its conversions included."""
        with self._opened(names) as tensors:
            options = LoadStateDictConfig(
                device_map={"": device},
                dtype=self.model.dtype,
                dtype_plan=self.model._get_dtype_plan(self.model.dtype),
                weight_mapping=self.conversions,
            )
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, options)
        self.unplaced |= set(map(str, info.unexpected_keys))
        if odd := sorted(map(str, info.mismatched_keys)) or sorted(info.conversion_errors):
            raise CheckpointError(f"{self.folder}: tensor '{odd[0]}' does not fit the model")


def _go_on(batches: Sequence[StreamedBatch], kept: LayerPass, record: bool) -> int:
    """Take the batches to where an interrupted pass has left them; return the number of layers that are done."""
    done, saved = kept.load("forward")
    recorded = done if record else 0
    if record and (way_back := kept.load("backward"))[1]:  # it asks for no hidden states
        done, saved = len(batches[0].calls), {f"hidden.{row}": batch.hidden for row, batch in enumerate(batches)}
        recorded = done - way_back[0]
    files: list[list[Tensor | Path]] = [
        [file for index in range(recorded) if (file := kept.input_file(index, row)).is_file()]
        for row in range(len(batches) if recorded else 0)
    ]
    shapes = {f"hidden.{row}": batch.hidden.shape for row, batch in enumerate(batches)}
    if any(name not in saved or saved[name].shape != shape for name, shape in shapes.items()):
        return 0
    if any(len(of_row) < recorded for of_row in files):
        return 0
    for row, batch in enumerate(batches):
        batch.hidden = saved[f"hidden.{row}"].to(batch.hidden)
        batch.inputs = files[row] if recorded else []
    return done


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
