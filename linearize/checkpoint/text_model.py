"""Write the text model inside a checkpoint for images or sound as a checkpoint of its own.

The bytes are copied under the names of the text model's own class. No weight is held in memory.
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
# how names of the text model's tensors go on after its prefix; a vision tower may lie under the same prefix
DECODER_PARTS = (EMBEDDING, "layers.", "norm.", "rotary_emb.")
# safetensors pads its header to a multiple of 8 bytes
ALIGNMENT = 8


def write_text_model(origin: Path, raw: dict[str, Any], folder: Path) -> None:
    """Write the text model of a checkpoint into `folder`.

    Args:
        origin: folder of the whole checkpoint.
        raw: its config.json.

    Raises:
        UnsupportedModelError: it has no text model, or its text model's tensors cannot be told from the others.
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
        names = _new_names(weights, f"{family.decoder_attribute}.", origin)
        if HEAD not in names.values():
            config["tie_word_embeddings"] = True
        _write_renamed(weights, names, folder)
    write_json(folder / "config.json", config)
    copy_assets(origin, folder, without=(PREPROCESSOR,))


def _new_names(weights: Weights, decoder: str, origin: Path) -> dict[str, str]:
    """Map the name of each of the text model's tensors in the whole checkpoint to its name in the new checkpoint.

    The text model's prefix in the whole checkpoint is the one under which there are both embeddings and layers.

    Args:
        weights: tensors of the whole checkpoint.
        decoder: prefix of the decoder in the new checkpoint, such as "model.".
        origin: folder of the whole checkpoint, for the error.

    Raises:
        UnsupportedModelError: no prefix fits, or several do.
    """
    candidates = [name.removesuffix(EMBEDDING) for name in weights.tensors if name.endswith(EMBEDDING)]
    prefixes = [p for p in candidates if any(name.startswith(f"{p}layers.0.") for name in weights.tensors)]
    if len(prefixes) != 1:
        raise UnsupportedModelError(
            f"--text-model: {origin.name}: its text model's prefix is not clear, found {', '.join(prefixes) or 'none'}"
        )
    (prefix,) = prefixes
    wanted = tuple(prefix + part for part in DECODER_PARTS)
    decoder_names = {name: decoder + name.removeprefix(prefix) for name in weights.tensors if name.startswith(wanted)}
    # the output embeddings lie outside the decoder, at any depth
    head_names = {name: HEAD for name in weights.tensors if name == HEAD or name.endswith(f".{HEAD}")}
    return decoder_names | head_names


def _write_renamed(weights: Weights, names: dict[str, str], folder: Path) -> None:
    """Write the tensors in `names` (old name -> new name), each into a file named as the one it comes from."""
    weight_map: dict[str, str] = {}
    for file in weights.files:
        tensors = {new: weights.tensors[old] for old, new in names.items() if weights.tensors[old].file == file}
        if tensors:
            _copy_tensors(weights.folder / file, folder / file, tensors)
            weight_map |= dict.fromkeys(tensors, file)
    if weights.files != (SINGLE,):
        total = sum(weights.tensors[name].nbytes for name in names)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_tensors(source: Path, target: Path, tensors: dict[str, TensorInfo]) -> None:
    """Copy some tensors of the safetensors file `source` into a new one, `target`.

    Args:
        tensors: their places in `source`, by the name that each gets in `target`.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0  # of the tensor before; safetensors counts offsets from the end of the header
    for name, info in tensors.items():
        start, end = end, end + info.nbytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(source, "rb") as source_file, open(target, "wb") as target_file:
        target_file.write(struct.pack("<Q", len(text)) + text)
        target_file.flush()  # sendfile writes past the buffer of `target_file`
        for info in tensors.values():
            offset, end = info.offset, info.offset + info.nbytes
            while offset < end:
                sent = os.sendfile(target_file.fileno(), source_file.fileno(), offset, end - offset)
                if sent == 0:
                    raise OSError(f"{source}: ended early")
                offset += sent
