"""Evaluation: student beside base, on the same tokens, with the baselines that would embarrass it.

1. Read the text and the tasks; refuse what is too short or missing, and gates on what will not be measured.
2. Say how the weights are loaded: the base's under the student's plan (base, untrained conversion and window + sinks in one
   instance), the student, and the baselines asked for; all at once or in turns, as memory allows.
3. Run the stages, one after the other; finished ones are kept beside the report and reused after an interruption.
4. Fold the findings into one Results, judge the gates, write results.json and its renderings.
"""

import contextlib
import json
import math
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import fingerprint_of, sha256
from linearize.checkpoint.names import MANIFEST
from linearize.checkpoint.source import Source
from linearize.checkpoint.writing import check_writable, write_json, write_text
from linearize.errors import ConfigError, Interrupted
from linearize.evaluation.suite import Suite, within_positions
from linearize.modeling.plan import Plan
from linearize.placement import spread_evenly
from linearize.report.card import add_evaluation
from linearize.report.gates import (
    check_common,
    check_comparable,
    check_gates,
    evaluate_gates,
    expand_gates,
    read_older,
    recovery_gates,
    regression_gates,
)
from linearize.report.markdown import append_summary, render_markdown
from linearize.report.results import CONTROL, SCHEMA_VERSION, STUDENT, UNIFORM, Findings, Results
from linearize.versions import versions

UNFINISHED = ".stages"
# what computing takes beside the weights
HEADROOM = 1.25


def evaluate(
    model: Path,
    suite: Suite,
    *,
    base: str | None = None,
    gates: list[str] | None = None,
    min_recovery: float | None = None,
    compare: Path | None = None,
    out: Path | None = None,
    summary_file: Path | None = None,
    precision: str = "auto",
    hold: str = "auto",
    progress: Callable[[str], None] = print,
) -> Results:
    """Measures and, where `out` is given, writes the report there. See the module's list.

    Args:
        summary_file: verdict and table are added to it.
        hold: "together" has all weights in memory at once, "in-turn" one set at a time, "auto" what memory allows.

    Raises:
        ConfigError: bad gates, data, base, tasks, control. LinearizeError: logits that are not finite.
    """
    from linearize.device import compute_dtype, pick_device
    from linearize.evaluation.harness import task_fingerprint
    from linearize.evaluation.lab import Lab
    from linearize.modeling.loading import load_tokenizer, open_base, read_manifest
    from linearize.training.data import data_fingerprint

    started = time.monotonic()
    manifest = read_manifest(model)
    window = manifest["settings"]["window"]
    expressions, older, tasks = check_request(
        suite, window, gates=gates, min_recovery=min_recovery, compare=compare, summary_file=summary_file
    )
    if out is not None:
        check_writable(out)
    tokenizer = load_tokenizer(model)
    dtype, device = compute_dtype(precision), pick_device()
    unfinished = None if out is None else out / UNFINISHED
    with open_base(manifest, base) as source, _work_folder(unfinished) as work:
        suite, notes = within_positions(suite, source.read_config())
        _check_recovery(min_recovery, suite, window)
        if not any(layer.has_branch for layer in Plan.from_dict(manifest["plan"]).layers):
            suite = replace(suite, branch=False)
        _require_same_shape(source, model)
        _require_same_tokenizer(source, tokenizer)
        text, data = _read_text(suite, tokenizer, older, dtype, device)
        loaders, folders = _weights(model, manifest, source, suite, dtype)
        together = hold == "together" or (hold == "auto" and _fit(folders, dtype, device))
        if not together:
            notes.append(
                "models took turns in memory; the base's final hidden states waited on disk, in the precision they were "
                "computed in"
            )
        vocabulary = min(len(tokenizer), source.read_config()["vocab_size"])
        lab = Lab(loaders, tokenizer, vocabulary, text, device, suite.seed, together, work, progress)
        identity = {name: _fingerprint(folders[name]) for name in (STUDENT, CONTROL) if name in folders}
        identity |= {"base": source.fingerprint(), "dtype": str(dtype), "suite": asdict(suite)}
        identity |= {"data": data_fingerprint([*suite.data, *suite.choice])}
        identity |= {"tasks": [task_fingerprint(task, suite.task_limit) for task in tasks.values()]}
        findings = _run_stages(lab, _stages(suite, tasks, source.fingerprint()), identity, unfinished)
        base_name = source.name
    metrics = tuple(metric for found in findings for metric in found.metrics)
    results = Results(
        schema_version=SCHEMA_VERSION,
        model=model.resolve().name,
        base=base_name,
        settings=manifest["settings"],
        coverage=manifest["coverage"],
        cache_bytes=manifest["cache_bytes"],
        data=data,
        metrics=metrics,
        positions={name: rows for found in findings for name, rows in found.positions.items()},
        tables={name: rows for found in findings for name, rows in found.tables.items()},
        checks=tuple(check for found in findings for check in found.checks),
        gates=evaluate_gates(expressions, metrics),
        seed=suite.seed,
        seconds=time.monotonic() - started,
        versions=versions(),
        command=shlex.join(["linearize", *sys.argv[1:]]),
        notes=(*notes, *(note for found in findings for note in found.notes)),
    )
    if min_recovery is not None:
        recovered = recovery_gates(min_recovery, _beyond(suite, window), metrics)
        results = replace(results, gates=(*results.gates, *recovered))
    if older is not None:
        regressions, remarks = regression_gates(older, results)
        results = replace(results, gates=(*results.gates, *regressions), notes=(*results.notes, *remarks))
    _publish(results, model, out, summary_file)
    return results


def _publish(results: Results, model: Path, out: Path | None, summary_file: Path | None) -> None:
    """Writes the report; one that lies in the model's own folder is told in its card, too."""
    if out is not None:
        write_results(results, out)
        card = model / "README.md"  # an adapter alone has none
        if out.resolve() == (model / "eval").resolve() and card.is_file():
            add_evaluation(card, results)
    if summary_file is not None:
        append_summary(summary_file, results)


def check_request(
    suite: Suite,
    window: int,
    *,
    gates: list[str] | None = None,
    min_recovery: float | None = None,
    compare: Path | None = None,
    summary_file: Path | None = None,
) -> tuple[list[str], dict | None, dict[str, Any]]:
    """What is asked for and needs no weights to be refused: the gates, the older results and the harness's tasks.

    Args:
        window: the student's; within it there is nothing to recover.

    Raises:
        ConfigError: a gate on what is not measured, an unreadable file, an unknown task.
    """
    from linearize.evaluation.harness import load_tasks
    from linearize.evaluation.letters import read_items
    from linearize.modeling.loading import read_manifest

    expressions = expand_gates(list(gates or []))
    _check_recovery(min_recovery, suite, window)
    check_gates(expressions, suite.figures(), open_ended=bool(suite.tasks))
    older = read_older(compare) if compare else None
    if older is not None and not suite.tasks:
        check_common(older, suite.figures())
    if summary_file is not None:
        check_writable(summary_file, "--summary-file", folder=False)
    if suite.control is not None:
        read_manifest(Path(suite.control))
    for path in suite.choice:
        read_items(Path(path), suite.task_limit)
    tasks = load_tasks(suite.tasks, Path(suite.tasks_dir) if suite.tasks_dir else None) if suite.tasks else {}
    return expressions, older, tasks


def _check_recovery(asked: float | None, suite: Suite, window: int) -> None:
    if asked is not None and not _beyond(suite, window):
        raise ConfigError(
            f"--min-recovery: got {asked}, but perplexity is measured at "
            f"{', '.join(map(str, suite.lengths)) or 'no length'}, and only beyond the window of {window} is there "
            "anything to recover"
        )


def _beyond(suite: Suite, window: int) -> list[int]:
    """The lengths at which there is something to recover."""
    return [length for length in suite.lengths if length > window]


def check_text(
    model: Path, suite: Suite, *, gates: list[str], min_recovery: float | None = None, compare: Path | None = None
) -> None:
    """What needs a conversion to be refused, though no weights: text, older results of other text, and gates on what its
    positions do not hold. Arguments as in `evaluate`.

    Raises:
        ConfigError: one of these.
    """
    from linearize.device import compute_dtype, pick_device
    from linearize.modeling.loading import load_tokenizer, read_manifest

    # a conversion has its base's positions
    suite, _ = within_positions(suite, json.loads((model / "config.json").read_bytes()))
    _check_recovery(min_recovery, suite, read_manifest(model)["settings"]["window"])
    check_gates(expand_gates(gates), suite.figures(), open_ended=bool(suite.tasks))
    older = read_older(compare) if compare else None
    _read_text(suite, load_tokenizer(model), older, compute_dtype("auto"), pick_device())


def write_results(results: Results, out: Path) -> None:
    """results.json and every rendering of it; what an interrupted run had kept is cleared away."""
    from linearize.report.html import render_html
    from linearize.report.plots import write_plots

    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", results.to_dict())
        write_text(out / "report.md", render_markdown(results))
        write_text(out / "report.html", render_html(results))
        write_plots(results, out / "plots")
    except PermissionError:
        raise ConfigError(f"--out: no permission to write in {out}") from None
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _weights(
    model: Path, manifest: dict[str, Any], source: Source, suite: Suite, dtype
) -> tuple[dict[str, Callable], dict[str, Path]]:
    """The sets of weights of an evaluation: functions that load them, and the folders they come from."""
    from linearize.evaluation.lab import REFERENCE
    from linearize.modeling.loading import load_student, load_unconverted, read_manifest, untrained_parameters

    plan = Plan.from_dict(manifest["plan"])
    vocabulary = source.read_config()["vocab_size"]
    loaders: dict[str, Callable] = {
        REFERENCE: lambda: load_unconverted(source, plan, dtype=dtype, added=untrained_parameters(model, manifest)),
        STUDENT: lambda: _same_vocabulary(load_student(model, dtype=dtype), vocabulary, "the student"),
    }
    folders = {REFERENCE: source.folder, STUDENT: model}
    if suite.uniform:
        heads = manifest["coverage"]["heads"] // len(plan.layers)
        uniform = _spread(plan, heads)
        loaders[UNIFORM] = lambda: load_unconverted(
            source, uniform, dtype=dtype, added=_calibrated(source, uniform, manifest)
        )
        folders[UNIFORM] = source.folder
    if suite.control is not None:
        folder = Path(suite.control)
        control = read_manifest(folder)
        if control["base"]["fingerprint"] != manifest["base"]["fingerprint"]:
            raise ConfigError(
                f"--control: {folder} comes from another base ({control['base']['name']}) than the student"
            )
        if control["coverage"]["heads_converted"]:
            raise ConfigError(
                f"--control: {folder} has {control['coverage']['heads_converted']} linear heads; a control is the base "
                "with the student's recipe (`linearize convert --keep-softmax all`, then `linearize finetune`)"
            )
        loaders[CONTROL] = lambda: _same_vocabulary(load_student(folder, dtype=dtype), vocabulary, "the control")
        folders[CONTROL] = folder
    return loaders, folders


def _spread(plan: Plan, heads: int) -> Plan:
    """The plan with as many softmax heads at even distances, of `heads` in each of the layers that are not the base's own."""
    ours = [i for i, layer in enumerate(plan.layers) if not layer.native]
    kept = sum(len(plan.layers[i].softmax_heads) for i in ours)
    if kept in (0, len(ours) * heads):
        raise ConfigError("--uniform: the student keeps none or all of its heads softmax; there is nothing to spread")
    layers = list(plan.layers)
    for i, chosen in zip(ours, spread_evenly(kept, len(ours), heads)):
        layers[i] = layers[i].with_softmax_heads(chosen)
    return replace(plan, layers=tuple(layers))


def _calibrated(source: Source, plan: Plan, manifest: dict[str, Any]):
    """Added parameters of another plan, calibrated as the student's were."""
    if not manifest.get("calibration"):
        return None
    from linearize.calibrate import calibrate, text_rows

    settings = manifest["settings"]["calibration"]
    rows = text_rows(source, plan.longest_window(), settings["text"], settings["rows"])
    return calibrate(source, plan, rows, settings["text"]).tensors


def _same_vocabulary(model, size: int, name: str):
    if model.config.vocab_size != size:
        raise ConfigError(
            f"--base: its vocabulary has {size} tokens, that of {name} {model.config.vocab_size}; their figures cannot be "
            "compared"
        )
    return model


def _require_same_shape(source: Source, model: Path) -> None:
    """A plan names heads, and what a conversion adds is as large as they are."""
    from linearize.families.registry import find_family
    from linearize.modeling.loading import weights_folder

    own = json.loads((weights_folder(model) / "config.json").read_bytes())
    family = find_family(own["linearize"]["base_model_type"])
    config, own = ({**raw, **family.heads(raw)} for raw in (source.read_config(), own))
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if config.get(key) != own.get(key):
            raise ConfigError(
                f"--base: {source.name} has {key} {config.get(key)}, the student's base had {own.get(key)}; their figures "
                "cannot be compared"
            )


def _require_same_tokenizer(source: Source, tokenizer) -> None:
    """Figures per token mean nothing when two models split text differently."""
    from transformers import AutoTokenizer

    if not any((source.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    of_base = AutoTokenizer.from_pretrained(source.folder)
    differing = dict(of_base.get_vocab().items() ^ tokenizer.get_vocab().items())
    if differing:
        raise ConfigError(
            f"--base: its tokenizer differs from the student's in {len(differing)} entries, first "
            f"{min(differing)!r}; their figures cannot be compared"
        )


def _fit(folders: dict[str, Path], dtype, device: str) -> bool:
    """Whether all weights and what computing takes beside them have room in memory at once."""
    from linearize.checkpoint.weights import read_weights
    from linearize.device import available_memory
    from linearize.modeling.loading import weights_folder

    parameters = sum(
        math.prod(info.shape)
        for folder in folders.values()
        for info in read_weights(weights_folder(folder)).tensors.values()
    )
    return parameters * dtype.itemsize * HEADROOM <= available_memory(device)


@contextlib.contextmanager
def _work_folder(kept: Path | None) -> Iterator[Path]:
    """Where stages put what has to outlive a model: beside the finished stages, or a temporary folder."""
    if kept is not None:
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="linearize-eval-") as folder:
            yield Path(folder)


def _stages(suite: Suite, tasks: dict[str, Any], base_fingerprint: str) -> Iterator[tuple[str, Callable]]:
    """What the suite asks for, cheap and telling first: (name, function of the lab)."""
    from linearize.bench import measure_efficiency
    from linearize.evaluation.branch_use import measure_branch_share
    from linearize.evaluation.generation import measure_generation
    from linearize.evaluation.harness import measure_task
    from linearize.evaluation.letters import measure_letters
    from linearize.evaluation.parity import measure_parity
    from linearize.evaluation.passkey import measure_passkey
    from linearize.evaluation.perplexity import measure_perplexity
    from linearize.evaluation.recall import measure_recall

    if suite.parity:
        yield "parity", measure_parity
    for length in suite.lengths:
        window_off = suite.branch and length == max(suite.lengths)
        yield (
            f"perplexity@{length}",
            partial(measure_perplexity, length=length, max_tokens=suite.max_tokens, window_off=window_off),
        )
    for kind, distances in (("recall", suite.recall), ("associative", suite.associative)):
        for distance in distances:
            window_off = suite.branch and kind == "recall" and distance == max(distances)
            yield (
                f"{kind}@{distance}",
                partial(measure_recall, kind=kind, distance=distance, rows=suite.recall_rows, window_off=window_off),
            )
    for length in suite.passkey:
        yield f"passkey@{length}", partial(measure_passkey, length=length, rows=suite.passkey_rows)
    if suite.branch:
        yield "branch", partial(measure_branch_share, length=suite.branch_length)
    if suite.generation:
        yield "generation", partial(measure_generation, tokens=suite.generation)
    for path in suite.choice:
        yield f"choice {path}", partial(measure_letters, path=Path(path), limit=suite.task_limit)
    for name, task in tasks.items():
        yield (
            f"task {name}",
            partial(measure_task, name=name, task=task, limit=suite.task_limit, base_fingerprint=base_fingerprint),
        )
    if suite.efficiency:
        yield "efficiency", partial(measure_efficiency, lengths=suite.efficiency)


def _run_stages(
    lab: Any, stages: Iterable[tuple[str, Callable]], identity: dict, unfinished: Path | None
) -> list[Findings]:
    """What the stages find, one after the other. In the folder `unfinished` a finished one is kept, and taken from there where
    models and settings, `identity`, are the same.

    Raises:
        Interrupted: by the user.
    """
    import torch

    try:
        with torch.no_grad():
            return [_run_once(lab, name, run, identity, unfinished) for name, run in stages]
    except KeyboardInterrupt:
        done = "; the parts that are finished are kept, and the same command goes on" if unfinished else ""
        raise Interrupted(f"interrupted{done}") from None


def _run_once(lab: Any, name: str, run: Callable, identity: dict, unfinished: Path | None) -> Findings:
    from pydantic import TypeAdapter

    if unfinished is None:
        return run(lab)
    path = unfinished / f"{fingerprint_of({**identity, 'stage': name})}.json"
    if path.is_file():
        lab.progress(f"{name}: kept from an interrupted run")
        return TypeAdapter(Findings).validate_python(json.loads(path.read_bytes()))
    found = run(lab)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(found)))  # errors can be NaN, which pydantic would write as null
    except PermissionError:
        raise ConfigError(f"--out: no permission to write in {unfinished.parent}") from None
    return found


def _read_text(suite: Suite, tokenizer, older: dict | None, dtype, device: str):
    """The token ids of the text, and what the report says of it, which must fit that of the older results."""
    text = _text_ids(suite, tokenizer)
    data = _data_record(suite, text, dtype, device)
    if older is not None:
        check_comparable(older, data)
    return text, data


def _text_ids(suite: Suite, tokenizer):
    """The evaluation text as one row of token ids, documents joined by an end-of-sequence token."""
    import torch

    from linearize.training.data import documents

    longest = max([16 if suite.parity else 2, *suite.lengths, *suite.passkey])
    needed = max(suite.max_tokens, longest, suite.passkey_rows * max(suite.passkey, default=0))
    texts: list[list[int]] = []
    for name in suite.data:
        texts.append([])
        for document, _ in documents(name, tokenizer, text_field=suite.text_field, completion_only=False, seed=None):
            texts[-1] += document
            if len(texts[-1]) >= needed:
                break
    ids = texts[0]
    if len(texts) > 1:  # each its share, and of what the short ones lack the others' more
        left, shares = needed, {}
        for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
            shares[i] = min(len(texts[i]), -(-left // (len(texts) - len(shares))))
            left -= shares[i]
        ids = [token for i, text in enumerate(texts) for token in text[: shares[i]]]
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


def _fingerprint(model: Path) -> str:
    """Of a student: its records, and names, sizes and times of its weights, of an adapter alone with its parent's."""
    from linearize.modeling.loading import weights_folder

    files = [path for folder in {model, weights_folder(model)} for path in folder.rglob("*.safetensors")]
    stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(files)]
    return sha256([(model / MANIFEST).read_bytes(), *(line.encode() for line in stats)])
