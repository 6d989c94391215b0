"""Refusals: a model that cannot be converted ends with exit code 4 and the reason; `list families` says the same."""

import json

import pytest
import torch
from transformers import AutoConfig

from linearize.families.refused import REFUSED
from linearize.families.registry import FAMILIES, find_family

HYBRID = {"model_type": "llama", "layer_types": ["linear_attention", "full_attention"]}
CHUNKED = {"model_type": "llama4_text", "layer_types": ["chunked_attention", "full_attention"]}
VISION = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}}
CASES = [
    *(({"model_type": name}, why) for name, why in REFUSED.items()),
    ({"model_type": "some_translator", "is_encoder_decoder": True}, "encoder-decoder"),
    (VISION, "it wraps the text model gemma3_text"),
    (HYBRID, "linear or hybrid already"),
    (CHUNKED, "attend within chunks"),
    ({"model_type": "opt"}, "no attention that takes rotary"),
    ({"model_type": "clip_text_model"}, "no causal language model of that type"),
    ({"model_type": "lama"}, "did you mean 'llama'?"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}, "convert the original"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
]


@pytest.mark.parametrize(
    "config, reason", CASES, ids=lambda value: value.get("model_type") if type(value) is dict else ""
)
def test_refused_with_a_reason(config, reason, tmp_path, cli):
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = cli("plan", tmp_path)
    assert (code, out) == (4, "")
    assert reason in err and ("is quantised" in err or config["model_type"] in err)
    assert len(err.strip().splitlines()) == 1


def test_the_list_is_what_decides(cli):
    code, out, _ = cli("list", "families", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and set(rows) == set(FAMILIES) | set(REFUSED)
    assert {name for name, row in rows.items() if row["status"] == "supported"} == {
        name for name, family in FAMILIES.items() if not family.experimental
    }
    assert rows["gpt_oss"]["status"] == "experimental" and rows["gpt_oss"]["why"]
    assert all(row["why"] for row in rows.values() if row["status"] == "refused")


def test_an_unlisted_family_is_read_off_and_called_experimental(tmp_path, cli):
    """Helium: nobody listed it, its attention goes through the interface, verification accepts it."""
    from helpers import COMMON, LINEAR
    from transformers import AutoModelForCausalLM

    from linearize.modeling.loading import load_student

    assert find_family("helium").attention_class == "HeliumAttention"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("helium", **{**COMMON, "head_dim": 8}))
    base.save_pretrained(tmp_path / "base")
    code, out, err = cli("convert", tmp_path / "base", "-o", tmp_path / "out", *LINEAR)
    assert code == 0, err
    assert "helium is experimental" in err and "verified" in out
    student = load_student(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(2, 42)[None]
    with torch.no_grad(), student.softmax_attention():
        assert torch.equal(student(ids).logits, base.eval()(ids).logits)
