"""Rows that an evaluation asks a model about, and how answers are scored."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import SUITE
from transformers import AutoTokenizer

from linearize.data.recall_rows import associative_task, recall_task
from linearize.evaluation import recall
from linearize.evaluation.generation import health
from linearize.evaluation.passkey import passkey_task
from linearize.evaluation.perplexity import position_buckets, windows_of
from linearize.evaluation.recall import accuracy, associative_accuracy
from linearize.evaluation.suite import SUITES, Suite, within_positions
from linearize.evaluation.text import text_ids_of
from linearize.modeling.readout import Readout


def test_recall_rows_and_their_scoring():
    for distance in (5, 256, 700):
        task = recall_task(distance, 2, 1000, 7, seed=1)
        copied = task.ids[:, -task.counted :]
        assert torch.equal(copied, task.ids[:, -task.counted - distance : -distance])
        assert torch.equal(task.ids, recall_task(distance, 2, 1000, 7, seed=1).ids)
        assert (task.ids[:, 0] == 7).all()
        row, head = task.ids[0], Readout(torch.eye(1000))
        perfect = torch.cat([torch.eye(1000)[row[1:]], torch.zeros(1, 1000)])
        assert accuracy(perfect, head, row, task.counted) == 1.0
        assert accuracy(perfect.roll(1, 0), head, row, task.counted) < 0.1


def test_windows_and_buckets():
    assert windows_of(torch.arange(100), 30, 1000).shape == (3, 30)
    assert windows_of(torch.arange(100), 30, 60).shape == (2, 30)
    assert list(position_buckets(200)) == [(1, 64), (64, 128), (128, 200)]


class _Greeting:
    """A tokenizer that begins whatever it is given with token 0, as many do."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[0] * add_special_tokens + [1 + b for b in text.encode()])


def test_a_passkey_prompt_and_what_would_follow():
    text = torch.full((1000,), 300)
    lab = SimpleNamespace(tokenizer=_Greeting(), text=text, seed=0)
    for depth in (0.1, 0.9):
        task = passkey_task(lab, 256, depth, rows=2)
        for prompt, answer, continuation in zip(task.prompts, task.answers, task.continuations):
            assert prompt.numel() == 256 and prompt[0] == 0 and (prompt[1:] > 0).all()
            said = bytes(i - 1 for i in prompt[prompt != 300][1:].tolist()).decode()
            assert said.startswith(f" The pass key is {answer}. ") and said.endswith("The pass key is")
            assert bytes(i - 1 for i in continuation.tolist()).decode() == f" {answer}"
            # the needle's place among the rest of the text
            hay = (prompt[: (prompt == 1 + ord("R")).nonzero()[0]] == 300).sum() / (prompt == 300).sum()
            assert abs(hay - depth) < 0.02


def test_every_text_is_measured(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    names = [tmp_path / f"{name}.txt" for name in ("a", "b", "short")]
    for path, text in zip(names, ("aa bb " * 400, "cc dd " * 400, "ee ff " * 5)):
        path.write_text(text)
    suite = replace(SUITE, lengths=(64,), max_tokens=300, data=tuple(map(str, names)))
    text = tokenizer.decode(text_ids_of(suite, tokenizer))
    short = len(tokenizer(names[2].read_text()).input_ids) + 1
    assert text_ids_of(suite, tokenizer).numel() == 300 and "ee ff ee ff ee ff ee ff ee ff" in text
    rest = (300 - short) / 2
    for piece, words in (("aa bb ", text.partition("c")[0]), ("cc dd ", text.partition("c")[2].partition("e")[0])):
        assert abs(len(tokenizer(words).input_ids) - rest) < 6, (piece, words)
    assert text_ids_of(replace(suite, data=suite.data[:1]), tokenizer).numel() > 300  # one text alone comes whole


@pytest.mark.parametrize("distance", [1, 8, 64, 200, 256, 1024])
def test_rows_are_as_long_as_positions_are_asked_for(distance):
    """What is left out for want of positions would not fit, and what is not left out fits."""
    for kind, make in (("recall", recall.recall_task), ("associative", associative_task)):
        tokens = make(distance, 1, 300, 0, seed=0).ids.shape[1]
        suite = Suite(**{"recall": (), kind: (distance,)})
        for positions, stays in ((tokens, (distance,)), (tokens - 1, ())):
            assert getattr(within_positions(suite, {"max_position_embeddings": positions})[0], kind) == stays


def test_associative_rows():
    head = Readout(torch.eye(1000))
    for distance in (2, 40, 300):
        task = associative_task(distance, 2, 1000, 7, seed=0)
        row, pairs = task.ids[0].tolist(), task.counted
        first = dict(zip(row[1 : 1 + 2 * pairs : 2], row[2 : 2 + 2 * pairs : 2]))
        again = dict(zip(row[-2 * pairs :: 2], row[-2 * pairs + 1 :: 2]))
        assert first == again and len(first) == pairs
        assert len(row) - 1 - 2 * pairs >= distance
        perfect = torch.cat([torch.eye(1000)[task.ids[0][1:]], torch.zeros(1, 1000)])
        assert associative_accuracy(perfect, head, task.ids[0], pairs) == 1.0
        assert associative_accuracy(perfect.roll(1, 0), head, task.ids[0], pairs) == 0.0


def test_associative_rows_longer_than_the_vocabulary():
    task = associative_task(1000, 2, 320, 7, seed=0)
    row, pairs = task.ids[0].tolist(), task.counted
    assert len(row) == 1 + 1000 + 2 * pairs and pairs == 32
    told = set(row[1 : 1 + 2 * pairs])
    assert not told & set(row[1 + 2 * pairs : -2 * pairs]) and set(row[-2 * pairs :]) == told
    assert associative_task(100, 1, 40, None, seed=0).counted == 10


def test_health():
    stuck, lively = health([1, 2] * 10, stopped=False), health(list(range(20)), stopped=True)
    assert stuck["repetition"] > 0.8 and stuck["distinct2"] < 0.2 and stuck["stopped"] == 0
    assert lively == {"repetition": 0.0, "distinct2": 1.0, "length": 20.0, "stopped": 1.0}


def test_suites_grow():
    quick, standard, full = (SUITES[name] for name in ("quick", "standard", "full"))
    for name in ("lengths", "recall", "associative", "passkey", "efficiency"):
        assert set(getattr(quick, name)) <= set(getattr(standard, name)) | {512} and set(
            getattr(standard, name)
        ) <= set(getattr(full, name)), name
    assert quick.max_tokens < standard.max_tokens < full.max_tokens and isinstance(quick, Suite)
