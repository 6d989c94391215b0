"""Cut rows of equal length out of a dataset's text."""

import torch
from torch import Tensor
from transformers import AutoConfig

from linearize.checkpoint.source import Source
from linearize.checkpoint.student import read_tokenizer
from linearize.data.documents import documents

LONGEST = 2048


def text_rows(source: Source, window: int, name: str, rows: int) -> Tensor | None:
    """Token ids [rows, T] of a dataset, T as long as text and positions allow, at most 2048; None where that is not
    twice as long as the window, or without a tokenizer.

    Raises:
        ConfigError: no such dataset.
    """
    if (tokenizer := read_tokenizer(source.folder)) is None:
        return None
    ids: list[int] = []
    for document, _ in documents(name, tokenizer, text_field="text", completion_only=False, seed=None):
        ids += document
        if len(ids) >= rows * LONGEST:
            break
    length = min(len(ids) // rows, LONGEST, AutoConfig.from_pretrained(source.folder).max_position_embeddings)
    if length < 2 * window:
        return None
    return torch.tensor(ids[: rows * length]).view(rows, length)
