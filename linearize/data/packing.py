"""Pack documents into rows of equal length whose documents do not see one another."""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.data.documents import documents
from linearize.errors import ConfigError

IGNORED = -100


# tokens that a copying row says twice, if it is long enough
COPIED = 256


@dataclass
class Batch:
    """Packed rows. input_ids, position_ids (restarting at every document) and labels are [rows, seq_len]; a label is the
    next token's id where it counts, -100 where it does not."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    def to(self, device) -> "Batch":
        return Batch(self.input_ids.to(device), self.position_ids.to(device), self.labels.to(device))

    def split(self, size: int) -> list["Batch"]:
        return [
            Batch(*parts) for parts in zip(*(x.split(size) for x in (self.input_ids, self.position_ids, self.labels)))
        ]


def packed_rows(
    datasets: list[str],
    tokenizer,
    *,
    seq_len: int,
    text_field: str,
    completion_only: bool,
    seed: int,
    shortest_document: int = 0,
) -> Iterator[Batch]:
    """Endless single-row batches of exactly `seq_len` tokens, the data read again, reshuffled, when it ends.

    A document cut at a row's end continues in the next row as a document of its own. Documents of fewer tokens than
    `shortest_document` are left out.

    Raises:
        ConfigError: the data hold less than one sequence.
    """
    for epoch in itertools.count():
        produced = 0
        streams = [
            documents(name, tokenizer, text_field=text_field, completion_only=completion_only, seed=seed + epoch)
            for name in datasets
        ]
        ids, positions, labels = [], [], []
        for document, counted in _round_robin(streams):
            if len(document) < shortest_document:
                continue
            # a label is the next token, so a document's last token predicts nothing
            targets = [*(t if c else IGNORED for t, c in zip(document[1:], counted[1:])), IGNORED]
            while document:
                room = seq_len - len(ids)
                ids += document[:room]
                positions += range(min(room, len(document)))
                labels += targets[:room]
                document, targets = document[room:], targets[room:]
                if len(ids) == seq_len:
                    labels[-1] = IGNORED
                    yield Batch(*(torch.tensor([x]) for x in (ids, positions, labels)))
                    produced += 1
                    ids, positions, labels = [], [], []
        if not produced:
            raise ConfigError(
                f"--data: {', '.join(datasets)} hold {len(ids)} tokens"
                + (f" in documents of at least {shortest_document}" if shortest_document else "")
                + f", fewer than one sequence of {seq_len} (--seq-len)"
            )


def with_copies(rows: Iterator[Batch], share: float, *, shortest: int, seed: int) -> Iterator[Batch]:
    """The rows, of which about `share` end with a copy of a span of their own, so that recall is trained too.

    Such a row is one document: without the look back its end is as hard as any text, with it nearly certain.

    Args:
        shortest: the least distance between the two, which is the window that has to be left.
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


def _round_robin(streams: list[Iterator]) -> Iterator:
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)


def read_ahead(rows: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The same rows, up to `count` of them made in a thread while what came before is computed with."""
    reader = ThreadPoolExecutor(1)
    try:
        waiting = deque(reader.submit(next, rows, None) for _ in range(count))
        while (row := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(next, rows, None))
            yield row
    finally:
        reader.shutdown(cancel_futures=True)


def join(rows: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*((r.input_ids, r.position_ids, r.labels) for r in rows))))
