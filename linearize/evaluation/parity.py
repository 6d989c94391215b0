"""The same logits computed in different ways: cached, padded, in a batch, in pieces, after saving. They must agree."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.checkpoint.writing import check_space
from linearize.errors import ResourceError
from linearize.evaluation.lab import Lab
from linearize.modeling.agreement import TOLERANCES, difference, logits_behind_padding, logits_in_pieces
from linearize.report.results import STUDENT, Check, Findings

LEAST_TOKENS, BEYOND = 400, 48


def measure_parity(lab: Lab) -> Findings:
    """Five checks of the student on text longer than its window, where positions allow."""
    return lab.measure([STUDENT], lambda name, model: _checks(lab, model))[STUDENT]


@torch.no_grad()
def _checks(lab: Lab, model: PreTrainedModel) -> Findings:
    limit = model.config.max_position_embeddings
    layers = [layer for layer in model.config.plan.layers if not layer.native]
    windows = [layer.window + layer.sinks for layer in layers]
    # a longer window counts where there is anything beyond it
    longest = max((layer.softmax_window or 0) + layer.sinks for layer in layers) if layers else 0
    if longest + BEYOND <= min(lab.text.numel(), limit - 16):
        windows.append(longest)
    length = min(max(LEAST_TOKENS, max(windows, default=0) + BEYOND), lab.text.numel(), limit - 16)
    ids = lab.text[:length][None].to(lab.device)
    other = lab.text[-length:][None].to(lab.device)
    whole, whole_other = (model(x, use_cache=False).logits for x in (ids, other))
    tolerance = TOLERANCES[whole.dtype]
    computed = {
        "cached = uncached": (logits_in_pieces(model, ids, [length - 8] + [1] * 8), whole),
        "chunked prefill = whole": (
            logits_in_pieces(model, ids, [length // 3, length // 3, length - 2 * (length // 3)]),
            whole,
        ),
        "padded = unpadded": (logits_behind_padding(model, ids), whole),
        "batch = single": (
            model(torch.cat([ids, other]), use_cache=False).logits,
            torch.cat([whole, whole_other]),
        ),
    }
    checks = [Check(name, difference(a, b), tolerance) for name, (a, b) in computed.items()]
    notes: list[str] = []
    try:
        checks.append(Check("saved and loaded = before", difference(_reloaded(model, ids), whole), 0.0))
    except ResourceError as error:
        notes.append(f"parity after saving was not checked: {error}")
    lab.progress(f"parity: {len(checks)} checks")
    return Findings(checks=tuple(checks), notes=tuple(notes))


def _reloaded(model, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="linearize-parity-") as folder:
        check_space(Path(folder), model.get_memory_footprint())
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(ids.device).eval()
        return again(ids, use_cache=False).logits
