"""Measure prefill and decode speed, cache size and peak memory of a student beside its base."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from linearize.evaluation.measurement import Measurement, Option, Stage
from linearize.report.results import STUDENT, StageResult

if TYPE_CHECKING:
    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite

# tokens to decode behind every prefill
DECODED_TOKENS = 8


class Efficiency(Measurement):
    """Speed and memory of the student beside its own softmax mode, which is the base."""

    name = "efficiency"
    options = (
        Option(
            "efficiency", int, (), least=1,
            suites={"quick": (512, 2048), "standard": (512, 2048, 8192), "full": (512, 2048, 8192, 32768)},
        ),
    )  # fmt: skip

    def positions(self, item: int) -> int:
        return item + DECODED_TOKENS

    def stages(self, suite: Suite, inputs: Any) -> Iterator[Stage]:
        if suite.efficiency:
            yield Stage("efficiency", partial(measure_efficiency, lengths=suite.efficiency))


def measure_efficiency(context: EvaluationContext, lengths: tuple[int, ...]) -> StageResult:
    """Time an evaluation's student at every length, and say in words where it overtakes the base."""
    from linearize.evaluation.inference_speed import bench_model

    rows = context.for_each_model(
        [STUDENT], lambda name, model: bench_model(model, lengths, DECODED_TOKENS, progress=context.progress)
    )[STUDENT]
    return StageResult(tables={"efficiency": rows}, notes=tuple(crossovers(rows)))


def crossovers(rows: list[dict[str, Any]]) -> list[str]:
    """Say where the student overtakes the base in prefill and in decoding. One length alone says nothing."""
    if len(rows) < 2:
        return []
    return [f"{phase}: {crossover(rows, f'{phase}_tokens_per_second')}" for phase in ("prefill", "decode")]


def crossover(rows: list[dict[str, Any]], column: str) -> str:
    """Say from which measured length on the student is ahead in a column where more is better."""
    rows = sorted(rows, key=lambda row: row["length"])
    ahead = [row["length"] for row in rows if row[f"student_{column}"] >= row[f"base_{column}"]]
    behind = [row["length"] for row in rows if row["length"] not in ahead]
    if not ahead:
        return f"the student is behind the base at every length measured, up to {behind[-1]:,} tokens"
    if not behind:
        return f"the student is ahead of the base at every length measured, from {ahead[0]:,} tokens"
    first = next((length for length in ahead if length > max(behind)), None)
    if first is None:
        return f"ahead at {_listed(ahead)} and behind at {_listed(behind)} tokens"
    return f"the student overtakes the base between {max(behind):,} and {first:,} tokens"


def _listed(lengths: list[int]) -> str:
    return ", ".join(f"{length:,}" for length in lengths)


MEASUREMENT = Efficiency()
