"""Compare cheap head scores with the exact one: their rank correlation, and the quality of each choice of heads.

    python scripts/compare_scoring.py MODEL_FOLDER [--text FILE] [--swap-distances 1024]
    python scripts/compare_scoring.py MODEL_FOLDER --methods gradient --asking look-ups --window 512 --heads 12 \\
        --results facts.json

For every method and number of heads: copy recall, perplexity and the answer to a passkey, without any training. The
chosen heads are at softmax and all others at window + sinks; rows and text are not those of the scoring. Writes a
file of scripts/results and prints a Markdown table.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from results_file import write_results
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from linearize.conversion.head_gates import gated_heads
from linearize.conversion.keep_softmax import top_heads
from linearize.conversion.probes import Probe, copies_probe, require_distances, text_look_ups_probe, text_probe
from linearize.conversion.scoring import combined, eliminate, head_scores
from linearize.data.recall_rows import recall_task
from linearize.data.samples import SAMPLES
from linearize.device import compute_dtype, keep_freed_memory, versions
from linearize.evaluation.passkey import passkey_task
from linearize.evaluation.recall import accuracy
from linearize.evaluation.window_scores import windows_of
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.readout import readout_of
from linearize.settings.config import ScoringSettings

DEFAULTS = ScoringSettings()
RESULTS = Path(__file__).resolve().parent / "results"
SINKS = 4
# characters of a sample that are read: more than the measurements take
SAMPLE_CHARACTERS = 60_000
TEXT_TOKENS, PERPLEXITY_WINDOW, PERPLEXITY_TOKENS = 2048, 2048, 8192
RECALL_DISTANCES, RECALL_ROWS = (512, 1024), 4
PASSKEY_LENGTH, PASSKEY_ROWS, PASSKEY_DEPTHS = 1024, 8, (0.1, 0.3)

# the softmax heads of every layer
Heads = tuple[tuple[int, ...], ...]


@dataclass
class Subject:
    """The model under test and the text that its choices of heads are measured on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: Tensor
    window: int

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.model.base_model.layers)

    @property
    def distances(self) -> tuple[int, ...]:
        """Distances that scores are taken at, in tokens."""
        return require_distances(DEFAULTS.distances, self.window, self.model.config.max_position_embeddings)

    @property
    def heads(self) -> int:
        """Number of key/value heads in a layer."""
        return self.model.config.num_key_value_heads


@dataclass
class Scores:
    """Scores of all heads by method, the seconds each took, and the probes that `both` joins."""

    by_method: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    probes: list[list[Probe]] = field(default_factory=list)


def main() -> None:
    """Score the heads, measure every choice, write the record and print the table."""
    arguments = parse_arguments()
    keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=compute_dtype("auto")).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")[:SAMPLE_CHARACTERS] if arguments.text else sample("sample-eval")
    subject = Subject(model, tokenizer, torch.tensor(tokenizer(text).input_ids), arguments.window)

    swap_distances = tuple(map(int, arguments.swap_distances.split(",")))
    scores = score_heads(subject, arguments.methods.split(","), swap_distances, arguments.asking)
    numbers = list(map(int, arguments.heads.split(",")))
    choices = measure_choices(subject, scores, numbers, arguments.eliminate)
    exact = scores.by_method.get("swap")
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "window": arguments.window,
        "seconds": scores.seconds,
        "rank_correlation_with_swap": {
            method: spearman(values, exact) for method, values in scores.by_method.items() if exact
        },
        "choices": choices,
        "scores": scores.by_method,
    }
    write_results(RESULTS / arguments.results, record)
    print(table(record))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("--text", type=Path, help="plain text for perplexity (default: sample-eval)")
    parser.add_argument("--window", type=int, default=256, help="window of the other heads, in keys")
    parser.add_argument("--swap-distances", default="1024", help="distances of the exact score, in tokens")
    parser.add_argument("--methods", default="lookup,gradient,swap", help="scores, separated by commas")
    parser.add_argument("--asking", default="text", choices=("text", "look-ups"), help="the probe beside copies")
    parser.add_argument("--heads", default="6,12,18,24", help="numbers of softmax heads, separated by commas")
    parser.add_argument("--eliminate", action="store_true", help="also eliminate heads, starting from the best of both")
    parser.add_argument("--results", default="scoring.json", help="file of scripts/results to write")
    arguments = parser.parse_args()
    if arguments.eliminate and "gradient" not in arguments.methods.split(","):
        parser.error("--eliminate starts from gradient, which --methods leaves out")
    return arguments


def score_heads(subject: Subject, methods: list[str], swap_distances: tuple[int, ...], asking: str) -> Scores:
    """Score all heads by every method; with gradient, also by text or look-ups, and by both together."""
    scores = Scores()
    copies: list[Probe] = []
    for method in methods:
        started = time.perf_counter()
        distances = swap_distances if method == "swap" else subject.distances
        probes = [copies_probe(distances, DEFAULTS.rows, len(subject.tokenizer), subject.tokenizer.bos_token_id)]
        scores.by_method[method] = head_scores(
            LayerStream(subject.model), probes, window=subject.window, sinks=SINKS, method=method, progress=note
        )
        scores.seconds[method] = time.perf_counter() - started
        if method == "gradient":
            copies = probes
    if copies:
        started = time.perf_counter()
        probe = asking_probe(subject, asking)
        scores.by_method[asking] = head_scores(
            LayerStream(subject.model), [probe], window=subject.window, sinks=SINKS, progress=note
        )
        scores.seconds[asking] = time.perf_counter() - started
        scores.by_method["both"] = combined(scores.by_method["gradient"], scores.by_method[asking])
        scores.probes = [copies, [probe]]
    return scores


def asking_probe(subject: Subject, asking: str) -> Probe:
    """Build the probe of long text, or of what is looked up in text."""
    filler = subject.tokenizer(sample("sample")).input_ids
    if asking == "text":
        return text_probe(LayerStream(subject.model), torch.tensor(filler[:TEXT_TOKENS])[None], subject.window, SINKS)

    def encode(words: str) -> list[int]:
        return subject.tokenizer(words, add_special_tokens=False).input_ids

    probe = text_look_ups_probe(
        encode, filler, subject.window, subject.distances, DEFAULTS.rows, len(subject.tokenizer)
    )
    assert probe is not None, "the sample is longer than a row"
    return probe


def measure_choices(
    subject: Subject, scores: Scores, numbers: list[int], with_elimination: bool
) -> list[dict[str, Any]]:
    """Measure no heads, the best of every method for each number of heads, every fourth layer, and all heads."""
    layers, heads = subject.layers, subject.heads
    all_heads = tuple(range(heads))
    choices = [measure(subject, "none", ((),) * layers)]
    for number in numbers:
        share = number / (layers * heads)
        for method, values in scores.by_method.items():
            choices.append(measure(subject, method, top_heads(values, share)))
        if with_elimination:
            started = time.perf_counter()
            rounds = eliminate(
                LayerStream(subject.model), scores.probes, scores.by_method["both"], number,
                window=subject.window, sinks=SINKS, layers=range(layers), progress=note,
            )  # fmt: skip
            scores.seconds[f"elimination of {2 * number} to {number}"] = time.perf_counter() - started
            choices.append(measure(subject, "elimination", top_heads(rounds, share)))
    every_fourth = tuple(all_heads if layer % 4 == 0 else () for layer in range(layers))
    choices.append(measure(subject, "every fourth layer", every_fourth))
    choices.append(measure(subject, "base", (all_heads,) * layers))
    return choices


@torch.no_grad()
def measure(subject: Subject, choice: str, softmax_heads: Heads) -> dict[str, Any]:
    """Measure recall, perplexity and passkeys with `softmax_heads` at softmax and the others at window + sinks."""
    model = subject.model
    with gated_heads(model, subject.window, SINKS) as attentions:
        for attention, heads in zip(attentions, softmax_heads, strict=True):
            attention.head_gates = torch.tensor([float(h in heads) for h in range(attention.head_gates.numel())])
        row: dict[str, Any] = {"choice": choice, "heads": sum(map(len, softmax_heads))}
        row["kept"] = [list(heads) for heads in softmax_heads]
        for distance in RECALL_DISTANCES:
            row[f"recall@{distance}"] = recall(subject, distance)
        windows = windows_of(subject.ids, PERPLEXITY_WINDOW, PERPLEXITY_TOKENS)
        losses = [model(window[None], labels=window[None]).loss for window in windows]
        row[f"perplexity@{PERPLEXITY_WINDOW}"] = torch.stack(losses).mean().exp().item()
        row["passkey_loss"], row["passkey_right"] = passkeys(subject)
    note(str({key: value for key, value in row.items() if key != "kept"}))
    return row


def recall(subject: Subject, distance: int) -> float:
    """Return the share of copied tokens that the model gets right at `distance`."""
    task = recall_task(distance, RECALL_ROWS, len(subject.tokenizer), subject.tokenizer.bos_token_id, 0)
    head = readout_of(subject.model)
    shares = []
    for ids in task.ids:
        states = subject.model.base_model(ids[None], use_cache=False).last_hidden_state[0]
        shares.append(accuracy(states, head, ids, task.counted))
    return sum(shares) / len(shares)


def passkeys(subject: Subject) -> tuple[float, float]:
    """Return the loss of the hidden number, in nats a token, and the share of prompts that it is the answer to."""
    losses, right = [], []
    setting = SimpleNamespace(seed=0, tokenizer=subject.tokenizer, text=subject.ids)
    for depth in PASSKEY_DEPTHS:
        task = passkey_task(setting, PASSKEY_LENGTH, depth, PASSKEY_ROWS)
        for prompt, number in zip(task.prompts, task.answers):
            answer = torch.tensor(subject.tokenizer(f" {number}", add_special_tokens=False).input_ids)
            ids = torch.cat([prompt, answer])[None]
            logits = subject.model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, answer).item())
            right.append(float((logits.argmax(-1) == answer).all()))
    return sum(losses) / len(losses), sum(right) / len(right)


def sample(name: str) -> str:
    """Return the beginning of a packaged sample."""
    rows = SAMPLES[name].read_text(encoding="utf-8").splitlines()
    return "\n\n".join(json.loads(row)["text"] for row in rows)[:SAMPLE_CHARACTERS]


def spearman(first: list[list[float]], second: list[list[float]]) -> float:
    """Return the rank correlation of two sets of scores."""
    ranks = [torch.tensor(scores).flatten().argsort().argsort().double() for scores in (first, second)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def table(record: dict[str, Any]) -> str:
    """Render the choices as a Markdown table, with the seconds and rank correlations below."""
    lines = [
        "| heads chosen by | heads | recall@512 | recall@1024 | perplexity@2048 | passkey, loss a token | right |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["choices"]:
        lines.append(
            f"| {row['choice']} | {row['heads']} | {row['recall@512']:.2f} | {row['recall@1024']:.2f} | "
            f"{row['perplexity@2048']:.2f} | {row['passkey_loss']:.2f} | {row['passkey_right']:.2f} |"
        )
    for method, seconds in record["seconds"].items():
        correlation = record["rank_correlation_with_swap"].get(method)
        beside = f", rank correlation with swap {correlation:.2f}" if correlation else ""
        lines.append(f"\n{method}: {seconds:.0f} s{beside}")
    return "\n".join(lines)


def note(text: str) -> None:
    """Print progress on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
