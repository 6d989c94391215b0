"""What every stage of an evaluation works with: the two models, their modes, the tokenizer and the text."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.modeling.readout import Readout, readout_of
from linearize.report.results import BASE, BRANCH_OFF, STUDENT, UNTRAINED, WINDOW, WINDOW_OFF

Forward = Callable[[Tensor], tuple[Tensor, Readout]]


@dataclass(frozen=True)
class Lab:
    """Two sets of weights serve six models.

    Attributes:
        reference: the base's weights under the student's plan: base, window + sinks and untrained conversion.
        text: the evaluation text as one row of token ids, [N].
    """

    reference: PreTrainedModel
    student: PreTrainedModel
    tokenizer: Any
    text: Tensor
    device: str
    seed: int
    progress: Callable[[str], None]

    def modes(self) -> dict[str, tuple[PreTrainedModel, Callable]]:
        """Model name -> (weights, context in which they are that model)."""
        return {
            BASE: (self.reference, self.reference.softmax_attention),
            STUDENT: (self.student, contextlib.nullcontext),
            BRANCH_OFF: (self.student, self.student.recurrent_branch_off),
            WINDOW_OFF: (self.student, self.student.window_off),
            UNTRAINED: (self.reference, contextlib.nullcontext),
            WINDOW: (self.reference, self.reference.recurrent_branch_off),
        }

    def forwards(self, *names: str) -> dict[str, Forward]:
        """ids [1, T] -> (final hidden states [T, D], readout), for the named models."""
        return {name: _forward(*self.modes()[name]) for name in names}

    def greedy(self, model: PreTrainedModel, ids: Tensor, tokens: int) -> list[int]:
        """At most `tokens` new token ids after ids [1, T], through the cache; fewer when the model stops by itself."""
        ids = ids.to(self.device)
        produced = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
        )
        return produced[0, ids.shape[1] :].tolist()

    def tick(self, what: str, done: int, total: int) -> None:
        if done == total or done % 4 == 0:
            self.progress(f"{what}: {done} of {total}")


def _forward(model: PreTrainedModel, mode: Callable) -> Forward:
    readout = readout_of(model)

    def forward(ids: Tensor) -> tuple[Tensor, Readout]:
        with mode():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return hidden, readout

    return forward
