"""Cut rows of equal length out of a dataset's text."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.checkpoint.auto import auto_config
from linearize.checkpoint.source import Source
from linearize.checkpoint.student import read_tokenizer
from linearize.data.documents import read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tokens of the longest row: more would cost memory and time, and tell little more of a head
LONGEST_ROW = 2048


def text_tokens(tokenizer: "PreTrainedTokenizerBase", dataset: str, count: int, *, skip: int = 0) -> list[int]:
    """Return the token ids of a dataset's text behind its first `skip` tokens: `count` of them, or all that there are.

    Raises:
        ConfigError: there is no such dataset.
    """
    ids: list[int] = []
    for document in read_documents(dataset, tokenizer, text_field="text", completion_only=False, seed=None):
        ids += document.ids
        if len(ids) >= skip + count:
            break
    return ids[skip : skip + count]


def text_rows(source: Source, window: int, dataset: str, rows: int) -> Tensor | None:
    """Return the first text of a dataset as token ids [rows, T].

    T is as long as the text and the model's positions allow, at most 2048.

    Returns:
        None if T would be less than twice the window, or if the model has no tokenizer.

    Raises:
        ConfigError: there is no such dataset.
    """
    tokenizer = read_tokenizer(source.folder)
    if tokenizer is None:
        return None
    ids = text_tokens(tokenizer, dataset, rows * LONGEST_ROW)
    positions = auto_config(source.folder).max_position_embeddings
    length = min(len(ids) // rows, LONGEST_ROW, positions)
    if length < 2 * window:
        return None
    return torch.tensor(ids[: rows * length]).view(rows, length)
