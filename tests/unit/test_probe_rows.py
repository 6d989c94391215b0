"""Rows that an evaluation asks a model about, and how answers are scored."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import SUITE
from transformers import AutoTokenizer

from linearize.data.recall_rows import associative_task, recall_task
from linearize.evaluation.associative import associative_accuracy
from linearize.evaluation.generation import health
from linearize.evaluation.passkey import passkey_task
from linearize.evaluation.perplexity import position_buckets
from linearize.evaluation.recall import accuracy
from linearize.evaluation.suite import SUITES, Suite, cut_to_positions
from linearize.evaluation.text import text_ids_of
from linearize.evaluation.window_scores import windows_of
from linearize.modeling.readout import Readout

HEAD = Readout(torch.eye(1000))


def perfect_answers(row: torch.Tensor) -> torch.Tensor:
    """Return hidden states [T, 1000] that `HEAD` reads as the row's own next tokens."""
    return torch.cat([torch.eye(1000)[row[1:]], torch.zeros(1, 1000)])


@pytest.fixture(params=[5, 256, 700])
def copy_task(request):
    """Return (distance, recall task): rows that repeat a span after `distance` tokens."""
    return request.param, recall_task(request.param, 2, 1000, 7, seed=1)


def test_a_recall_row_repeats_a_span_at_its_distance(copy_task):
    distance, task = copy_task
    assert torch.equal(task.ids[:, -task.counted :], task.ids[:, -task.counted - distance : -distance])


def test_recall_rows_are_the_same_for_the_same_seed(copy_task):
    distance, task = copy_task
    assert torch.equal(task.ids, recall_task(distance, 2, 1000, 7, seed=1).ids)


def test_a_recall_row_begins_with_the_start_token(copy_task):
    assert (copy_task[1].ids[:, 0] == 7).all()


def test_recall_counts_the_tokens_that_are_copied(copy_task):
    row, counted = copy_task[1].ids[0], copy_task[1].counted
    assert accuracy(perfect_answers(row), HEAD, row, counted) == 1.0
    assert accuracy(perfect_answers(row).roll(1, 0), HEAD, row, counted) < 0.1


@pytest.mark.parametrize(("tokens", "rows"), [(1000, 3), (60, 2)])
def test_windows_take_whole_rows_of_the_text(tokens, rows):
    assert windows_of(torch.arange(100), 30, tokens).shape == (rows, 30)


def test_position_buckets_double_and_end_with_the_window():
    assert list(position_buckets(200)) == [(1, 64), (64, 128), (128, 200)]


class _Greeting:
    """Tokenize into bytes, with token 0 in front of every text, as many tokenizers do."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[0] * add_special_tokens + [1 + b for b in text.encode()])


@pytest.fixture(params=[0.1, 0.9])
def passkeys(request):
    """Return (depth, [(prompt, answer, continuation)]) of two passkeys in a text of token 300 alone."""
    lab = SimpleNamespace(tokenizer=_Greeting(), text=torch.full((1000,), 300), seed=0)
    task = passkey_task(lab, 256, request.param, rows=2)
    return request.param, list(zip(task.prompts, task.answers, task.continuations))


def as_text(ids: torch.Tensor) -> str:
    return bytes(i - 1 for i in ids.tolist()).decode()


def test_a_passkey_prompt_has_the_length_asked_for_and_one_start_token(passkeys):
    for prompt, _, _ in passkeys[1]:
        assert prompt.numel() == 256 and prompt[0] == 0 and (prompt[1:] > 0).all()


def test_a_passkey_prompt_tells_the_key_and_asks_for_it(passkeys):
    for prompt, answer, _ in passkeys[1]:
        told = as_text(prompt[prompt != 300][1:])
        assert told.startswith(f" The pass key is {answer}. ") and told.endswith("The pass key is")


def test_a_passkey_s_continuation_is_the_key(passkeys):
    for _, answer, continuation in passkeys[1]:
        assert as_text(continuation) == f" {answer}"


def test_a_passkey_lies_at_its_depth_in_the_text(passkeys):
    depth, rows = passkeys
    for prompt, _, _ in rows:
        before = (prompt[: (prompt == 1 + ord("R")).nonzero()[0]] == 300).sum() / (prompt == 300).sum()
        assert abs(before - depth) < 0.02


@pytest.fixture
def three_texts(tmp_path, tokenizer_folder):
    """Return (tokenizer, paths): two long texts and a short one."""
    paths = [tmp_path / f"{name}.txt" for name in ("a", "b", "short")]
    for path, text in zip(paths, ("aa bb " * 400, "cc dd " * 400, "ee ff " * 5)):
        path.write_text(text)
    return AutoTokenizer.from_pretrained(tokenizer_folder), paths


def suite_of(paths) -> Suite:
    return replace(SUITE, lengths=(64,), max_tokens=300, data=tuple(map(str, paths)))


def test_every_text_is_measured(three_texts):
    """A short text comes whole, and long ones share the rest evenly."""
    tokenizer, paths = three_texts
    ids = text_ids_of(suite_of(paths), tokenizer)
    text = tokenizer.decode(ids)
    short = len(tokenizer(paths[2].read_text()).input_ids) + 1
    assert ids.numel() == 300 and "ee ff ee ff ee ff ee ff ee ff" in text
    rest = (300 - short) / 2
    for piece, words in (("aa bb ", text.partition("c")[0]), ("cc dd ", text.partition("c")[2].partition("e")[0])):
        assert abs(len(tokenizer(words).input_ids) - rest) < 6, (piece, words)


def test_one_text_alone_comes_whole(three_texts):
    tokenizer, paths = three_texts
    assert text_ids_of(suite_of(paths[:1]), tokenizer).numel() > 300


@pytest.mark.parametrize("kind", ["recall", "associative"])
@pytest.mark.parametrize("distance", [1, 8, 64, 200, 256, 1024])
def test_a_row_is_left_out_exactly_where_it_does_not_fit_the_positions(distance, kind):
    make = {"recall": recall_task, "associative": associative_task}[kind]
    tokens = make(distance, 1, 300, 0, seed=0).ids.shape[1]
    suite = Suite(**{"recall": (), kind: (distance,)})
    for positions, remaining in ((tokens, (distance,)), (tokens - 1, ())):
        assert getattr(cut_to_positions(suite, {"max_position_embeddings": positions})[0], kind) == remaining


@pytest.fixture(params=[2, 40, 300])
def pair_task(request):
    """Return (distance, associative task): keys with values, and the same keys again after `distance` tokens."""
    return request.param, associative_task(request.param, 2, 1000, 7, seed=0)


def test_an_associative_row_asks_for_every_pair_that_it_told(pair_task):
    row, pairs = pair_task[1].ids[0].tolist(), pair_task[1].counted
    told = dict(zip(row[1 : 1 + 2 * pairs : 2], row[2 : 2 + 2 * pairs : 2]))
    asked = dict(zip(row[-2 * pairs :: 2], row[-2 * pairs + 1 :: 2]))
    assert told == asked and len(told) == pairs


def test_an_associative_row_keeps_its_distance(pair_task):
    distance, task = pair_task
    assert len(task.ids[0]) - 1 - 2 * task.counted >= distance


def test_associative_recall_counts_the_values(pair_task):
    row, pairs = pair_task[1].ids[0], pair_task[1].counted
    assert associative_accuracy(perfect_answers(row), HEAD, row, pairs) == 1.0
    assert associative_accuracy(perfect_answers(row).roll(1, 0), HEAD, row, pairs) == 0.0


def test_an_associative_row_longer_than_the_vocabulary_repeats_no_pair_in_between():
    task = associative_task(1000, 2, 320, 7, seed=0)
    row, pairs = task.ids[0].tolist(), task.counted
    assert len(row) == 1 + 1000 + 2 * pairs and pairs == 32
    told = set(row[1 : 1 + 2 * pairs])
    assert not told & set(row[1 + 2 * pairs : -2 * pairs]) and set(row[-2 * pairs :]) == told


def test_a_small_vocabulary_gives_fewer_pairs():
    assert associative_task(100, 1, 40, None, seed=0).counted == 10


def test_a_text_that_repeats_itself_is_seen_as_such():
    stuck = health([1, 2] * 10, stopped=False)
    assert stuck["repetition"] > 0.8 and stuck["distinct2"] < 0.2 and stuck["stopped"] == 0


def test_a_text_without_repetition_is_healthy():
    assert health(list(range(20)), stopped=True) == {
        "repetition": 0.0, "distinct2": 1.0, "length": 20.0, "stopped": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["lengths", "recall", "associative", "passkey", "efficiency"])
def test_each_suite_measures_what_the_smaller_one_does(name):
    quick, standard, full = (set(getattr(SUITES[suite], name)) for suite in ("quick", "standard", "full"))
    assert quick <= standard | {512} and standard <= full


def test_each_suite_reads_more_text_than_the_smaller_one():
    assert SUITES["quick"].max_tokens < SUITES["standard"].max_tokens < SUITES["full"].max_tokens
