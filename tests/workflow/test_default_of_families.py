"""The default conversion of families that differ: scored, fitted, measured and verified, whatever their attention."""

import pytest
from helpers import family_base
from transformers import AutoTokenizer

from linearize.checkpoint.student import Student

# caps on scores, own windows, partial rotary and biases, one norm for two branches, mixtures, no rotary, learned sinks
DIFFERENT = ("gemma2", "gemma3_text", "gpt_neox", "phi", "mixtral", "qwen3_moe", "smollm3", "cohere2", "gpt_oss")


@pytest.mark.parametrize("model_type", DIFFERENT)
def test_the_default_converts_a_family(model_type, tokenizer_folder, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    family_base(model_type, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    code, out, err = cli("convert", tmp_path / "base", "-o", tmp_path / "out", "--window", "8")
    assert code == 0 and "verified" in out and "yes, chosen" in out, err
    manifest = Student.read(tmp_path / "out").manifest
    assert manifest.quality.holds and manifest.quality.tokens > 0
    assert manifest.coverage.heads_converted > 0
