"""The text model inside a checkpoint for images or sound, written out as a checkpoint of its own.

Its bytes are copied under the names that the text model's own class gives them; no weight is read into memory.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

from linearize.checkpoint.assets import copy_assets
from linearize.checkpoint.weights import INDEX, SINGLE, TensorInfo, Weights, has_weights, read_weights
from linearize.checkpoint.writing import write_json
from linearize.errors import UnsupportedModelError
from linearize.families.registry import find_family

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PREPROCESSOR = "preprocessor_config.json"
ALIGNMENT = 8


def write_text_model(origin: Path, raw: dict[str, Any], folder: Path) -> None:
    """Writes the text model of the checkpoint `origin`, whose config.json is `raw`, into `folder`.

    Raises:
        UnsupportedModelError: there is none, or none that can be told from the rest.
    """
    if not isinstance(inner := raw.get("text_config"), dict) or "model_type" not in inner:
        raise UnsupportedModelError(f"--text-model: {origin.name}: a {raw.get('model_type')} model holds no text model")
    family = find_family(inner["model_type"])
    config = {**inner, "architectures": [family.causal_lm_class]}
    for key in ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings"):
        if key in raw:
            config.setdefault(key, raw[key])
    if has_weights(origin):
        weights = read_weights(origin)
        names = _own_names(weights, f"{family.decoder_attribute}.", origin)
        if HEAD not in names.values():
            config["tie_word_embeddings"] = True
        _write_renamed(weights, names, folder)
    write_json(folder / "config.json", config)
    copy_assets(origin, folder, without=(PREPROCESSOR,))


def _own_names(weights: Weights, decoder: str, origin: Path) -> dict[str, str]:
    """Of every tensor of the text model, the name in the wrapper's checkpoint and in one of its own."""
    prefixes = [name.removesuffix(EMBEDDING) for name in weights.tensors if name.endswith(EMBEDDING)]
    prefixes = [p for p in prefixes if any(name.startswith(f"{p}layers.0.") for name in weights.tensors)]
    if len(prefixes) != 1:
        found = ", ".join(prefixes) or "none"
        raise UnsupportedModelError(
            f"--text-model: {origin.name}: where its text model lies is not clear, found {found}"
        )
    (prefix,) = prefixes
    # some wrappers keep their vision tower beside the layers, under the very prefix
    own = (EMBEDDING, "layers.", "norm.", "rotary_emb.")
    names = {name: decoder + name.removeprefix(prefix) for name in weights.tensors if name.startswith(prefix)}
    names = {name: new for name, new in names.items() if new.removeprefix(decoder).startswith(own)}
    return names | {name: HEAD for name in weights.tensors if name.split(".")[-2:] == HEAD.split(".")}


def _write_renamed(weights: Weights, names: dict[str, str], folder: Path) -> None:
    """Writes the named tensors of every file into a file of the same name."""
    weight_map = {}
    for file in weights.files:
        kept = {name: weights.tensors[name] for name in names if weights.tensors[name].file == file}
        if kept:
            _copy_tensors(weights.folder / file, folder / file, kept, names)
            weight_map |= {names[name]: file for name in kept}
    if weights.files != (SINGLE,):
        total = sum(weights.tensors[name].nbytes for name in names)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_tensors(source: Path, target: Path, kept: dict[str, TensorInfo], names: dict[str, str]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, info in kept.items():
        offsets = [end, end := end + info.nbytes]
        header[names[name]] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(source, "rb") as read, open(target, "wb") as write:
        write.write(struct.pack("<Q", len(text)) + text)
        write.flush()
        for info in kept.values():
            offset, left = info.offset, info.nbytes
            while left:
                sent = os.sendfile(write.fileno(), read.fileno(), offset, left)
                if sent == 0:
                    raise OSError(f"{source}: ended early")
                offset, left = offset + sent, left - sent
