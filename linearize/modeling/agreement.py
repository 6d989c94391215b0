"""Compute the same logits in another way (in pieces through the cache, behind padding) and compare the two."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.modeling.cache import CACHE_NAME

# masked tokens before a row: not a multiple of any block length
PADDING = 7
# allowed difference, relative to the largest logit, between two orders of summation
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def logits_in_pieces(model: PreTrainedModel, ids: Tensor, sizes: list[int]) -> Tensor:
    """Return the logits [B, T, vocabulary] of ids [B, T], fed to a growing cache in pieces of these sizes."""
    cache, logits = None, []
    for piece in ids.split(sizes, dim=1):
        output = model(piece, use_cache=True, **{CACHE_NAME: cache})
        cache = output[CACHE_NAME]
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def logits_behind_padding(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits [B, T, vocabulary] of ids [B, T] behind `PADDING` masked tokens."""
    mask = F.pad(torch.ones_like(ids), (PADDING, 0))
    return model(F.pad(ids, (PADDING, 0)), attention_mask=mask, use_cache=False).logits[:, PADDING:]


def difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()
