"""Measure speed and memory of a linearized model beside its base: prefill, decode and a LoRA training step.

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
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from results_file import write_results
from transformers import PreTrainedModel

from linearize.device import compute_dtype, keep_freed_memory, pick_device, versions
from linearize.modeling.cache import CACHE_NAME
from linearize.modeling.loading import load_student

RESULTS = Path(__file__).resolve().parent / "results"
# tokens of one forward while a context is prefilled for decoding, which bounds the base's memory
PREFILL_CHUNK = 2048
# timings, of which the least counts: a token is short and noisy, a training step is steady after the first
PREFILL_REPEATS, DECODE_REPEATS, TRAINING_STEPS = 3, 8, 8


def main() -> None:
    """Measure, write bench.json and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="linearized folder")
    parser.add_argument("--layers", type=int, help="measure the first layers only")
    parser.add_argument("--lengths", default="2048,8192,32768", help="context lengths, in tokens")
    parser.add_argument("--train-length", type=int, default=1024, help="tokens of the training step")
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
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


def modes(model: PreTrainedModel) -> dict[str, Callable[[], AbstractContextManager]]:
    """Return the contexts that make `model` its base and the student, on the same weights."""
    return {"base": model.softmax_attention, "student": contextlib.nullcontext}


@torch.no_grad()
def bench_prefill(model: PreTrainedModel, lengths: list[int]) -> list[dict[str, Any]]:
    """Measure microseconds a token of one forward over each length."""
    rows = []
    for length in lengths:
        ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
        row: dict[str, Any] = {"length": length}
        for name, mode in modes(model).items():
            with mode():
                seconds = best_of(lambda ids=ids: model.base_model(ids, use_cache=False), PREFILL_REPEATS)
            row[f"{name}_us_per_token"] = 1e6 * seconds / length
        row["ratio"] = row["student_us_per_token"] / row["base_us_per_token"]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


@torch.no_grad()
def bench_decode(model: PreTrainedModel, lengths: list[int]) -> list[dict[str, Any]]:
    """Measure milliseconds a token and mebibytes of cache when decoding behind each context length."""
    rows = []
    for length in lengths:
        ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
        row: dict[str, Any] = {"length": length}
        for name, mode in modes(model).items():
            with mode():
                cache = None
                for piece in ids.split(PREFILL_CHUNK, dim=1):
                    cache = model.base_model(piece, use_cache=True, **{CACHE_NAME: cache})[CACHE_NAME]
                token = ids[:, :1]
                seconds = best_of(
                    lambda cache=cache, token=token: model.base_model(token, use_cache=True, **{CACHE_NAME: cache}),
                    DECODE_REPEATS,
                )
            row[f"{name}_ms_per_token"] = 1e3 * seconds
            row[f"{name}_cache_mib"] = cache_bytes(cache) / 2**20
            del cache
            gc.collect()
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def bench_training(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Measure tokens a second of a LoRA step (forward, cross-entropy, backward), base and student in turn."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if ".mixer." in name:
            parameter.requires_grad_(True)
    ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
    seconds: dict[str, list[float]] = {"base": [], "student": []}
    adapted.train()
    for _ in range(TRAINING_STEPS):
        for name, mode in modes(model).items():
            with mode():
                started = time.perf_counter()
                adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                synchronize()
                seconds[name].append(time.perf_counter() - started)
            adapted.zero_grad()
    adapted.unload()
    model.eval()
    best = {name: min(timings[1:]) for name, timings in seconds.items()}  # the first step warms up
    return {
        "length": length,
        **{f"{name}_tokens_per_second": length / value for name, value in best.items()},
        "ratio": best["base"] / best["student"],
    }


def best_of(function: Callable[[], Any], repeats: int) -> float:
    """Return the least seconds of `repeats` calls after one that warms up: the speed of an otherwise idle machine."""
    function()
    timings = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        synchronize()
        timings.append(time.perf_counter() - started)
    return min(timings)


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache: its layers' own count where they have one, else those of keys and values."""
    total = 0
    for layer in cache.layers:
        if layer.get_seq_length():
            total += layer.nbytes() if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes
    return total


def render(record: dict[str, Any]) -> str:
    """Render the record as Markdown tables."""
    lines = [
        f"{record['layers']} layers, {record['machine']}",
        "",
        "| prefill | base, µs/token | student, µs/token | ratio |",
        "|---|---|---|---|",
    ]
    for row in record["prefill"]:
        base, student = row["base_us_per_token"], row["student_us_per_token"]
        lines.append(f"| {row['length']} | {base:.0f} | {student:.0f} | {row['ratio']:.2f} |")
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
        f"training at {training['length']} tokens (all layers): "
        f"base {training['base_tokens_per_second']:.0f} tokens/s, "
        f"student {training['student_tokens_per_second']:.0f} tokens/s, ratio {training['ratio']:.2f}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
