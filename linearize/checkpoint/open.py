"""Open whatever MODEL names as a local folder of safetensors: a folder, a hub id, a GGUF file or a PEFT adapter."""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from linearize.checkpoint.assets import copy_assets
from linearize.checkpoint.base import base_config
from linearize.checkpoint.hub import download
from linearize.checkpoint.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Source
from linearize.checkpoint.weights import read_header
from linearize.errors import CheckpointError, ConfigError, UnsupportedModelError, one_line

# adapters that put tokens or keys before a text's own
UNMERGEABLE = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")


@contextlib.contextmanager
def open_source(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "bfloat16",
    merge_adapter: bool = False,
    text_model: bool = False,
    option: str = "MODEL",
) -> Iterator[Source]:
    """Resolves MODEL. A GGUF file is dequantised to `dtype` into a temporary folder that lives as long as the context.

    Args:
        merge_adapter: a PEFT adapter folder is merged into its base model, likewise into a temporary folder.
        text_model: so is the text model of a checkpoint for images or sound, taken out of it.
        option: where the user named it.

    Raises:
        ConfigError: no such file, folder or hub model. CheckpointError: the hub does not answer.
        UnsupportedModelError: a GGUF architecture that cannot be converted.
    """
    path = Path(model).expanduser()
    if text_model:
        from linearize.checkpoint.text_model import write_text_model

        with (
            open_source(model, revision=revision, dtype=dtype, merge_adapter=merge_adapter, option=option) as whole,
            tempfile.TemporaryDirectory(prefix="linearize-text-") as folder,
        ):
            write_text_model(whole.folder, whole.read_config(), Path(folder))
            yield Source(whole.reference, "text_model", Path(folder), whole.name, whole.revision)
    elif (path / ADAPTER_CONFIG).is_file():
        adapter = path.resolve()
        base = _adapter_base(adapter, merge_adapter)
        with (
            open_source(base, revision=revision, dtype=dtype) as source,
            tempfile.TemporaryDirectory(prefix="linearize-merged-") as folder,
        ):
            _merge(source, adapter, Path(folder))
            yield Source(str(adapter), "adapter", Path(folder), adapter.name, merged_into=source.fingerprint())
    elif path.is_dir():
        if revision is not None:
            raise ConfigError(f"--revision: got '{revision}', but {model} is a folder; allowed is a hub id")
        folder = path.resolve()
        yield Source(str(folder), "folder", folder, _folder_name(folder))
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{option}: no file '{model}'")
        from linearize.checkpoint.gguf_file import dequantise

        with tempfile.TemporaryDirectory(prefix="linearize-gguf-") as folder:
            dequantise(path.resolve(), Path(folder), dtype)
            yield Source(str(path.resolve()), "gguf", Path(folder), path.stem)
    elif path.exists():
        raise ConfigError(f"{option}: got the file '{model}', allowed are a hub id, a folder or a .gguf file")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "/", "~")):
        raise ConfigError(f"{option}: no file or folder '{model}', and it is not a hub id (owner/name) either")
    else:
        folder = download(model, revision, option)
        yield Source(model, "hub", folder, model, folder.name if len(folder.name) == 40 else revision)


def _folder_name(folder: Path) -> str:
    """A hub cache folder is named after its commit; its model is two levels up."""
    match = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    return f"{match[1]}/{match[2]}" if match else folder.name


def _adapter_base(adapter: Path, merge: bool) -> str:
    """The base model that a PEFT adapter names, if the adapter may and can be merged into it."""
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
        base, kind = config["base_model_name_or_path"], config.get("peft_type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG}: damaged ({error})") from None
    if not isinstance(base, str):
        raise ConfigError(
            f"{adapter / ADAPTER_CONFIG}: names no base model (base_model_name_or_path: {base}); write it in"
        )
    if kind in UNMERGEABLE:
        raise UnsupportedModelError(f"{adapter}: is a PEFT adapter of type {kind}, which no weights can be merged with")
    if not merge:
        raise UnsupportedModelError(
            f"{adapter}: is a PEFT adapter of '{base}', not a model; --merge-adapter merges the two and converts the result"
        )
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{adapter}: no {ADAPTER_WEIGHTS}; pickled adapters are never loaded because loading one runs code"
        )
    return base


def _merge(base: Source, adapter: Path, folder: Path) -> None:
    """Writes `base` with the adapter merged in, every tensor of it accounted for."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    base_config(base)
    # what a file says of a layer below an adapter is the base's own
    given = {name.replace(".base_layer.", ".") for name in read_header(adapter / ADAPTER_WEIGHTS)}
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype="auto")
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    own = {f"base_model.model.{name}" for name in model.state_dict()}
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{adapter}: cannot be merged: {one_line(error)}") from None
    if model.config.tie_word_embeddings and any(
        isinstance(module, BaseTunerLayer)
        and not isinstance(module, TrainableTokensLayer)
        and module.get_base_layer() in embeddings
        for module in adapted.modules()
    ):
        raise UnsupportedModelError(
            f"{adapter}: changes the input or the output embeddings alone, which its base ties together; untie them first"
        )
    for kind, names in (("lacks", wanted - given), ("has, but the base has no place for", given - wanted - own)):
        if names:
            raise CheckpointError(
                f"{adapter}: {kind} {len(names)} tensors, first '{min(names)}'; is it of another base?"
            )
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{adapter}: cannot be merged: {one_line(error)}") from None
    merged.save_pretrained(folder, max_shard_size="4GB")
    for origin in (base.folder, adapter):  # an adapter's own tokenizer or template is the newer one
        copy_assets(origin, folder)
