"""Tiny random Llamas for breadth, SmolLM2-135M for truth."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# beside other workers one thread each; small models gain nothing from more. What a test starts inherits it.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else max(1, min(2, os.cpu_count() or 1))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
torch.set_num_threads(THREADS)


def pytest_addoption(parser):
    parser.addoption("--record-pins", action="store_true", help="record the pinned numbers of test_pins.py anew")


def pytest_collection_modifyitems(items):
    """What takes longest starts first, so that no worker is left alone with it."""
    slowest = ("test_real_model.py", "test_versions.py", "test_report.py")
    items.sort(key=lambda item: slowest.index(item.path.name) if item.path.name in slowest else len(slowest))


# grouped, single and as many key/value heads as query heads; tied and untied; with biases; an odd number of layers
SHAPES = {
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
    "mqa_tied": {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 32, "tie_word_embeddings": True},
    "mha_bias": {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32, "attention_bias": True},
    "wide_head": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 16},
}
VOCABULARY = 320


def tiny_config(shape: str = "gqa", **changes):
    from transformers import LlamaConfig

    settings = {
        "vocab_size": VOCABULARY,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **SHAPES[shape],
        **changes,
    }
    return LlamaConfig(**settings)


def tiny_base(shape: str = "gqa", seed: int = 0, **changes):
    """A random Llama whose attention is far from uniform, so that mistakes in it show."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(shape, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12.0)
            elif "bias" in name:
                parameter.normal_(std=0.2)
    return model


def tiny_student(plan, base):
    """`base` under `plan`, with the same weights."""
    from linearize.families.registry import FAMILIES
    from linearize.modeling.factory import linearized_classes

    classes = linearized_classes(FAMILIES[plan.base_model_type])
    config = base.config.to_dict()
    config.pop("model_type")
    student = classes.causal_lm(classes.config.from_dict({**config, "linearize": plan.to_dict()})).eval()
    missing, unexpected = student.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(".mixer." in name for name in missing)
    return student


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A small byte-level BPE with a chat template, trained on the sample text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from linearize.data.samples import SAMPLES

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = SAMPLES["sample-eval"].read_text(encoding="utf-8").splitlines()[:8]
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def reshard(folder: Path, shards: int) -> None:
    """Splits model.safetensors into `shards` files with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(shards):
        names = sorted(tensors)[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def base_folder(tmp_path, tokenizer_folder):
    """Makes a complete base checkpoint folder: make(shape, dtype=..., shards=..., **config)."""
    import shutil

    def make(shape: str = "gqa", name: str = "base", dtype=torch.float32, shards: int = 1, **changes) -> Path:
        folder = tmp_path / name
        model = tiny_base(shape, **changes).to(dtype)
        model.save_pretrained(folder)
        if shards > 1:
            reshard(folder, shards)
        for path in tokenizer_folder.iterdir():
            shutil.copyfile(path, folder / path.name)
        (folder / "LICENSE").write_text("the licence\n")
        return folder

    return make


@pytest.fixture(scope="session")
def smollm2():
    """The real base model as a .gguf file or a folder; fetched by scripts/get_model.py, skipped where it cannot be."""
    named = os.environ.get("LINEARIZE_TEST_MODEL")
    if named:
        return named
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "get_model.py")], capture_output=True, text=True, cwd=ROOT
    )
    if run.returncode != 0:
        pytest.skip(f"the real model cannot be had: {run.stderr.strip().splitlines()[-1:]}")
    return run.stdout.strip()


@pytest.fixture
def in_float32(monkeypatch):
    """For figures that have to agree to more digits than bfloat16 has, where that would be the choice."""
    monkeypatch.setattr("linearize.device.bf16_is_fast", lambda: False)


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Runs the command line in this process, in an empty folder: cli("convert", ...) -> (code, stdout, stderr)."""
    from linearize.cli.app import run

    work = tmp_path / "cwd"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
