"""Inspect a source checkpoint and plan its conversion, without writing anything."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linearize.checkpoint.base import base_config, check_tensors, full_config, weights_of_config
from linearize.checkpoint.source import Source
from linearize.checkpoint.weights import BITS, FLOATING, Weights, has_weights, read_weights
from linearize.conversion.automatic import Choice, ChoiceRequest, resolve
from linearize.conversion.keep_softmax import HeadScores
from linearize.conversion.planning import converted_layers, make_plan
from linearize.families.registry import find_family
from linearize.plan import Plan
from linearize.settings.config import ConversionConfig


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
        choice: the choice that stands for `keep_softmax: auto`, if that was asked for and is known.
        possible: caches of the shares that come into question, while the choice is not known.
        estimate: what the conversion will take, if it was asked for.
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
    choice: Choice | None = None
    possible: tuple[dict[str, Any], ...] = ()
    estimate: dict[str, Any] | None = None

    @property
    def state_bytes(self) -> int:
        """Return the bytes of one sequence's recurrent states in all layers, in float32."""
        from linearize.modeling.added import linear_heads_by_layer

        by_layer = linear_heads_by_layer(self.config, self.plan, device="meta")
        return sum(4 * len(heads.site.heads) * math.prod(heads.state_shape()) for heads in by_layer.values())

    @property
    def calibrates(self) -> bool:
        """Return True if `convert` will run the base model to calibrate the added parameters."""
        return bool(self.added) and self.settings.calibration.when != "never"

    @property
    def number_bytes(self) -> int:
        """Return the bytes of one cached number."""
        return _number_bytes(self.weights)

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
            "reference": self.source.reference,
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
            # while `keep_softmax: auto` is not measured, the plan shows no softmax heads, and these shares may come
            "choice": {
                "measured": None if self.choice is None else self.choice.quality,
                "possible": list(self.possible),
            },
            "estimate": self.estimate,
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
    ignored = () if from_config else check_tensors(source, config, family_name, weights)
    width = _number_bytes(weights)
    request = ChoiceRequest(source, config, settings, width, weights.nbytes, progress)
    settings, choice, possible = resolve(request, measure=converting, weights=not from_config)
    scores: HeadScores = [] if choice is None else choice.scores

    def score(by: str) -> HeadScores:
        from linearize.conversion.head_choice import ScoreRequest, base_head_scores

        if not scores:
            layers = converted_layers(family_name, config, settings)
            scores.extend(base_head_scores(ScoreRequest(source, config, settings, by, layers, progress)))
        return scores

    plan = make_plan(family_name, config, settings, None if from_config else score)
    added = added_shapes(config, plan)
    return Inspection(
        source=source,
        config=config,
        settings=settings,
        plan=plan,
        weights=weights,
        ignored=ignored,
        added=added,
        cache_bytes=cache_sizes(config, plan, width),
        scores=tuple(map(tuple, scores)),
        from_config=from_config,
        choice=choice,
        possible=possible,
    )


def _number_bytes(weights: Weights) -> int:
    """Return the bytes of one cached number, which has the dtype of most of the weights."""
    sizes = Counter[str]()
    for info in weights.tensors.values():
        sizes[info.dtype if info.dtype in FLOATING else "BF16"] += info.nbytes
    return BITS[sizes.most_common(1)[0][0]] // 8
