"""The training loop: optimizer steps over packed rows, with progress, saved states and a clean stop.

A step takes `batch_size` rows in all, over every process and micro-batch, and divides the summed loss by the positions
counted in all of them: the result does not depend on how the rows are spread.
"""

import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from linearize.errors import ConfigError, Interrupted, LinearizeError
from linearize.recipe import Recipe
from linearize.training.data import Batch, join
from linearize.training.model import Distiller
from linearize.training.state import load_state, save_state, states


@dataclass(frozen=True)
class Progress:
    """One optimizer step, as metrics.jsonl records it."""

    step: int
    steps: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    eta_seconds: float
    memory_bytes: int


def total_steps(recipe: Recipe) -> int:
    return max(1, math.ceil(recipe.tokens / (recipe.seq_len * recipe.batch_size)))


def train(
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    rows: Iterator[Batch],
    recipe: Recipe,
    accelerator: Accelerator,
    work: Path,
    *,
    fingerprint: dict,
    report: Callable[[Progress], None],
) -> list[float]:
    """Runs the remaining steps and returns the loss of every step of this call.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, once the state is saved. LinearizeError: the loss is not finite.
    """
    micro = _micro_batch(recipe, accelerator.num_processes)
    steps = total_steps(recipe)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    trainable = [value for value in distiller.parameters() if value.requires_grad]
    saved = states(work)
    done = 0
    if saved:
        done = load_state(saved[-1], distiller, optimizer, accelerator.device)["step"]
        _truncate_metrics(work / "metrics.jsonl", done)
    wrapped = accelerator.prepare(distiller)
    wrapped.train()
    rows = itertools.islice(rows, done * recipe.batch_size, None)
    losses, started = [], time.monotonic()
    with _stop_requests() as stop:
        for step in range(done + 1, steps + 1):
            factor = _schedule(recipe, step, steps)
            for group, rate in zip(optimizer.param_groups, base_rates):
                group["lr"] = rate * factor
            loss, grad_norm = _step(wrapped, distiller, optimizer, rows, recipe, accelerator, micro, trainable)
            if not math.isfinite(loss):
                raise LinearizeError(
                    f"the loss became {loss} at step {step}; the last good state is kept in {work}. Lower the rate "
                    "(--lr) or clip (--set optimizer.clip_norm=1.0)"
                )
            losses.append(loss)
            elapsed = time.monotonic() - started
            rate = len(losses) * recipe.batch_size * recipe.seq_len / elapsed
            progress = Progress(
                step=step,
                steps=steps,
                tokens=step * recipe.batch_size * recipe.seq_len,
                loss=loss,
                lr=base_rates[0] * factor,
                grad_norm=grad_norm,
                tokens_per_second=rate,
                eta_seconds=(steps - step) * elapsed / len(losses),
                memory_bytes=memory_bytes(),
            )
            if accelerator.is_main_process:
                with open(work / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(progress.__dict__) + "\n")
                report(progress)
            stopping = stop.requested
            if (stopping or step % recipe.checkpoint_every == 0 or step == steps) and accelerator.is_main_process:
                save_state(work, step, distiller, optimizer, fingerprint, {})
            if stopping and step < steps:
                raise Interrupted(f"stopped at step {step} of {steps}; the same command goes on from there")
    return losses


def _step(wrapped, distiller, optimizer, rows, recipe, accelerator, micro, trainable) -> tuple[float, float]:
    """One optimizer step: (loss, gradient norm)."""
    every = list(itertools.islice(rows, recipe.batch_size))
    share = recipe.batch_size // accelerator.num_processes
    mine = join(every[accelerator.process_index * share : (accelerator.process_index + 1) * share])
    batches = [batch.to(accelerator.device) for batch in mine.split(micro)]
    # every process reads every row, so the count needs no communication
    counted = max(1, sum(distiller.counted(row) for row in every))
    # data parallelism averages gradients over processes, the loss is a sum
    normaliser = torch.tensor(counted / accelerator.num_processes, device=accelerator.device)
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(wrapped), accelerator.autocast():
            loss = wrapped(batch, normaliser)
        accelerator.backward(loss)
        total += loss.detach()
    limit = recipe.optimizer.clip_norm if recipe.optimizer.clip_norm is not None else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(trainable, limit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return accelerator.reduce(total, "mean").item(), norm.item()


def _micro_batch(recipe: Recipe, processes: int) -> int:
    parts = processes * recipe.gradient_accumulation
    if recipe.batch_size % parts:
        raise ConfigError(
            f"batch_size: got {recipe.batch_size} rows a step, which do not divide over {processes} process(es) times "
            f"gradient_accumulation {recipe.gradient_accumulation}"
        )
    return recipe.batch_size // parts


def _schedule(recipe: Recipe, step: int, steps: int) -> float:
    """Factor on the rates at a step counted from 1: linear warm-up, then cosine or constant."""
    warmup = math.ceil(recipe.optimizer.warmup_fraction * steps)
    if step <= warmup:
        return step / warmup
    if recipe.optimizer.schedule == "constant":
        return 1.0
    position = (step - warmup) / max(1, steps - warmup)
    floor = recipe.optimizer.final_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * position))


@contextmanager
def _stop_requests() -> Iterator:
    """Turns the first SIGINT or SIGTERM into a request, honoured after the step; the second acts at once."""

    class Stop:
        requested = False

    def request(number, frame) -> None:
        if Stop.requested:
            raise KeyboardInterrupt
        Stop.requested = True

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield Stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _truncate_metrics(path: Path, steps: int) -> None:
    """Drops what a killed run logged after its last state."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:steps]), encoding="utf-8")


def memory_bytes() -> int:
    """Peak device memory, or this process's peak resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
