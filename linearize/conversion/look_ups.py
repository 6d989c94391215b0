"""Build rows whose last tokens can be known only from far back: copies of random tokens, facts and quotes in text.

One row asks about several places, at two distances. Head scores (probes.py) and the measured quality of a conversion
(quality.py) are taken on such rows, with other numbers, other words and other text.

    text | facts and a span of random tokens | text | facts and another span | text | questions and answers, the
    passages of text before the facts again, the spans again

Without a tokenizer there are neither text nor facts, and a row is random tokens with two spans that come again.

Shapes: T tokens.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# tokens of a span of random tokens that comes again, and of a quoted passage
SPAN, QUOTE = 96, 72
# first tokens of a copy that do not count: from them the model has yet to recognise the span
SKIPPED = 8
# facts of a row at each distance, and tokens of text before the first and between two of them
FACTS, TEXT_BEFORE, TEXT_BETWEEN = 10, 72, 24
# room for a fact and the text behind it, in tokens
TOKENS_A_FACT = 60
# tokens that a row is longer than its longest distance at most: text before it, questions and copies
ROOM = 768
# rows ask about what stands so many windows back, if the model's positions allow it
NEAR, FAR = 2.5, 6

THINGS = ("locker", "suitcase", "safe", "garden gate", "bicycle lock", "archive", "workshop", "cellar")
OWNERS = ("Miriam", "Oscar", "Helena", "Tobias", "Ingrid", "Marcus", "Beatrice", "Conrad")


@dataclass(frozen=True)
class Wording:
    """The words of a fact, and of the question that its number answers."""

    fact: str
    question: str


SCORING = Wording(" To open the {thing} of {owner}, enter {number}.\n", "\nTo open the {thing} of {owner}, enter")
HELD_OUT = Wording(
    " The {thing} that {owner} rents has the number {number}.\n", "\nThe {thing} that {owner} rents has the number"
)


@dataclass(frozen=True)
class Answer:
    """Tokens of a row that are to be known from further back.

    Attributes:
        kind: "copies", "facts" or "quotes".
        distance: about how many tokens back their source stands.
        start, stop: their positions, `stop` not included.
        source, source_stop: the positions that tell them.
        verbatim: the source is the same tokens, one by one, that end at `source_stop`.
    """

    kind: str
    distance: int
    start: int
    stop: int
    source: int
    source_stop: int
    verbatim: bool = False

    def keys(self, length: int) -> Tensor:
        """Return the keys to look up for each of the answer's tokens, [tokens, length] bool.

        For a copy it is the token itself where it came first; the query is the token before it.
        """
        positions = torch.arange(length)
        if not self.verbatim:
            in_source = (positions >= self.source) & (positions < self.source_stop)
            return in_source.expand(self.stop - self.start, -1)
        sources = torch.arange(self.source_stop - (self.stop - self.start), self.source_stop)
        return positions == sources[:, None]


@dataclass(frozen=True)
class LookUpRow:
    """A row of token ids [T] and its answers; positions from `asked` on are questions, answers and copies."""

    ids: Tensor
    answers: tuple[Answer, ...]
    asked: int


def look_up_distances(window: int, positions: int) -> tuple[int, ...]:
    """Return the distances that rows ask at: 2.5 and 6 windows, or fewer and shorter ones if positions are few."""
    longest = positions - min(ROOM, 128 + 10 * window)  # short windows leave room for few questions
    near, far = round(NEAR * window), FAR * window
    if longest < near:
        # half as far again as the window still leaves it
        return (longest,) if longest >= 1.5 * window else ()
    return (near, min(far, longest)) if longest >= 1.5 * near else (near,)


def copy_row(
    distances: Sequence[int], vocabulary: int, start_token: int | None, generator: torch.Generator
) -> LookUpRow:
    """Build a row of random tokens that ends with a second copy of one span for every distance."""
    distances = sorted(distances, reverse=True)
    span = min(SPAN, distances[-1])
    first = 0 if start_token is None else 1
    length = first + distances[0] + span * len(distances)
    ids = torch.randint(vocabulary, (length,), generator=generator)
    if start_token is not None:
        ids[0] = start_token
    answers = []
    asked = length - span * len(distances)
    skipped = min(SKIPPED, span - 1)
    for number, distance in enumerate(distances):
        start = asked + number * span
        source = start - distance
        ids[start : start + span] = ids[source : source + span].clone()
        answers.append(Answer("copies", distance, start + skipped, start + span, source, source + span, verbatim=True))
    return LookUpRow(ids, tuple(answers), asked)


@dataclass(frozen=True)
class _Fact:
    """A made-up fact as token ids: its statement, the question for it, and the answer."""

    statement: list[int]
    question: list[int]
    answer: list[int]


def _draw_facts(
    encode: Callable[[str], list[int]], wording: Wording, count: int, generator: torch.Generator
) -> list[_Fact]:
    """Make up facts: the numbers of somebody's things. No two are about the same."""
    facts = []
    for place in torch.randperm(len(THINGS) * len(OWNERS), generator=generator)[:count].tolist():
        about = {"thing": THINGS[place % len(THINGS)], "owner": OWNERS[place // len(THINGS)]}
        number = str(int(torch.randint(10_000, 100_000, (1,), generator=generator)))  # five digits
        question = encode(wording.question.format(**about))
        # encoded as one text, since a tokenizer may split the answer alone differently
        question_and_answer = encode(wording.question.format(**about) + f" {number}")
        statement = encode(wording.fact.format(**about, number=number))
        facts.append(_Fact(statement, question, question_and_answer[len(question) :]))
    return facts


def text_row(
    encode: Callable[[str], list[int]],
    text: Sequence[int],
    distances: Sequence[int],
    window: int,
    vocabulary: int,
    generator: torch.Generator,
    wording: Wording,
) -> LookUpRow | None:
    """Build a row of running text with made-up facts and random tokens at every distance, that ends by asking for them.

    Args:
        encode: turns text into token ids, without special tokens.
        text: token ids that fill the row.
        distances: tokens from the start of a block of facts to the first question, all beyond the window.

    Returns:
        None if the text is too short.
    """
    distances = sorted(distances, reverse=True)
    gaps = [far - near for far, near in zip(distances, [*distances[1:], window], strict=True)]
    per_distance = max(1, min(FACTS, (min(gaps) - SPAN) // TOKENS_A_FACT))
    span = min(SPAN, min(gaps) // 2)
    before = min(TEXT_BEFORE, distances[-1])
    body = before + distances[0]
    if len(text) < body:
        return None
    facts = _draw_facts(encode, wording, per_distance * len(distances), generator)
    filler = iter(text)
    row = _take(filler, before)
    answers, verbatim = [], []
    sources: list[tuple[int, int]] = []
    for number, distance in enumerate(distances):
        row += _take(filler, body - distance - len(row))
        verbatim.append(("quotes", distance, len(row) - min(QUOTE, before), len(row)))
        for fact in facts[number * per_distance : (number + 1) * per_distance]:
            sources.append((len(row), len(row) + len(fact.statement)))
            row += [*fact.statement, *_take(filler, TEXT_BETWEEN)]
        verbatim.append(("copies", distance, len(row), len(row) + span))
        row += torch.randint(vocabulary, (span,), generator=generator).tolist()
    row += _take(filler, body - len(row))
    asked = len(row)
    for number, fact in enumerate(facts):
        row += [*fact.question, *fact.answer]
        distance = distances[number // per_distance]
        answers.append(Answer("facts", distance, len(row) - len(fact.answer), len(row), *sources[number]))
    for kind, distance, source, source_stop in sorted(verbatim, reverse=True):  # quotes before copies
        row += row[source:source_stop]
        start = len(row) - (source_stop - source) + min(SKIPPED, source_stop - source - 1)
        answers.append(Answer(kind, distance, start, len(row), source, source_stop, verbatim=True))
    return LookUpRow(torch.tensor(row), tuple(answers), asked)


def _take(tokens: Iterator[int], count: int) -> list[int]:
    """Return the next `count` tokens; none if it is negative."""
    return list(itertools.islice(tokens, max(0, count)))
