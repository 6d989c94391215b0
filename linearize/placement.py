"""`--keep-softmax`: which key/value heads keep softmax attention.

none | all | every:N | 0,7,18 (whole layers) | 18:2,17:1,8:0 (layer:key/value head)
"""

from linearize.errors import ConfigError

ALLOWED = "none, all, every:N, layers (0,7,18) or layer:head pairs (18:2,17:1)"


def softmax_heads(spec: str, layers: int, key_value_heads: int) -> tuple[tuple[int, ...], ...]:
    """For every layer, the key/value heads that keep softmax, ascending.

    `every:N` keeps layers 0, N, 2N… whole, as Liger-H and its relatives do.

    Raises:
        ConfigError: unknown form, or a layer or head the model does not have.
    """
    every_head = tuple(range(key_value_heads))
    if spec == "none":
        return ((),) * layers
    if spec == "all":
        return (every_head,) * layers
    if spec.startswith("every:"):
        step = _number(spec.removeprefix("every:"), spec)
        if step < 1:
            raise ConfigError(f"keep_softmax: got '{spec}', allowed is every:N with N of at least 1")
        return tuple(every_head if layer % step == 0 else () for layer in range(layers))
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


def _number(text: str, spec: str) -> int:
    if not text.strip().isdecimal():
        raise ConfigError(f"keep_softmax: got '{spec}', allowed are {ALLOWED}")
    return int(text)
