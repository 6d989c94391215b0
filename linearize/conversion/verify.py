"""Verify a written checkpoint in a process of its own: `python -m linearize.conversion.verify FOLDER BASE`.

(a) Every tensor is finite.
(b) With every head set to softmax, the logits equal those of the base model.
(c) Decoding with a cache gives the logits of the full forward.
(d) So does a row with padding on the left.
(e) So does the family's readout of the hidden states.

Checks (c) to (e) must leave every window. A window too long for that in reasonable time is shortened for them; no
parameter depends on its length. Large models run layer by layer. The program prints one JSON
document; the key "failure" in it names a difference.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from linearize.checkpoint.auto import auto_config
from linearize.checkpoint.names import ADDED
from linearize.checkpoint.student import Student
from linearize.checkpoint.weights import DTYPE_NAMES, TensorInfo, read_weights
from linearize.device import RESIDENT_BYTES, has_amx, keep_freed_memory
from linearize.errors import CheckpointError
from linearize.modeling.agreement import (
    TOLERANCES,
    difference,
    logits_behind_padding,
    logits_in_pieces,
    streamed_behind_padding,
    streamed_in_pieces,
)
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.readout import readout_of
from linearize.modeling.registration import register_checkpoint
from linearize.plan import Plan

# bytes of a tensor that are in memory while it is checked
BLOCK_BYTES = 1 << 24
# tokens that (c) to (e) take at most, so that a model of 4 GiB takes about a minute
LONGEST = 600
# windows that so many tokens leave
WINDOW, SOFTMAX_WINDOW = 512, 560
TORCH_DTYPES = {code: getattr(torch, name) for code, name in DTYPE_NAMES.items()}


class VerificationFailure(Exception):
    """A check that does not hold; the message names the difference."""


def verify(folder: Path, base: Path) -> dict[str, Any]:
    """Run the checks and return their figures.

    Raises:
        VerificationFailure: the first check that does not hold.
    """
    tensors = _check_finite(folder)
    register_checkpoint(folder)
    config = auto_config(folder)
    plan = _shortened(config.plan)
    linear = [layer for layer in plan.layers if layer.linear_heads(config.key_value_heads)]
    window = max((max(layer.window, layer.softmax_window or 0) for layer in linear), default=0)
    # beyond the window, so that sinks and recurrent branch take part, and with a decode that leaves the window again
    length = min(max(window + 24, 48), LONGEST, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    softmax_difference = _softmax_difference(folder, base, ids)
    decode_difference, padded_difference = _student_differences(folder, plan, ids)
    return {
        "tokens": length,
        "tensors_finite": tensors,
        "softmax_everywhere_max_difference": softmax_difference,
        "cached_decode_max_difference": decode_difference,
        "padded_max_difference": padded_difference,
    }


def _shortened(plan: Plan) -> Plan:
    """Return the plan with windows that LONGEST tokens leave."""
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
    """Check that every floating-point tensor is finite, and return the number of tensors."""
    weights = read_weights(folder)
    for name, info in weights.tensors.items():
        if info.dtype in TORCH_DTYPES and not _is_finite(folder / info.file, info):
            raise VerificationFailure(f"tensor '{name}' in {info.file} has values that are not finite")
    return len(weights.tensors)


def _is_finite(path: Path, info: TensorInfo) -> bool:
    """Read a tensor in blocks through plain file reads, which leave nothing mapped in memory; True if all is finite."""
    with open(path, "rb") as file:
        file.seek(info.offset)
        unread = info.nbytes
        while unread:
            block = bytearray(file.read(min(unread, BLOCK_BYTES)))
            if not torch.frombuffer(block, dtype=TORCH_DTYPES[info.dtype]).isfinite().all():
                return False
            unread -= len(block)
    return True


def _load(
    folder: Path, student: Path, *, dtype: torch.dtype | None = None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Load a student or its base with every key accounted for.

    Args:
        student: folder of the student, whose record names the tensors that are kept unused.
        dtype: None: the checkpoint's own if this processor is fast in it, else float32.
        config: a config in place of the checkpoint's.

    Raises:
        VerificationFailure: keys are missing, unexpected or mismatched.
    """
    config = config or auto_config(folder)
    options: dict[str, Any] = {"dtype": dtype or ("auto" if has_amx() else torch.float32)}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, output_loading_info=True, trust_remote_code=False, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        _require_none(kind, info[kind], model, student)
    return model.eval()


def _require_none(kind: str, names: Iterable[Any], model: PreTrainedModel, student: Path) -> None:
    """Raise a VerificationFailure for the first of the names, but for tensors that are kept unused."""
    unused = Student.read(student).manifest.ignored_tensors
    names = [str(name) for name in names if "rotary_emb" not in str(name) and str(name) not in unused]
    attentions = model.linear_attentions() if hasattr(model, "linear_attentions") else ()
    if not any(attention.linear_heads for _, attention in attentions):
        names = [name for name in names if ADDED not in name]  # a plan without linear heads
    if names:
        raise VerificationFailure(f"{kind.replace('_', ' ')} on loading, first {min(names)}")


def _stream(folder: Path, config: PretrainedConfig | None = None) -> LayerStream:
    """Open a large checkpoint to run layer by layer, in float32."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config or auto_config(folder), dtype=torch.float32, trust_remote_code=False
        )
    return LayerStream(model.eval(), folder)


def _is_large(folder: Path) -> bool:
    """Return True if a checkpoint's model is to be streamed from disk."""
    return read_weights(folder).nbytes > RESIDENT_BYTES


@torch.no_grad()
def _softmax_difference(folder: Path, base: Path, ids: torch.Tensor) -> float:
    """Compare the student in softmax mode with its base, check (b), and return the difference, which must be 0."""
    config = auto_config(folder)
    config.linearize = config.plan.keep_all_softmax(config.key_value_heads).to_dict()
    if _is_large(folder):
        reference = _streamed_logits(_stream(base), ids, folder)
        logits = _streamed_logits(_stream(folder, config), ids, folder)
    else:
        reference = _load(base, folder)(ids, use_cache=False).logits
        logits = _load(folder, folder, config=config)(ids, use_cache=False).logits
    if not logits.isfinite().all():
        raise VerificationFailure("the base model's logits are not finite")
    difference = (logits - reference).abs().max().item()
    if difference != 0.0:
        raise VerificationFailure(f"with every head set to softmax the logits differ from the base by {difference:g}")
    return difference


def _streamed_logits(stream: LayerStream, ids: torch.Tensor, student: Path) -> torch.Tensor:
    """Return the logits [T, vocabulary] of ids [1, T]; `student` as in `_load`."""
    (hidden,) = stream.last_hidden([ids[0]])
    with stream.readout() as head:
        _require_none("unexpected_keys", stream.unplaced, stream.model, student)
        return head(hidden)


@torch.no_grad()
def _student_differences(folder: Path, plan: Plan, ids: torch.Tensor) -> tuple[float, float]:
    """Compute the same logits in other ways: checks (c) to (e).

    Returns:
        Largest differences from the full forward, relative to the largest logit: of a prefill, a chunk and single steps
        through the cache, and of the same tokens behind padding.
    """
    config = auto_config(folder)
    config.linearize = plan.to_dict()
    pieces = [ids.shape[1] - 8, 5, 1, 1, 1]
    ways = ("cached decode", "a left-padded row", "the readout that losses and scores use")
    if _is_large(folder):
        stream = _stream(folder, config)
        full = _streamed_logits(stream, ids, folder)
        hidden = streamed_in_pieces(stream, ids, pieces), streamed_behind_padding(stream, ids)
        with stream.readout() as head:  # which is (e) itself
            others = [head(of_way) for of_way in hidden]
    else:
        student = _load(folder, folder, dtype=torch.float32, config=config)
        full = student(ids, use_cache=False).logits
        others = [logits_in_pieces(student, ids, pieces), logits_behind_padding(student, ids)]
        others.append(readout_of(student)(student.base_model(ids, use_cache=False).last_hidden_state))
    differences = []
    for way, logits in zip(ways, others):
        differences.append(difference(logits, full))
        # written so that NaN fails, too
        if not differences[-1] <= TOLERANCES[full.dtype]:
            raise VerificationFailure(
                f"{way} differs from the full forward by {differences[-1]:g} of the largest logit "
                f"(allowed {TOLERANCES[full.dtype]:g})"
            )
    return differences[0], differences[1]


def main() -> None:
    """Verify the folder that the command line names, and print the outcome."""
    logging.set_verbosity_error()
    folder, base = (Path(argument) for argument in sys.argv[1:3])
    try:
        if not _is_large(folder):
            keep_freed_memory()
        result = verify(folder, base)
    except (VerificationFailure, CheckpointError) as failure:
        result = {"failure": str(failure)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
