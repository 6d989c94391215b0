"""Open the model that the user names as a local folder of safetensors: a folder, hub id, GGUF file or PEFT adapter."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.checkpoint.assets import copy_assets
from linearize.checkpoint.auto import auto_config
from linearize.checkpoint.base import base_config
from linearize.checkpoint.gguf_file import dequantise
from linearize.checkpoint.hub import download, is_hub_id
from linearize.checkpoint.json_file import read_json
from linearize.checkpoint.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Source
from linearize.checkpoint.text_model import write_text_model
from linearize.checkpoint.weights import read_header
from linearize.checkpoint.work_folder import temporary_folder
from linearize.errors import CheckpointError, ConfigError, UnsupportedModelError, one_line

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

# types of PEFT adapter that put tokens or keys before the text, which no weight can hold
UNMERGEABLE = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")


@contextlib.contextmanager
def open_source(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "bfloat16",
    merge_adapter: bool = False,
    text_model: bool = False,
    ignore_unexpected: bool = False,
    option: str = "MODEL",
    near: Path | None = None,
) -> Iterator[Source]:
    """Open a model as a local folder. Temporary folders live as long as the context.

    Args:
        model: hub id, folder, .gguf file, or folder of a PEFT adapter.
        revision: branch, tag or commit of a hub model.
        dtype: dtype that the weights of a GGUF file are dequantised to.
        merge_adapter: merge a PEFT adapter into its base model, in a temporary folder.
        text_model: take the text model out of a checkpoint for images or sound, into a temporary folder.
        ignore_unexpected: as in `Source`.
        option: the argument or option that names the model, for errors.
        near: a folder on whose disk temporary folders are to be, so that their files can be linked from there.

    Raises:
        ConfigError: no such file, folder or hub model.
        CheckpointError: the hub does not answer, or the files are damaged.
        UnsupportedModelError: a GGUF architecture or a type of adapter that cannot be converted.
    """
    opened = _opened(
        model,
        revision=revision,
        dtype=dtype,
        merge_adapter=merge_adapter,
        text_model=text_model,
        option=option,
        near=near,
    )
    with opened as source:
        yield replace(source, ignore_unexpected=ignore_unexpected)


@contextlib.contextmanager
def _opened(
    model: str,
    *,
    revision: str | None,
    dtype: str,
    merge_adapter: bool,
    text_model: bool,
    option: str,
    near: Path | None,
) -> Iterator[Source]:
    """Open a model; arguments as in `open_source`."""
    path = Path(model).expanduser()
    if text_model:
        with (
            open_source(
                model, revision=revision, dtype=dtype, merge_adapter=merge_adapter, option=option, near=near
            ) as whole,
            temporary_folder("text", near) as folder,
        ):
            write_text_model(whole.folder, whole.read_config(), folder)
            yield Source(whole.reference, "text_model", folder, whole.name, whole.revision)
    elif (path / ADAPTER_CONFIG).is_file():
        with _merged_adapter(path.resolve(), merge_adapter, revision=revision, dtype=dtype, near=near) as source:
            yield source
    elif path.is_dir() or (path.name == "config.json" and path.is_file()):
        path = path if path.is_dir() else path.parent
        if revision is not None:
            raise ConfigError(f"--revision: got '{revision}', but {model} is a folder; allowed is a hub id")
        folder = path.resolve()
        yield Source(str(folder), "folder", folder, _folder_name(folder))
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{option}: no file '{model}'")
        with temporary_folder("gguf", near) as folder:
            dequantise(path.resolve(), folder, dtype)
            yield Source(str(path.resolve()), "gguf", folder, path.stem)
    elif path.exists():
        raise ConfigError(f"{option}: got the file '{model}', allowed are a hub id, a folder or a .gguf file")
    elif not is_hub_id(model):
        raise ConfigError(f"{option}: no file or folder '{model}', and it is not a hub id (owner/name) either")
    else:
        folder = download(model, revision, option)
        # a folder of the hub's cache is named after the commit, 40 hex digits
        yield Source(model, "hub", folder, model, folder.name if len(folder.name) == 40 else revision)


@contextlib.contextmanager
def _merged_adapter(
    adapter: Path, merge: bool, *, revision: str | None, dtype: str, near: Path | None
) -> Iterator[Source]:
    """Merge a PEFT adapter into its base model, in a temporary folder, if the user allows to `merge`."""
    base_name = _adapter_base(adapter, merge)
    opened = open_source(base_name, revision=revision, dtype=dtype, near=near)
    with opened as base, temporary_folder("merged", near) as folder:
        _merge(base, adapter, folder)
        yield Source(str(adapter), "adapter", folder, adapter.name, merged_into=base.fingerprint())


def _folder_name(folder: Path) -> str:
    """Return a folder's name, or the model's for a folder of the hub's cache.

    The cache names the folder after its commit, and the model two levels up.
    """
    match = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    return f"{match[1]}/{match[2]}" if match else folder.name


def _adapter_base(adapter: Path, merge: bool) -> str:
    """Return the name of the base model of a PEFT adapter.

    Args:
        merge: the user allows to merge the adapter.

    Raises:
        CheckpointError: the adapter's files are damaged or missing.
        ConfigError: the adapter names no base model.
        UnsupportedModelError: the adapter may not or cannot be merged.
    """
    try:
        config = read_json(adapter / ADAPTER_CONFIG)
        base, kind = config["base_model_name_or_path"], config.get("peft_type")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG}: damaged ({one_line(error)})") from None
    if not isinstance(base, str):
        raise ConfigError(
            f"{adapter / ADAPTER_CONFIG}: names no base model (base_model_name_or_path: {base}); write it in"
        )
    if config.get("megatron_config"):  # with it PEFT imports a module that the config names
        raise UnsupportedModelError(f"{adapter}: names code of its own (megatron_config), which is never loaded")
    if not isinstance(kind, str):
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG}: peft_type: got {str(kind)[:40]}, allowed is a name")
    if kind in UNMERGEABLE:
        raise UnsupportedModelError(f"{adapter}: is a PEFT adapter of type {kind}, which no weights can be merged with")
    if not merge:
        raise UnsupportedModelError(
            f"{adapter}: is a PEFT adapter of '{base}', not a model; --merge-adapter merges the two and converts the "
            "result"
        )
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{adapter}: no {ADAPTER_WEIGHTS}; pickled adapters are never loaded because loading one runs code"
        )
    return base


def _merge(base: Source, adapter: Path, folder: Path) -> None:
    """Write `base` with the adapter merged in, into `folder`.

    Raises:
        UnsupportedModelError: the base cannot be converted, or the adapter changes one of two tied embeddings.
        CheckpointError: the adapter's tensors are not exactly those that PEFT expects on this base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base_config(base)
    # a file may store a layer below an adapter, which is the base's own
    stored = {
        name.replace(".base_layer.", "."): info.shape for name, info in read_header(adapter / ADAPTER_WEIGHTS).items()
    }
    config = auto_config(base.folder)
    model = AutoModelForCausalLM.from_pretrained(base.folder, config=config, dtype="auto", trust_remote_code=False)
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    of_base = {f"base_model.model.{name}" for name in model.state_dict()}
    try:
        _resize_to(model, adapter, stored)
        adapted = PeftModel.from_pretrained(model, adapter)
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except Exception as error:  # of any type: the values come from the adapter's config
        raise CheckpointError(f"{adapter}: cannot be merged: {one_line(error)}") from None
    if model.config.tie_word_embeddings and _changes_one_of(adapted, embeddings):
        raise UnsupportedModelError(
            f"{adapter}: changes the input or the output embeddings alone, which its base ties together; untie them "
            "first"
        )
    lacking, misplaced = expected - stored.keys(), stored.keys() - expected - of_base
    for problem, names in (("lacks", lacking), ("has, but the base has no place for", misplaced)):
        if names:
            raise CheckpointError(
                f"{adapter}: {problem} {len(names)} tensors, first '{min(names)}'; is it of another base?"
            )
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{adapter}: cannot be merged: {one_line(error)}") from None
    merged.save_pretrained(folder, max_shard_size="4GB")
    for origin in (base.folder, adapter):  # the adapter's own tokenizer or template is the newer one
        copy_assets(origin, folder)


def _resize_to(model: "PreTrainedModel", adapter: Path, stored: dict[str, tuple[int, ...]]) -> None:
    """Give a base as many tokens as an adapter that was trained after a resize, as PEFT's users do before they load it.

    Args:
        stored: the adapter's tensors and their shapes.
    """
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = [name for name, module in model.named_modules() if module in embeddings]
    endings = tuple(f"{name}.{kind}weight" for name in names for kind in ("", "modules_to_save."))
    sizes = {shape[0] for tensor, shape in stored.items() if len(shape) == 2 and tensor.endswith(endings)}
    present = model.get_input_embeddings().weight.shape[0]
    if len(sizes) > 1:
        raise ValueError(f"its embeddings have {' and '.join(map(str, sorted(sizes)))} tokens")
    if sizes and (size := sizes.pop()) != present:
        if size > 2 * present:
            raise ValueError(f"it has {size:,} tokens, its base {present:,}")
        model.resize_token_embeddings(size, mean_resizing=False)


def _changes_one_of(adapted: "PeftModel", embeddings: "set[torch.nn.Module]") -> bool:
    """Return True if a layer of the adapter stands over one of the embeddings.

    Trainable tokens do not count: PEFT applies them to tied embeddings on both sides.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(
        isinstance(module, BaseTunerLayer)
        and not isinstance(module, TrainableTokensLayer)
        and module.get_base_layer() in embeddings
        for module in adapted.modules()
    )
