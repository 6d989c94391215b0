"""The training loop: optimizer steps over packed rows, with progress, saved states and a clean stop.

`train_stage` goes through one stage of a run:

1. Load the newest saved state, and skip the rows of the steps that were made before it was saved.
2. At every step compute the gradients of `batch_size` rows, over all processes and micro-batches, and update.
3. Write the step to metrics.jsonl and report it.
4. Save the state every `checkpoint_every` steps, at the stage's end, and before an interruption.

The summed loss of a step is divided by the positions counted in all of its rows, so the result does not depend on how
the rows are spread.
"""

import itertools
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from linearize.checkpoint.names import METRICS
from linearize.checkpoint.work_folder import remove
from linearize.checkpoint.writing import write_text
from linearize.data.packing import Batch, join, read_ahead
from linearize.errors import ConfigError, Interrupted, LinearizeError
from linearize.settings.recipe import Recipe
from linearize.training.model import Distiller, make_optimizers
from linearize.training.schedule import ScheduledStage, rate_factor
from linearize.training.state import load_state, save_state, saved_states, step_of
from linearize.training.transfer import transfer_backward
from linearize.training.window_dropout import window_dropout


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as metrics.jsonl records it.

    Steps, tokens and the time left are those of the whole run; the rate is that of this stage in this call.
    """

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
class TrainingRun:
    """Everything that the stages of a run share.

    Attributes:
        recipe: the recipe.
        distiller: the student under training, with its teacher.
        accelerator: device, precision and processes.
        work: folder of metrics.jsonl and saved states.
        fingerprint: everything that decides what training computes; it is saved with every state.
        report: receives the record of every step, in the main process.
    """

    recipe: Recipe
    distiller: Distiller
    accelerator: Accelerator
    work: Path
    fingerprint: dict[str, Any]
    report: Callable[[StepRecord], None]


def train_stages(run: TrainingRun, schedule: list[ScheduledStage], rows_by_stage: list[Iterator[Batch]]) -> int:
    """Train what remains of every stage, and return the tokens trained in this call.

    A run that fails before its first saved state leaves no work folder.

    Raises:
        LinearizeError: as `train_stage`.
    """
    tokens = 0
    try:
        for scheduled, rows in zip(schedule, rows_by_stage):
            tokens += train_stage(run, scheduled, rows) * scheduled.stage.tokens_per_step
    finally:
        if run.accelerator.is_main_process and not saved_states(run.work):  # nothing to go on from
            remove(run.work)
    return tokens


def train_stage(run: TrainingRun, scheduled: ScheduledStage, rows: Iterator[Batch]) -> int:
    """Train the remaining steps of one stage, and return their number.

    Args:
        run: the run that the stage belongs to.
        scheduled: the stage.
        rows: batches of one row, from the start of the stage's data.

    Raises:
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, once the state is saved.
        LinearizeError: the loss is not finite.
    """
    trainer = StageTrainer(run, scheduled)
    steps_done = trainer.restore()
    if steps_done == scheduled.steps:
        return 0
    trainer.prepare()
    batch_size = scheduled.stage.batch_size
    rows = itertools.islice(rows, steps_done * batch_size, None)
    if run.accelerator.device.type != "cpu":  # a device waits for its rows
        rows = read_ahead(rows, 2 * batch_size)
    started = time.monotonic()
    with _stop_requests() as stop:
        for step in range(steps_done + 1, scheduled.steps + 1):
            loss, grad_norm = trainer.train_step(step, list(itertools.islice(rows, batch_size)))
            trainer.log(step, loss, grad_norm, steps_per_second=(step - steps_done) / (time.monotonic() - started))
            stopping = stop.is_set()
            if stopping or step % run.recipe.checkpoint_every == 0 or step == scheduled.steps:
                trainer.save(step)
            number = scheduled.steps_before + step
            if stopping and number < scheduled.total_steps:
                raise Interrupted(
                    f"stopped at step {number} of {scheduled.total_steps}; the same command goes on from there"
                )
    return scheduled.steps - steps_done


class StageTrainer:
    """Trains one stage of a run step by step. Steps are counted within the stage, from 1."""

    def __init__(self, run: TrainingRun, scheduled: ScheduledStage) -> None:
        """Set the distiller up for the stage, and make the stage's optimizers.

        Raises:
            ConfigError: the stage has nothing to train, or its rows do not divide over processes and micro-batches.
        """
        run.distiller.start(scheduled.stage)
        self.run, self.scheduled, self.stage = run, scheduled, scheduled.stage
        self.optimizers = make_optimizers(run.distiller, self.stage.optimizer)
        self.parameter_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        # the learning rates that the schedule's factor multiplies at every step
        self.base_rates = [group["lr"] for group in self.parameter_groups]
        self.trainable = [value for value in run.distiller.parameters() if value.requires_grad]
        # rows of a micro-batch; `_compute_gradients` lowers the number when the device's memory runs out
        self.rows_at_once = _rows_at_once(self.stage.batch_size, run)
        # the module that forward calls: the distiller, which `prepare` may wrap for data parallelism
        self.model: torch.nn.Module = run.distiller

    def restore(self) -> int:
        """Load the newest saved state, and return the number of this stage's steps made before it was saved.

        The last stage loads it even where all steps are done: the weights have still to be written.
        """
        work, scheduled = self.run.work, self.scheduled
        saved = saved_states(work)
        steps_done = step_of(saved[-1]) if saved else 0
        finished = steps_done >= scheduled.last_step
        if saved and (not finished or scheduled.last_step == scheduled.total_steps):
            device = self.run.accelerator.device
            load_state(saved[-1], self.run.distiller, self.optimizers, device, scheduled.steps_before)
        if not finished and self.run.accelerator.is_main_process:
            _truncate_metrics(work / METRICS, steps_done)
        return min(max(steps_done - scheduled.steps_before, 0), scheduled.steps)

    def prepare(self) -> None:
        """Get the model ready to train on the device and over the processes."""
        # attention transfer goes backward layer by layer, which a wrapper would not expect
        if self.stage.loss.kind != "attention":
            self.model = self.run.accelerator.prepare(self.run.distiller)
        self.model.train()

    def train_step(self, step: int, rows: list[Batch]) -> tuple[float, float]:
        """Make one optimizer step on the rows of all processes, and return the loss and the gradient's norm."""
        factor = rate_factor(self.stage, step, self.scheduled.steps)
        for group, rate in zip(self.parameter_groups, self.base_rates):
            group["lr"] = rate * factor
        loss = self._compute_gradients(rows)
        grad_norm = self._update(self.scheduled.steps_before + step)
        if not math.isfinite(loss):
            work = self.run.work
            state = f"the last good state is kept in {work}" if saved_states(work) else "no state had been saved yet"
            raise LinearizeError(
                f"the loss became {loss} at step {self.scheduled.steps_before + step}; {state}. Start again "
                "(--restart) at a lower rate (--lr) or clip (--set optimizer.clip_norm=1.0)"
            )
        return loss, grad_norm

    def _compute_gradients(self, rows: list[Batch]) -> float:
        """Compute the gradients of one step, with as many rows at once as the memory takes; return the loss."""
        while True:
            try:
                return self._compute_gradients_at_once(rows)
            except torch.OutOfMemoryError:
                # another process would wait for this one's share of the gradients
                if self.rows_at_once == 1 or self.run.accelerator.num_processes > 1:
                    raise
            fewer = max(count for count in range(1, self.rows_at_once) if len(rows) % count == 0)
            warnings.warn(f"no memory for {self.rows_at_once} rows at once, trying {fewer}", stacklevel=2)
            self.rows_at_once = fewer
            for parameter in self.trainable:
                parameter.grad = None
            torch.cuda.empty_cache()

    def _compute_gradients_at_once(self, rows: list[Batch]) -> float:
        """Go forward and backward over the rows of this process, `rows_at_once` at a time; return the loss."""
        accelerator, distiller = self.run.accelerator, self.run.distiller
        transfers = self.stage.loss.kind == "attention"
        share = self.stage.batch_size // accelerator.num_processes
        own_rows = join(rows[accelerator.process_index * share : (accelerator.process_index + 1) * share])
        batches = [batch.to(accelerator.device) for batch in own_rows.split(self.rows_at_once)]
        # every process reads every row, so the count needs no communication
        counted = max(1, sum(distiller.counted(row) for row in rows))
        # data parallelism averages gradients over processes, the loss is a sum
        normaliser = torch.tensor(counted / accelerator.num_processes, device=accelerator.device)
        total = torch.zeros((), device=accelerator.device)
        with window_dropout(distiller, self.stage.window_dropout):
            for number, batch in enumerate(batches, 1):
                if transfers:
                    with accelerator.autocast():
                        total += transfer_backward(distiller.student.get_base_model(), batch, 1 / len(batches))
                    continue
                is_last = number == len(batches)
                with nullcontext() if is_last else accelerator.no_sync(self.model), accelerator.autocast():
                    loss = self.model(batch, normaliser)
                accelerator.backward(loss)
                total += loss.detach()
        if transfers and accelerator.num_processes > 1:
            for parameter in self.trainable:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        return accelerator.reduce(total, "mean").item()

    def _update(self, number: int) -> float:
        """Update the parameters in the step of that number in the run; return the gradient's norm."""
        self.run.distiller.before_update()
        clip_norm = self.stage.optimizer.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, float("inf") if clip_norm is None else clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.run.distiller.after_update(number)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def log(self, step: int, loss: float, grad_norm: float, steps_per_second: float) -> None:
        """Append the record of a step to metrics.jsonl and report it, in the main process."""
        if not self.run.accelerator.is_main_process:
            return
        scheduled = self.scheduled
        tokens_per_second = steps_per_second * self.stage.tokens_per_step
        tokens = scheduled.tokens_before + step * self.stage.tokens_per_step
        record = StepRecord(
            stage=self.stage.name,
            step=scheduled.steps_before + step,
            steps=scheduled.total_steps,
            tokens=tokens,
            loss=loss,
            lr=self.base_rates[0] * rate_factor(self.stage, step, scheduled.steps),
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_second,
            eta_seconds=(scheduled.total_tokens - tokens) / tokens_per_second,
            memory_bytes=peak_memory(),
        )
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(self.run.work / METRICS, flags, 0o644), "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        self.run.report(record)

    def save(self, step: int) -> None:
        """Save the state after a step, in the main process."""
        if self.run.accelerator.is_main_process:
            number = self.scheduled.steps_before + step
            with open(self.run.work / METRICS, "rb") as file:
                os.fsync(file.fileno())  # a state is never without the log of its steps
            save_state(self.run.work, number, self.run.distiller, self.optimizers, self.run.fingerprint)


def _rows_at_once(batch_size: int, run: TrainingRun) -> int:
    """Return the rows of a micro-batch: a process's rows of a step in `gradient_accumulation` parts."""
    processes, accumulation = run.accelerator.num_processes, run.recipe.gradient_accumulation
    parts = processes * accumulation
    if batch_size % parts:
        raise ConfigError(
            f"batch_size: got {batch_size} rows a step, which do not divide over {processes} process(es) times "
            f"gradient_accumulation {accumulation}"
        )
    return batch_size // parts


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into an event, honoured after the step. The second acts at once."""
    stop = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # of nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _truncate_metrics(path: Path, steps: int) -> None:
    """Remove the steps that a killed run logged after its last saved state."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(lines[:steps]))


def peak_memory() -> int:
    """Return the peak device memory in bytes, or this process's peak resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
