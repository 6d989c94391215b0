"""Load written checkpoints: the student, its base, and the base's weights under the student's plan."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from linearize.checkpoint.auto import auto_config
from linearize.checkpoint.names import ADDED, MANIFEST
from linearize.checkpoint.source import Source
from linearize.checkpoint.student import (
    ADAPTER,
    TOKENIZER_FILES,
    UNTRAINED_FILE,
    Student,
    read_tokenizer,
)
from linearize.checkpoint.weights import read_weights
from linearize.device import placement_of
from linearize.errors import (
    CheckpointError,
    ConfigError,
    CoverageError,
    LinearizeError,
    is_full,
    is_out_of_memory,
    one_line,
)
from linearize.families.registry import find_family
from linearize.modeling.factory import LinearizedClasses, linearized_classes
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.registration import register_checkpoint
from linearize.plan import Plan


def load_student(folder: Path, *, dtype: torch.dtype, quantization: str | None = None) -> PreTrainedModel:
    """Load a converted or finetuned checkpoint. An adapter-only folder is merged in memory.

    Args:
        quantization: "int8" or "nf4" for the projections, by bitsandbytes.

    Raises:
        CheckpointError: it cannot be loaded.
        CoverageError: a tensor is missing, unexpected or of another shape.
    """
    student = Student.read(folder)
    if not student.is_adapter_only:
        options = {} if quantization is None else {"quantization_config": _quantized(quantization, dtype)}
        return _load_exactly(folder, dtype=dtype, **options)
    from peft import PeftModel

    parent = load_student(student.weights_folder, dtype=dtype)
    return merge_adapters(PeftModel.from_pretrained(parent, folder / ADAPTER))


def _quantized(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' settings for a quantization."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization: {kind} needs bitsandbytes (pip install bitsandbytes)")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def merge_adapters(adapted: Any) -> PreTrainedModel:
    """Merge the adapters of a PeftModel into the model under them, in place, and return that model.

    PEFT's own merging of some variants (VeRA) takes every module that was trained whole for a projection.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    model = adapted.get_base_model()
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            try:
                module.merge(safe_merge=True)
            except ValueError as error:  # values that are not finite
                raise LinearizeError(f"the trained weights cannot be merged: {one_line(error)}") from None
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    return model


def load_tokenizer(folder: Path) -> Any:
    """Load the checkpoint's tokenizer; an adapter-only folder has its parent's.

    Raises:
        ConfigError: there is none.
        CheckpointError: it is damaged.
    """
    folder = Student.read(folder).weights_folder
    register_checkpoint(folder)
    if (tokenizer := read_tokenizer(folder)) is None:
        raise ConfigError(f"MODEL: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); put the base's into it")
    return tokenizer


def positions_of(folder: Path) -> int:
    """Return the number of positions of a checkpoint's model."""
    register_checkpoint(folder := Student.read(folder).weights_folder)
    return auto_config(folder).max_position_embeddings


@contextlib.contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """Name the folder in every error of loading a model: the values of its files decide what transformers raises."""
    try:
        yield
    except LinearizeError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_full(error):
            raise
        raise CheckpointError(f"{folder}: cannot be loaded: {type(error).__name__}: {one_line(error)}") from None


def load_base(source: Source, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base model as transformers does."""
    return _base_model(source.folder, dtype=dtype)


def _base_model(folder: Path, **options: Any) -> PreTrainedModel:
    with loading_errors(folder):
        config = auto_config(folder)
        return AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=False, **options).eval()


def load_unconverted(
    source: Source,
    plan: Plan,
    *,
    dtype: torch.dtype,
    added: dict[str, torch.Tensor] | None = None,
    device_map: dict[str, str] | str | None = None,
) -> PreTrainedModel:
    """Load the base's weights under `plan`, added parameters at their start: the conversion before any training.

    In softmax mode the model is the base itself, so one instance serves as base and as both baselines.

    Args:
        added: the added parameters as calibration left them. Without, they have their first values.
        device_map: devices of its modules, as Accelerate takes them.

    Raises:
        ConfigError: the base is of another architecture than the plan.
        CoverageError: the added parameters are of another plan.
    """
    classes, config = _unconverted_config(source, plan)
    logging.set_verbosity_error()  # its warning of newly initialized parameters would mislead: they are added
    placed = {} if device_map is None else {"device_map": device_map}
    model = _load_exactly(
        source.folder,
        dtype=dtype,
        model_class=classes.causal_lm,
        config=config,
        may_miss=ADDED,
        may_exceed=True,
        **placed,
    )
    if added is not None:
        _load_added(model, added)
    return model


def _load_added(model: PreTrainedModel, added: dict[str, torch.Tensor]) -> None:
    """Give a model its added parameters; refuse those of another plan."""
    unexpected = model.load_state_dict(added, strict=False).unexpected_keys
    missing = [name for name in model.state_dict() if ADDED in name and name not in added]
    if unexpected or missing:
        raise CoverageError(f"added parameters of another plan, first '{[*unexpected, *missing][0]}'")


def _unconverted_config(source: Source, plan: Plan) -> tuple[LinearizedClasses, PretrainedConfig]:
    """Return the linearized classes of the base's family, and its config under the plan."""
    classes = linearized_classes(find_family(plan.base_model_type))
    base = auto_config(source.folder).to_dict()
    if base.pop("model_type") != plan.base_model_type:
        raise ConfigError(f"--base: '{source.name}' is not a {plan.base_model_type} model, as the student's base was")
    base.pop("architectures", None)
    if base["num_hidden_layers"] != len(plan.layers):
        raise ConfigError(
            f"--base: '{source.name}' has {base['num_hidden_layers']} layers, the student's plan {len(plan.layers)}"
        )
    config = classes.config.from_dict({**base, "linearize": plan.to_dict()})
    return classes, config


def base_without_weights(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that a folder's config.json describes; its parameters have shapes and no values."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(auto_config(folder), dtype=dtype, trust_remote_code=False).eval()


def open_base(source: Source, *, dtype: torch.dtype, device: str, unfinished: Path | None = None) -> LayerStream:
    """Open a base model to run layer by layer: in memory if it is small, from its files otherwise.

    On CUDA devices a small model is one that fits into all of them together; Accelerate spreads it over them.

    Args:
        unfinished: where passes over a model in files wait that are interrupted; None keeps nothing.
    """
    placement = placement_of(read_weights(source.folder).nbytes, device)
    if placement is None:
        model = base_without_weights(source.folder, dtype)
        return LayerStream(model, source.folder, device=device, unfinished=unfinished)
    model = _base_model(source.folder, dtype=dtype, device_map=placement)
    return LayerStream(model.requires_grad_(False), device=device)


def open_unconverted(
    source: Source,
    plan: Plan,
    *,
    dtype: torch.dtype,
    device: str,
    added: dict[str, torch.Tensor] | None = None,
    unfinished: Path | None = None,
) -> LayerStream:
    """Open the base's weights under `plan` to run layer by layer; the added parameters are in memory.

    Args:
        added: the added parameters as calibration left them. Without, they have their first values.
        unfinished: as for `open_base`.

    Raises:
        ConfigError: the base is of another architecture than the plan.
        CoverageError: the added parameters are of another plan.
    """
    placement = placement_of(read_weights(source.folder).nbytes, device)
    if placement is not None:
        model = load_unconverted(source, plan, dtype=dtype, added=added, device_map=placement)
        return LayerStream(model, device=device)
    classes, config = _unconverted_config(source, plan)
    with init_empty_weights(include_buffers=False):
        model = classes.causal_lm._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for _, attention in model.linear_attentions():
            if attention.mixer is not None:
                attention.mixer.to_empty(device=device)
                model.base_model._init_weights(attention.mixer)
    if added is not None:
        _load_added(model, added)
    return LayerStream(model, source.folder, device=device, unfinished=unfinished)


def untrained_parameters(student: Student) -> dict[str, torch.Tensor] | None:
    """Read the added parameters as they were before any training; None if no calibration had set them."""
    if student.manifest.calibration is None:
        return None
    if (student.folder / UNTRAINED_FILE).is_file():
        return load_file(student.folder / UNTRAINED_FILE)
    if student.is_adapter_only:
        return untrained_parameters(student.parent())
    return added_of(student.folder)


def added_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read the added parameters of a checkpoint folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in read_weights(folder).files:
        with safe_open(folder / file, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys() if ADDED in name}
    return tensors


def _ignored_tensors(folder: Path) -> tuple[str, ...]:
    """Return the tensors that a checkpoint's conversion kept unused."""
    return Student.read(folder).manifest.ignored_tensors if (folder / MANIFEST).is_file() else ()


def _load_exactly(
    folder: Path,
    *,
    dtype: torch.dtype,
    model_class: Any = AutoModelForCausalLM,
    may_miss: str | None = None,
    may_exceed: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """Load a model and check that every tensor of its class and of the folder met its match.

    Args:
        may_miss: part of the names of tensors that may be missing.
        may_exceed: tensors without a place in the model are no error: the conversion has looked at them.
    """
    register_checkpoint(folder)
    with loading_errors(folder):
        kwargs.setdefault("config", auto_config(folder))
        options = {"output_loading_info": True, "trust_remote_code": False, **kwargs}
        model, info = model_class.from_pretrained(folder, dtype=dtype, **options)
    missing = [name for name in info["missing_keys"] if may_miss is None or may_miss not in name]
    ignored = _ignored_tensors(folder)
    unexpected = [
        name for name in info["unexpected_keys"] if not (may_exceed or "rotary_emb" in name or name in ignored)
    ]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("mismatched", info["mismatched_keys"])):
        if names:
            raise CoverageError(f"{folder}: {len(names)} {kind} tensors, first '{sorted(map(str, names))[0]}'")
    return model.eval()
