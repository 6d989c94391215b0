"""What every stage of an evaluation works with: the models, the tokenizer and the text.

A few sets of weights serve all models, each in some mode. Where they do not fit into memory together they take turns, so
a stage hands over what is to be done with a model instead of holding one.
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
PROBE_TOKENS = 32
# the sets of weights; "reference": the base's under the student's plan
REFERENCE = "reference"
Found = TypeVar("Found")


def _as_it_is(model: PreTrainedModel) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


# model -> (its weights, the mode in which they are that model)
MODES: dict[str, tuple[str, Callable[[Any], contextlib.AbstractContextManager]]] = {
    BASE: (REFERENCE, lambda model: model.softmax_attention()),
    UNTRAINED: (REFERENCE, _as_it_is),
    WINDOW: (REFERENCE, lambda model: model.recurrent_branch_off()),
    STUDENT: (STUDENT, _as_it_is),
    BRANCH_OFF: (STUDENT, lambda model: model.recurrent_branch_off()),
    WINDOW_OFF: (STUDENT, lambda model: model.window_off()),
    UNIFORM: (UNIFORM, _as_it_is),
    CONTROL: (CONTROL, _as_it_is),
}


@dataclass
class Lab:
    """Models at hand and what they are measured on.

    Attributes:
        loaders: weights -> function that loads them.
        vocabulary: how many token ids both the tokenizer and the models know.
        text: the evaluation text as one row of token ids, [N].
        together: whether all weights are held at once; else one set at a time.
        work: folder for what has to outlive the model that computed it.
    """

    loaders: dict[str, Callable[[], PreTrainedModel]]
    tokenizer: Any
    vocabulary: int
    text: Tensor
    device: str
    seed: int
    together: bool
    work: Path
    progress: Callable[[str], None]
    _held: dict[str, PreTrainedModel] = field(default_factory=dict)

    def measure(self, names: Iterable[str], run: Callable[[str, PreTrainedModel], Found]) -> dict[str, Found]:
        """run(name, model) of every named model that is at hand, in its mode."""
        found: dict[str, Found] = {}

        def one_set(models: dict[str, PreTrainedModel]) -> None:
            for name, model in models.items():
                with MODES[name][1](model):
                    found[name] = run(name, model)

        chosen = self.at_hand(names)
        self.in_turn(sorted(chosen, key=lambda name: MODES[name][0] not in self._held), one_set)
        return {name: found[name] for name in chosen}

    def in_turn(self, names: Iterable[str], run: Callable[[dict[str, PreTrainedModel]], None]) -> None:
        """run({name: weights}) with all models, or with those of one set of weights after the other, in the order given.

        The caller enters the modes. `run` must not keep a model, or two sets would be in memory at once.
        """
        chosen = self.at_hand(names)
        sets = list(dict.fromkeys(MODES[name][0] for name in chosen))
        for group in [sets] if self.together else [[weights] for weights in sets]:
            self._hold(group)
            run({name: self._held[MODES[name][0]] for name in chosen if MODES[name][0] in group})

    def at_hand(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if MODES[name][0] in self.loaders]

    def greedy(self, model: PreTrainedModel, prompts: list[Tensor], tokens: int) -> list[tuple[list[int], bool]]:
        """At most `tokens` new token ids after every prompt [T], through the cache, and whether the model stopped by itself.

        Prompts go in batches, padded on the left. Of a checkpoint's own settings for generating, beams and penalties
        among them, the end tokens alone count.
        """
        longest = max(prompt.numel() for prompt in prompts)
        rows = max(1, BATCH_TOKENS // longest)
        stops = model.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops])
        pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        answers = []
        for start in range(0, len(prompts), rows):
            batch = prompts[start : start + rows]
            width = max(prompt.numel() for prompt in batch)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros_like(ids)
            for i, prompt in enumerate(batch):
                ids[i, width - prompt.numel() :] = prompt
                mask[i, width - prompt.numel() :] = 1
            with _generation_config(model, GenerationConfig(eos_token_id=model.generation_config.eos_token_id)):
                produced = model.generate(
                    ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    max_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=pad,
                )
            for row in produced[:, width:].tolist():
                end = next((i for i, token in enumerate(row) if token in stops), None)
                answers.append((row[:end], end is not None))
        return answers

    def tick(self, what: str, done: int, total: int) -> None:
        if done == total or done % 4 == 0:
            self.progress(f"{what}: {done} of {total}")

    def _hold(self, group: list[str]) -> None:
        if not self.together and not set(group) <= self._held.keys():
            self._held.clear()
            gc.collect()
        for weights in group:
            if weights not in self._held:
                model = self.loaders[weights]().to(self.device)
                self._require_finite(weights, model)
                self._held[weights] = model

    def _require_finite(self, weights: str, model: PreTrainedModel) -> None:
        """Every model of these weights says something, at least about the first tokens."""
        ids = self.text[:PROBE_TOKENS][None].to(self.device)
        for name, (needed, mode) in MODES.items():
            if needed == weights:
                with mode(model):
                    require_finite(name, model(ids, use_cache=False).logits)


@contextlib.contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def final_hidden(name: str, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the output embeddings are multiplied by, [B, T, D], for ids [B, T]; the model is in its mode.

    Raises:
        LinearizeError: it is not finite.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    require_finite(name, hidden)
    return hidden


def require_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise LinearizeError(
            f"{name}: its logits are not finite at {values.shape[1]} tokens; the checkpoint is damaged"
        )
