"""Every family, end to end on a tiny random model: converted, verified, cached, padded, trained, merged, reloaded."""

import contextlib
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from gguf_writer import write_gguf
from helpers import COMMON, FAMILIES, VOCABULARY, family_base, family_config
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearize.checkpoint.gguf_file import complete
from linearize.checkpoint.open import open_source
from linearize.conversion import verify
from linearize.conversion.probes import copies_probe, text_probe
from linearize.conversion.scoring import head_scores
from linearize.errors import CheckpointError
from linearize.families.registry import FAMILIES as LISTED
from linearize.families.registry import find_family
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.loading import load_student, load_unconverted
from linearize.modeling.readout import readout_of
from linearize.settings.config import ConversionConfig
from linearize.settings.recipe import Lora
from linearize.training.model import add_adapters
from linearize.workflows import convert as conversion

LOUD = {"log_mass": 0.5}  # a recurrent branch that matters, so that mistakes in it show
SETTINGS = {
    "window": 8, "sinks": 2, "mix_options": LOUD, "keep_softmax": "1:0", "calibration": {"when": "never"},
}  # fmt: skip
NATIVE = [name for name, facts in FAMILIES.items() if "layer_types" in facts]


def tokens(batch: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass
class Converted:
    """A tiny base, its folder, the folder of its conversion and what verification found."""

    model_type: str
    base: PreTrainedModel
    folder: Path
    out: Path
    verification: dict

    def student(self) -> PreTrainedModel:
        return load_student(self.out, dtype=torch.float32)  # raises on a missing or unexpected tensor


def converted(
    model_type: str, work: Path, settings: dict = SETTINGS, tokenizer_folder: Path | None = None
) -> Converted:
    base = family_base(model_type)
    base.save_pretrained(work / "base")
    if tokenizer_folder is not None:
        shutil.copytree(tokenizer_folder, work / "base", dirs_exist_ok=True)
    conversion.convert(
        str(work / "base"), ConversionConfig(**settings), out=work / "out", verify=False, progress=lambda text: None
    )
    # in this process: a fresh one takes seconds to import what is here already
    return Converted(model_type, base, work / "base", work / "out", verify.verify(work / "out", work / "base"))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory, tokenizer_folder):
    return converted(request.param, tmp_path_factory.mktemp(request.param), tokenizer_folder=tokenizer_folder)


def assert_exact(case: Converted) -> None:
    assert case.verification["softmax_everywhere_max_difference"] == 0.0
    assert case.verification["cached_decode_max_difference"] < 1e-5
    assert case.verification["padded_max_difference"] < 1e-5


def test_verification_layer_by_layer_finds_the_same(case, monkeypatch):
    monkeypatch.setattr(verify, "RESIDENT_BYTES", 0)
    streamed = verify.verify(case.out, case.folder)
    assert_exact(replace(case, verification=streamed))
    assert streamed["tokens"] == case.verification["tokens"]


def test_every_listed_family_has_a_row():
    assert set(FAMILIES) == set(LISTED)


@torch.no_grad()
def test_conversion_and_reload(case, tmp_path):
    """Exactly the planned tensors are added; in softmax mode the student is the base; a second save loads the same."""
    assert_exact(case)
    student, ids = case.student(), tokens()
    reference, logits = case.base(ids).logits, student(ids).logits
    assert (logits - reference).abs().max() > 1e-3
    with student.softmax_attention():
        assert torch.equal(student(ids).logits, reference)
    with open_source(str(case.folder)) as source:  # the base's own shards under the plan
        untrained = load_unconverted(source, student.config.plan, dtype=torch.float32)
    assert torch.equal(untrained(ids).logits, logits)
    student.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.eval()(ids).logits, logits)


@torch.no_grad()
def test_packed_documents_do_not_see_one_another(case):
    """In linear heads, kept heads and layers that stay as they are; in softmax mode, which is the teacher, too."""
    student, ids = case.student(), tokens(length=50)[:1]
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    for mode in (contextlib.nullcontext, student.softmax_attention):
        with mode():
            packed = student(ids, position_ids=positions, use_cache=False).logits
            apart = [student(part, use_cache=False).logits for part in ids.split([20, 30], dim=1)]
        torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-4)


def assert_generates(student: PreTrainedModel) -> None:
    """Through the cache, in a left-padded batch, as without cache and batch."""
    ids, mask = tokens(length=30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}):
        together = student.generate(ids, attention_mask=mask, **options, **more)
        assert torch.equal(together[:1, 9:], student.generate(ids[:1, 9:], use_cache=False, **options, **more))


def test_generation(case):
    assert_generates(case.student())


def test_generation_from_a_chat_template(case):
    """The chat template travels with the checkpoint; its prompt is continued the same with and without cache."""
    tokenizer, student = AutoTokenizer.from_pretrained(case.out), case.student()
    chat = [{"role": "user", "content": "What is the report about?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = inputs["input_ids"].shape[1]
    assert tokenizer.decode(inputs["input_ids"][0]).startswith("<|user|>") and length > SETTINGS["window"]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    cached = student.generate(**inputs, **options)
    assert cached.shape[1] == length + 10
    assert torch.equal(cached, student.generate(**inputs, use_cache=False, **options))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_kept_heads_with_a_window(model_type, tmp_path):
    case = converted(model_type, tmp_path, {**SETTINGS, "softmax_window": 13})
    assert_exact(case)
    assert_generates(case.student())


@pytest.mark.parametrize("model_type", NATIVE)
def test_every_layer_of_a_family_with_sliding_windows(model_type, tmp_path):
    case = converted(model_type, tmp_path, {**SETTINGS, "convert_layers": "all", "keep_softmax": "0:1,1:0"})
    assert_exact(case)
    student = case.student()
    assert [len(attention.linear_heads) for _, attention in student.linear_attentions()] == [1, 1, 2, 2]
    assert_generates(student)


def test_training(case, tmp_path):
    """Checkpointed gradients are the same; LoRA adapts the family's projections alone; merged equals adapted."""
    student, ids = case.student().train(), tokens(length=30)

    def gradients():
        student.zero_grad()
        student(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    plain = gradients()
    assert any(".mixer." in name for name in plain)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients()
    assert checkpointed.keys() == plain.keys()
    for name, value in checkpointed.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)
    student.gradient_checkpointing_disable()

    adapted = add_adapters(student, Lora(rank=2)).eval()
    targets = find_family(case.model_type).lora_targets
    hit = [name for name, _ in adapted.named_modules() if name.endswith(".lora_A")]
    assert {name.split(".")[-2] for name in hit} == set(targets)
    assert len(hit) == COMMON["num_hidden_layers"] * len(targets)
    assert not any(".mixer." in name for name in hit)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        wanted = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload(safe_merge=True)
        logits = merged(input_ids=ids).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, logits)


@torch.no_grad()
def test_readout_and_head_scores(case):
    ids = tokens()
    hidden = case.base.base_model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(readout_of(case.base)(hidden), case.base(ids).logits, rtol=1e-4, atol=1e-5)
    probes = [copies_probe((24,), 1, VOCABULARY, None), text_probe(LayerStream(case.base), ids[:1], 8, 2)]
    scores = head_scores(LayerStream(case.base), probes, window=8, sinks=2, layers=[1, 3])
    heads = find_family(case.model_type).heads(case.base.config.to_dict())["num_key_value_heads"]
    assert [len(row) for row in scores] == [heads] * 4
    assert not any(scores[0] + scores[2]) and all(scores[1] + scores[3])


def test_portable_files_load_without_the_package(tmp_path):
    wanted = {}
    for model_type in FAMILIES:
        case = converted(model_type, tmp_path / model_type)
        with torch.no_grad():
            wanted[model_type] = case.student()(tokens()).logits
    torch.save({"ids": tokens(), "wanted": wanted}, tmp_path / "wanted.pt")
    script = f"""
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "linearize":
            raise ModuleNotFoundError("linearize is blocked")
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM
saved = torch.load({str(tmp_path / "wanted.pt")!r})
for name, wanted in saved["wanted"].items():
    model, info = AutoModelForCausalLM.from_pretrained(
        f"{tmp_path}/{{name}}/out", trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], (name, info)
    with torch.no_grad():
        # two processes may add up a product in different orders
        logits = model.eval()(saved["ids"]).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-4, msg=lambda text: name + text)
        model.generate(saved["ids"], max_new_tokens=3, pad_token_id=1, do_sample=False)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]


# what llama.cpp calls the families whose files transformers reads, and their features that such files carry
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 5e5,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0], "rope_theta": 1e4,
    "original_max_position_embeddings": 32, "partial_rotary_factor": 0.5,
}  # fmt: skip
GGUF = {
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}),
    "qwen2": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3moe", {"norm_topk_prob": True}),
    "phi3": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3_text": (
        "gemma3",
        {
            "query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": None, "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "stablelm": ("stablelm", {"qk_layernorm": False}),
    "starcoder2": ("starcoder2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", GGUF)
def test_gguf(model_type, tmp_path, tokenizer_folder):
    """Dequantised and converted; in softmax mode the logits are those of the model that was written."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    arch, changes = GGUF[model_type]
    base = family_base(model_type, vocab_size=len(tokenizer), **changes)
    path = tmp_path / "model.gguf"
    write_gguf(base, tokenizer, path, arch)
    said = []
    conversion.convert(
        str(path),
        ConversionConfig(**SETTINGS, dtype="float32"),
        out=tmp_path / "out",
        verify=False,
        progress=said.append,
    )
    assert any("dequantised to float32" in text for text in said)
    student, ids = load_student(tmp_path / "out", dtype=torch.float32), torch.randint(2, len(tokenizer), (1, 40))
    with torch.no_grad(), student.softmax_attention():
        torch.testing.assert_close(student(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "arch", "says"),
    [("mixtral", "llama", "not in it"), ("stablelm", "stablelm", "of which transformers reads")],
)
def test_gguf_that_would_be_read_in_part(model_type, arch, says, tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    write_gguf(family_base(model_type, vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf", arch)
    with pytest.raises(CheckpointError, match=says):
        conversion.convert(
            str(tmp_path / "model.gguf"), ConversionConfig(**SETTINGS), out=tmp_path / "out", progress=lambda text: None
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("layers", "scalar"), [(4, 16), (46, 8)])
def test_the_query_scale_of_gemma_2_in_gguf(layers, scalar):
    """No file names it; of the largest model it is the hidden size by heads, of the others the head size."""
    config = family_config("gemma2", num_hidden_layers=layers, layer_types=None)
    complete(config, {"attention.key_length": 16, "context_length": 512}, {})
    assert config.query_pre_attn_scalar == scalar
