"""Compute the same logits in another way (in pieces through the cache, behind padding) and compare the two."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from linearize.modeling.attention import CACHE_ARGUMENTS
from linearize.modeling.cache import CACHE_NAME, adopt_layer
from linearize.modeling.layer_stream import LayerStream

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


def streamed_in_pieces(stream: LayerStream, ids: Tensor, sizes: list[int]) -> Tensor:
    """Return the hidden states [T, D] of ids [1, T] as `logits_in_pieces` computes them, one layer after another."""
    cache, options, start = DynamicCache(config=stream.model.config), [], 0
    for size in sizes:
        # a cache that looks filled, for masks and positions
        filled = DynamicCache(config=stream.model.config)
        for index in range(len(stream.layers)):
            adopt_layer(filled, index, lambda: (None, None)).length = start
        positions = torch.arange(start, start + size)[None]
        options.append({CACHE_NAME: filled, "use_cache": True, "position_ids": positions})
        start += size
    batches = stream.start(ids.split(sizes, dim=1), options)
    for batch in batches:
        for call in batch.calls:
            call.keywords |= {name: cache for name in CACHE_ARGUMENTS if call.keywords.get(name) is not None}
    stream.forward(batches)
    return torch.cat([stream.normalised(batch.hidden)[0] for batch in batches])


def streamed_behind_padding(stream: LayerStream, ids: Tensor) -> Tensor:
    """Return the hidden states [T, D] of ids [1, T] behind `PADDING` masked tokens, one layer after another."""
    mask = F.pad(torch.ones_like(ids), (PADDING, 0))
    (batch,) = stream.start([F.pad(ids, (PADDING, 0))], [{"attention_mask": mask}])
    stream.forward([batch])
    return stream.normalised(batch.hidden)[0, PADDING:]


def difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()
