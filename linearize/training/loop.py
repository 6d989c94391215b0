"""The training loop: optimizer steps over packed rows, with progress, saved states and a clean stop.

A step takes `batch_size` rows in all, over every process and micro-batch, and divides the summed loss by the positions
counted in all of them: the result does not depend on how the rows are spread.
"""

import itertools
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from linearize.checkpoint.names import METRICS
from linearize.data.packing import Batch, join, read_ahead
from linearize.errors import ConfigError, Interrupted, LinearizeError
from linearize.settings.recipe import Recipe, Stage
from linearize.training.model import Distiller
from linearize.training.state import load_state, save_state, states
from linearize.training.transfer import transfer_backward
from linearize.training.window_dropout import window_dropout


@dataclass(frozen=True)
class Progress:
    """One optimizer step, as metrics.jsonl records it: steps, tokens and the time left are the whole run's, the rate is of
    this stage in this call."""

    stage: str
    step: int
    steps: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    eta_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Leg:
    """A stage's place in the whole run: its first step comes after `before` steps and `tokens` tokens, of `total` and
    `total_tokens`."""

    stage: Stage
    steps: int
    before: int
    tokens: int
    total: int
    total_tokens: int


def legs_of(recipe: Recipe) -> list[Leg]:
    """The stages of a recipe in their order."""
    stages = recipe.resolved_stages()
    counts = [stage.steps(recipe.tokens) for stage in stages]
    sizes = [count * stage.seq_len * stage.batch_size for count, stage in zip(counts, stages)]
    return [
        Leg(stage, count, sum(counts[:i]), sum(sizes[:i]), sum(counts), sum(sizes))
        for i, (stage, count) in enumerate(zip(stages, counts))
    ]


def train(
    distiller: Distiller,
    optimizers: list[torch.optim.Optimizer],
    rows: Iterator[Batch],
    recipe: Recipe,
    leg: Leg,
    accelerator: Accelerator,
    work: Path,
    *,
    fingerprint: dict,
    report: Callable[[Progress], None],
) -> list[float]:
    """Runs the remaining steps of one stage and returns the loss of every step of this call.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, once the state is saved. LinearizeError: the loss is not finite.
    """
    stage, micro = leg.stage, _micro_batch(leg.stage, recipe, accelerator.num_processes)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    base_rates = [group["lr"] for group in groups]
    trainable = [value for value in distiller.parameters() if value.requires_grad]
    saved = states(work)
    done = int(saved[-1].name.removeprefix("step-")) if saved else 0
    if done >= leg.before + leg.steps:
        if done == leg.before + leg.steps == leg.total:  # trained to the end, and then not written
            load_state(saved[-1], distiller, optimizers, accelerator.device, leg.before)
        return []
    if saved:
        load_state(saved[-1], distiller, optimizers, accelerator.device, leg.before)
    if accelerator.is_main_process:
        _truncate_metrics(work / METRICS, done)
    done = max(done - leg.before, 0)
    # what matches attentions goes backward layer by layer, which a wrapper would not expect
    wrapped = distiller if stage.loss.kind == "attention" else accelerator.prepare(distiller)
    wrapped.train()
    rows = itertools.islice(rows, done * stage.batch_size, None)
    if accelerator.device.type != "cpu":  # a device waits for its rows
        rows = read_ahead(rows, 2 * stage.batch_size)
    losses, started = [], time.monotonic()
    with _stop_requests() as stop:
        for step in range(done + 1, leg.steps + 1):
            factor = _schedule(stage, step, leg.steps)
            for group, rate in zip(groups, base_rates):
                group["lr"] = rate * factor
            every = list(itertools.islice(rows, stage.batch_size))
            loss, micro = _gradients_that_fit(wrapped, distiller, every, stage, accelerator, micro, trainable)
            grad_norm = _update(distiller, optimizers, stage, trainable, leg.before + step)
            if not math.isfinite(loss):
                kept = f"the last good state is kept in {work}" if states(work) else "no state had been saved yet"
                raise LinearizeError(
                    f"the loss became {loss} at step {leg.before + step}; {kept}. Start again (--restart) at a lower rate "
                    "(--lr) or clip (--set optimizer.clip_norm=1.0)"
                )
            losses.append(loss)
            per_second = len(losses) * stage.batch_size * stage.seq_len / (time.monotonic() - started)
            tokens = leg.tokens + step * stage.batch_size * stage.seq_len
            progress = Progress(
                stage=stage.name,
                step=leg.before + step,
                steps=leg.total,
                tokens=tokens,
                loss=loss,
                lr=base_rates[0] * factor,
                grad_norm=grad_norm,
                tokens_per_second=per_second,
                eta_seconds=(leg.total_tokens - tokens) / per_second,
                memory_bytes=memory_bytes(),
            )
            if accelerator.is_main_process:
                with open(work / METRICS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(progress.__dict__) + "\n")
                report(progress)
            stopping = stop.is_set()
            if (stopping or step % recipe.checkpoint_every == 0 or step == leg.steps) and accelerator.is_main_process:
                save_state(work, leg.before + step, distiller, optimizers, fingerprint)
            if stopping and leg.before + step < leg.total:
                raise Interrupted(
                    f"stopped at step {leg.before + step} of {leg.total}; the same command goes on from there"
                )
    return losses


def _gradients_that_fit(wrapped, distiller, every, stage, accelerator, micro, trainable) -> tuple[float, int]:
    """`_gradients` with as many rows at once as the device's memory takes: the loss, and how many."""
    while True:
        try:
            return _gradients(wrapped, distiller, every, stage, accelerator, micro, trainable), micro
        except torch.OutOfMemoryError:
            # another process would wait for this one's share of the gradients
            if micro == 1 or accelerator.num_processes > 1:
                raise
        fewer = max(n for n in range(1, micro) if len(every) % n == 0)
        warnings.warn(f"no memory for {micro} rows at once, trying {fewer}", stacklevel=2)
        micro = fewer
        for parameter in trainable:
            parameter.grad = None
        torch.cuda.empty_cache()


def _gradients(wrapped, distiller, every, stage, accelerator, micro, trainable) -> float:
    """Forward and backward over the rows of one step, `micro` at once; returns the loss."""
    share = stage.batch_size // accelerator.num_processes
    mine = join(every[accelerator.process_index * share : (accelerator.process_index + 1) * share])
    batches = [batch.to(accelerator.device) for batch in mine.split(micro)]
    # every process reads every row, so the count needs no communication
    counted = max(1, sum(distiller.counted(row) for row in every))
    # data parallelism averages gradients over processes, the loss is a sum
    normaliser = torch.tensor(counted / accelerator.num_processes, device=accelerator.device)
    total = torch.zeros((), device=accelerator.device)
    with window_dropout(distiller, stage.window_dropout):
        for i, batch in enumerate(batches):
            if stage.loss.kind == "attention":
                with accelerator.autocast():
                    total += transfer_backward(distiller.student.get_base_model(), batch, 1 / len(batches))
                continue
            last = i == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(wrapped), accelerator.autocast():
                loss = wrapped(batch, normaliser)
            accelerator.backward(loss)
            total += loss.detach()
    if stage.loss.kind == "attention" and accelerator.num_processes > 1:
        for parameter in trainable:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return accelerator.reduce(total, "mean").item()


def _update(distiller, optimizers, stage, trainable, number) -> float:
    """The optimizer step of that number; returns the gradient's norm."""
    distiller.before_update()
    limit = stage.optimizer.clip_norm if stage.optimizer.clip_norm is not None else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(trainable, limit)
    for optimizer in optimizers:
        optimizer.step()
    distiller.after_update(number)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


def _micro_batch(stage: Stage, recipe: Recipe, processes: int) -> int:
    parts = processes * recipe.gradient_accumulation
    if stage.batch_size % parts:
        raise ConfigError(
            f"batch_size: got {stage.batch_size} rows a step, which do not divide over {processes} process(es) times "
            f"gradient_accumulation {recipe.gradient_accumulation}"
        )
    return stage.batch_size // parts


def _schedule(stage: Stage, step: int, steps: int) -> float:
    """Factor on the rates at a step counted from 1: linear warm-up, then cosine or constant."""
    warmup = math.ceil(stage.optimizer.warmup_fraction * steps)
    if step <= warmup:
        return step / warmup
    if stage.optimizer.schedule == "constant":
        return 1.0
    position = (step - warmup) / max(1, steps - warmup)
    floor = stage.optimizer.final_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * position))


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Turns the first SIGINT or SIGTERM into a request, honoured after the step; the second acts at once."""

    stop = threading.Event()

    def request(number, frame) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
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
