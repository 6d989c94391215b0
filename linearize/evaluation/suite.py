"""What an evaluation measures: the named suites, and how they are cut and checked."""

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from linearize.errors import ConfigError, nearest
from linearize.report.results import ALL, ASKED, BASE, CONTROL, UNIFORM, WINDOW_OFF

BRANCH_LENGTH = 2048
# what a metric says of the student beside others, if it has a base
DERIVED = {"ratio", "recovery", "p_value"}
# beside perplexity
PARTS = ("recall", "associative", "passkey", "choice", "tasks", "generation", "efficiency", "branch", "parity")


def metric_stem(path: str) -> str:
    """A file's name as part of a metric's name."""
    return re.sub(r"\W", "_", Path(path).stem)


@dataclass(frozen=True)
class Suite:
    """What to measure. Empty tuples and zeros leave a part out.

    Attributes:
        lengths: windows for perplexity; at most `max_tokens` of text each.
        recall, associative: distances; `recall_rows` rows each. passkey: context lengths; `passkey_rows` each depth.
        tasks: names of lm-evaluation-harness, from `tasks_dir` if given, `task_limit` items each.
        choice: files of multiple-choice items to be answered by letter, options permuted; `task_limit` items each.
        generation: new tokens for every health prompt. efficiency: context lengths.
        branch: whether to measure the recurrent branch's share, and at the longest length and distance the model with its
            window off.
        parity: whether to hold cached, padded, batched and reloaded logits against each other.
        uniform: whether to measure the layout that spreads as many softmax heads evenly.
        control: a folder with the base finetuned by the student's recipe, every head softmax.
    """

    data: tuple[str, ...] = ("sample-eval",)
    lengths: tuple[int, ...] = (512, 2048)
    recall: tuple[int, ...] = (64, 256, 1024)
    associative: tuple[int, ...] = ()
    passkey: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    tasks_dir: str | None = None
    task_limit: int | None = None
    choice: tuple[str, ...] = ()
    generation: int = 0
    efficiency: tuple[int, ...] = ()
    branch: bool = False
    parity: bool = False
    max_tokens: int = 16384
    recall_rows: int = 8
    passkey_rows: int = 2
    text_field: str = "text"
    seed: int = 0
    uniform: bool = False
    control: str | None = None

    def figures(self) -> dict[str, set[str]]:
        """The metrics that will certainly be measured, each with its models and what follows from them; a task's are known
        when it has run."""
        absent = {model for model, asked in ((UNIFORM, self.uniform), (CONTROL, self.control)) if not asked}
        beside = {*ALL} - absent
        every, asked = beside | DERIVED, {*ASKED} - absent | DERIVED
        made = {}
        for length in self.lengths:
            window_off = {WINDOW_OFF} if self.branch and length == max(self.lengths) else set()
            for kind in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"):
                made[f"{kind}@{length}"] = every | window_off
            for kind in ("kl", "agreement"):
                made[f"{kind}@{length}"] = beside - {BASE} | window_off
        for distance in self.recall:
            made[f"recall@{distance}"] = every | (
                {WINDOW_OFF} if self.branch and distance == max(self.recall) else set()
            )
        made |= {f"associative@{distance}": every for distance in self.associative}
        made |= {f"{kind}@{length}": asked for length in self.passkey for kind in ("passkey", "passkey_loss")}
        for path in self.choice:
            made[f"letters_{metric_stem(path)}"] = asked | {"recovery_over_chance"}
            made[f"letters_consistent_{metric_stem(path)}"] = asked
        if self.generation:
            made |= dict.fromkeys(("repetition", "distinct2", "length", "stopped"), asked)
        return made

    @property
    def branch_length(self) -> int:
        """Tokens on which the recurrent branch's share is measured, as far as text and positions go."""
        return max(self.lengths, default=BRANCH_LENGTH)


SUITES = {
    "quick": Suite(
        lengths=(2048,), recall=(64, 1024), max_tokens=4096, recall_rows=2, generation=24,
        efficiency=(512, 2048), branch=True, parity=True,
    ),
    "standard": Suite(
        lengths=(512, 2048, 8192), recall=(64, 256, 1024, 4096), associative=(64, 256, 1024, 4096),
        passkey=(1024, 4096), generation=128, efficiency=(512, 2048, 8192), branch=True, parity=True, max_tokens=32768,
    ),
    "full": Suite(
        lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768), recall=(64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        associative=(64, 256, 1024, 4096, 16384), passkey=(1024, 4096, 16384), passkey_rows=4, generation=256,
        efficiency=(512, 2048, 8192, 32768), branch=True, parity=True, max_tokens=131072, recall_rows=16,
    ),
}  # fmt: skip


def choose_suite(name: str, only: str | None, **changes: Any) -> Suite:
    """A named suite with the given settings on top, cut down to the parts of `only`."""
    if name not in SUITES:
        raise ConfigError(f"--suite: got '{name}', allowed are {', '.join(SUITES)}{nearest(name, SUITES)}")
    for key in ("max_tokens", "recall_rows", "passkey_rows", "task_limit"):
        if changes.get(key) is not None and changes[key] < 1:
            raise ConfigError(f"--{key.replace('_', '-')}: got {changes[key]}, allowed are numbers of at least 1")
    suite = replace(SUITES[name], **{key: value for key, value in changes.items() if value is not None})
    if not 0 <= suite.seed < 2**32:
        raise ConfigError(f"--seed: got {suite.seed}, allowed are 0 to {2**32 - 1}")
    stems = [metric_stem(path) for path in suite.choice]
    for path, stem in zip(suite.choice, stems):
        if stems.count(stem) > 1:
            raise ConfigError(
                f"--choice: got '{path}' and another file whose figures would be named letters_{stem}, too"
            )
    if only is None:
        return suite
    parts = {"perplexity": "lengths", **{part: part for part in PARTS}}
    wanted = [part.strip() for part in only.split(",")]
    for part in wanted:
        if part not in parts:
            raise ConfigError(f"--only: got '{part}', allowed are {', '.join(parts)}{nearest(part, parts)}")
        if not getattr(suite, parts[part]):
            raise ConfigError(f"--only: the suite {name} has no {part}; say which, or take a larger one")
    for part, key in parts.items():
        if changes.get(key) and part not in wanted:
            raise ConfigError(f"--{key}: given, but --only leaves '{part}' out")
    empty = {field.name: type(getattr(suite, field.name))() for field in fields(suite)}
    return replace(suite, **{key: empty[key] for part, key in parts.items() if part not in wanted})


def within_positions(suite: Suite, config: dict) -> tuple[Suite, list[str]]:
    """Leaves out what is longer than the base's positions, and says so; of the lengths at least one as long as these stays."""
    limit = config.get("max_position_embeddings") or math.inf
    longest = {
        "lengths": lambda n: n,
        "recall": lambda n: 1 + n + min(n, 256),
        "associative": lambda n: 1 + max(n, 2) + 2 * max(1, min(n // 2, 32)),
        "passkey": lambda n: n + 8,
        "efficiency": lambda n: n + 8,
    }
    notes, changes = [], {}
    for name, tokens in longest.items():
        beyond = [n for n in getattr(suite, name) if tokens(n) > limit]
        if beyond:
            changes[name] = tuple(n for n in getattr(suite, name) if n not in beyond)
            notes.append(f"{name} {', '.join(map(str, beyond))} left out: longer than the base's {limit} positions")
            if name == "lengths" and not changes[name]:
                changes[name] = (limit,)
    return replace(suite, **changes), notes
