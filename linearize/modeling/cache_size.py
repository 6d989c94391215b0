"""What one sequence's cache takes, by length, reckoned from a plan: the base's beside the student's."""

import math
from typing import Any

from linearize.families.registry import find_family
from linearize.modeling.added import linear_branches
from linearize.modeling.branch import WindowHeads
from linearize.plan import Plan

CONTEXTS = (4096, 32768, 131072)


def cache_sizes(config: dict[str, Any], plan: Plan, width: int) -> dict[int, dict[str, int]]:
    """Bytes that one sequence's cache takes at each context length, at `width` bytes a cached number."""
    J, K = config["num_key_value_heads"], config["head_dim"]
    branches = linear_branches(config, plan, device="meta")
    windows = find_family(plan.base_model_type).sliding_windows(config)
    sizes = {}
    for length in CONTEXTS:
        base = student = 0
        for i, layer in enumerate(plan.layers):
            linear = len(layer.linear_heads(J))
            softmax_head = 2 * K * width * (length if windows[i] is None else min(length, windows[i] - 1))
            base += J * softmax_head
            if layer.softmax_window is None:
                student += (J - linear) * softmax_head
            elif linear < J:
                slots = min(layer.softmax_window, length) + layer.sinks
                student += (J - linear) * 2 * K * width * slots + bookkeeping(layer.softmax_window, layer.sinks, length)
            if linear:
                student += linear * _linear_head_bytes(branches[i], K, width, length)
                student += bookkeeping(layer.window, layer.sinks, length)
        sizes[length] = {"base": base, "student": student}
    return sizes


def _linear_head_bytes(branch: WindowHeads, head_dim: int, width: int, length: int) -> int:
    """Window keys and values, what the recurrent branch waits for, sinks, state."""
    slots = min(branch.window, length)
    waiting = branch.recurrent_input_bytes(width) * slots
    return 2 * (slots + branch.sinks) * head_dim * width + waiting + 4 * math.prod(branch.state_shape())


def bookkeeping(window: int, sinks: int, length: int) -> int:
    """Ordinals of a window's slots, the sinks' slots and the token count, 8 bytes each."""
    return 8 * (min(window, length) + sinks + 1)
