"""Conversions that choose their softmax heads by scores or by elimination."""

import json

import pytest

from linearize.conversion.keep_softmax import SCORED


@pytest.mark.parametrize("by", SCORED)
def test_convert_by_scores(by, base_folder, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = base_folder()
    flags = ["--keep-softmax", f"{by}:30%", "--window", "12", "--set", "scoring.distances=[40, 60]"]
    code, out, err = cli("plan", base, *flags, "--json")
    assert code == 0, err
    for part in ("recall", "text"):
        assert (f"scoring key/value heads by {part} (gradient)" in err) == (by in (part, "both"))
    layers = json.loads(out)["layers"]
    scores = {(layer["layer"], head): score for layer in layers for head, score in enumerate(layer["scores"])}
    kept = {(layer["layer"], head) for layer in layers for head in layer["softmax_heads"]}
    assert kept == set(sorted(scores, key=lambda at: -scores[at])[:3])
    code, text, err = cli("plan", base, *flags)
    assert "scoring key/value heads" not in err and "scores " in text
    for path in (tmp_path / "cache" / "linearize" / "scores").iterdir():
        path.write_text("damaged")
    code, _, err = cli("plan", base, *flags)
    assert code == 0 and "scoring key/value heads" in err
    code, out, err = cli("convert", base, *flags, "-o", tmp_path / "out", "--json")
    assert code == 0, err
    assert {
        (number, head)
        for number, layer in enumerate(json.loads(out)["plan"]["layers"])
        for head in layer["softmax_heads"]
    } == kept


def test_scores_are_those_of_the_text(base_folder, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    flags = ["--keep-softmax", "text:30%", "--window", "12", "--set", f"scoring.text={text}"]
    base, found = base_folder(), []
    for words in ("one after the other ", "one after the other ", "something else entirely "):
        text.write_text(words * 400)
        code, out, err = cli("plan", base, *flags, "--json")
        assert code == 0, err
        found.append(json.loads(out)["layers"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("by", SCORED)
def test_convert_by_elimination(by, base_folder, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [
        "--keep-softmax", f"{by}:30%", "--window", "12", "--set", "scoring.distances=[40, 60]",
        "--set", "scoring.method=elimination",
    ]  # fmt: skip
    code, out, err = cli("plan", base_folder(), *flags, "--json")
    assert code == 0, err
    assert err.count("scoring heads by elimination: ") == 3 and "3 are left" in err
    layers = json.loads(out)["layers"]
    turns = {(layer["layer"], head): score for layer in layers for head, score in enumerate(layer["scores"])}
    assert sorted(turns.values()) == [0, 0, 0, 1, 2, 3, 4, 4, 4]
    assert {(layer["layer"], head) for layer in layers for head in layer["softmax_heads"]} == {
        at for at, turn in turns.items() if turn == 4
    }
    code, _, err = cli("plan", base_folder(), *flags)
    assert code == 0 and "scoring" not in err
    code, _, err = cli("plan", base_folder(), *flags, "--keep-softmax", f"{by}:12%")
    assert code == 0 and "by elimination" in err
