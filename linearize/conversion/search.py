"""Find how few heads can keep softmax: the smallest share that holds what the base can do, by measured loss.

1. Fit the recurrent branches of all heads to the base (calibrate.py). Those of a mixer whose heads depend on each other
   are fitted for every conversion that is tried.
2. Read the held-out rows with the base and with window + sinks alone (trials.py).
3. Read them with conversions that keep more and more of the best heads, until look-ups hold; search by bisection.
4. If text does not hold yet, go on with more heads, or with a window twice as long where that takes fewer bytes.

Every conversion that is tried is the real one: its heads, its window, its fitted branches.
"""

import bisect
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from linearize.checkpoint.source import Source
from linearize.conversion.calibrate import Calibration, calibrate
from linearize.conversion.trials import CONTEXT, Examiner, Trial, cache_shares
from linearize.data.text_rows import text_rows
from linearize.errors import ConfigError, CoverageError
from linearize.modeling.added import added_shapes, linear_heads_by_layer, of_fewer_heads
from linearize.modeling.linear_heads import LinearHeads
from linearize.plan import Plan
from linearize.settings.config import ConversionConfig

# shares of heads that are tried; more would save little of the cache
SHARES = (0, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
# the share that is tried first
FIRST_SHARE = 3 / 16
# tokens beyond a longer window that a divergence is measured on
LEAST_TEXT = 256
# a divergence so many times the limit is not mended by the next step
FAR_OFF = 1.5
# a conversion whose cache is a larger share of the base's gains nothing
WORTHWHILE = 0.9


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        heads: number of heads that keep softmax.
        window: keys that linear heads see.
        calibration: the fitted parameters of this conversion; None if it is not calibrated.
        record: all that was measured, for linearize.json.
    """

    heads: int
    window: int
    calibration: Calibration | None
    record: dict[str, Any]


@dataclass
class Search:
    """A search for the number of heads that keep softmax.

    Attributes:
        config: the base's config, with every default filled in.
        planned: returns the plan in which that many heads keep softmax, the best by score, with that window.
        heads: number of key/value heads to choose from.
        width: bytes of one cached number.
        progress: receives one line of text at a time.
        cache_key: everything that decides the outcome; steps that are done are cached under it, so that the same
            command goes on where an earlier one was stopped.
        first: number of heads and window to try first, and to take if they hold; None if nothing is known.
    """

    source: Source
    config: dict[str, Any]
    settings: ConversionConfig
    planned: Callable[[int, int], Plan]
    heads: int
    width: int
    progress: Callable[[str], None]
    cache_key: dict[str, Any]
    first: tuple[int, int] | None = None
    _trials: dict[tuple[int, int], Trial] = field(default_factory=dict)

    def run(self) -> Found:
        """Search for the smallest cache that holds what the base can do.

        Returns:
            What was found. If nothing within the budget holds, the largest cache within it.

        Raises:
            ConfigError: not even window + sinks alone fit the budget.
            CoverageError: nothing is to be gained from a conversion of this model.
        """
        counts = self._counts()
        if self._independent_heads():
            self._calibration_of(self.planned(0, self.settings.window))  # before the rows: a base may be damaged
        answered = ", ".join(name.replace("@", " from ") for name in self._examiner.standard.answered) or "none"
        self.progress(f"held-out rows of {self._examiner.rows.tokens} tokens; look-ups of the base: {answered}")
        chosen = self._smallest(counts)
        self._require_gain(chosen)
        trials = sorted(self._trials.values(), key=lambda trial: trial.cache[CONTEXT])
        calibration = self._calibration_of(self.planned(chosen.heads, chosen.window))
        return Found(chosen.heads, chosen.window, calibration, self._examiner.record(chosen, tuple(trials)))

    @functools.cached_property
    def _examiner(self) -> Examiner:
        """The examiner of all trials, which has read the rows with the base."""
        all_linear = self.planned(0, self.settings.window)
        return Examiner(self.source, self.config, self.settings, all_linear, self.width, self.cache_key)

    def _require_gain(self, chosen: Trial) -> None:
        """Refuse a conversion that saves next to nothing or loses look-ups, unless a budget was set for its cache."""
        cache, budget = chosen.cache[CONTEXT], self.settings.quality.cache_budget
        lost = self._examiner.standard.lost(chosen.reading)
        if budget is None and (cache > WORTHWHILE or lost):
            more = "more than " if lost else ""
            raise CoverageError(
                f"{self.source.name}: nothing is to be gained: what the base can do needs {more}{cache:.0%} of its "
                "cache at 32K tokens. Keep the base, or say what may be lost: --quality 0.9, --cache-budget 30%, "
                "--keep-softmax"
            )

    def _counts(self) -> list[int]:
        """Return the numbers of heads to try, ascending, within the budget."""
        counts = sorted({round(share * self.heads) for share in SHARES})
        budget = self.settings.quality.cache_budget
        if budget is None:
            return counts
        window = self.settings.window
        affordable = bisect.bisect_right(range(self.heads), budget, key=lambda count: self._cache(count, window))
        if not affordable:
            raise ConfigError(
                f"--cache-budget: got {budget:.1%}, window, sinks and recurrent states alone take "
                f"{self._cache(0, window):.1%} of the base's cache at 32K tokens; use a smaller --window"
            )
        largest = affordable - 1
        return sorted({count for count in counts if count < largest} | {largest})

    def _smallest(self, counts: list[int]) -> Trial:
        """Measure until the smallest cache that holds is found; see `run`."""
        window, standard = self.settings.window, self._examiner.standard
        budget = self.settings.quality.cache_budget or math.inf
        if self.first is not None and self._cache(*self.first) <= budget and self._trial(*self.first).holds:
            return self._trial(*self.first)
        least = _first_that_holds(
            lambda number: not standard.lost(self._trial(counts[number], window).reading),
            len(counts),
            start=max(i for i, count in enumerate(counts) if count <= max(counts[0], FIRST_SHARE * self.heads)),
        )
        if least is None:
            return self._trial(counts[-1], window)
        options = self._options(counts[least:])
        skip = False
        for option in options[:-1]:
            if skip:
                skip = False
                continue
            if (trial := self._trial(*option)).holds:
                return trial
            skip = (trial.reading.divergence or 0.0) > FAR_OFF * standard.divergence
        return self._trial(*options[-1])

    def _options(self, counts: list[int]) -> list[tuple[int, int]]:
        """Return numbers of heads and windows that may hold text, too, within the budget, the smallest cache first."""
        window, rows = self.settings.window, self._examiner.rows
        windows = [window]
        # a window twice as long has to leave text to measure, and is no longer than that of the softmax heads
        room = min((rows.rows[number].asked for number in rows.texts), default=0) - LEAST_TEXT
        if 2 * window <= min(room, self.settings.softmax_window or room):
            windows.append(2 * window)
        options = [(count, length) for count in counts for length in windows]
        budget = self.settings.quality.cache_budget or math.inf
        affordable = [option for option in options if self._cache(*option) <= budget]
        return sorted(affordable, key=lambda option: self._cache(*option))

    def _cache(self, count: int, window: int) -> float:
        """Return a conversion's cache at CONTEXT as a share of the base's."""
        return cache_shares(self.config, self.planned(count, window), self.width)[CONTEXT]

    def _independent_heads(self) -> bool:
        """Return True if every head's branch is the same whichever other heads are linear."""
        all_linear = self.planned(0, self.settings.window)
        by_layer = linear_heads_by_layer(self.config, all_linear, device="meta")
        return all(
            not isinstance(heads, LinearHeads) or heads.structure.independent_heads for heads in by_layer.values()
        )

    def _calibration_of(self, plan: Plan) -> Calibration | None:
        """Return the fit of a plan: its part of the fit of all heads, where these are independent."""
        if not self._independent_heads():
            return self._calibrated(plan)
        all_linear = self.planned(0, self.settings.window)
        if (calibration := self._calibrated(all_linear)) is None:
            return None
        layers = set(plan.linear_layers(self.config["num_key_value_heads"]))
        return replace(
            calibration,
            tensors=of_fewer_heads(calibration.tensors, self.config, all_linear, plan),
            errors={layer: pair for layer, pair in calibration.errors.items() if layer in layers},
        )

    def _calibrated(self, plan: Plan) -> Calibration | None:
        """Fit the branches of a plan, once; None if the settings or the text do not allow it, or there are none."""
        settings = self.settings.calibration
        if settings.when == "never" or not added_shapes(self.config, plan):
            return None
        rows = text_rows(self.source, plan.longest_window(), settings.text, settings.rows)
        if rows is None:
            return None
        return calibrate(self.source, plan, rows, settings.text, self.progress)

    def _trial(self, count: int, window: int) -> Trial:
        """Measure a conversion, once."""
        if (count, window) not in self._trials:
            plan = self.planned(count, window)
            calibration = self._calibration_of(plan)
            added = None if calibration is None else calibration.tensors
            trial = self._trials[count, window] = self._examiner.trial(plan, added, count, window)
            outcome = "; ".join(self._examiner.standard.shortfalls(trial.reading)) or "holds"
            kl = "" if trial.reading.divergence is None else f", KL {trial.reading.divergence:.4f}"
            self.progress(
                f"softmax in {count} of {self.heads} heads, window {window}: {trial.cache[CONTEXT]:.1%} of the base's "
                f"cache at 32K{kl}: {outcome}"
            )
        return self._trials[count, window]


def _first_that_holds(holds: Callable[[int], bool], count: int, start: int) -> int | None:
    """Return the first of the numbers below `count` that holds, if all behind it hold; None if none does.

    The search goes from `start` up or down, one, two, four… numbers at a time, and then bisects.
    """
    low, high, step = 0, count, 1  # those below `low` do not hold; `high` and those behind it do
    guess = start
    while low < high:
        if holds(guess):
            high = guess
        else:
            low = guess + 1
        if high == count:
            guess = min(low + step - 1, count - 1)
        elif low == 0:
            guess = max(high - step, 0)
        else:
            guess = (low + high) // 2
        step *= 2
    return None if low == count else low
