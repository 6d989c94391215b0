"""Loading written checkpoints: the student, its base, and the base's weights under the student's plan."""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from linearize.checkpoint.names import ADDED, MANIFEST
from linearize.checkpoint.source import Source, local_fingerprint, open_source
from linearize.checkpoint.weights import read_weights
from linearize.errors import CheckpointError, ConfigError, CoverageError, one_line
from linearize.families.registry import find_family
from linearize.modeling.factory import linearized_classes
from linearize.modeling.plan import Plan
from linearize.modeling.register import register_checkpoint

ADAPTER = "adapter"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
# beside finetuned weights: the added parameters before any training
UNTRAINED_FILE = "untrained.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """linearize.json of a written checkpoint.

    Raises:
        ConfigError: no such folder, or not one that linearize wrote.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"MODEL: no folder '{folder}'; finetune and eval take a folder that `linearize convert` wrote"
        )
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigError(
            f"MODEL: {folder} is not a linearized checkpoint (no {MANIFEST}); run `linearize convert` first"
        )
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or "kind" not in manifest or "base" not in manifest:
            raise ValueError("not a manifest")
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    return manifest


def load_student(folder: Path, *, dtype: torch.dtype, quantization: str | None = None) -> PreTrainedModel:
    """A converted or finetuned checkpoint, every key accounted for. An adapter-only folder is merged in memory.

    Args:
        quantization: "int8" or "nf4" for the projections, by bitsandbytes.
    """
    manifest = read_manifest(folder)
    if (folder / "config.json").is_file():
        options = {} if quantization is None else {"quantization_config": _quantized(quantization, dtype)}
        return _load_exactly(folder, dtype=dtype, **options)
    from peft import PeftModel

    parent = load_student(_parent(folder, manifest), dtype=dtype)
    return merged(PeftModel.from_pretrained(parent, folder / ADAPTER))


def _quantized(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization: {kind} needs bitsandbytes (pip install bitsandbytes)")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def merged(adapted: Any) -> PreTrainedModel:
    """The model under the adapters of a PeftModel, in place, with their weights added to its own.

    PEFT's own merging of some variants (VeRA) takes every module that was trained whole for a projection.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    model = adapted.get_base_model()
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    return model


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer (an adapter-only folder's is its parent's).

    Raises:
        ConfigError: there is none. CheckpointError: it is damaged.
    """
    folder = weights_folder(folder)
    register_checkpoint(folder)
    if (tokenizer := tokenizer_of(folder)) is None:
        raise ConfigError(f"MODEL: {folder} has no tokenizer ({', '.join(TOKENIZERS)}); put the base's into it")
    return tokenizer


def tokenizer_of(folder: Path) -> Any:
    """A folder's tokenizer, None where it has none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare ones
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {one_line(error, 200)}") from None


def weights_folder(folder: Path) -> Path:
    """Where a checkpoint's weights lie: its own folder, of an adapter-only one its parent's."""
    if (folder / "config.json").is_file():
        return folder
    return _parent(folder, read_manifest(folder))


def _parent(folder: Path, manifest: dict[str, Any]) -> Path:
    """Where the checkpoint lies that an adapter-only folder was trained from.

    Raises:
        ConfigError: it is gone, or another than then.
    """
    trained = manifest["finetune"]
    parent = Path(trained["parent"])
    if not (parent / "config.json").is_file():
        raise ConfigError(
            f"MODEL: {folder} holds an adapter only, and the checkpoint that it belongs to, {parent}, is gone"
        )
    recorded = trained.get("parent_fingerprint")  # older manifests have none
    if recorded is not None and recorded != local_fingerprint(str(parent)):
        raise ConfigError(
            f"MODEL: {folder} holds an adapter only, and the checkpoint that it belongs to, {parent}, has changed since"
        )
    return parent


def positions_of(folder: Path) -> int:
    """How many positions a checkpoint's model has."""
    register_checkpoint(folder := weights_folder(folder))
    return AutoConfig.from_pretrained(folder).max_position_embeddings


@contextlib.contextmanager
def open_base(manifest: dict[str, Any], override: str | None = None, *, option: str = "--base") -> Iterator[Source]:
    """The base model that a manifest records, or the one named instead of it by `option`.

    Raises:
        ConfigError: it is gone, or has changed since the conversion.
    """
    recorded = manifest["base"]
    reference = override or recorded["reference"]
    # what is not a hub id is recorded with its full path
    if override is None and Path(reference).is_absolute() and not Path(reference).exists():
        raise ConfigError(f"{option}: the recorded base '{reference}' is gone; name it with {option}")
    with open_source(
        reference,
        revision=recorded["revision"] if override is None else None,
        dtype=manifest["settings"]["dtype"],
        merge_adapter=override is None and recorded["kind"] == "adapter",
        text_model=override is None and recorded["kind"] == "text_model",
        option=option,
    ) as source:
        if override is None and source.fingerprint() != recorded["fingerprint"]:
            raise ConfigError(
                f"{option}: '{reference}' has changed since the conversion (fingerprint {source.fingerprint()[:12]}, "
                f"recorded {recorded['fingerprint'][:12]}); convert again, or name the right base with {option}"
            )
        yield source


def load_base(source: Source, *, dtype: torch.dtype) -> PreTrainedModel:
    """The base model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype).eval()


def load_unconverted(
    source: Source, plan: Plan, *, dtype: torch.dtype, added: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """The base's weights under `plan`, added parameters at their start: the conversion before any training.

    In softmax mode it is the base model itself, so one instance serves as base and as both baselines.

    Args:
        added: the added parameters as calibration left them; at their plain first values without.
    """
    classes = linearized_classes(find_family(plan.base_model_type))
    base = AutoConfig.from_pretrained(source.folder).to_dict()
    if base.pop("model_type") != plan.base_model_type:
        raise ConfigError(f"--base: '{source.name}' is not a {plan.base_model_type} model, as the student's base was")
    base.pop("architectures", None)
    if base["num_hidden_layers"] != len(plan.layers):
        raise ConfigError(
            f"--base: '{source.name}' has {base['num_hidden_layers']} layers, the student's plan {len(plan.layers)}"
        )
    config = classes.config.from_dict({**base, "linearize": plan.to_dict()})
    logging.set_verbosity_error()  # of parameters that are "newly initialized" it warns; here that is the point
    model = _load_exactly(source.folder, dtype=dtype, model_class=classes.causal_lm, config=config, may_miss=ADDED)
    if added is not None:
        unexpected = model.load_state_dict(added, strict=False).unexpected_keys
        lacking = [name for name in model.state_dict() if ADDED in name and name not in added]
        if unexpected or lacking:
            raise CoverageError(f"added parameters of another plan, first '{[*unexpected, *lacking][0]}'")
    return model


def untrained_parameters(folder: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """The added parameters of a checkpoint before any training, where calibration set them."""
    if not manifest.get("calibration"):
        return None
    if (folder / UNTRAINED_FILE).is_file():
        return load_file(folder / UNTRAINED_FILE)
    if (parent := weights_folder(folder)) != folder:
        return untrained_parameters(parent, read_manifest(parent))
    return added_of(folder)


def added_of(folder: Path) -> dict[str, torch.Tensor]:
    """The added parameters that a checkpoint folder holds."""
    found = {}
    for file in read_weights(folder).files:
        with safe_open(folder / file, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys() if ADDED in name}
    return found


def _load_exactly(
    folder: Path, *, dtype: torch.dtype, model_class: Any = AutoModelForCausalLM, may_miss: str | None = None, **kwargs
) -> PreTrainedModel:
    register_checkpoint(folder)
    try:
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    missing = [name for name in info["missing_keys"] if may_miss is None or may_miss not in name]
    unexpected = [name for name in info["unexpected_keys"] if "rotary_emb" not in name]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("mismatched", info["mismatched_keys"])):
        if names:
            raise CoverageError(f"{folder}: {len(names)} {kind} tensors, first '{sorted(map(str, names))[0]}'")
    return model.eval()
