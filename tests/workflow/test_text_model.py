"""The text model inside a checkpoint for images is taken out and converted on request."""

import json

import pytest
import torch
from helpers import COMMON, LINEAR
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from linearize.checkpoint.student import Student
from linearize.modeling.loading import load_student

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TEXT = {
    "gemma3": ("gemma3_text", {"head_dim": 8, "layer_types": ["full_attention"] * COMMON["num_hidden_layers"]}),
    "llava": ("llama", {"tie_word_embeddings": False}),
}


def wrapper(model_type: str):
    inner, more = TEXT[model_type]
    text = AutoConfig.for_model(inner, **{**COMMON, **more})
    vision = AutoConfig.for_model("siglip_vision_model", **VISION)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, text_config=text.to_dict(), vision_config=vision.to_dict())
    config.tie_word_embeddings = text.tie_word_embeddings
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("model_type", TEXT)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_the_text_model_is_converted_on_request(model_type, shard, tmp_path, cli):
    whole = wrapper(model_type)
    whole.save_pretrained(tmp_path / "base", max_shard_size=shard)
    code, _, err = cli("convert", tmp_path / "base", "-o", tmp_path / "out")
    assert code == 4 and "--text-model" in err and TEXT[model_type][0] in err
    assert not (tmp_path / "out").exists()
    code, out, err = cli("convert", tmp_path / "base", "-o", tmp_path / "out", "--text-model", *LINEAR)
    assert code == 0, err
    assert "verified" in out
    student, ids = load_student(tmp_path / "out", dtype=torch.float32), torch.arange(2, 42)[None]
    with torch.no_grad(), student.softmax_attention():
        assert torch.equal(student(ids).logits, whole(input_ids=ids).logits)
    with Student.read(tmp_path / "out").open_base() as source:
        assert source.kind == "text_model"
        base = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, whole(input_ids=ids).logits)


def test_layouts_of_older_checkpoints(tmp_path, cli):
    whole = wrapper("llava")
    whole.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        bare = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
        text = bare.startswith(("embed_tokens", "layers", "norm"))
        tensors[f"language_model.model.{bare}" if text else f"language_model.{bare}" if "lm_head" in bare else bare] = (
            value
        )
    assert any(name == "language_model.lm_head.weight" for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    code, _, err = cli("convert", tmp_path / "base", "-o", tmp_path / "out", "--text-model", *LINEAR)
    assert code == 0, err
    student, ids = load_student(tmp_path / "out", dtype=torch.float32), torch.arange(2, 42)[None]
    with torch.no_grad(), student.softmax_attention():
        assert torch.equal(student(ids).logits, whole(input_ids=ids).logits)


def test_what_has_no_text_model_or_one_that_is_unclear(base_folder, tmp_path, cli):
    code, _, err = cli("plan", base_folder(), "--text-model")
    assert code == 4 and "a llama model holds no text model" in err
    whole = wrapper("llava")
    whole.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name.replace("embed_tokens", "embeddings"): value for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    code, _, err = cli("plan", tmp_path / "base", "--text-model")
    assert code == 4 and "its text model's prefix is not clear, found none" in err
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["text_config"]["model_type"] = "gpt2"
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    code, _, err = cli("plan", tmp_path / "base", "--text-model")
    assert code == 4 and "gpt2" in err
