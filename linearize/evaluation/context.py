"""Hold what every stage of an evaluation works with: the models, the tokenizer and the text.

A few sets of weights serve all models, each in some mode. Where the sets do not fit into memory together they take
turns. A stage therefore hands over a function to run with a model instead of holding the model.
"""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from linearize.errors import LinearizeError
from linearize.report.results import BASE, BRANCH_OFF, CONTROL, STUDENT, UNIFORM, UNTRAINED, WINDOW, WINDOW_OFF

# tokens that go through a model at once where a stage has several short rows
BATCH_TOKENS = 4096
# tokens of text that every model is tried on when its weights are loaded
PROBE_TOKENS = 32
# the set of weights that is the base's under the student's plan
REFERENCE = "reference"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Mode:
    """The way to get one of the models: the name of its set of weights, and a context manager.

    Inside the context manager, a model that was loaded with these weights computes what the wanted model computes.
    """

    weights: str
    enter: Callable[[Any], contextlib.AbstractContextManager]


def _unchanged(model: PreTrainedModel) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


MODES: dict[str, Mode] = {
    BASE: Mode(REFERENCE, lambda model: model.softmax_attention()),
    UNTRAINED: Mode(REFERENCE, _unchanged),
    WINDOW: Mode(REFERENCE, lambda model: model.recurrent_branch_off()),
    STUDENT: Mode(STUDENT, _unchanged),
    BRANCH_OFF: Mode(STUDENT, lambda model: model.recurrent_branch_off()),
    WINDOW_OFF: Mode(STUDENT, lambda model: model.window_off()),
    UNIFORM: Mode(UNIFORM, _unchanged),
    CONTROL: Mode(CONTROL, _unchanged),
}


@dataclass
class EvaluationContext:
    """Models and the data they are measured on.

    Attributes:
        loaders: function that loads each set of weights.
        tokenizer: the student's, of transformers.
        vocabulary: number of token ids that both the tokenizer and the models know.
        text: the evaluation text as one row of token ids, [N].
        base_fingerprint: digest of the base's weights, for results of the base that are cached on disk.
        all_in_memory: True if all sets of weights are in memory at once, False if they take turns.
        work: folder for tensors that outlive the model that computed them.
        progress: called with a line of text now and then.
    """

    loaders: dict[str, Callable[[], PreTrainedModel]]
    tokenizer: Any
    vocabulary: int
    text: Tensor
    base_fingerprint: str
    device: str
    seed: int
    all_in_memory: bool
    work: Path
    progress: Callable[[str], None]
    _loaded: dict[str, PreTrainedModel] = field(default_factory=dict)

    def available(self, names: Iterable[str]) -> list[str]:
        """Return those of the named models that have weights here."""
        return [name for name in names if MODES[name].weights in self.loaders]

    def for_each_model(self, names: Iterable[str], run: Callable[[str, PreTrainedModel], Result]) -> dict[str, Result]:
        """Call run(name, model) for every named model that is available, in the model's mode (see `Mode`).

        Returns:
            What `run` returned, by name of the model.
        """
        results: dict[str, Result] = {}

        def run_set(models: dict[str, PreTrainedModel]) -> None:
            for name, model in models.items():
                with MODES[name].enter(model):
                    results[name] = run(name, model)

        available = self.available(names)
        # models whose weights are in memory go first, since loading others may drop these
        in_memory_first = sorted(available, key=lambda name: MODES[name].weights not in self._loaded)
        self.for_each_weight_set(in_memory_first, run_set)
        return {name: results[name] for name in available}

    def for_each_weight_set(self, names: Iterable[str], run: Callable[[dict[str, PreTrainedModel]], None]) -> None:
        """Call run({name: model}) with all models at once, or set after set of weights, in the order given.

        The caller enters the modes. `run` must not hold on to a model, or two sets would be in memory at once.
        """
        available = self.available(names)
        sets = list(dict.fromkeys(MODES[name].weights for name in available))
        for group in [sets] if self.all_in_memory else [[weights] for weights in sets]:
            self._load(group)
            run({name: self._loaded[MODES[name].weights] for name in available if MODES[name].weights in group})

    def greedy(self, model: PreTrainedModel, prompts: list[Tensor], tokens: int) -> list[tuple[list[int], bool]]:
        """Generate greedily after every prompt, through the cache.

        Prompts go in batches, padded on the left. Only the end tokens of the checkpoint's own generation settings
        count: neither beams nor penalties.

        Args:
            prompts: token ids [T] each.
            tokens: number of new tokens at most.

        Returns:
            The new token ids of every prompt, and True if the model stopped by itself.
        """
        longest = max(prompt.numel() for prompt in prompts)
        size = max(1, BATCH_TOKENS // longest)
        end_ids = model.generation_config.eos_token_id
        ends = set(end_ids if isinstance(end_ids, list) else [end_ids])
        answers = []
        for start in range(0, len(prompts), size):
            for row in self._generate(model, prompts[start : start + size], tokens):
                end = next((i for i, token in enumerate(row) if token in ends), None)
                answers.append((row[:end], end is not None))
        return answers

    def _generate(self, model: Any, prompts: list[Tensor], tokens: int) -> list[list[int]]:
        """Return the new token ids of a batch of prompts [T], padding included."""
        padding = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        width = max(prompt.numel() for prompt in prompts)
        ids = torch.full((len(prompts), width), padding)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - prompt.numel() :] = prompt
            mask[i, width - prompt.numel() :] = 1
        with _generation_config(model, GenerationConfig(eos_token_id=model.generation_config.eos_token_id)):
            rows = model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=padding,
            )
        return rows[:, width:].tolist()

    def report_every_fourth(self, name: str, done: int, total: int) -> None:
        """Report progress of a loop at every fourth step and at the last."""
        if done == total or done % 4 == 0:
            self.progress(f"{name}: {done} of {total}")

    def _load(self, group: list[str]) -> None:
        if not self.all_in_memory and not set(group) <= self._loaded.keys():
            self._loaded.clear()
            gc.collect()
        for weights in group:
            if weights not in self._loaded:
                model: Any = self.loaders[weights]()
                model = model.to(self.device)
                self._require_finite_models(weights, model)
                self._loaded[weights] = model

    def _require_finite_models(self, weights: str, model: PreTrainedModel) -> None:
        """Refuse weights with which any model has no finite logits for the first tokens of the text."""
        ids = self.text[:PROBE_TOKENS][None].to(self.device)
        for name, mode in MODES.items():
            if mode.weights == weights:
                with mode.enter(model):
                    require_finite(name, model(ids, use_cache=False).logits)


@contextlib.contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def final_hidden(name: str, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the hidden states before the output embeddings, [B, T, D], for ids [B, T].

    The caller has entered the model's mode.

    Raises:
        LinearizeError: they are not finite.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    require_finite(name, hidden)
    return hidden


def require_finite(name: str, values: Tensor) -> None:
    """Refuse values [B, T, ...] of a model that are not finite.

    Raises:
        LinearizeError: they are not.
    """
    if not values.isfinite().all():
        raise LinearizeError(
            f"{name}: its logits are not finite at {values.shape[1]} tokens; the checkpoint is damaged"
        )
