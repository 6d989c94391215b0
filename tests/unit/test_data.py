"""Data: file formats, documents, packing, copying rows, reading ahead and fingerprints."""

import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer

from linearize.data import text_files
from linearize.data.documents import data_fingerprint, read_documents
from linearize.data.packing import IGNORED, Batch, packed_rows, read_ahead, with_copies
from linearize.errors import ConfigError

DATA_ROWS = {
    "text": {"text": "one two three"},
    "instruction": {"instruction": "Add.", "input": "2 2", "output": "four"},
    "messages": {"messages": [{"role": "user", "content": "Add 2 2."}, {"role": "assistant", "content": "four"}]},
}


@pytest.mark.parametrize("kind", list(DATA_ROWS))
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_data_formats(tmp_path, tokenizer_folder, kind, suffix):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / f"data{suffix}"
    rows = [DATA_ROWS[kind]] * 3
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import gzip

        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    found = list(read_documents(str(path), tokenizer, text_field="text", completion_only=True, seed=None))
    assert len(found) == 3
    ids, counted = found[0]
    answer = tokenizer.decode([i for i, c in zip(ids, counted) if c])
    assert answer == ("one two three</s>" if kind == "text" else "four</s>")


def test_rows_that_say_nothing_are_passed_over(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path, user = tmp_path / "rows.jsonl", {"role": "user", "content": "Add 2 2."}
    answer = {"role": "assistant", "content": "four"}

    def answers() -> list[str]:
        found = read_documents(str(path), tokenizer, text_field="text", completion_only=True, seed=None)
        return [tokenizer.decode([i for i, c in zip(ids, counted) if c]) for ids, counted in found]

    conversations = [[], [user, answer], [answer], [user, answer, user, answer, user]]
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
        first, alone, last = answers()
        assert first == last == "four</s>" and alone.endswith("four</s>")
    path.write_text('{"text": null, "url": "a"}\n{"text": "one", "url": "b", "messages": []}\n')
    assert answers() == ["one</s>"]


def test_the_end_that_a_tokenizer_puts_behind_a_prompt_is_taken_off(tmp_path, tokenizer_folder):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(DATA_ROWS["instruction"]) + "\n")
    ((ids, counted),) = read_documents(str(path), tokenizer, text_field="text", completion_only=True, seed=None)
    assert tokenizer.decode([i for i, c in zip(ids, counted) if c]) == "four</s>"


def test_a_long_text_is_read_in_pieces_and_names_are_taken_as_they_are(tmp_path, tokenizer_folder, monkeypatch):

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / "a[1]*.txt"
    lines = [f"line {i} of some words\n" for i in range(40)]
    path.write_text("".join(lines))
    options = {"text_field": "text", "completion_only": False, "seed": None}
    ((whole, _),) = read_documents(str(path), tokenizer, **options)
    monkeypatch.setattr(text_files, "LONGEST_TEXT", 200)
    pieces = [
        tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in read_documents(str(path), tokenizer, **options)
    ]
    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True) == "".join(lines)
    assert len(pieces) == 4 and all(piece.endswith("\n") for piece in pieces)
    assert len(list(read_documents(str(path), tokenizer, **{**options, "seed": 1}))) == 4


def test_short_documents_are_left_out(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["short", "long " * 100, "brief"] * 3))
    options = {"seq_len": 64, "text_field": "text", "completion_only": False, "seed": 0}
    short = tokenizer("short").input_ids
    for row in itertools.islice(packed_rows([str(path)], tokenizer, shortest_document=50, **options), 12):
        starts = (row.position_ids[0] == 0).nonzero().flatten().tolist()
        assert all(row.input_ids[0, at : at + len(short)].tolist() != short for at in starts)
    with pytest.raises(ConfigError, match="hold 0 tokens in documents of at least 9999, fewer than one sequence of 64"):
        next(packed_rows([str(path)], tokenizer, shortest_document=9999, **options))


def test_packing_respects_documents(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(1, 60)))
    rows = packed_rows([str(path)], tokenizer, seq_len=32, text_field="text", completion_only=False, seed=3)
    for _ in range(60):  # more than one pass over the data
        row = next(rows)
        ids, positions, labels = row.input_ids[0], row.position_ids[0], row.labels[0]
        assert ids.shape == positions.shape == labels.shape == (32,) and positions[0] == 0
        for t in range(31):
            continues = positions[t + 1] == positions[t] + 1
            assert continues or positions[t + 1] == 0
            assert labels[t] == (ids[t + 1] if continues else IGNORED)
        assert labels[31] == IGNORED


PLAIN_ROWS = [
    Batch(torch.arange(i, i + 64)[None], torch.arange(64)[None], torch.full((1, 64), IGNORED)) for i in range(200)
]


def rows_with_copies(share: float, shortest: int = 24) -> list[Batch]:
    return list(with_copies(iter(PLAIN_ROWS), share, shortest=shortest, seed=1))


@pytest.fixture(scope="module")
def copied_rows():
    """Return [(row with a copied span, the row it was made of)]."""
    return [(row, plain) for row, plain in zip(rows_with_copies(0.5), PLAIN_ROWS) if row is not plain]


def copy_start(row: Batch) -> int:
    """Return the position of the span that is repeated from position 44 on."""
    return (row.input_ids[0, :44] == row.input_ids[0, 44]).nonzero()[-1].item()


def test_about_the_share_of_rows_asked_for_copy(copied_rows):
    assert 70 < len(copied_rows) < 130


def test_a_copying_row_repeats_a_span_of_its_own(copied_rows):
    for row, plain in copied_rows:
        first = copy_start(row)
        assert torch.equal(row.input_ids[0, 44:], row.input_ids[0, first : first + 20])
        assert torch.equal(row.input_ids[0, :44], plain.input_ids[0, :44])


def test_a_copying_row_is_trained_on_its_copy(copied_rows):
    for row, _ in copied_rows:
        assert torch.equal(row.labels[0, 43:-1], row.input_ids[0, 44:]) and row.labels[0, -1] == IGNORED


def test_copies_come_from_outside_the_window(copied_rows):
    distances = {44 - copy_start(row) for row, _ in copied_rows}
    assert min(distances) == 24 and max(distances) == 44


def test_copies_are_the_same_for_the_same_seed():
    for one, again in zip(rows_with_copies(0.5), rows_with_copies(0.5)):
        assert torch.equal(one.input_ids, again.input_ids)


@pytest.mark.parametrize(("share", "shortest"), [(0.0, 24), (1.0, 63)], ids=["no share", "no room"])
def test_rows_stay_as_they_are_where_nothing_is_to_be_copied(share, shortest):
    assert rows_with_copies(share, shortest) == PLAIN_ROWS


def test_rows_read_ahead_are_the_same_rows():
    made = []

    def rows():
        for i in range(20):
            made.append(i)
            yield i

    ahead = read_ahead(rows(), 5)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    assert len(made) <= 3 + 5
    assert list(ahead) == list(range(3, 20))


def test_what_fails_while_reading_ahead_is_raised_in_its_place():
    def rows():
        yield 0
        raise ConfigError("--data: damaged")

    ahead = read_ahead(rows(), 5)
    assert next(ahead) == 0
    with pytest.raises(ConfigError, match="damaged"):
        next(ahead)


def test_the_fingerprint_of_data_is_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows").mkdir()
    for name, path in (("~/text.txt", "text.txt"), (str(tmp_path / "rows"), "rows/a.parquet")):
        (tmp_path / path).write_bytes(b"one")
        before = data_fingerprint([name])
        (tmp_path / path).write_bytes(b"two")
        assert data_fingerprint([name]) != before
    assert data_fingerprint(["owner/name"]) == data_fingerprint(["owner/name"])
