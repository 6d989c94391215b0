"""Make the plan of a conversion from its settings: which layers and heads become linear, and how."""

from collections.abc import Callable
from typing import Any

from linearize.conversion.keep_softmax import HeadScores, softmax_heads
from linearize.errors import ConfigError
from linearize.families.registry import find_family
from linearize.plan import LayerPlan, Plan
from linearize.settings.config import ConversionConfig, layer_numbers


def make_plan(
    family_name: str,
    config: dict[str, Any],
    settings: ConversionConfig,
    score: Callable[[str], HeadScores] | None = None,
) -> Plan:
    """Plan every layer of a model.

    Args:
        config: the base's config, with every default filled in.
        score: computes the heads' scores, if `keep_softmax` asks for them; None: the base cannot be run.

    Raises:
        ConfigError: the settings name a layer or head that the model does not have.
    """
    layers = config["num_hidden_layers"]
    converted = converted_layers(family_name, config, settings)
    heads_by_layer = softmax_heads(settings.keep_softmax, layers, config["num_key_value_heads"], score, converted)
    changes = _layer_changes(settings, layers)
    all_heads = tuple(range(config["num_key_value_heads"]))
    sliding_windows = find_family(family_name).sliding_windows(config)
    plans = []
    for layer, heads in enumerate(heads_by_layer):
        if layer not in converted:
            plans.append(LayerPlan(all_heads, native=True))
            continue
        layer_settings = settings.layer_settings(changes.get(layer, {}))
        if sliding_windows[layer] is not None:
            # the family's own window is that of the softmax heads, too
            layer_settings |= {"softmax_window": None}
        plans.append(LayerPlan(heads, **layer_settings))
    return Plan(family_name, tuple(plans))


def _layer_changes(settings: ConversionConfig, layers: int) -> dict[int, dict[str, Any]]:
    """Return the settings of the layers that differ from the rest, by layer."""
    changes: dict[int, dict[str, Any]] = {}
    for spec, changed in settings.layers.items():
        for number in layer_numbers(spec):
            if number >= layers:
                raise ConfigError(f"layers.{spec}: got layer {number}, the model has layers 0 to {layers - 1}")
            changes[number] = changed.model_dump(exclude_none=True)
    return changes


def converted_layers(family_name: str, config: dict[str, Any], settings: ConversionConfig) -> tuple[int, ...]:
    """Return the layers that are converted, ascending.

    By default these are the layers of full attention; one with a sliding window has a cache of constant size already.
    """
    layers = config["num_hidden_layers"]
    if settings.convert_layers == "all":
        return tuple(range(layers))
    if settings.convert_layers == "full":
        windows = find_family(family_name).sliding_windows(config)
        return tuple(i for i, window in enumerate(windows) if window is None)
    chosen = sorted(set(layer_numbers(settings.convert_layers)))
    if chosen[-1] >= layers:
        raise ConfigError(f"convert_layers: got layer {chosen[-1]}, the model has layers 0 to {layers - 1}")
    return tuple(chosen)
