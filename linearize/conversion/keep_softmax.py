"""`--keep-softmax`: which key/value heads keep softmax attention.

none | all | every:N | recall:SHARE | text:SHARE | both:SHARE | 0,7,18 (whole layers) | 18:2,17:1,8:0 (layer:key/value head)
"""

import math
from collections.abc import Callable, Sequence

from linearize.errors import ConfigError

SCORED = ("recall", "text", "both")
ALLOWED = "none, all, every:N, recall:SHARE (recall:12.5%), text:SHARE, both:SHARE, layers (0,7,18) or layer:head pairs (18:2,17:1)"
HeadScores = list[list[float]]


def softmax_heads(
    spec: str,
    layers: int,
    key_value_heads: int,
    score: Callable[[str], HeadScores] | None = None,
    among: Sequence[int] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """For every layer, the key/value heads that keep softmax, ascending.

    `every:N` keeps layers 0, N, 2N… whole, as Liger-H and its relatives do. `recall:SHARE` keeps that share of all heads,
    those that recall depends on most, `text:SHARE` those that long text does, `both:SHARE` by the sum of the two. All count
    in the layers `among` which there is a choice (all by default).

    Args:
        score: computes the heads' scores for one of these three, [layers][key/value heads]; called for them alone.

    Raises:
        ConfigError: unknown form, or a layer or head the model does not have.
    """
    every_head = tuple(range(key_value_heads))
    among = range(layers) if among is None else among
    if spec == "none":
        return ((),) * layers
    if spec == "all":
        return (every_head,) * layers
    if spec.startswith("every:"):
        step = _number(spec.removeprefix("every:"), spec)
        if step < 1:
            raise ConfigError(f"keep_softmax: got '{spec}', allowed is every:N with N of at least 1")
        return tuple(every_head if layer in among[::step] else () for layer in range(layers))
    if spec.partition(":")[0] in SCORED:
        by, share = scored_share(spec)
        if score is None:
            raise ConfigError(f"keep_softmax: '{spec}' needs the base model to be run, which is not possible here")
        scores = score(by)
        kept_heads = dict(zip(among, top_heads([scores[layer] for layer in among], share)))
        return tuple(kept_heads.get(layer, ()) for layer in range(layers))
    kept: list[set[int]] = [set() for _ in range(layers)]
    for item in spec.split(","):
        layer_text, separator, head_text = item.strip().partition(":")
        layer = _number(layer_text, spec)
        if not 0 <= layer < layers:
            raise ConfigError(f"keep_softmax: got layer {layer} in '{spec}', the model has layers 0 to {layers - 1}")
        if not separator:
            kept[layer].update(every_head)
            continue
        head = _number(head_text, spec)
        if not 0 <= head < key_value_heads:
            raise ConfigError(
                f"keep_softmax: got key/value head {head} of layer {layer} in '{spec}', every layer has key/value "
                f"heads 0 to {key_value_heads - 1}"
            )
        kept[layer].add(head)
    return tuple(tuple(sorted(heads)) for heads in kept)


def spread_evenly(count: int, layers: int, key_value_heads: int) -> tuple[tuple[int, ...], ...]:
    """`count` heads at even distances among all of them, by layer."""
    total = layers * key_value_heads
    chosen = [i * total // count for i in range(count)]
    return tuple(
        tuple(head for head in range(key_value_heads) if layer * key_value_heads + head in chosen)
        for layer in range(layers)
    )


def scored_share(spec: str) -> tuple[str, float]:
    """Of recall:SHARE and its like the part before the colon, and SHARE as a fraction of one: 12.5% and 0.125 are the same."""
    by, _, text = spec.partition(":")
    text = text.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ConfigError(f"keep_softmax: got '{spec}', allowed is {by}:SHARE with a share above 0% and below 100%")
    return by, share


def kept_count(share: float, heads: int) -> int:
    """How many of all heads a share is, at least one."""
    return max(1, round(share * heads))


def top_heads(scores: HeadScores, share: float) -> tuple[tuple[int, ...], ...]:
    """For every layer the heads among the best `share` of all, at least one in the model, ascending."""
    ranked = sorted(
        ((score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row)),
        key=lambda item: (-item[0], item[1], item[2]),
    )
    kept: list[list[int]] = [[] for _ in scores]
    for _, layer, head in ranked[: kept_count(share, len(ranked))]:
        kept[layer].append(head)
    return tuple(tuple(sorted(heads)) for heads in kept)


def _number(text: str, spec: str) -> int:
    if not text.strip().isdecimal():
        raise ConfigError(f"keep_softmax: got '{spec}', allowed are {ALLOWED}")
    return int(text)
