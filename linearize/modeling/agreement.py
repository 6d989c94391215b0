"""The same logits computed in another way: in pieces through the cache, behind padding. And how near is the same."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.modeling.cache import CACHE_NAME

PADDING = 7
# of the largest logit: two orders of summation
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def logits_in_pieces(model: PreTrainedModel, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits [B, T, vocabulary] of ids [B, T], given in pieces of these sizes to a growing cache."""
    cache, logits = None, []
    for piece in ids.split(sizes, dim=1):
        result = model(piece, use_cache=True, **{CACHE_NAME: cache})
        cache = result[CACHE_NAME]
        logits.append(result.logits)
    return torch.cat(logits, dim=1)


def logits_behind_padding(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of ids [B, T] behind PADDING masked tokens."""
    mask = F.pad(torch.ones_like(ids), (PADDING, 0))
    return model(F.pad(ids, (PADDING, 0)), attention_mask=mask, use_cache=False).logits[:, PADDING:]


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest of what is wanted."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
