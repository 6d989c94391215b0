"""Adapters as a base: merged on request, refused where that cannot be right."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file


def assert_refused(cli, adapter, code, words):
    found, _, err = cli("convert", adapter, "-o", "refused", "--merge-adapter")
    assert found == code and words in err and "Traceback" not in err, err


def test_an_adapter_of_tied_embeddings_is_refused(base_folder, tmp_path, cli):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder("mqa_tied"))
    get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(tmp_path / "adapter")
    assert_refused(cli, tmp_path / "adapter", 4, "its base ties together")


def test_an_adapter_is_merged_on_request_alone(base_folder, tmp_path, cli):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from linearize.checkpoint.student import Student
    from linearize.modeling.loading import load_student

    base = base_folder()
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    code, _, err = cli("convert", tmp_path / "adapter", "-o", tmp_path / "out")
    assert code == 4 and "--merge-adapter" in err and str(base) in err
    code, _, err = cli("convert", tmp_path / "adapter", "-o", tmp_path / "out", "--merge-adapter", "--window", "8")
    assert code == 0, err
    student, ids = load_student(tmp_path / "out", dtype=torch.float32), torch.arange(2, 42)[None]
    with torch.no_grad(), student.softmax_attention():
        merged = adapted.merge_and_unload()(ids).logits
        assert torch.equal(student(ids).logits, merged)
    with Student.read(tmp_path / "out").open_base() as source:  # eval and resuming merge it again
        assert source.kind == "adapter" and (source.folder / "config.json").is_file()
    for change, code, words in (
        ({"base_model_name_or_path": None}, 2, "names no base model"),
        ({"peft_type": "PREFIX_TUNING"}, 4, "which no weights can be merged with"),
    ):
        altered = shutil.copytree(tmp_path / "adapter", tmp_path / words.split()[0])
        config = json.loads((altered / "adapter_config.json").read_bytes())
        (altered / "adapter_config.json").write_text(json.dumps({**config, **change}))
        assert_refused(cli, altered, code, words)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    renamed = shutil.copytree(tmp_path / "adapter", tmp_path / "renamed")
    for found, words in (
        ({name.replace("model.layers", "model.text.layers"): x for name, x in tensors.items()}, "lacks 6 tensors"),
        ({**tensors, "base_model.model.other.lora_A.weight": torch.zeros(2, 2)}, "has no place for 1 tensors"),
    ):
        save_file(found, renamed / "adapter_model.safetensors")
        assert_refused(cli, renamed, 1, words)
    (renamed / "adapter_model.safetensors").write_bytes(b"abc")
    assert_refused(cli, renamed, 1, "too short for a safetensors file")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    code, _, err = cli("convert", tmp_path / "adapter", "-o", tmp_path / "again", "--merge-adapter")
    assert code == 1 and "never loaded" in err
