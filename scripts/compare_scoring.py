"""Cheap head scores beside the exact one: rank correlation, and what each choice of heads keeps without any training.

    python scripts/compare_scoring.py MODEL_FOLDER [--text FILE] [--swap-distances 1024]
    python scripts/compare_scoring.py MODEL_FOLDER --methods gradient --asking facts --window 512 --heads 12 --results facts.json

For every method and number of heads: copy recall, perplexity and the answer to a passkey with the chosen heads at softmax
and all others at window + sinks, on rows and text that the scoring did not see. Writes a file of scripts/results and prints a
Markdown table.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from results_file import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.conversion import scoring
from linearize.conversion.keep_softmax import top_heads
from linearize.data.recall_rows import recall_task
from linearize.data.samples import SAMPLES
from linearize.device import compute_dtype, keep_freed_memory, versions
from linearize.evaluation.passkey import passkey_task
from linearize.evaluation.perplexity import windows_of
from linearize.evaluation.recall import accuracy
from linearize.modeling.readout import readout_of
from linearize.settings.config import ScoringSettings

DEFAULTS = ScoringSettings()
RESULTS = Path(__file__).resolve().parent / "results"
SINKS = 4
PASSKEY_LENGTH, PASSKEY_ROWS = 1024, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="plain text (default: sample-eval)")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--swap-distances", default="1024")
    parser.add_argument("--methods", default="lookup,gradient,swap")
    parser.add_argument("--asking", default="text", choices=("text", "facts"), help="beside copies")
    parser.add_argument("--heads", default="6,12,18,24")
    parser.add_argument("--eliminate", action="store_true", help="too, from the best of both")
    parser.add_argument("--results", default="scoring.json")
    arguments = parser.parse_args()
    if arguments.eliminate and "gradient" not in arguments.methods.split(","):
        parser.error("--eliminate starts from gradient, which --methods leaves out")
    keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=compute_dtype("auto")).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")[:60_000] if arguments.text else sample("sample-eval")
    ids = torch.tensor(tokenizer(text).input_ids)

    scores, seconds = {}, {}
    for method in arguments.methods.split(","):
        distances = tuple(map(int, arguments.swap_distances.split(","))) if method == "swap" else DEFAULTS.distances
        started = time.perf_counter()
        probes = scoring.recall_probes(
            distances, 1 if method == "swap" else DEFAULTS.rows, window=arguments.window,
            positions=model.config.max_position_embeddings, vocabulary=len(tokenizer), start_token=tokenizer.bos_token_id,
        )  # fmt: skip
        scores[method] = scoring.head_scores(
            model, probes, window=arguments.window, sinks=SINKS, method=method, progress=note
        )
        seconds[method] = time.perf_counter() - started
        if method == "gradient":
            copies = probes
    if "gradient" in scores:
        started = time.perf_counter()
        filler = tokenizer(sample("sample")).input_ids
        if arguments.asking == "text":
            probe = scoring.text_probe(model, torch.tensor(filler[:2048])[None], arguments.window, SINKS)
        else:
            probe = scoring.facts_probe(
                lambda words: tokenizer(words, add_special_tokens=False).input_ids, filler, arguments.window,
                max(DEFAULTS.distances), DEFAULTS.fact_rows,
            )  # fmt: skip
        scores[arguments.asking] = scoring.head_scores(
            model, [probe], window=arguments.window, sinks=SINKS, progress=note
        )
        seconds[arguments.asking] = time.perf_counter() - started
        scores["both"] = scoring.combined(scores["gradient"], scores[arguments.asking])
        groups = [copies, [probe]]
    choices = []
    layers, heads = len(model.base_model.layers), model.config.num_key_value_heads
    every_fourth = tuple(tuple(range(heads)) if layer % 4 == 0 else () for layer in range(layers))
    choices.append(measure(model, tokenizer, ids, arguments.window, "none", ((),) * layers))
    for number in map(int, arguments.heads.split(",")):
        for method, values in scores.items():
            kept = top_heads(values, number / (layers * heads))
            choices.append(measure(model, tokenizer, ids, arguments.window, method, kept))
        if arguments.eliminate:
            started = time.perf_counter()
            turns = scoring.eliminate(
                model, groups, scores["both"], number, window=arguments.window, sinks=SINKS, layers=range(layers), progress=note
            )  # fmt: skip
            seconds[f"elimination of {2 * number} to {number}"] = time.perf_counter() - started
            kept = top_heads(turns, number / (layers * heads))
            choices.append(measure(model, tokenizer, ids, arguments.window, "elimination", kept))
    choices.append(measure(model, tokenizer, ids, arguments.window, "every fourth layer", every_fourth))
    choices.append(measure(model, tokenizer, ids, arguments.window, "base", (tuple(range(heads)),) * layers))
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "window": arguments.window,
        "seconds": seconds,
        "rank_correlation_with_swap": {m: spearman(scores[m], scores["swap"]) for m in scores}
        if "swap" in scores
        else {},
        "choices": choices,
        "scores": scores,
    }
    write_results(RESULTS / arguments.results, record)
    print(table(record))


def sample(name: str) -> str:
    rows = SAMPLES[name].read_text(encoding="utf-8").splitlines()
    return "\n\n".join(json.loads(row)["text"] for row in rows)[:60_000]


@torch.no_grad()
def measure(model, tokenizer, ids, window: int, name: str, kept) -> dict:
    with scoring._gated(model, window, SINKS) as attentions:
        for attention, heads in zip(attentions, kept, strict=True):
            attention.head_gates = torch.tensor([float(h in heads) for h in range(attention.head_gates.numel())])
        found = {"choice": name, "heads": sum(map(len, kept)), "kept": [list(heads) for heads in kept]}
        head = readout_of(model)
        for distance in (512, 1024):
            task = recall_task(distance, 4, len(tokenizer), tokenizer.bos_token_id, 0)
            units = [
                accuracy(model.base_model(row[None], use_cache=False).last_hidden_state[0], head, row, task.counted)
                for row in task.ids
            ]
            found[f"recall@{distance}"] = sum(units) / len(units)
        losses = [model(row[None], labels=row[None]).loss for row in windows_of(ids, 2048, 8192)]
        found["perplexity@2048"] = torch.stack(losses).mean().exp().item()
        found["passkey_loss"], found["passkey_right"] = passkeys(model, tokenizer, ids)
    note(str({key: value for key, value in found.items() if key != "kept"}))
    return found


def passkeys(model, tokenizer, ids) -> tuple[float, float]:
    """Loss a token of the number that is asked for, and the share of prompts that it would be given for."""
    losses, right = [], []
    for depth in (0.1, 0.3):
        task = passkey_task(SimpleNamespace(seed=0, tokenizer=tokenizer, text=ids), PASSKEY_LENGTH, depth, PASSKEY_ROWS)
        for prompt, number in zip(task.prompts, task.answers):
            answer = torch.tensor(tokenizer(f" {number}", add_special_tokens=False).input_ids)
            row = torch.cat([prompt, answer])[None]
            logits = model(row, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, answer).item())
            right.append(float((logits.argmax(-1) == answer).all()))
    return sum(losses) / len(losses), sum(right) / len(right)


def spearman(first, second) -> float:
    ranks = [torch.tensor(x).flatten().argsort().argsort().double() for x in (first, second)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def table(record: dict) -> str:
    lines = [
        "| heads kept by | heads | recall@512 | recall@1024 | perplexity@2048 | passkey, loss a token | right |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["choices"]:
        lines.append(
            f"| {row['choice']} | {row['heads']} | {row['recall@512']:.2f} | {row['recall@1024']:.2f} | "
            f"{row['perplexity@2048']:.2f} | {row['passkey_loss']:.2f} | {row['passkey_right']:.2f} |"
        )
    for method, seconds in record["seconds"].items():
        correlation = record["rank_correlation_with_swap"].get(method)
        lines.append(
            f"\n{method}: {seconds:.0f} s" + (f", rank correlation with swap {correlation:.2f}" if correlation else "")
        )
    return "\n".join(lines)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
