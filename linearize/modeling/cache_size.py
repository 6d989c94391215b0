"""Compute from a plan how many bytes one sequence's cache takes by length: the base model's beside the student's.

Shapes: J key/value heads, K head dim.
"""

import math
from typing import Any

from linearize.families.registry import find_family
from linearize.modeling.added import linear_heads_by_layer
from linearize.modeling.window_heads import WindowHeads
from linearize.plan import LayerPlan, Plan

# lengths that plans, reports and model cards show, in tokens: 4K, 32K, 128K
CONTEXTS = (4096, 32768, 131072)


def cache_sizes(config: dict[str, Any], plan: Plan, width: int) -> dict[int, dict[str, int]]:
    """Return the bytes of one sequence's cache at each context length, given `width` bytes per cached number."""
    J, K = config["num_key_value_heads"], config["head_dim"]
    heads_by_layer = linear_heads_by_layer(config, plan, device="meta")
    sliding_windows = find_family(plan.base_model_type).sliding_windows(config)
    sizes = {}
    for length in CONTEXTS:
        base = student = 0
        for i, layer in enumerate(plan.layers):
            linear = len(layer.linear_heads(J))
            window = sliding_windows[i]
            softmax_head = 2 * K * width * (length if window is None else min(length, window - 1))
            base += J * softmax_head
            student += _softmax_heads_bytes(layer, J - linear, softmax_head, 2 * K * width, length)
            if linear:
                student += linear * _linear_head_bytes(heads_by_layer[i], K, width, length)
                student += bookkeeping(layer.window, layer.sinks, length)
        sizes[length] = {"base": base, "student": student}
    return sizes


def _softmax_heads_bytes(layer: LayerPlan, heads: int, full_head: int, token: int, length: int) -> int:
    """Return the bytes of a layer's softmax heads.

    Args:
        heads: number of softmax heads.
        full_head: bytes of one head that sees every token its base sees.
        token: bytes of one head's key and value of one token.
    """
    if layer.softmax_window is None:
        return heads * full_head
    if not heads:
        return 0
    slots = min(layer.softmax_window, length) + layer.sinks
    return heads * token * slots + bookkeeping(layer.softmax_window, layer.sinks, length)


def _linear_head_bytes(heads: WindowHeads, head_dim: int, width: int, length: int) -> int:
    """Return the bytes of one linear head: keys and values of window and sinks, recurrent inputs, state."""
    slots = min(heads.window, length)
    recurrent_inputs = heads.recurrent_input_bytes(width) * slots
    return 2 * (slots + heads.sinks) * head_dim * width + recurrent_inputs + 4 * math.prod(heads.state_shape())


def bookkeeping(window: int, sinks: int, length: int) -> int:
    """Return the bytes of a window's ordinals, the sinks' slots and the token count, 8 bytes each."""
    return 8 * (min(window, length) + sinks + 1)
