"""Decide how many heads keep softmax where `keep_softmax` is "auto": from earlier results, or by a search.

A choice is cached on disk with its curve, so that a plan shows it and the next conversion of this base takes it over.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.fingerprint import fingerprint_of, tokenizer_fingerprint
from linearize.checkpoint.result_cache import read_cached, write_cached
from linearize.checkpoint.source import Source
from linearize.checkpoint.student import read_tokenizer
from linearize.conversion.keep_softmax import AUTO, HeadScores, share_form
from linearize.conversion.known_scores import known_scores
from linearize.conversion.planning import converted_layers, make_plan
from linearize.errors import ConfigError
from linearize.plan import Plan
from linearize.settings.config import ConversionConfig

if TYPE_CHECKING:
    from linearize.conversion.calibrate import Calibration

# raised when a change makes the same settings choose other heads
VERSION = 1
BY = "recall"


@dataclass(frozen=True)
class Choice:
    """The heads that keep softmax by default.

    Attributes:
        keep_softmax: the form of `keep_softmax` that was chosen.
        window: keys that linear heads see.
        scores: [layers][key/value heads].
        quality: what was measured, for linearize.json; None where it is known from somebody else's measurement.
        part: part of their fitted shares that the branches get; None without calibration.
        calibration: the fitted parameters, if they were fitted just now.
    """

    keep_softmax: str
    window: int
    scores: HeadScores
    quality: dict[str, Any] | None
    part: float | None = None
    calibration: "Calibration | None" = None


@dataclass(frozen=True)
class ChoiceRequest:
    """A choice to make.

    Attributes:
        config: the base's config, with every default filled in.
        width: bytes of one cached number.
        weights_bytes: bytes of the base's weights.
        progress: receives one line of text at a time.
    """

    source: Source
    config: dict[str, Any]
    settings: ConversionConfig
    width: int
    weights_bytes: int
    progress: Callable[[str], None]

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers that are converted."""
        return converted_layers(self.config["model_type"], self.config, self.settings)

    @property
    def heads(self) -> int:
        """Return the number of key/value heads to choose from."""
        return len(self.layers) * self.config["num_key_value_heads"]

    def plan(self, count: int, window: int, scores: HeadScores) -> Plan:
        """Return the plan in which the best `count` heads keep softmax."""
        changes = {"keep_softmax": share_form(BY, count, self.heads), "window": window}
        settings = self.settings.model_copy(update=changes)
        return make_plan(self.config["model_type"], self.config, settings, lambda by: scores)


def resolve(
    request: ChoiceRequest, *, measure: bool, weights: bool
) -> tuple[ConversionConfig, Choice | None, tuple[dict[str, Any], ...]]:
    """Replace `keep_softmax: auto` in the settings of a request; other forms stay.

    Args:
        measure: run the base if the choice is not known.
        weights: the base has weights; without them nothing is known of it.

    Returns:
        The settings; the choice, if `auto` was asked for and it is known; and else the caches of the shares that come
        into question, with settings that keep no softmax.
    """
    settings = request.settings
    if settings.keep_softmax != AUTO:
        return settings, None, ()
    if not request.heads:  # a plan that converts nothing is refused later, where heads are counted
        return settings.model_copy(update={"keep_softmax": "none"}), None, ()
    request.plan(0, settings.window, [])  # refuses layers that the model does not have
    choice = cached_choice(request) if weights else None
    if choice is None and weights:
        choice = choose(request) if measure else known_choice(request)
    if choice is None:
        return settings.model_copy(update={"keep_softmax": "none"}), None, possible_caches(request)
    return settings.model_copy(update={"keep_softmax": choice.keep_softmax, "window": choice.window}), choice, ()


def cached_choice(request: ChoiceRequest) -> Choice | None:
    """Return the choice of an earlier conversion of this base with these settings; None if there was none."""
    return read_cached("choices", _cache_key(request), lambda value: Choice(**value))


def known_choice(request: ChoiceRequest) -> Choice | None:
    """Return the choice that a file of scores states for this model and these settings; None if there is none."""
    known = known_scores(request.source, request.settings)
    found = None if known is None else known.found(request.settings)
    if known is None or found is None or request.settings.quality.cache_budget is not None:
        return None
    heads, window = found
    return Choice(share_form(BY, heads, request.heads), window, known.scores, quality=None)


def choose(request: ChoiceRequest) -> Choice:
    """Find the smallest share of heads that holds what the base can do, by running it; see search.py.

    Raises:
        ConfigError: nothing can be measured on this base.
        CoverageError: nothing is to be gained.
    """
    _require_measurable(request)
    from linearize.conversion.estimate import described, shortened
    from linearize.conversion.head_choice import ScoreRequest, base_head_scores
    from linearize.conversion.search import Search

    known = known_scores(request.source, request.settings)
    settings, takes = shortened(
        request.config,
        request.settings,
        request.plan(0, request.settings.window, []),
        weights=request.weights_bytes,
        known=known is not None,
    )
    progress = request.progress
    expected = "layers too large to time beforehand" if takes is None else described(takes)
    progress(f"{request.source.name}: {expected}")
    if known is not None:
        progress(f"{request.source.name}: head scores are known ({known.name})")
        scores = known.scores
    else:
        scores = base_head_scores(ScoreRequest(request.source, request.config, settings, BY, request.layers, progress))
    found = Search(
        request.source,
        request.config,
        settings,
        planned=lambda count, window: request.plan(count, window, scores),
        heads=request.heads,
        width=request.width,
        progress=progress,
        first=None if known is None else known.found(request.settings),
        cache_key=_step_key(request, settings, scores),
    ).run()
    choice = Choice(
        share_form(BY, found.heads, request.heads),
        found.window,
        scores,
        found.record,
        part=None if found.calibration is None else found.calibration.part,
        calibration=found.calibration,
    )
    stored = {field.name: getattr(choice, field.name) for field in fields(Choice) if field.name != "calibration"}
    write_cached("choices", _cache_key(request), stored)
    return choice


def possible_caches(request: ChoiceRequest) -> tuple[dict[str, Any], ...]:
    """Return the caches of the shares that come into question, before anything is measured."""
    from linearize.conversion.search import SHARES
    from linearize.conversion.trials import cache_shares

    no_scores = [[0.0] * request.config["num_key_value_heads"]] * request.config["num_hidden_layers"]
    window, counts = request.settings.window, sorted({round(share * request.heads) for share in SHARES})
    shares = [cache_shares(request.config, request.plan(count, window, no_scores), request.width) for count in counts]
    return tuple(
        {"softmax_heads": count, "cache": {str(length): round(share, 5) for length, share in of_count.items()}}
        for count, of_count in zip(counts, shares, strict=True)
    )


def _require_measurable(request: ChoiceRequest) -> None:
    """Refuse a base on which nothing can be measured."""
    from linearize.conversion.probes import look_up_distances_of

    settings, positions = request.settings, request.config["max_position_embeddings"]
    if look_up_distances_of(settings, positions):
        return
    room = f"its {positions:,} positions"
    if settings.softmax_window is not None and settings.softmax_window < positions:
        room = f"a --softmax-window of {settings.softmax_window:,}"
    why = f"{room} {'leave' if room.startswith('its') else 'leaves'} no room beyond a window of {settings.window}"
    raise ConfigError(
        f"{request.source.name}: --keep-softmax auto cannot measure this model: {why}. Choose heads by hand "
        "(--keep-softmax every:4), convert all (--keep-softmax none), or use a smaller --window"
    )


def _step_key(request: ChoiceRequest, settings: ConversionConfig, scores: HeadScores) -> dict[str, Any]:
    """Return everything that decides what a fit or a reading finds; what is asked of a conversion is not among it."""
    deciding = settings.model_dump(exclude={"description", "quality"}) | {"rows": settings.quality.rows}
    return {**_cache_key(request), "settings": deciding, "scores": fingerprint_of(scores)}


def _cache_key(request: ChoiceRequest) -> dict[str, Any]:
    """Return everything that decides the choice."""
    from linearize.data.documents import data_fingerprint
    from linearize.device import compute_dtype

    settings = request.settings
    tokenizer = read_tokenizer(request.source.folder)
    return {
        "version": VERSION,
        "base": request.source.fingerprint(),
        "settings": settings.model_dump(exclude={"description"}),
        "data": [
            data_fingerprint([settings.scoring.text, settings.calibration.text]),
            tokenizer_fingerprint(tokenizer),
        ],
        "precision": str(compute_dtype("auto")),
    }
