"""SmolLM2-135M-Instruct: known figures of the base, an exact conversion, a start no worse than the window."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SHARED
from safetensors.torch import load_file
from transformers import AutoConfig

from linearize.checkpoint.student import Student
from linearize.modeling.cache import CACHE_NAME
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.loading import load_student, load_unconverted
from linearize.modeling.readout import readout_of
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert

pytestmark = pytest.mark.slow
WIKITEXT = SHARED / "data" / "eval" / "wikitext-2" / "valid.txt"


@pytest.fixture(scope="module")
def converted(smollm2, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "converted"
    settings = load_config("smollm2-135m", {"keep_softmax": "none", "window": 256}, ["calibration.rows=2"])
    manifest = convert(smollm2, settings, out=out, progress=lambda message: None).manifest
    assert manifest.coverage.heads_converted == 90
    assert manifest.verification.softmax_everywhere_max_difference == 0.0
    assert manifest.verification.cached_decode_max_difference < 1e-5
    return out


@pytest.fixture(scope="module")
def student(converted):
    return load_student(converted, dtype=torch.float32)


def sample_ids(converted, count: int) -> torch.Tensor:
    from linearize.data.samples import SAMPLES
    from linearize.modeling.loading import load_tokenizer

    text = "".join(json.loads(line)["text"] for line in SAMPLES["sample-eval"].read_text().splitlines()[:4])
    return load_tokenizer(converted)(text[: 8 * count], return_tensors="pt").input_ids[:, :count]


def perplexity(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        log = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return (-log.gather(-1, ids[:, 1:, None])).mean().exp().item()


def test_softmax_mode_is_the_base_to_the_last_bit(converted, student):
    ids = sample_ids(converted, 300)
    with Student.read(converted).open_base() as source, torch.no_grad():
        from linearize.modeling.loading import load_base

        reference = load_base(source, dtype=torch.float32)(ids).logits
        with student.softmax_attention():
            assert torch.equal(student(ids).logits, reference)


def test_starts_no_worse_than_window_and_sinks(converted, student):
    """Over windows from all of the held-out sample, not one alone."""
    import math

    from linearize.data.samples import SAMPLES
    from linearize.modeling.loading import load_tokenizer

    text = "".join(json.loads(line)["text"] for line in SAMPLES["sample-eval"].read_text().splitlines())
    windows = load_tokenizer(converted)(text, return_tensors="pt").input_ids[0].split(2048)[:-1:10]
    assert len(windows) >= 3
    losses = {"base": 0.0, "window": 0.0, "untrained": 0.0}
    for window in windows:
        with student.softmax_attention():
            losses["base"] += math.log(perplexity(student, window[None]))
        with student.recurrent_branch_off():
            losses["window"] += math.log(perplexity(student, window[None]))
        losses["untrained"] += math.log(perplexity(student, window[None]))
    assert losses["base"] < losses["untrained"] <= losses["window"]


def test_cached_generation_equals_the_full_forward_beyond_the_window(converted, student):
    ids = sample_ids(converted, 400)
    generated = student.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
    with torch.no_grad():
        for length in range(400, generated.shape[1], 4):
            assert student(generated[:, :length], use_cache=False).logits[0, -1].argmax() == generated[0, length]
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, :50] = 0
    batch = torch.cat([ids, torch.cat([torch.full((1, 50), 2), ids[:, :350]], 1)])
    both = student.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=2)
    alone = student.generate(ids[:, :350], max_new_tokens=8, do_sample=False, pad_token_id=2)
    assert torch.equal(both[0, 400:], generated[0, 400:408]) and torch.equal(both[1, 400:], alone[0, 350:])


def test_chat_template_survives(converted):
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(converted).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert "<|im_start|>user\nHi<|im_end|>" in text


def test_cache_is_constant_and_a_fraction(converted):
    cache_bytes = Student.read(converted).manifest.cache_bytes
    sizes = {int(length): value["student"] / value["base"] for length, value in cache_bytes.items()}
    assert sizes[32768] < 0.02 and sizes[131072] < 0.005


def test_the_config_keeps_the_heads_that_recall_needs(converted):
    """Without training, text beyond the window is copied and looked up; with every head linear, nothing is."""
    from linearize.conversion.planning import make_plan
    from linearize.conversion.probes import text_look_ups_probe
    from linearize.data.recall_rows import recall_task
    from linearize.evaluation.recall import accuracy
    from linearize.modeling.loading import load_tokenizer

    checkpoint, tokenizer = Student.read(converted), load_tokenizer(converted)
    task = recall_task(1024, 1, len(tokenizer), tokenizer.bos_token_id, 0)
    text = sample_ids(converted, 2048)[0].tolist()
    look_ups = text_look_ups_probe(lambda words: tokenizer(words).input_ids, text, 512, (1280,), 1, len(tokenizer))
    assert look_ups is not None
    recalled, asked = {}, {}
    with checkpoint.open_base() as source, torch.no_grad():
        for kept in ("none", None):
            config = AutoConfig.from_pretrained(source.folder).to_dict()
            plan = make_plan("llama", config, load_config("smollm2-135m", {"keep_softmax": kept}))
            model = load_unconverted(source, plan, dtype=torch.float32)
            modes = {"base": model.softmax_attention(), kept or "config": contextlib.nullcontext()}
            for name, mode in modes.items():
                with mode:
                    hidden = [model.base_model(row[None], use_cache=False).last_hidden_state[0] for row in task.ids]
                    asked[name] = look_ups.mean_loss(LayerStream(model))
                head = readout_of(model)
                right = [accuracy(h, head, row, task.counted) for h, row in zip(hidden, task.ids)]
                recalled[name] = sum(right) / len(right)
    assert recalled["base"] > 0.2 and recalled["none"] < 0.05
    assert recalled["config"] > 0.8 * recalled["base"]
    # nats a token of facts, quotes and copies in text
    assert asked["none"] > asked["base"] + 4
    assert asked["config"] < asked["base"] + 0.2 * (asked["none"] - asked["base"])


def test_base_figures_on_wikitext(converted):
    if not WIKITEXT.is_file():
        pytest.skip(f"{WIKITEXT} is not there")
    from linearize.modeling.loading import load_tokenizer

    checkpoint = Student.read(converted)
    ids = load_tokenizer(converted)(WIKITEXT.read_text()[:60000], return_tensors="pt").input_ids[:, :8192]
    with checkpoint.open_base() as source:
        model = load_unconverted(source, checkpoint.manifest.plan, dtype=torch.float32)
    losses = {}
    for name, mode in (("base", model.softmax_attention), ("window", model.recurrent_branch_off)):
        with mode():
            values = [torch.tensor(perplexity(model, window[None])).log() for window in ids.view(-1, 2048)]
        losses[name] = torch.stack(values).mean().exp().item()
    # methods.md: 14.5 and 17.7 over the whole text
    assert 13.5 < losses["base"] < 16.5 and 1.1 < losses["window"] / losses["base"] < 1.35


def test_a_few_steps_of_the_default_recipe_lower_the_divergence(smollm2, tmp_path):
    """Train a conversion without calibration: a fitted one has too little left for a few steps to show."""
    converted = tmp_path / "converted"
    plain = ["mixer_options.gate_logit_normalizer=64", "calibration.when=never"]
    settings = load_config(None, {"mixer": "gla", "keep_softmax": "none", "window": 256}, plain)
    convert(smollm2, settings, out=converted, verify=False, progress=lambda message: None)
    command = [sys.executable, "-m", "linearize", "finetune", str(converted), "-o", str(tmp_path / "tuned")]
    run = subprocess.run(
        [*command, "--tokens", "3072", "--seq-len", "512", "--lr", "5e-4", "--json"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    tuned = Path(json.loads(run.stdout)["output"])
    # divergence from the base on held-out text, before and after
    ids = sample_ids(converted, 1024)
    divergence = {}
    for folder in (converted, tuned):
        model = load_student(folder, dtype=torch.float32)
        with torch.no_grad():
            log = model(ids).logits.log_softmax(-1)
            if folder == converted:
                with model.softmax_attention():
                    base_log = model(ids).logits.log_softmax(-1)
        divergence[folder] = (base_log.exp() * (base_log - log)).sum(-1).mean().item()
    assert divergence[tuned] < divergence[converted]


@torch.no_grad()
def test_no_cache_of_the_real_model_grows(smollm2, tmp_path):
    """Kept heads with a window: verified beyond it, decoded from text beyond it, bytes as planned at every length."""
    heads = {"keep_softmax": "7:2,8:0,20:1,23:0", "window": 128, "softmax_window": 384}
    settings = load_config("smollm2-135m", heads, ["calibration.when=never"])
    verification = convert(smollm2, settings, out=tmp_path / "out", progress=lambda message: None).manifest.verification
    assert verification.tokens > 384
    assert verification.softmax_everywhere_max_difference == 0.0
    assert verification.cached_decode_max_difference < 1e-5
    ids = sample_ids(tmp_path / "out", 640)
    model = load_student(tmp_path / "out", dtype=torch.float32)
    whole, cache, pieces = model(ids, use_cache=False).logits, None, []
    for piece in ids.split([500, 100, *[1] * 40], dim=1):
        output = model(piece, use_cache=True, **{CACHE_NAME: cache})
        cache = output[CACHE_NAME]
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-3)
    planned = Student.read(tmp_path / "out").manifest.cache_bytes
    model = load_student(tmp_path / "out", dtype=torch.bfloat16)
    for length in (400, 640):
        cache = model(ids[:, :length], use_cache=True)[CACHE_NAME]
        assert {sum(layer.nbytes() for layer in cache.layers)} == {sizes["student"] for sizes in planned.values()}


def test_portable_file_of_the_real_model(converted, tmp_path):
    script = (
        "import sys; sys.modules['linearize'] = None\n"
        "import torch; from safetensors.torch import save_file; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(converted)!r}, trust_remote_code=True, dtype=torch.float32)\n"
        "m.eval()\n"
        f"save_file({{'logits': m(torch.arange(300)[None]).logits.detach()}}, {str(tmp_path / 'logits.safetensors')!r})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    with torch.no_grad():
        wanted = load_student(converted, dtype=torch.float32)(torch.arange(300)[None]).logits
    # another process: the order in which a product is summed may hang on where its buffers lie
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], wanted, rtol=1e-6, atol=1e-4)


def test_the_default_holds_what_the_base_looks_up(smollm2, tmp_path):
    """On rows of another seed and another kind than those that chose the heads: copies among random tokens alone."""
    from linearize.data.recall_rows import recall_task
    from linearize.evaluation.recall import accuracy

    student = convert(smollm2, out=tmp_path / "out", verify=False, progress=lambda message: None)
    quality = student.manifest.quality
    assert quality is not None and quality.holds and quality.chosen.cache["32768"] < 0.35
    assert min(quality.chosen.held["look-ups@3072"].values()) > 0.95
    model, task = load_student(student.folder, dtype=torch.float32), recall_task(1024, 2, 49152, 1, seed=11)
    right = {"base": 0.0, "student": 0.0}
    with torch.no_grad():
        for row in task.ids:
            for name, mode in (("base", model.softmax_attention()), ("student", contextlib.nullcontext())):
                with mode:
                    hidden = model.base_model(row[None], use_cache=False).last_hidden_state[0]
                right[name] += accuracy(hidden, readout_of(model), row, task.counted)
    assert right["base"] > 0.4 and right["student"] > 0.9 * right["base"]
