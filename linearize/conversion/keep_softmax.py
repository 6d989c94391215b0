"""Read `--keep-softmax`: the key/value heads that keep softmax attention.

none | all | every:N | recall:SHARE | text:SHARE | both:SHARE | 0,7,18 (whole layers) | 18:2,17:1,8:0 (layer:key/value
head) | auto
"""

import math
from collections.abc import Callable, Sequence

from linearize.errors import ConfigError

# forms that rank heads by scores from running the base
SCORED = ("recall", "text", "both")
# digits of a layer or a head
MOST_DIGITS = 9
ALLOWED = (
    "none, all, every:N, recall:SHARE (recall:12.5%), text:SHARE, both:SHARE, layers (0,7,18) or layer:head pairs "
    "(18:2,17:1)"
)
# the form of `keep_softmax` that stands for the smallest share that holds what the base can do (automatic.py)
AUTO = "auto"
# [layers][key/value heads], larger for heads that are needed more
HeadScores = list[list[float]]
# for every layer, key/value heads in ascending order
HeadsByLayer = tuple[tuple[int, ...], ...]


def softmax_heads(
    spec: str,
    layers: int,
    key_value_heads: int,
    score: Callable[[str], HeadScores] | None = None,
    candidates: Sequence[int] | None = None,
) -> HeadsByLayer:
    """Return the key/value heads that keep softmax, for every layer.

    `every:N` keeps layers 0, N, 2N… whole, as Liger-H and its relatives do. `recall:SHARE` keeps that share of all
    heads, those that recall needs most. `text:SHARE` keeps those that long text needs most, and `both:SHARE` goes by
    the sum of the two.

    Args:
        layers: number of layers of the model.
        key_value_heads: number of key/value heads in each layer.
        score: computes scores by "recall", "text" or "both"; called only for these three forms. None: the base cannot
            be run.
        candidates: layers that are converted, all by default; every:N and the three shares count among them.

    Raises:
        ConfigError: an unknown form, or a layer or head that the model does not have.
    """
    all_heads = tuple(range(key_value_heads))
    candidates = range(layers) if candidates is None else candidates
    if spec == "none":
        return ((),) * layers
    if spec == "all":
        return (all_heads,) * layers
    if spec.startswith("every:"):
        step = _number(spec.removeprefix("every:"), spec)
        if step < 1:
            raise ConfigError(f"keep_softmax: got '{spec}', allowed is every:N with N of at least 1")
        return tuple(all_heads if layer in candidates[::step] else () for layer in range(layers))
    if spec.partition(":")[0] in SCORED:
        by, share = scored_share(spec)
        if score is None:
            raise ConfigError(f"keep_softmax: '{spec}' needs the base model to be run, which is not possible here")
        scores = score(by)
        best = dict(zip(candidates, top_heads([scores[layer] for layer in candidates], share)))
        return tuple(best.get(layer, ()) for layer in range(layers))
    return _listed_heads(spec, layers, key_value_heads)


def _listed_heads(spec: str, layers: int, key_value_heads: int) -> HeadsByLayer:
    """Return the heads of a list of layers and layer:head pairs."""
    heads: list[set[int]] = [set() for _ in range(layers)]
    for item in spec.split(","):
        layer_text, separator, head_text = item.strip().partition(":")
        layer = _number(layer_text, spec)
        if not 0 <= layer < layers:
            raise ConfigError(f"keep_softmax: got layer {layer} in '{spec}', the model has layers 0 to {layers - 1}")
        if not separator:
            heads[layer].update(range(key_value_heads))
            continue
        head = _number(head_text, spec)
        if not 0 <= head < key_value_heads:
            raise ConfigError(
                f"keep_softmax: got key/value head {head} of layer {layer} in '{spec}', every layer has key/value "
                f"heads 0 to {key_value_heads - 1}"
            )
        heads[layer].add(head)
    return tuple(tuple(sorted(of_layer)) for of_layer in heads)


def spread_evenly(count: int, layers: int, key_value_heads: int) -> HeadsByLayer:
    """Return `count` heads at even distances among all heads, for every layer."""
    total = layers * key_value_heads
    chosen = {i * total // count for i in range(count)}
    return tuple(
        tuple(head for head in range(key_value_heads) if layer * key_value_heads + head in chosen)
        for layer in range(layers)
    )


def scored_share(spec: str) -> tuple[str, float]:
    """Split a form like recall:SHARE into the word before the colon and the share, as a fraction of one.

    SHARE may be a percentage or a fraction: 12.5% and 0.125 are the same.

    Raises:
        ConfigError: not a share above 0% and below 100%.
    """
    by, _, text = spec.partition(":")
    text = text.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ConfigError(f"keep_softmax: got '{spec}', allowed is {by}:SHARE with a share above 0% and below 100%")
    return by, share


def share_form(by: str, count: int, heads: int) -> str:
    """Return the form that keeps softmax in `count` of `heads` heads: recall:12.5%, or none."""
    return f"{by}:{100 * count / heads:.6g}%" if count else "none"


def share_count(share: float, heads: int) -> int:
    """Return the number of heads in a share of `heads`, at least one."""
    return max(1, round(share * heads))


def top_heads(scores: HeadScores, share: float) -> HeadsByLayer:
    """Return the heads among the best `share` of all, for every layer; at least one head in the model."""
    ranked = sorted(
        ((score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row)),
        key=lambda item: (-item[0], item[1], item[2]),
    )
    best: list[list[int]] = [[] for _ in scores]
    for _, layer, head in ranked[: share_count(share, len(ranked))]:
        best[layer].append(head)
    return tuple(tuple(sorted(heads)) for heads in best)


def _number(text: str, spec: str) -> int:
    """Read a whole number of the form `spec`, which the error names."""
    if not text.strip().isdecimal() or len(text.strip()) > MOST_DIGITS:
        raise ConfigError(f"keep_softmax: got '{spec}', allowed are {ALLOWED}")
    return int(text)
