"""Read the headers of safetensors checkpoints: names, dtypes and shapes of the tensors.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data,
without gaps (https://github.com/huggingface/safetensors). No weight is read, except for a sample in `sampled_values`.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.checkpoint.json_file import LARGEST, read_json
from linearize.checkpoint.names import UNTRAINED
from linearize.errors import CheckpointError, one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# the limit of the safetensors library itself, in bytes
HEADER_LIMIT = 100_000_000
# bytes that `sampled_values` reads at each of three places of a tensor: one page
SAMPLE = 4096
# bits of one number by the dtype codes of safetensors
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
# floating-point dtype codes, with the names of torch and config.json
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOATING = set(DTYPE_NAMES)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: its file, its first byte there, dtype code, shape and size in bytes."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint folder by name, and its weight files in order; no files for a planned checkpoint."""

    folder: Path
    tensors: dict[str, TensorInfo]
    files: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Return the size in bytes of the files, or of the tensors if there are no files."""
        if not self.files:
            return sum(info.nbytes for info in self.tensors.values())
        return sum((self.folder / name).stat().st_size for name in self.files)


def has_weights(folder: Path) -> bool:
    """Return True if `folder` holds weights of any format, pickles included, or an index of weights."""
    return (folder / INDEX).is_file() or any(path.suffix in (".safetensors", *PICKLES) for path in folder.glob("*"))


def read_weights(folder: Path) -> Weights:
    """Read and check the index and the headers of a checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated, damaged, lies outside the folder, or holds other tensors than
            the index says; or there are only pickles.
    """
    if (folder / SINGLE).is_file():
        return Weights(folder, read_header(folder / SINGLE), (SINGLE,))
    if not (folder / INDEX).is_file():
        raise CheckpointError(_why_no_weights(folder))
    weight_map = _read_index(folder / INDEX)
    files = tuple(sorted(set(weight_map.values())))
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        path = folder / name
        if Path(name).name != name or Path(name).suffix != ".safetensors" or "\0" in name:
            raise CheckpointError(
                f"{folder / INDEX}: names '{name}', allowed are .safetensors files inside the folder itself"
            )
        if name == UNTRAINED:
            raise CheckpointError(
                f"{folder / INDEX}: names '{name}', a name that linearize keeps for a file of its own"
            )
        if not path.is_file():
            raise CheckpointError(f"{folder / INDEX}: names '{name}', which is missing from {folder}")
        header = read_header(path)
        for tensor, info in header.items():
            if tensor in tensors:
                raise CheckpointError(f"{path}: tensor '{tensor}' is also in {tensors[tensor].file}")
            if weight_map.get(tensor) != name:
                raise CheckpointError(
                    f"{path}: holds tensor '{tensor}', which the index places in {weight_map.get(tensor, 'no file')}"
                )
            tensors[tensor] = info
    missing = [tensor for tensor in weight_map if tensor not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder / weight_map[missing[0]]}: does not hold tensor '{missing[0]}', which the index places there"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    return Weights(folder, tensors, files)


def sampled_values(path: Path) -> Iterator[bytes]:
    """Yield name, dtype and shape of every tensor of a safetensors file, and its first, middle and last SAMPLE bytes.

    They tell weights of one architecture apart without reading gigabytes.

    Raises:
        CheckpointError: a damaged header.
    """
    for pieces in sampled_tensors(path):
        yield from pieces


def sampled_tensors(path: Path) -> Iterator[list[bytes]]:
    """Yield the pieces of `sampled_values` tensor by tensor."""
    header = read_header(path)
    with open(path, "rb") as file:
        for name, info in header.items():
            pieces = [f"{name} {info.dtype} {info.shape}".encode()]
            furthest = max(info.nbytes - SAMPLE, 0)
            for start in sorted({0, furthest // 2, furthest}):
                file.seek(info.offset + start)
                pieces.append(file.read(min(SAMPLE, info.nbytes)))
            yield pieces


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of one safetensors file, checking every offset against shapes and the file's size.

    Raises:
        CheckpointError: not a safetensors file, or a damaged or truncated one.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, HEADER_LIMIT):
            raise CheckpointError(
                f"{path}: not a safetensors file, or damaged or truncated (its header would take {length:,} bytes of "
                f"a file of {size:,})"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        infos = {name: _tensor_info(path.name, 8 + length, entry) for name, entry in header.items()}
        spans = sorted((tuple(entry["data_offsets"]), name) for name, entry in header.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header ({one_line(error, 120)})") from None
    end = 0
    for (start, stop), name in spans:
        if start != end or stop - start != infos[name].nbytes:
            raise CheckpointError(f"{path}: damaged header (tensor '{name}' lies at bytes {start} to {stop})")
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: truncated or damaged, its header describes {8 + length + end:,} bytes, the file has {size:,}"
        )
    return infos


def _tensor_info(file: str, data_start: int, entry: dict[str, Any]) -> TensorInfo:
    """Read one entry of a header; `data_start` is the byte of the file at which the data begins."""
    if entry["dtype"] not in BITS:
        raise ValueError(f"unknown dtype '{entry['dtype']}'")
    shape = tuple(entry["shape"])
    if not all(type(n) is int and 0 <= n < LARGEST for n in shape):
        raise ValueError(f"impossible shape {str(list(shape))[:60]}")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"impossible data_offsets {str(offsets)[:60]}")
    nbytes = math.prod(shape) * BITS[entry["dtype"]] // 8
    return TensorInfo(file, data_start + entry["data_offsets"][0], entry["dtype"], shape, nbytes)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict of a JSON object's pairs, refusing a key that comes twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"duplicate key '{next(name for name in names if names.count(name) > 1)}'")
    return dict(pairs)


def _read_index(path: Path) -> dict[str, str]:
    """Read the file name of every tensor from an index."""
    index = read_json(path, _no_duplicates)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{path}: damaged index (weight_map is not a mapping of tensor names to file names)")
    if not isinstance(index.get("metadata"), dict):
        raise CheckpointError(f"{path}: damaged index (metadata is not an object, which transformers needs)")
    return weight_map


def _why_no_weights(folder: Path) -> str:
    """Say why a folder without index and single file has no usable weights."""
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder}: only pickled weights ({pickles[0]}), which are never loaded because loading one runs code; "
            "save the model as safetensors first (transformers: save_pretrained)"
        )
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return f"{folder}: found {shards[0]} but neither {SINGLE} nor {INDEX}"
    return f"{folder}: no weights, looked for {SINGLE} and {INDEX}"
