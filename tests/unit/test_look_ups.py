"""Rows that ask about what stands far back: what they say, where it stands, and how shares of it are counted."""

import itertools

import pytest
import torch
from transformers import AutoTokenizer

from linearize.conversion.look_ups import HELD_OUT, SCORING, copy_row, look_up_distances, text_row
from linearize.conversion.quality import Reading, Standard
from linearize.conversion.search import _first_that_holds

FILLER = "word "


def row_of_text(tokenizer_folder, distances=(400, 900), window=100, wording=SCORING):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    filler = encode(FILLER) * 1000
    generator = torch.Generator().manual_seed(5)
    return tokenizer, text_row(encode, filler, distances, window, 300, generator, wording)


@pytest.mark.parametrize(
    ("window", "positions", "expected"),
    [
        (512, 32768, (1280, 3072)),
        (512, 2816, (1280, 2048)),
        (512, 2048, (1280,)),
        (512, 1600, (832,)),
        (512, 1024, ()),
        (12, 512, (30, 72)),
    ],
)
def test_distances_fit_the_positions(window, positions, expected):
    assert look_up_distances(window, positions) == expected


def test_spans_come_again_after_each_distance():
    row = copy_row((60, 20), 300, 0, torch.Generator().manual_seed(1))
    assert row.ids[0] == 0 and [answer.distance for answer in row.answers] == [60, 20]
    for answer in row.answers:
        assert torch.equal(row.ids[answer.start : answer.stop], row.ids[answer.source + 8 : answer.source_stop])
        assert answer.start - (answer.source + 8) == answer.distance
        keys = answer.keys(len(row.ids))
        assert keys.sum(-1).tolist() == [1] * (answer.stop - answer.start)
        assert all(row.ids[keys[i]] == row.ids[answer.start + i] for i in range(len(keys)))


@pytest.mark.parametrize("wording", [SCORING, HELD_OUT])
def test_every_answer_of_a_text_stands_in_its_source(tokenizer_folder, wording):
    tokenizer, row = row_of_text(tokenizer_folder, wording=wording)
    kinds = [answer.kind for answer in row.answers]
    assert kinds.count("facts") >= 4 and kinds.count("quotes") == kinds.count("copies") == 2
    for answer in row.answers:
        asked, source = row.ids[answer.start : answer.stop], row.ids[answer.source : answer.source_stop]
        assert row.asked <= answer.start and answer.source_stop <= row.asked
        if answer.verbatim:
            assert torch.equal(asked, source[-len(asked) :])
        else:
            assert tokenizer.decode(asked).strip() in tokenizer.decode(source)


def test_sources_are_beyond_the_window(tokenizer_folder):
    _, row = row_of_text(tokenizer_folder)
    for answer in row.answers:
        assert answer.start - answer.source_stop > 100


def test_a_text_that_is_too_short_makes_no_row(tokenizer_folder):
    generator = torch.Generator().manual_seed(5)
    assert text_row(lambda words: [1] * 9, [3] * 400, (400, 900), 100, 300, generator, SCORING) is None


def reading(hits: float, nats: float, divergence: float = 0.0, tokens: int = 400) -> Reading:
    right = torch.arange(tokens) < hits * tokens
    return Reading({"copies@900": right.float()}, {"copies@900": torch.full((tokens,), nats)}, divergence)


def test_held_shares_are_of_hits_and_of_what_the_window_lacks():
    standard = Standard(reading(0.8, 1.0), reading(0.0, 5.0), 0.97, 0.02)
    held = standard.held(reading(0.4, 2.0))
    assert held["copies@900"]["hits"].share == held["look-ups@900"]["hits"].share == pytest.approx(0.5)
    assert held["copies@900"]["nats"].share == pytest.approx(0.75)
    assert standard.shortfalls(reading(0.4, 2.0)) != [] and not standard.holds(reading(0.4, 2.0))
    assert standard.holds(reading(0.8, 1.0)) and standard.holds(reading(0.9, 0.5))


def test_a_share_may_miss_the_target_by_chance_and_no_more():
    standard = Standard(reading(1.0, 1.0), reading(0.0, 5.0), 0.97, 0.02)
    assert standard.holds(reading(0.9625, 1.0)) and not standard.holds(reading(0.94, 1.0))


def test_look_ups_that_the_base_does_not_answer_do_not_count():
    standard = Standard(reading(0.0, 4.8), reading(0.0, 5.0), 0.97, 0.02)
    assert standard.answered == () and standard.holds(reading(0.0, 9.0))
    assert not standard.holds(reading(0.0, 5.0, divergence=0.03))


@pytest.mark.parametrize("count", [1, 2, 7, 11])
def test_the_first_that_holds_is_found_from_anywhere(count):
    for first, start in itertools.product(range(count + 1), range(count)):
        asked: list[int] = []

        def holds(number: int, first=first, asked=asked) -> bool:
            asked.append(number)
            return number >= first

        assert _first_that_holds(holds, count, start) == (first if first < count else None)
        assert len(asked) == len(set(asked)) <= 7


def test_nan_is_lost():
    standard = Standard(reading(0.8, 1.0), reading(0.0, 5.0), 0.97, 0.02)
    assert not standard.holds(reading(0.8, float("nan")))
    assert not standard.holds(reading(0.8, 1.0, divergence=float("nan")))
