"""Pack documents into rows of equal length whose documents do not see one another.

A document is told apart from the one before it by its positions, which start again at 0.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from linearize.data.documents import Document, read_documents
from linearize.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
# the label of a position that the loss does not count
IGNORED = -100
# tokens of the span that a row of `with_copies` repeats, where the row is long enough
COPIED = 256


@dataclass
class Batch:
    """Packed rows, each tensor [rows, seq_len].

    Attributes:
        input_ids: token ids.
        position_ids: positions, which start again at every document.
        labels: the next token's id where it counts, -100 where it does not.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device."""
        return Batch(self.input_ids.to(device), self.position_ids.to(device), self.labels.to(device))

    def split(self, size: int) -> list["Batch"]:
        """Split the batch into batches of at most `size` rows."""
        parts = zip(self.input_ids.split(size), self.position_ids.split(size), self.labels.split(size))
        return [Batch(*part) for part in parts]


def join(batches: list[Batch]) -> Batch:
    """Join batches of rows of the same length into one."""
    return Batch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.position_ids for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    )


class _Packer:
    """Fills one row after another with documents; the start of a row that is not full yet waits in the lists."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.labels: list[int] = []

    def add(self, document: Document) -> Iterator[Batch]:
        """Append a document and yield the rows that are full.

        A document that a row's end cuts continues in the next row as a document of its own.
        """
        ids = document.ids
        # a label is the next token, so the last token of a document predicts nothing
        labels = [*(id if counts else IGNORED for id, counts in zip(ids[1:], document.counted[1:])), IGNORED]
        while ids:
            room = self.seq_len - len(self.ids)
            self.ids += ids[:room]
            self.positions += range(min(room, len(ids)))
            self.labels += labels[:room]
            ids, labels = ids[room:], labels[room:]
            if len(self.ids) == self.seq_len:
                self.labels[-1] = IGNORED
                yield Batch(*(torch.tensor([row]) for row in (self.ids, self.positions, self.labels)))
                self.ids, self.positions, self.labels = [], [], []


def packed_rows(
    datasets: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    text_field: str,
    completion_only: bool,
    seed: int,
    shortest_document: int = 0,
) -> Iterator[Batch]:
    """Yield batches of one row of exactly `seq_len` tokens, without end.

    Documents come from the datasets in turn. When the data end they are read again in another order.

    Args:
        text_field, completion_only: see `read_documents`.
        seed: of the order of documents.
        shortest_document: documents of fewer tokens are left out.

    Raises:
        ConfigError: the data hold less than one row.
    """
    for epoch in itertools.count():
        packer = _Packer(seq_len)
        produced = 0
        streams = [
            read_documents(name, tokenizer, text_field=text_field, completion_only=completion_only, seed=seed + epoch)
            for name in datasets
        ]
        for document in _round_robin(streams):
            if len(document.ids) < shortest_document:
                continue
            for row in packer.add(document):
                yield row
                produced += 1
        if not produced:
            raise ConfigError(
                f"--data: {', '.join(datasets)} hold {len(packer.ids)} tokens"
                + (f" in documents of at least {shortest_document}" if shortest_document else "")
                + f", fewer than one sequence of {seq_len} (--seq-len)"
            )


def with_copies(rows: Iterator[Batch], share: float, *, shortest: int, seed: int) -> Iterator[Batch]:
    """Yield the rows, about `share` of them with a copy of a span of their own at the end, to train recall.

    Such a row is one document. Without the look back its end is as hard as any text; with it, it is nearly certain.

    Args:
        shortest: least distance in tokens between the span and its copy: the window that has to be left.
        seed: chooses the rows and the spans.
    """
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        chance, place = torch.rand(2, generator=generator).tolist()
        length = row.input_ids.shape[1]
        span = min(COPIED, (length - shortest) // 2)
        if chance >= share or span < 1:
            yield row
            continue
        first = int(place * (length - span - max(shortest, span) + 1))
        ids, labels = row.input_ids.clone(), row.labels.clone()
        ids[:, -span:] = ids[:, first : first + span]
        labels[:, -span - 1 : -1] = ids[:, -span:]
        yield Batch(ids, torch.arange(length)[None], labels)


def _round_robin(streams: list[Iterator[Item]]) -> Iterator[Item]:
    """Yield one item of each stream in turn, until all have ended."""
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)


def read_ahead(rows: Iterator[Item], count: int) -> Iterator[Item]:
    """Yield the same rows while a thread prepares up to `count` of the next ones."""
    reader = ThreadPoolExecutor(1)
    try:
        waiting = deque(reader.submit(next, rows, None) for _ in range(count))
        while (row := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(next, rows, None))
            yield row
    finally:
        reader.shutdown(cancel_futures=True)
