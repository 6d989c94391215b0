"""Estimate how long a conversion will take, and how much memory and disk, from a probe of one layer.

One decoder layer with random weights runs at two lengths, in the three ways that a conversion uses: softmax alone,
forward and backward with gated heads, and linear heads. A fit a T + b T^2 gives the time of a row of T tokens. The rest
is counting rows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights

from linearize.conversion.calibrate import HELD_OUT
from linearize.conversion.head_gates import gated_heads
from linearize.conversion.known_scores import known_scores
from linearize.conversion.look_ups import ROOM
from linearize.conversion.probes import RECALL_GATES, look_up_distances_of
from linearize.conversion.verify import LONGEST
from linearize.data.text_rows import LONGEST_ROW
from linearize.device import RESIDENT_BYTES, compute_dtype, pick_device
from linearize.errors import ConfigError
from linearize.families.registry import find_family
from linearize.modeling.factory import linearized_classes
from linearize.modeling.layer_pass import RECORDED_BYTES
from linearize.modeling.layer_stream import LayerStream, run_layer
from linearize.plan import Plan
from linearize.settings.config import ConversionConfig
from linearize.training.losses import LOGIT_BYTES

if TYPE_CHECKING:
    from linearize.conversion.inspection import Inspection

# lengths of the rows that are timed, in tokens
LENGTHS = (256, 1024)
# bytes of a layer that is too large to be made just for its time, as those of large mixtures are
TIMED_BYTES = 1 << 30
# conversions that a search measures, as a rule, and passes of calibration over one row to scale all branches
TRIALS, SCALING_PASSES = 4, 4
# seconds for imports, reading text, planning and writing
FIXED_SECONDS = 15.0
# bytes a second at which weights are read again, from memory as a rule
READ_RATE = 2e9
# bytes of libraries, and of what a layer allocates besides its output, per token and hidden unit
IMPORTED_BYTES, WORK_BYTES = 500 << 20, 150


@dataclass(frozen=True)
class RowTime:
    """The time of one row in one layer: a T + b T^2 seconds."""

    a: float
    b: float

    def __call__(self, tokens: int) -> float:
        return self.a * tokens + self.b * tokens**2


@dataclass(frozen=True)
class LayerTimes:
    """Times of one layer: softmax forward, forward and backward with gates, linear heads forward."""

    softmax: RowTime
    gradient: RowTime
    linear: RowTime


@dataclass(frozen=True)
class Estimate:
    """The time, memory and disk of a conversion.

    Attributes:
        steps: name of a step -> seconds.
        memory: bytes of the largest resident set.
        disk: bytes that are written.
    """

    steps: dict[str, float]
    memory: int
    disk: int

    @property
    def seconds(self) -> float:
        """Return the time of all steps."""
        return sum(self.steps.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the record that `linearize plan --json` prints."""
        steps = {name: round(seconds, 1) for name, seconds in self.steps.items()}
        return {"seconds": round(self.seconds, 1), "steps": steps, "memory_bytes": self.memory, "disk_bytes": self.disk}


@torch.no_grad()
def time_layer(config: dict[str, Any], plan: Plan) -> LayerTimes | None:
    """Time one layer of a model with random weights; None if the layer is larger than TIMED_BYTES.

    Args:
        config: the base's config, with every default filled in.
        plan: a plan under which the layer has linear heads alone.
    """
    device, dtype = pick_device(), compute_dtype("auto")
    classes, family = linearized_classes(find_family(plan.base_model_type)), find_family(plan.base_model_type)
    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    with init_empty_weights(include_buffers=False):
        student_config = classes.config.from_dict({**fields, "linearize": plan.to_dict()})
        model = classes.causal_lm._from_config(student_config, dtype=dtype).eval()
    index = plan.linear_layers(config["num_key_value_heads"])[0]
    layer, layer_plan = model.base_model.layers[index], plan.layers[index]
    if sum(parameter.nbytes for parameter in layer.parameters()) > TIMED_BYTES:
        return None
    embeddings = (model.get_input_embeddings(), model.base_model.layers)
    for module in (layer, *(child for child in model.base_model.children() if child not in embeddings)):
        _randomise(module, device)
    attention = getattr(layer, family.attention_attribute)
    stream = LayerStream(model, device=device)

    def timed(run: Callable[[Any, Any], None]) -> RowTime:
        seconds = []
        for length in LENGTHS:
            batch = stream.recorded(torch.randn(1, length, config["hidden_size"], device=device, dtype=dtype))
            run(batch.hidden, batch.calls[index])  # the first run allocates
            start = time.perf_counter()
            run(batch.hidden, batch.calls[index])
            seconds.append(time.perf_counter() - start)
        return _fitted(seconds)

    def forward(hidden: torch.Tensor, call: Any) -> None:
        run_layer(layer, hidden, call)

    def backward(hidden: torch.Tensor, call: Any) -> None:
        with torch.enable_grad():
            hidden = hidden.requires_grad_()
            output = run_layer(layer, hidden, call)
            torch.autograd.grad(output.float().sum(), [hidden, attention.head_gates])

    linear = timed(forward)
    attention.set_linear(False)
    softmax = timed(forward)
    with gated_heads(model, layer_plan.window, layer_plan.sinks, [index], device) as (gated,):
        gated.head_gates = torch.full_like(gated.head_gates, 0.5).requires_grad_()
        gradient = timed(backward)
    return LayerTimes(softmax, gradient, linear)


def _randomise(module: torch.nn.Module, device: str) -> None:
    """Give random values to the parameters of a module that has none yet."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.empty_like(parameter, device=device).normal_(std=0.02)
                setattr(part, name, torch.nn.Parameter(values, requires_grad=False))


def _fitted(seconds: list[float]) -> RowTime:
    """Fit a T + b T^2 to the times at LENGTHS; neither falls below zero."""
    short, long = LENGTHS
    b = max(0.0, (seconds[1] / long - seconds[0] / short) / (long - short))
    return RowTime(max(0.0, seconds[1] / long - b * long), b)


def estimate(
    times: LayerTimes,
    config: dict[str, Any],
    settings: ConversionConfig,
    *,
    weights: int,
    scores: bool,
    trials: int,
) -> Estimate:
    """Estimate a conversion.

    Args:
        config: the base's config, with every default filled in.
        weights: bytes of the base's weights.
        scores: heads will be scored.
        trials: conversions that will be measured, to choose one; 0 if the choice is made.
    """
    layers, hidden, vocabulary = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    positions, scoring = config["max_position_embeddings"], settings.scoring
    distances = look_up_distances_of(settings, positions)
    row = max(distances, default=4 * settings.window) + ROOM // 2
    text_row = min(LONGEST_ROW, positions)
    read = weights / READ_RATE if weights > RESIDENT_BYTES else 0.0
    one_score = times.gradient(row) + times.softmax(row) if scoring.method == "gradient" else times.softmax(row)
    passes = len(RECALL_GATES) if scoring.method == "gradient" else 1
    steps = {
        "score heads": (layers * scoring.rows * passes * one_score + 2 * read) * scores,
        "calibrate": layers
        * (
            (settings.calibration.rows + HELD_OUT) * (times.softmax(text_row) + times.linear(text_row))
            + SCALING_PASSES * times.linear(text_row)
        )
        + (1 + SCALING_PASSES) * read,
        "measure": (
            layers * settings.quality.rows * (times.softmax(row) + (1 + trials) * times.linear(row))
            + (2 + trials) * read
        )
        * (trials > 0),
        "verify": layers * (2 * times.softmax(LONGEST) + 3 * times.linear(LONGEST)) + 6 * read,
        "read and write": FIXED_SECONDS,
    }
    if settings.calibration.when == "never":
        steps["calibrate"] = 0.0
    width = compute_dtype("auto").itemsize
    resident = weights if weights <= RESIDENT_BYTES else 2 * (weights // layers) + width * vocabulary * hidden
    recorded = row * hidden * width * layers if scoring.method == "gradient" and scores else 0
    rows_in_flight = 3 * row * hidden * width + min(recorded, RECORDED_BYTES)
    work = row * hidden * WORK_BYTES + 4 * LOGIT_BYTES
    return Estimate(steps, IMPORTED_BYTES + resident + rows_in_flight + work, weights)


def shortened(
    config: dict[str, Any], settings: ConversionConfig, plan: Plan, *, weights: int, known: bool
) -> tuple[ConversionConfig, Estimate | None]:
    """Return settings under which the default conversion takes no longer than `quality.budget`, and their estimate.

    A model with layers too large to be timed has none.

    The ways, from the best to the shortest: the settings as they are; heads scored by where they look; that, and
    fewer rows to calibrate on.

    Args:
        plan: a plan without softmax heads.
        weights: bytes of the base's weights.
        known: scores and choice are known, so that one conversion is measured.

    Raises:
        ConfigError: even the shortest way takes longer.
    """
    times, budget = time_layer(config, plan), settings.quality.budget
    if times is None and budget is not None:
        raise ConfigError(
            f"--budget: got {duration(budget)}, but a layer of this model takes more than {TIMED_BYTES >> 30} GiB and "
            "is not timed beforehand. Leave --budget out, or choose heads by hand (--keep-softmax every:4)"
        )
    if times is None:
        return settings, None
    look_up = settings.scoring.model_copy(update={"method": "lookup"})
    fewer = settings.calibration.model_copy(update={"rows": 2})
    faster = settings.model_copy(update={"scoring": look_up})
    for way in (settings, faster, faster.model_copy(update={"calibration": fewer})):
        takes = estimate(times, config, way, weights=weights, scores=not known, trials=1 if known else TRIALS)
        if budget is None or takes.seconds <= budget:
            return way, takes
    raise ConfigError(
        f"--budget: got {duration(budget or 0)}, this conversion takes about {duration(takes.seconds)} at least. Give "
        "it more, choose heads by hand (--keep-softmax every:4), or convert all (--keep-softmax none --no-calibrate)"
    )


def estimate_plan(inspection: "Inspection") -> Estimate | None:
    """Estimate the conversion of an inspected model; None if no head becomes linear, or its layers are too large."""
    J, layers = inspection.key_value_heads, inspection.plan.layers
    linear = tuple(layer if layer.native else layer.with_softmax_heads(()) for layer in layers)
    plan = replace(inspection.plan, layers=linear)
    if not plan.linear_layers(J):
        return None
    settings = inspection.settings
    if (times := time_layer(inspection.config, plan)) is None:
        return None
    if not inspection.calibrates:
        settings = settings.model_copy(
            update={"calibration": settings.calibration.model_copy(update={"when": "never"})}
        )
    open_choice, choice = bool(inspection.possible), inspection.choice
    known = choice is not None and choice.quality is None  # convert measures that it holds
    return estimate(
        times,
        inspection.config,
        settings,
        weights=inspection.weights.nbytes,
        scores=open_choice and (inspection.from_config or known_scores(inspection.source, settings) is None),
        trials=TRIALS if open_choice else int(known),
    )


def described(takes: Estimate) -> str:
    """Say what a conversion will do, and what it takes."""
    steps = ", ".join(f"{name} ({duration(seconds)})" for name, seconds in takes.steps.items() if seconds >= 1)
    return (
        f"about {duration(takes.seconds)} to {steps}; {takes.memory / 2**30:.1f} GiB of memory, at most "
        f"{takes.disk / 2**30:.1f} GiB of disk"
    )


def duration(seconds: float) -> str:
    """Write a time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
