"""Inspect a source checkpoint and plan its conversion, without writing anything."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linearize.checkpoint.base import base_config, check_tensors, full_config, weights_of_config
from linearize.checkpoint.source import Source
from linearize.checkpoint.weights import BITS, FLOATING, Weights, has_weights, read_weights
from linearize.conversion.keep_softmax import HeadScores, resolve_auto, softmax_heads
from linearize.device import can_run_base
from linearize.errors import ConfigError
from linearize.families.registry import find_family
from linearize.plan import LayerPlan, Plan
from linearize.settings.config import ConversionConfig, layer_numbers

# memory of torch, transformers and a model without weights; measured as 355 MiB while a 4 GiB model was converted with
# linked weights and without verification
IMPORTED_BYTES = 355 << 20


@dataclass(frozen=True)
class Inspection:
    """The plan of a conversion and the sizes that follow from it.

    Attributes:
        config: the base's config, with every default filled in.
        ignored: names of the base's tensors that its family allows to ignore.
        added: shapes by name of the parameters that the conversion adds, in float32.
        cache_bytes: context length -> bytes of one sequence's cache, of the "base" and of the "student".
        scores: [layers][key/value heads], if heads were chosen by scores; else empty.
        from_config: there are no weights beside config.json, and `weights` describes those that there would be.
    """

    source: Source
    config: dict[str, Any]
    settings: ConversionConfig
    plan: Plan
    weights: Weights
    ignored: tuple[str, ...]
    added: dict[str, tuple[int, ...]]
    cache_bytes: dict[int, dict[str, int]]
    scores: tuple[tuple[float, ...], ...] = ()
    from_config: bool = False

    @property
    def state_bytes(self) -> int:
        """Return the bytes of one sequence's recurrent states in all layers, in float32."""
        from linearize.modeling.added import linear_heads_by_layer

        by_layer = linear_heads_by_layer(self.config, self.plan, device="meta")
        return sum(4 * len(heads.site.heads) * math.prod(heads.state_shape()) for heads in by_layer.values())

    @property
    def least_memory_bytes(self) -> int:
        """Return the least memory that a conversion takes: libraries, and the base's weights if it is run."""
        return IMPORTED_BYTES + (self.weights.nbytes if self.scores or self.calibrates else 0)

    @property
    def calibrates(self) -> bool:
        """Return True if `convert` will run the base model to calibrate the added parameters."""
        when = self.settings.calibration.when
        return bool(self.added) and (when == "always" or (when == "auto" and can_run_base(self.weights.nbytes)))

    @property
    def key_value_heads(self) -> int:
        """Return the number of key/value heads in each layer."""
        return self.config["num_key_value_heads"]

    @property
    def base_parameters(self) -> int:
        """Return the number of the base's parameters."""
        return sum(math.prod(info.shape) for info in self.weights.tensors.values())

    @property
    def added_parameters(self) -> int:
        """Return the number of parameters that the conversion adds."""
        return sum(math.prod(shape) for shape in self.added.values())

    def coverage(self) -> dict[str, int]:
        """Count layers and key/value heads, and those that the plan makes linear."""
        heads = len(self.plan.layers) * self.key_value_heads
        linear = sum(len(layer.linear_heads(self.key_value_heads)) for layer in self.plan.layers)
        return {
            "layers": len(self.plan.layers),
            "layers_planned": len(self.plan.linear_layers(self.key_value_heads)),
            "heads": heads,
            "heads_planned": linear,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `linearize plan --json` prints."""
        group = self.config["num_attention_heads"] // self.key_value_heads
        windows = find_family(self.plan.base_model_type).sliding_windows(self.config)
        layers = [
            {
                "layer": i,
                "softmax_heads": list(layer.softmax_heads),
                "softmax_window": layer.softmax_window,
                "linear_heads": list(layer.linear_heads(self.key_value_heads)),
                **{
                    name: None if layer.native else getattr(layer, name)
                    for name in ("mixer", "mix", "gate", "window", "sinks")
                },
                "scores": list(self.scores[i]) if self.scores else None,
                "native": layer.native,
                "sliding_window": windows[i],
            }
            for i, layer in enumerate(self.plan.layers)
        ]
        return {
            "model": self.source.name,
            "family": self.plan.base_model_type,
            "query_heads_per_key_value_head": group,
            "experimental": find_family(self.plan.base_model_type).experimental,
            "from_config_alone": self.from_config,
            "settings": self.settings.model_dump(),
            "coverage": self.coverage(),
            "layers": layers,
            "parameters_base": self.base_parameters,
            "parameters_added": self.added_parameters,
            "tensors_added": {name: list(shape) for name, shape in self.added.items()},
            "state_bytes": self.state_bytes,
            "cache_bytes": {str(length): sizes for length, sizes in self.cache_bytes.items()},
            "weights_bytes": self.weights.nbytes,
            "disk_bytes_copying": self.weights.nbytes + 4 * self.added_parameters,
            "disk_bytes_linking": 4 * self.added_parameters,
            "least_memory_bytes": self.least_memory_bytes,
        }


def inspect_source(
    source: Source,
    settings: ConversionConfig,
    weights: Weights | None = None,
    progress: Callable[[str], None] = lambda text: None,
    *,
    converting: bool = False,
) -> Inspection:
    """Plan a conversion and check all that can be checked without writing.

    Args:
        weights: the result of `read_weights`, if it was called already.
        progress: receives one line of text at a time, while heads are scored.
        converting: `keep_softmax: auto` may run the base model. Forms that name a score run it in any case.

    Raises:
        LinearizeError: the model cannot be converted, or not with these settings.
    """
    from linearize.modeling.added import added_shapes
    from linearize.modeling.cache_size import cache_sizes

    raw = base_config(source)
    config, family_name = full_config(source, raw), raw["model_type"]
    from_config = weights is None and not has_weights(source.folder)
    weights = weights or (weights_of_config(source, config) if from_config else read_weights(source.folder))
    settings = resolve_auto(source, config, settings, weights, progress, converting)
    scores: HeadScores = []

    def score(by: str) -> HeadScores:
        from linearize.conversion.head_choice import ScoreRequest, base_head_scores

        layers = converted_layers(family_name, config, settings)
        scores.extend(base_head_scores(ScoreRequest(source, config, settings, by, layers, progress)))
        return scores

    plan = make_plan(family_name, config, settings, None if from_config else score)
    ignored = () if from_config else check_tensors(source, config, family_name, weights)
    added = added_shapes(config, plan)
    return Inspection(
        source=source,
        config=config,
        settings=settings,
        plan=plan,
        weights=weights,
        ignored=ignored,
        added=added,
        cache_bytes=cache_sizes(config, plan, _number_bytes(weights)),
        scores=tuple(map(tuple, scores)),
        from_config=from_config,
    )


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


def _number_bytes(weights: Weights) -> int:
    """Return the bytes of one cached number, which has the dtype of most of the weights."""
    sizes = Counter[str]()
    for info in weights.tensors.values():
        sizes[info.dtype if info.dtype in FLOATING else "BF16"] += info.nbytes
    return BITS[sizes.most_common(1)[0][0]] // 8
