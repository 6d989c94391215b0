"""Evaluation: student beside base, on the same tokens, with the baselines that would embarrass it.

1. Read the text; refuse what is too short.
2. Load the base's weights under the student's plan: base, untrained conversion and window + sinks in one instance.
3. Load the student; measure everything window by window and row by row.
4. Fold the figures into one Results, judge the gates, write results.json and report.md.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.checkpoint.writing import write_json, write_text
from linearize.convert import versions
from linearize.errors import ConfigError, LinearizeError
from linearize.report.gates import check_gates, evaluate_gates
from linearize.report.markdown import render_markdown
from linearize.report.results import (
    BASE,
    BRANCH_OFF,
    SCHEMA_VERSION,
    STUDENT,
    UNTRAINED,
    WINDOW,
    Metric,
    Results,
    make_metric,
)


@dataclass(frozen=True)
class Suite:
    """What to measure. `max_tokens` bounds the text per length; `recall_rows` the rows per distance."""

    data: tuple[str, ...] = ("sample-eval",)
    lengths: tuple[int, ...] = (512, 2048)
    recall: tuple[int, ...] = (64, 256, 1024)
    max_tokens: int = 16384
    recall_rows: int = 8
    text_field: str = "text"
    seed: int = 0

    def metric_names(self) -> list[str]:
        names = [f"{kind}@{length}" for length in self.lengths for kind in ("perplexity", "kl", "agreement")]
        return names + [f"recall@{distance}" for distance in self.recall]


def evaluate(
    model: Path,
    suite: Suite,
    *,
    base: str | None = None,
    gates: list[str] | None = None,
    min_recovery: float | None = None,
    out: Path | None = None,
    precision: str = "auto",
    progress: Callable[[str], None] = print,
) -> Results:
    """Measures and, where `out` is given, writes results.json and report.md there. See the module's list.

    Raises:
        ConfigError: bad gates, data, base. LinearizeError: logits that are not finite.
    """
    import torch

    from linearize.device import compute_dtype, pick_device
    from linearize.modeling.loading import load_student, load_tokenizer, load_unconverted, open_base, read_manifest
    from linearize.modeling.plan import Plan

    started = time.monotonic()
    gates = list(gates or [])
    if min_recovery is not None:
        gates += [f"perplexity@{length}.recovery>={min_recovery}" for length in suite.lengths]
    check_gates(gates, suite.metric_names())
    manifest = read_manifest(model)
    tokenizer = load_tokenizer(model)
    text_ids = _text_ids(suite, tokenizer)
    notes = []
    dtype, device = compute_dtype(precision), pick_device()
    with open_base(manifest, base) as source:
        plan = Plan.from_dict(manifest["plan"])
        reference = load_unconverted(source, plan, dtype=dtype).to(device)
        student = load_student(model, dtype=dtype).to(device)
        if reference.config.vocab_size != student.config.vocab_size:
            raise ConfigError(
                f"--base: its vocabulary has {reference.config.vocab_size} tokens, the student's "
                f"{student.config.vocab_size}; their figures cannot be compared"
            )
        positions_limit = reference.config.max_position_embeddings
        for length in (*suite.lengths, *(2 * distance + 1 for distance in suite.recall)):
            if length > positions_limit:
                notes.append(f"{length} tokens exceed the model's {positions_limit} positions")
        with torch.no_grad():
            metrics, positions = _measure(suite, text_ids, tokenizer, reference, student, device, progress)
        base_name = source.name
    results = Results(
        schema_version=SCHEMA_VERSION,
        model=model.resolve().name,
        base=base_name,
        settings=manifest["settings"],
        coverage=manifest["coverage"],
        cache_bytes=manifest["cache_bytes"],
        data=_data_record(suite, text_ids, dtype, device),
        metrics=metrics,
        positions=positions,
        gates=evaluate_gates(gates, metrics),
        seed=suite.seed,
        seconds=time.monotonic() - started,
        versions=versions(),
        command=shlex.join(["linearize", *sys.argv[1:]]),
        notes=tuple(notes),
    )
    if out is not None:
        write_results(results, out)
    return results


def write_results(results: Results, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", results.to_dict())
        write_text(out / "report.md", render_markdown(results))
    except PermissionError:
        raise ConfigError(f"--out: no permission to write in {out}") from None


def _measure(suite, text_ids, tokenizer, reference, student, device, progress) -> tuple[tuple[Metric, ...], dict]:
    """Every metric of every model, base first on each window so that nothing large is kept."""
    from linearize.evaluation.perplexity import WindowScores, position_buckets, score_window, windows_of
    from linearize.evaluation.recall import accuracy, recall_task

    forwards = {
        STUDENT: _forward(student),
        BRANCH_OFF: _forward(student, student.recurrent_branch_off),
        UNTRAINED: _forward(reference),
        WINDOW: _forward(reference, reference.recurrent_branch_off),
    }
    base_forward = _forward(reference, reference.softmax_attention)
    metrics, positions = [], {}
    for length in suite.lengths:
        scores = {name: WindowScores() for name in (BASE, *forwards)}
        windows = windows_of(text_ids, length, suite.max_tokens)
        for i, window in enumerate(windows):
            score_window(window[None].to(device), base_forward, forwards, scores)
            _tick(progress, f"perplexity@{length}", i + 1, len(windows))
        losses = {name: [x.mean().item() for x in score.losses] for name, score in scores.items()}
        _require_finite(losses, length)
        metrics.append(make_metric(f"perplexity@{length}", "lower", losses, exponentiate=True))
        metrics.append(make_metric(f"kl@{length}", "lower", {name: scores[name].kl for name in forwards}))
        metrics.append(
            make_metric(f"agreement@{length}", "higher", {name: scores[name].agreement for name in forwards})
        )
        positions[f"perplexity@{length}"] = _by_position(scores, position_buckets(length))
    every = {BASE: base_forward, **forwards}
    for distance in suite.recall:
        task = recall_task(distance, suite.recall_rows, len(tokenizer), tokenizer.bos_token_id, suite.seed)
        units: dict[str, list[float]] = {name: [] for name in every}
        for i, row in enumerate(task.ids):
            for name, forward in every.items():
                hidden, head = forward(row[None].to(device))
                units[name].append(accuracy(hidden, head, row.to(device), task.counted))
            _tick(progress, f"recall@{distance}", i + 1, len(task.ids))
        metrics.append(make_metric(f"recall@{distance}", "higher", units))
    return tuple(metrics), positions


def _forward(model, mode: Callable = contextlib.nullcontext) -> Callable:
    """ids [1, T] -> (final hidden states [T, D], output embeddings [C, D]), in the given mode of the model."""

    def forward(ids):
        with mode():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return hidden, model.get_output_embeddings().weight

    return forward


def _by_position(scores: dict, buckets: Iterator[tuple[int, int]]) -> list[dict[str, float]]:
    """Perplexity of every model in every range of positions; position p is the p-th token after the first."""
    import torch

    rows = []
    stacked = {name: torch.stack(score.losses) for name, score in scores.items()}
    for start, end in buckets:
        row: dict[str, float] = {"start": start, "end": end}
        row.update({name: losses[:, start - 1 : end - 1].mean().exp().item() for name, losses in stacked.items()})
        rows.append(row)
    return rows


def _require_finite(losses: dict[str, list[float]], length: int) -> None:
    import math

    for name, values in losses.items():
        if not all(math.isfinite(value) for value in values):
            raise LinearizeError(f"{name}: its logits are not finite at {length} tokens; the checkpoint is damaged")


def _text_ids(suite: Suite, tokenizer):
    """The evaluation text as one row of token ids, documents joined by an end-of-sequence token."""
    import torch

    from linearize.training.data import documents

    longest = max(suite.lengths, default=2)
    needed = max(suite.max_tokens, longest)
    ids: list[int] = []
    for name in suite.data:
        for document, _ in documents(name, tokenizer, text_field=suite.text_field, completion_only=False, seed=None):
            ids += document
            if len(ids) >= needed:
                break
    if len(ids) < longest:
        raise ConfigError(
            f"--data: {', '.join(suite.data)} hold {len(ids)} tokens, fewer than one window of {longest} (--lengths)"
        )
    return torch.tensor(ids)


def _data_record(suite: Suite, text_ids, dtype, device: str) -> dict[str, Any]:
    from linearize.training.data import data_fingerprint

    return {
        "text": ", ".join(suite.data),
        "text fingerprint": data_fingerprint(list(suite.data))[:16],
        "tokens per length": min(suite.max_tokens, text_ids.numel()),
        "recall rows per distance": suite.recall_rows,
        "precision": f"{str(dtype).removeprefix('torch.')} on {device}",
    }


def _tick(progress: Callable[[str], None], what: str, done: int, total: int) -> None:
    if done == total or done % 4 == 0:
        progress(f"{what}: {done} of {total}")
