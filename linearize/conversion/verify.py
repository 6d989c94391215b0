"""Checks a written checkpoint in a process of its own: `python -m linearize.conversion.verify FOLDER BASE`.

(a) every tensor is finite, (b) with every head set to softmax the logits equal the base model's, (c) cached decode
equals the full forward, (d) so does a left-padded row, (e) and the family's readout of the hidden states. A window too
long for (c) to (e) to leave it in reasonable time is shortened for them; no parameter depends on it. Large models are
streamed from disk, a module at a time. Prints one JSON document; a "failure" in it says what differed.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from linearize.checkpoint.names import ADDED
from linearize.checkpoint.weights import DTYPE_NAMES, TensorInfo, read_weights
from linearize.device import has_amx, keep_freed_memory
from linearize.modeling.agreement import TOLERANCES, difference, logits_behind_padding, logits_in_pieces
from linearize.modeling.readout import readout_of
from linearize.modeling.registration import register_checkpoint
from linearize.plan import Plan

STREAM_ABOVE = 1 << 30
BLOCK_BYTES = 1 << 24
# tokens that (c) to (e) take at most, and the windows they leave, so that 4 GiB take about a minute
LONGEST, WINDOW, SOFTMAX_WINDOW = 600, 512, 560
TORCH_DTYPES = {code: getattr(torch, name) for code, name in DTYPE_NAMES.items()}


class VerificationFailure(Exception):
    """What differed."""


def verify(folder: Path, base: Path) -> dict[str, Any]:
    """Runs the checks. Raises VerificationFailure with the first that does not hold."""
    tensors = _check_finite(folder)
    register_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    plan = _shortened(config.plan)
    linear = [layer for layer in plan.layers if layer.linear_heads(config.key_value_heads)]
    window = max((max(layer.window, layer.softmax_window or 0) for layer in linear), default=0)
    # beyond the window, so that sinks and recurrent branch take part, and a decode that leaves it again
    length = min(max(window + 24, 48), LONGEST, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="linearize-verify-") as offload:
        softmax_difference = _softmax_difference(folder, base, ids, Path(offload))
        decode_difference, padded_difference = _student_differences(folder, plan, ids, Path(offload))
    return {
        "tokens": length,
        "tensors_finite": tensors,
        "softmax_everywhere_max_difference": softmax_difference,
        "cached_decode_max_difference": decode_difference,
        "padded_max_difference": padded_difference,
    }


def _shortened(plan: Plan) -> Plan:
    """The plan with windows that LONGEST tokens leave."""
    layers = (
        replace(
            layer,
            window=min(layer.window, WINDOW),
            softmax_window=layer.softmax_window and min(layer.softmax_window, SOFTMAX_WINDOW),
        )
        for layer in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def _check_finite(folder: Path) -> int:
    """Reads every tensor in blocks through plain file reads, which leave nothing mapped in memory."""
    weights = read_weights(folder)
    for name, info in weights.tensors.items():
        if info.dtype in TORCH_DTYPES and not _finite(folder / info.file, info):
            raise VerificationFailure(f"tensor '{name}' in {info.file} has values that are not finite")
    return len(weights.tensors)


def _finite(path: Path, info: TensorInfo) -> bool:
    with open(path, "rb") as file:
        file.seek(info.offset)
        left = info.nbytes
        while left:
            block = bytearray(file.read(min(left, BLOCK_BYTES)))
            if not torch.frombuffer(block, dtype=TORCH_DTYPES[info.dtype]).isfinite().all():
                return False
            left -= len(block)
    return True


def _load(folder: Path, offload: Path, *, dtype: torch.dtype | None = None, **kwargs) -> PreTrainedModel:
    """In `dtype`, or the checkpoint's own where a processor is fast in it; a large model always in its own."""
    dtype, placement = dtype or ("auto" if has_amx() else torch.float32), {}
    if _large(folder):
        dtype = "auto"
        config = kwargs.get("config") or AutoConfig.from_pretrained(folder)
        placement = {"device_map": _streamed(config), "offload_folder": str(offload)}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **placement, **kwargs
    )
    softmax_only = not any(attention.linear_heads for _, attention in _attentions(model))
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(name) for name in info[kind] if "rotary_emb" not in str(name)]
        if softmax_only:  # a plan without linear heads has no place for what a conversion added
            names = [name for name in names if ADDED not in name]
        if names:
            raise VerificationFailure(f"{kind.replace('_', ' ')} on loading {folder.name}, first {sorted(names)[0]}")
    return model.eval()


def _streamed(config: PretrainedConfig) -> dict[str, str]:
    """Every module's place: on disk until it is needed, but for what a conversion adds, which is small and read in parts."""
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    modules = {name.partition(ADDED)[0] + ".mixer" if ADDED in name else name.rpartition(".")[0] for name in names}
    return {module: "cpu" if module.endswith(".mixer") else "disk" for module in sorted(modules)}


def _attentions(model: PreTrainedModel):
    return model.linear_attentions() if hasattr(model, "linear_attentions") else ()


def _large(folder: Path) -> bool:
    return read_weights(folder).nbytes > STREAM_ABOVE


@torch.no_grad()
def _softmax_difference(folder: Path, base: Path, ids: torch.Tensor, offload: Path) -> float:
    reference = _load(base, offload / "base")(ids, use_cache=False).logits
    config = AutoConfig.from_pretrained(folder)
    config.linearize = config.plan.keep_all_softmax(config.key_value_heads).to_dict()
    logits = _load(folder, offload / "softmax", config=config)(ids, use_cache=False).logits
    if not logits.isfinite().all():
        raise VerificationFailure("the base model's logits are not finite")
    difference = (logits - reference).abs().max().item()
    if difference != 0.0:
        raise VerificationFailure(f"with every head set to softmax the logits differ from the base by {difference:g}")
    return difference


@torch.no_grad()
def _student_differences(folder: Path, plan: Plan, ids: torch.Tensor, offload: Path) -> tuple[float, float]:
    """Largest differences from the full forward, relative to the largest logit: of a prefill, a chunk and single steps
    through the cache, and of the same tokens behind padding."""
    config = AutoConfig.from_pretrained(folder)
    config.linearize = plan.to_dict()
    student = _load(folder, offload / "student", dtype=torch.float32, config=config)
    full = student(ids, use_cache=False).logits
    found = {
        "cached decode": logits_in_pieces(student, ids, [ids.shape[1] - 8, 5, 1, 1, 1]),
        "a left-padded row": logits_behind_padding(student, ids),
    }
    if not _large(folder):  # a streamed model's output embeddings are not there to be read
        hidden = student.base_model(ids, use_cache=False).last_hidden_state
        found["the readout that losses and scores use"] = readout_of(student)(hidden)
    differences = []
    for what, logits in found.items():
        differences.append(difference(logits, full))
        if not differences[-1] <= TOLERANCES[full.dtype]:
            raise VerificationFailure(
                f"{what} differs from the full forward by {differences[-1]:g} of the largest logit "
                f"(allowed {TOLERANCES[full.dtype]:g})"
            )
    return differences[0], differences[1]


def main() -> None:
    logging.set_verbosity_error()
    keep_freed_memory()
    folder, base = (Path(argument) for argument in sys.argv[1:3])
    try:
        result = verify(folder, base)
    except VerificationFailure as failure:
        result = {"failure": str(failure)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
