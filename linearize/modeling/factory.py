"""Build the linearized model classes from a family's own, and register them with transformers.

For a family with model_type `llama` the classes are LinearizedLlamaConfig (model_type `linearized_llama`),
LinearizedLlamaAttention, LinearizedLlamaModel and LinearizedLlamaForCausalLM. They are the family's classes; the
attention layers are replaced in place, as the plan in `config.linearize` says.
"""

import contextlib
import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from linearize.families.family import FULL, SLIDING, Family
from linearize.families.registry import FAMILIES, find_family
from linearize.mixers.mixer import Site
from linearize.modeling.attention import CACHE_ARGUMENTS, IMPLEMENTATION, LinearizedAttention
from linearize.modeling.attention_call import Observation
from linearize.modeling.configuration import config_class
from linearize.modeling.linear_heads import LinearHeads
from linearize.plan import Plan

# writes the portable file and returns its auto_map. modeling/registration.py sets it; in a portable file it stays None
PORTABLE_WRITER: Callable[[Path, Plan], dict[str, str]] | None = None


@dataclass(frozen=True)
class LinearizedClasses:
    """The classes of one linearized family."""

    config: Any
    attention: type
    decoder: type
    causal_lm: type[PreTrainedModel]


if TYPE_CHECKING:
    from transformers import PreTrainedModel as ModelBase
else:  # a mixin stands before a family's class, which has the methods that `super()` calls
    ModelBase = object


class LinearizedDecoder(ModelBase):
    """A mixin before the family's decoder: pass the padding mask and the document numbers on to the layers.

    Attributes:
        layers_linear: false in softmax mode.
        masks_ignore_positions: true if the family makes its masks without the positions that tell documents apart.
    """

    _keep_in_fp32_modules_strict = {"mixer"}
    masks_ignore_positions = False
    layers_linear: bool

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call the family's forward; arguments are the family's."""
        if args:
            kwargs |= zip(list(inspect.signature(super().forward).parameters)[3:], args)
        if self.layers_linear:
            kwargs["padding_mask"] = padding_mask = _padding_mask(attention_mask)
            if padding_mask is not None and position_ids is None:
                # unlike softmax, some mixers behind rotary depend on the position at which a row starts
                tokens = (input_ids if input_ids is not None else kwargs["inputs_embeds"]).shape[1]
                position_ids = (padding_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
            kwargs["segments"] = _segments(attention_mask, position_ids, input_ids, kwargs)
        if self.masks_ignore_positions and _segments(attention_mask, position_ids, input_ids, kwargs) is not None:
            if input_ids is not None:
                input_ids, kwargs["inputs_embeds"] = None, self.get_input_embeddings()(input_ids)
            kwargs["attention_mask"] = _packed_masks(self.config, kwargs["inputs_embeds"], position_ids)
        else:
            kwargs["attention_mask"] = attention_mask
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Set the parameters of a module to their first values, where a checkpoint has none."""
        if isinstance(module, LinearHeads):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class LinearizedForCausalLM(ModelBase):
    """A mixin before the family's causal language model."""

    _is_stateful = True
    _keep_in_fp32_modules_strict = {"mixer"}

    def __init__(self, config: Any):
        super().__init__(config)
        linearize_layers(self, config.plan)

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Return False: engines that bring their own attention and cache would lose the recurrent state."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching."""
        raise NotImplementedError(
            "continuous batching pages keys and values and cannot hold a recurrent state; use generate() on a batch"
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching."""
        return self.generate_batch()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the portable file and `auto_map` beside the weights."""
        # transformers itself copies the portable file of a model that was loaded from one
        if PORTABLE_WRITER is not None and kwargs.get("is_main_process", True):
            self.config.auto_map = PORTABLE_WRITER(Path(save_directory), self.config.plan)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: Any) -> dict[str, float]:
        """Return the times of files that need no upload, since they were there before saving.

        The portable file is not one of them, though it is written first.
        """
        written = {f"{name.partition('.')[0]}.py" for name in (getattr(self.config, "auto_map", None) or {}).values()}
        stamps = super()._get_files_timestamps(working_dir)
        return {name: stamp for name, stamp in stamps.items() if name not in written}

    def linear_attentions(self) -> Iterator[tuple[str, LinearizedAttention]]:
        """Yield the linearized attention of every layer that has one, with its module name."""
        for name, module in self.named_modules():
            if isinstance(module, LinearizedAttention):
                yield name, module

    @contextlib.contextmanager
    def softmax_attention(self) -> Iterator[None]:
        """Inside, run every layer as the base model's own softmax attention on the same weights."""
        before = self.base_model.layers_linear
        self._set_linear(False)
        try:
            yield
        finally:
            self._set_linear(before)

    @contextlib.contextmanager
    def observed(self, observer: Callable[[Observation], Tensor | None]) -> Iterator[None]:
        """Inside, run the model as its base and call `observer` for every layer that has linear heads."""
        for _, module in self.linear_attentions():
            module.observer = observer
        try:
            yield
        finally:
            for _, module in self.linear_attentions():
                module.observer = None

    @contextlib.contextmanager
    def recurrent_branch_off(self) -> Iterator[None]:
        """Inside, run linear heads with window + sinks alone: the training-free baseline."""
        with self._switched(recurrent_enabled=False):
            yield

    @contextlib.contextmanager
    def window_off(self) -> Iterator[None]:
        """Inside, run linear heads with their recurrent branch alone."""
        with self._switched(window_enabled=False):
            yield

    @contextlib.contextmanager
    def _switched(self, **switches: bool) -> Iterator[None]:
        """Inside, set these attributes of all linear heads."""
        mixers = [module for module in self.modules() if isinstance(module, LinearHeads)]
        before = [(module, name, getattr(module, name)) for module in mixers for name in switches]
        for module in mixers:
            for name, value in switches.items():
                setattr(module, name, value)
        try:
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)

    def _set_linear(self, linear: bool) -> None:
        """Switch every layer between linear and softmax mode."""
        self.base_model.layers_linear = linear
        for _, module in self.linear_attentions():
            module.set_linear(linear)


def linearize_layers(model: PreTrainedModel, plan: Plan) -> None:
    """Replace the attention layers of a family's model in place, as `plan` says."""
    family = find_family(plan.base_model_type)
    classes = linearized_classes(family)
    config = model.config.to_dict()
    config |= family.heads(config)
    heads = config["num_key_value_heads"]
    routed = copy.copy(model.config)
    routed._attn_implementation_internal = IMPLEMENTATION
    decoder = model.base_model
    decoder.__class__ = classes.decoder
    decoder.layers_linear = True
    for i, (layer, layer_plan) in enumerate(zip(decoder.layers, plan.layers, strict=True)):
        if layer_plan.native:
            continue
        attention = getattr(layer, family.attention_attribute)
        attention.__class__ = classes.attention
        site = Site.of(config, layer_plan.linear_heads(heads), i, len(plan.layers))
        attention.setup(layer_plan, site, routed, family, rotates=family.rotates(config, i))
        if family.layers_drop_keywords:
            layer.register_forward_pre_hook(functools.partial(_pass_keywords, attention), with_kwargs=True)


@functools.cache
def linearized_classes(family: Family) -> LinearizedClasses:
    """Build and register the classes of one family (modeling/registration.py, step 5)."""
    module = importlib.import_module(family.import_path("modeling"))
    base_causal_lm = getattr(module, family.causal_lm_class)
    base_decoder = getattr(module, family.decoder_class)
    base_attention = getattr(module, family.attention_class)

    def derive(mixin: type, base: type, **attributes: Any) -> Any:
        """Make a class of this module, found by its name when an object is unpickled."""
        name = f"Linearized{base.__name__}"
        cls = type(name, (mixin, base), {"__module__": __name__, "__qualname__": name, **attributes})
        globals()[name] = cls
        return cls

    config = config_class(family)
    attention = derive(LinearizedAttention, base_attention)
    decoder = derive(
        LinearizedDecoder, base_decoder, config_class=config, masks_ignore_positions=family.masks_ignore_positions
    )
    causal_lm = derive(LinearizedForCausalLM, base_causal_lm, config_class=config)

    # the registry has class names as keys; its own __setitem__ would want an instance
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(decoder), base_decoder._can_record_outputs)
    # transformers looks up the renaming of a checkpoint's parameters by model type and by class name
    for old, new in (
        (family.model_type, config.model_type),
        (base_causal_lm.__name__, causal_lm.__name__),
        (base_decoder.__name__, decoder.__name__),
    ):
        if (mapping := get_checkpoint_conversion_mapping(old)) is not None:
            register_checkpoint_conversion_mapping(new, mapping, overwrite=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    return LinearizedClasses(config, attention, decoder, causal_lm)


def __getattr__(name: str) -> type:
    """Return a class of a listed family by name, for pickles."""
    for family in FAMILIES.values():
        if name in {
            f"Linearized{cls}" for cls in (family.causal_lm_class, family.decoder_class, family.attention_class)
        }:
            linearized_classes(family)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _pass_keywords(attention: LinearizedAttention, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give a layer's attention the keywords that the layer itself would drop."""
    attention.layer_keywords = {name: kwargs[name] for name in ("padding_mask", "segments") if name in kwargs}
    return args, kwargs


def _padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Return the 2-D mask as bool, or None if nothing is padded."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"linearized models take a 2-D attention mask [batch, tokens]; got {attention_mask.dim()} dimensions, "
            "which a static cache makes, too: the default of generate() is the one to use"
        )
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


def _segments(
    attention_mask: Tensor | None, position_ids: Tensor | None, input_ids: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the document numbers [B, T] of packed rows, None for one document a row.

    Packed rows are recognised as transformers does: by positions that restart, without a mask and without a cache.
    """
    cached = kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS)
    if attention_mask is not None or cached or position_ids is None:
        return None
    batch = (input_ids if input_ids is not None else kwargs["inputs_embeds"]).shape[0]
    return find_packed_sequence_indices(position_ids.expand(batch, -1))


def _packed_masks(config: Any, inputs_embeds: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """Make the masks of packed rows for a family that passes no positions to transformers' mask functions."""
    masks = {}
    for kind, make in ((FULL, create_causal_mask), (SLIDING, create_sliding_window_causal_mask)):
        names = inspect.signature(make).parameters  # versions name cache and embeddings differently
        arguments: dict[str, Any] = {name: inputs_embeds for name in ("inputs_embeds", "input_embeds") if name in names}
        arguments |= {name: None for name in CACHE_ARGUMENTS if name in names}
        if "cache_position" in names:
            arguments["cache_position"] = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        masks[kind] = make(config=config, attention_mask=None, position_ids=position_ids, **arguments)
    return masks
