"""What the recurrent branch contributes: its share of the norm of every head's output."""

import torch
from transformers import PreTrainedModel

from linearize.evaluation.lab import Lab
from linearize.modeling.linear_heads import LinearHeads
from linearize.report.results import STUDENT, Findings


def measure_branch_share(lab: Lab, length: int) -> Findings:
    """One row a layer: which key/value heads kept softmax, and per query head of the linear ones
    |recurrent part| / (|window part| + |recurrent part|), averaged over the tokens of one window of text."""
    return lab.measure([STUDENT], lambda name, model: _shares(lab, model, length))[STUDENT]


@torch.no_grad()
def _shares(lab: Lab, model: PreTrainedModel, length: int) -> Findings:
    positions = model.config.max_position_embeddings or length
    ids = lab.text[: min(length, positions)][None].to(lab.device)
    attentions = [attention for _, attention in model.linear_attentions()]
    branches = [module for module in model.modules() if isinstance(module, LinearHeads)]
    for branch in branches:
        branch.shares = []
    try:
        model.base_model(ids, use_cache=False)
        rows = []
        for attention in attentions:
            linear = {}
            if attention.mixer is not None and attention.mixer.shares:
                per_head = torch.stack(attention.mixer.shares).mean(0).view(len(attention.linear_heads), -1)
                linear = dict(zip(attention.linear_heads, per_head.tolist()))
            row = {"layer": attention.layer_idx, "softmax_heads": list(attention.softmax_heads)}
            row["shares"] = {str(head): linear.get(head, []) for head in attention.linear_heads}
            rows.append(row)
    finally:
        for branch in branches:
            branch.shares = None
    lab.progress("branch share: measured")
    return Findings(tables={"branch_share": rows})
