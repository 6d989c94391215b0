"""Speed and memory of a converted model beside its base, in one process: prefill, decode, a LoRA training step.

    python scripts/bench.py linearized/demo --layers 6 --lengths 2048,8192,32768

`--layers` cuts both models to their first layers (dimensions stay), so that long prefills of the base end in time on a
CPU. Prints Markdown tables and writes scripts/results/bench.json with versions and command.
"""

import argparse
import contextlib
import gc
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from results_file import write_results

from linearize.device import compute_dtype, keep_freed_memory, pick_device, versions
from linearize.modeling.cache import CACHE_NAME
from linearize.modeling.loading import load_student

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, help="keep only the first layers")
    parser.add_argument("--lengths", default="2048,8192,32768", help="prefill lengths")
    parser.add_argument("--train-length", type=int, default=1024)
    arguments = parser.parse_args()
    lengths = [int(n) for n in arguments.lengths.split(",")]
    keep_freed_memory()
    device = pick_device()
    model = load_student(arguments.model, dtype=compute_dtype("auto")).to(device)
    full_layers = len(model.model.layers)

    training = bench_training(model, arguments.train_length)
    if arguments.layers:
        model.model.layers = model.model.layers[: arguments.layers]
        model.config.num_hidden_layers = arguments.layers
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "versions": versions(),
        "layers": f"{len(model.model.layers)} of {full_layers}",
        "training": training,
        "prefill": bench_prefill(model, lengths),
        "decode": bench_decode(model, lengths),
    }
    RESULTS.mkdir(exist_ok=True)
    write_results(RESULTS / "bench.json", record)
    print(render(record))


def modes(model):
    """(name, context) of base and student on the same weights; the base goes first."""
    return ("base", model.softmax_attention), ("student", contextlib.nullcontext)


@torch.no_grad()
def bench_prefill(model, lengths: list[int]) -> list[dict]:
    rows = []
    for length in lengths:
        ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
        row = {"length": length}
        for name, mode in modes(model):
            with mode():
                row[f"{name}_us_per_token"] = (
                    1e6 * best_of(lambda ids=ids: model.base_model(ids, use_cache=False)) / length
                )
        row["ratio"] = row["student_us_per_token"] / row["base_us_per_token"]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


@torch.no_grad()
def bench_decode(model, lengths: list[int]) -> list[dict]:
    """Seconds a token and cache bytes when decoding at each context length (prefilled in pieces)."""
    rows = []
    for length in lengths:
        ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
        row = {"length": length}
        for name, mode in modes(model):
            with mode():
                cache = None
                for piece in ids.split(2048, dim=1):
                    cache = model.base_model(piece, use_cache=True, **{CACHE_NAME: cache})[CACHE_NAME]
                step = ids[:, :1]
                row[f"{name}_ms_per_token"] = 1e3 * best_of(
                    lambda cache=cache, step=step: model.base_model(step, use_cache=True, **{CACHE_NAME: cache}),
                    repeats=8,
                )
                row[f"{name}_cache_mib"] = cache_bytes(cache) / 2**20
            del cache
            gc.collect()
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def bench_training(model, length: int) -> dict:
    """Tokens a second of one LoRA step (forward, cross-entropy, backward), alternating base and student."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if ".mixer." in name:
            parameter.requires_grad_(True)
    ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
    seconds = {"base": [], "student": []}
    adapted.train()
    for _ in range(8):
        for name, mode in modes(model):
            with mode():
                started = time.perf_counter()
                adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                synchronise()
                seconds[name].append(time.perf_counter() - started)
            adapted.zero_grad()
    adapted.unload()
    model.eval()
    best = {name: min(values[1:]) for name, values in seconds.items()}
    return {
        "length": length,
        **{f"{name}_tokens_per_second": length / value for name, value in best.items()},
        "ratio": best["base"] / best["student"],
    }


def best_of(function, repeats: int = 3) -> float:
    """The least of several timings after one that warms up: what the machine can do when left alone."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        synchronise()
        times.append(time.perf_counter() - started)
    return min(times)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cache_bytes(cache) -> int:
    return sum(
        layer.nbytes() if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
        if layer.get_seq_length()
    )  # fmt: skip


def render(record: dict) -> str:
    lines = [
        f"{record['layers']} layers, {record['machine']}",
        "",
        "| prefill | base, µs/token | student, µs/token | ratio |",
    ]
    lines.append("|---|---|---|---|")
    for row in record["prefill"]:
        lines.append(
            f"| {row['length']} | {row['base_us_per_token']:.0f} | {row['student_us_per_token']:.0f} | {row['ratio']:.2f} |"
        )
    lines += [
        "",
        "| decode at | base, ms/token | student, ms/token | base cache, MiB | student cache, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in record["decode"]:
        lines.append(
            f"| {row['length']} | {row['base_ms_per_token']:.1f} | {row['student_ms_per_token']:.1f} | "
            f"{row['base_cache_mib']:.1f} | {row['student_cache_mib']:.1f} |"
        )
    training = record["training"]
    lines += [
        "",
        f"training at {training['length']} tokens (all layers): base {training['base_tokens_per_second']:.0f} tokens/s, "
        f"student {training['student_tokens_per_second']:.0f} tokens/s, ratio {training['ratio']:.2f}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
