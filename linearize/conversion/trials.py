"""Measure conversions of one base: each reads the held-out rows, and is held against what the base made of them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from linearize.checkpoint.fingerprint import fingerprint_of
from linearize.checkpoint.result_cache import cached_on_disk, unfinished_folder
from linearize.checkpoint.source import Source
from linearize.conversion.quality import HeldOutRows, Reading, Standard, held_out_rows, read_rows
from linearize.device import compute_dtype, pick_device
from linearize.errors import CheckpointError, ConfigError
from linearize.modeling.cache_size import cache_sizes
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.loading import open_unconverted
from linearize.plan import Plan
from linearize.progress import doing
from linearize.settings.config import ConversionConfig

# context at which caches are compared, in tokens
CONTEXT = 32768


@dataclass(frozen=True)
class Trial:
    """A conversion that was measured.

    Attributes:
        heads: number of key/value heads that keep softmax, of the heads that could become linear.
        window: keys that linear heads see.
        cache: context length -> cache as a share of the base's.
        reading: its reading of the held-out rows.
        holds: true if it holds all that is asked for.
    """

    heads: int
    window: int
    cache: dict[int, float]
    reading: Reading
    holds: bool

    def to_dict(self, standard: Standard) -> dict[str, Any]:
        """Return the record for linearize.json."""
        held = standard.held(self.reading)
        return {
            "softmax_heads": self.heads,
            "window": self.window,
            "cache": {str(length): round(share, 5) for length, share in self.cache.items()},
            "holds": self.holds,
            "held": {
                group: {kind: round(one.share, 4) for kind, one in shares.items()} for group, shares in held.items()
            },
            **self.reading.to_dict(),
        }


@dataclass
class Examiner:
    """Measures conversions of one base.

    Attributes:
        config: the base's config, with every default filled in.
        all_linear: the plan without a softmax head, under which base and window + sinks are read.
        width: bytes of one cached number.
        cache_key: everything that decides the readings, if they are cached on disk.
    """

    source: Source
    config: dict[str, Any]
    settings: ConversionConfig
    all_linear: Plan
    width: int
    cache_key: dict[str, Any] | None = None
    rows: HeldOutRows = field(init=False)
    standard: Standard = field(init=False)

    def __post_init__(self) -> None:
        """Read the rows with the base, and with window + sinks in every head.

        Raises:
            CheckpointError: the base computes logits that are not finite.
            ConfigError: nothing can be measured.
        """
        quality = self.settings.quality
        self.rows = held_out_rows(self.source, self.config, self.settings)
        if not self.rows.rows:
            raise self._nothing_to_measure()
        base = self._cached("base", lambda: self._base[0])
        if not all(nats.isfinite().all() for nats in base.nats.values()):
            raise CheckpointError(f"{self.source.name}: its logits are not finite; its weights are damaged")
        alone = self._cached("window alone", self._read_window_alone)
        self.standard = Standard(base, alone, quality.target, quality.divergence)
        if not self.standard.answered and alone.divergence is None:
            raise self._nothing_to_measure()

    def trial(self, plan: Plan, added: dict[str, Tensor] | None, heads: int, window: int) -> Trial:
        """Measure the conversion under a plan.

        Args:
            added: its added parameters; None for their first values.
            heads: number of its softmax heads.
            window: its window, where single layers do not set one of their own.
        """

        name = fingerprint_of(plan.to_dict())

        def read() -> Reading:
            _, base_hidden = self._base
            with doing(f"measuring {heads} softmax heads"):
                return read_rows(self._open(name, plan, added), self.rows, plan.longest_window(), base_hidden)[0]

        reading = self._cached(name, read)
        return Trial(heads, window, self.cache(plan), reading, self.standard.holds(reading))

    @functools.cached_property
    def _base(self) -> tuple[Reading, list[Tensor]]:
        """Reading and hidden states of the base."""
        stream = self._open("base", self.all_linear, None)
        with doing("measuring the base"), stream.model.softmax_attention():
            return read_rows(stream, self.rows, self.all_linear.longest_window())

    def _read_window_alone(self) -> Reading:
        """Read the rows with window + sinks in every head."""
        _, base_hidden = self._base
        stream = self._open("window alone", self.all_linear, None)
        with doing("measuring window + sinks alone"), stream.model.recurrent_branch_off():
            return read_rows(stream, self.rows, self.all_linear.longest_window(), base_hidden)[0]

    def _cached(self, name: str, read: Callable[[], Reading]) -> Reading:
        """Return a reading: an earlier one from disk, if this examiner has a key."""
        if (key := self._key(name)) is None:
            return read()
        return cached_on_disk("readings", key, lambda: read().to_stored(), parse=Reading.from_stored)

    def _key(self, name: str) -> dict[str, Any] | None:
        """Return what decides a reading; None if readings are not cached."""
        return None if self.cache_key is None else {**self.cache_key, "reading": name}

    def _nothing_to_measure(self) -> ConfigError:
        return ConfigError(
            f"{self.source.name}: the loss of a conversion cannot be measured: there is no text beyond the window, for "
            "want of a tokenizer, text or positions, and the model copies no random tokens. Choose heads by hand "
            "(--keep-softmax every:4) or convert all (--keep-softmax none), without --require-quality"
        )

    def cache(self, plan: Plan) -> dict[int, float]:
        """Return a conversion's cache as a share of the base's, by context length."""
        return cache_shares(self.config, plan, self.width)

    def record(self, chosen: Trial, trials: tuple[Trial, ...]) -> dict[str, Any]:
        """Return the record of what was measured, for linearize.json."""
        standard = self.standard
        return {
            "target": standard.quality,
            "divergence_limit": standard.divergence,
            "holds": chosen.holds,
            "lost": standard.shortfalls(chosen.reading),
            "answered": list(standard.answered),
            "tokens": self.rows.tokens,
            "chosen": chosen.to_dict(standard),
            "base": standard.base.to_dict(),
            "window_alone": standard.window_alone.to_dict(),
            "curve": [trial.to_dict(standard) for trial in trials],
        }

    def _open(self, name: str, plan: Plan, added: dict[str, Tensor] | None) -> LayerStream:
        """Open the conversion under a plan for the reading of that name."""
        key = self._key(name)
        return open_unconverted(
            self.source,
            plan,
            dtype=compute_dtype("auto"),
            device=pick_device(),
            added=added,
            unfinished=None if key is None else unfinished_folder("readings", key),
        )


def cache_shares(config: dict[str, Any], plan: Plan, width: int) -> dict[int, float]:
    """Return the cache under a plan as a share of the base's, by context length; see `cache_sizes`."""
    sizes = cache_sizes(config, plan, width)
    return {length: of_length["student"] / of_length["base"] for length, of_length in sizes.items()}


def examine(
    source: Source,
    config: dict[str, Any],
    settings: ConversionConfig,
    plan: Plan,
    added: dict[str, Tensor] | None,
    width: int,
) -> dict[str, Any]:
    """Measure one conversion, and return the record for linearize.json.

    Args:
        config: the base's config, with every default filled in.
        added: its added parameters; None for their first values.
        width: bytes of one cached number.
    """
    # base and window + sinks are read under the same plan without softmax heads
    layers = tuple(layer if layer.native else layer.with_softmax_heads(()) for layer in plan.layers)
    examiner = Examiner(source, config, settings, replace(plan, layers=layers), width)
    softmax_heads = sum(len(layer.softmax_heads) for layer in plan.layers if not layer.native)
    trial = examiner.trial(plan, added, softmax_heads, settings.window)
    return examiner.record(trial, (trial,))
