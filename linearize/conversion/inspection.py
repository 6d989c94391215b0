"""What is known about a conversion before anything is written: config, plan, tensors, sizes."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linearize.checkpoint.base import base_config, check_tensors, full_config, weights_of_config
from linearize.checkpoint.source import Source
from linearize.checkpoint.weights import BITS, FLOATING, Weights, has_weights, read_weights
from linearize.conversion.head_choice import base_head_scores, with_kept_heads
from linearize.conversion.keep_softmax import softmax_heads
from linearize.device import can_run_base
from linearize.errors import ConfigError
from linearize.families.registry import find_family
from linearize.plan import LayerPlan, Plan
from linearize.settings.config import ConversionConfig, layer_numbers

# torch, transformers and a model without weights: 355 MiB where a 4 GiB model was linked without verification
IMPORTED = 355 << 20


@dataclass(frozen=True)
class Inspection:
    """What is known about a conversion before anything is written.

    Attributes:
        added: names, shapes of the parameters the conversion adds (float32).
        cache_bytes: context length -> bytes of one sequence's cache, of the base and of the student.
        scores: by layer and key/value head, where heads were chosen by them.
        from_config: no weights lie beside config.json; `weights` is what they would be.
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
        """Bytes of one sequence's recurrent states, all layers."""
        from linearize.modeling.added import linear_branches

        branches = linear_branches(self.config, self.plan, device="meta")
        return sum(4 * len(b.site.heads) * math.prod(b.state_shape()) for b in branches.values())

    @property
    def least_memory_bytes(self) -> int:
        """What a conversion takes: torch and transformers, and the base where it is run, without its activations."""
        return IMPORTED + (self.weights.nbytes if self.scores or self.calibrates else 0)

    @property
    def calibrates(self) -> bool:
        """Whether the base is to be run to fit what is added."""
        when = self.settings.calibration.when
        return bool(self.added) and (when == "always" or (when == "auto" and can_run_base(self.weights.nbytes)))

    @property
    def key_value_heads(self) -> int:
        return self.config["num_key_value_heads"]

    @property
    def base_parameters(self) -> int:
        return sum(math.prod(info.shape) for info in self.weights.tensors.values())

    @property
    def added_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.added.values())

    def coverage(self) -> dict[str, int]:
        heads = len(self.plan.layers) * self.key_value_heads
        linear = sum(len(layer.linear_heads(self.key_value_heads)) for layer in self.plan.layers)
        return {
            "layers": len(self.plan.layers),
            "layers_planned": len(self.plan.linear_layers(self.key_value_heads)),
            "heads": heads,
            "heads_planned": linear,
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as printed by `linearize plan --json`."""
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
    """Steps 1 to 3 of a conversion: everything that can be checked without writing.

    Args:
        weights: what `read_weights` found, where it has been called already.
        converting: whether `keep_softmax: auto` may run the base model.
        progress: hears of the heads being scored, the one thing here that runs the base model.
    """
    from linearize.modeling.added import added_shapes
    from linearize.modeling.cache_size import cache_sizes

    raw = base_config(source)
    config, family_name = full_config(source, raw), raw["model_type"]
    from_config = weights is None and not has_weights(source.folder)
    weights = weights or (weights_of_config(source, config) if from_config else read_weights(source.folder))
    settings = with_kept_heads(source, config, settings, weights, progress, converting)
    scores: list[list[float]] = []

    def score(by: str) -> list[list[float]]:
        layers = chosen_layers(family_name, config, settings)
        scores.extend(base_head_scores(source, config, settings, by, layers, progress))
        return scores

    plan = make_plan(family_name, config, settings, None if from_config else score)
    ignored = () if from_config else check_tensors(source, config, family_name, weights)
    added = added_shapes(config, plan)
    return Inspection(
        source,
        config,
        settings,
        plan,
        weights,
        ignored,
        added,
        cache_sizes(config, plan, _number_bytes(weights)),
        tuple(map(tuple, scores)),
        from_config,
    )


def make_plan(
    family_name: str,
    config: dict[str, Any],
    settings: ConversionConfig,
    score: Callable[[str], list[list[float]]] | None = None,
) -> Plan:
    """One LayerPlan for every layer of the model; `score` is called where heads are chosen by their scores."""
    layers = config["num_hidden_layers"]
    chosen = chosen_layers(family_name, config, settings)
    kept = softmax_heads(settings.keep_softmax, layers, config["num_key_value_heads"], score, chosen)
    changes: dict[int, dict[str, Any]] = {}
    for spec, changed in settings.layers.items():
        for number in layer_numbers(spec):
            if number >= layers:
                raise ConfigError(f"layers.{spec}: got layer {number}, the model has layers 0 to {layers - 1}")
            changes[number] = changed.model_dump(exclude_none=True)
    every_head = tuple(range(config["num_key_value_heads"]))
    windows = find_family(family_name).sliding_windows(config)
    return Plan(
        family_name,
        tuple(
            LayerPlan(heads, **_fitting(settings.layer_settings(changes.get(i, {})), windows[i]))
            if i in chosen
            else LayerPlan(every_head, native=True)
            for i, heads in enumerate(kept)
        ),
    )


def _fitting(settings: dict[str, Any], sliding_window: int | None) -> dict[str, Any]:
    """A layer's settings; where the family gives it a sliding window, that is its softmax heads' too."""
    return settings if sliding_window is None else settings | {"softmax_window": None}


def chosen_layers(family_name: str, config: dict[str, Any], settings: ConversionConfig) -> tuple[int, ...]:
    """The layers that are converted, ascending. One with a sliding window of its own costs constant memory already."""
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
    """Bytes of one cached number: of the type that most of the weights have."""
    sizes = Counter[str]()
    for info in weights.tensors.values():
        sizes[info.dtype if info.dtype in FLOATING else "BF16"] += info.nbytes
    return BITS[sizes.most_common(1)[0][0]] // 8
