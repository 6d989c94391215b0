"""Tiny models, inputs, plans, settings and comparisons that several test files share."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from linearize.evaluation.suite import Suite
from linearize.mixers.mixer import Site
from linearize.mixers.registry import build_mixer
from linearize.plan import NO_BRANCH, LayerPlan, Plan
from linearize.report.results import SCHEMA_VERSION, Metric, Results
from linearize.settings.loading import load_config, load_recipe
from linearize.settings.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

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
    """Return a random Llama whose attention is far from uniform, so that mistakes in it show."""
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
    """Return `base` under `plan`, with the same weights."""
    from linearize.families.registry import find_family
    from linearize.modeling.factory import linearized_classes

    classes = linearized_classes(find_family(plan.base_model_type))
    config = base.config.to_dict()
    config.pop("model_type")
    student = classes.causal_lm(classes.config.from_dict({**config, "linearize": plan.to_dict()})).eval()
    missing, unexpected = student.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(".mixer." in name for name in missing)
    return student


def student_of(base, **settings):
    layers = tuple(LayerPlan(heads, window=8, sinks=2, **settings) for heads in ((), (1,), (0, 2)))
    return tiny_student(Plan("llama", layers), base)


def reshard(folder: Path, shards: int) -> None:
    """Split model.safetensors into `shards` files with an index."""
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


def write_base(
    folder: Path, tokenizer_folder: Path, shape: str = "gqa", *, dtype=torch.float32, shards: int = 1, **changes
) -> Path:
    """Write a complete base checkpoint: weights, tokenizer and licence. Return its folder."""
    tiny_base(shape, **changes).to(dtype).save_pretrained(folder)
    if shards > 1:
        reshard(folder, shards)
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "LICENSE").write_text("the licence\n")
    return folder


def copy_conversion(conversion: Path, folder: Path) -> Path:
    """Copy FOLDER/linearized/NAME and its base FOLDER/base into another folder. Return the copied conversion."""
    original = conversion.parent.parent
    shutil.copytree(original / "base", folder / "base")
    out = shutil.copytree(conversion, folder / "linearized" / conversion.name)
    manifest = out / "linearize.json"
    manifest.write_text(manifest.read_text().replace(str(original), str(folder)))
    return out


# a tiny random model of every family, with the feature that sets it apart turned on
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
PROJECTIONS = ("_proj.w", "query_key_value.w", "dense.w")
ABSENT = object()
EVERY_OTHER = ["sliding_attention", "full_attention"] * 2
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "ministral": {"head_dim": 8, "sliding_window": 12, "layer_types": EVERY_OTHER},
    "ministral3": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 12, "layer_types": EVERY_OTHER,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 12, "layer_types": EVERY_OTHER},
    "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": True, "num_key_value_heads": ABSENT},
    "olmo2": {},
    "olmo3": {"sliding_window": 12, "layer_types": EVERY_OTHER},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"attention_multiplier": 0.4, "logits_scaling": 3.0, "embedding_multiplier": 2.0,
                "residual_multiplier": 0.5},
    "starcoder2": {"sliding_window": None, "use_bias": True},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True},
    "cohere2": {"sliding_window": 12, "layer_types": EVERY_OTHER, "logit_scale": 0.25},
    "mixtral": MIXTURE,
    "qwen3_moe": {**MIXTURE, "head_dim": 16},
    "olmoe": MIXTURE,
    "gpt_oss": {**MIXTURE, "head_dim": 8, "sliding_window": 12, "layer_types": EVERY_OTHER},
}  # fmt: skip


def family_config(model_type: str, **changes):
    from transformers import AutoConfig

    settings = {**COMMON, **FAMILIES.get(model_type, {}), **changes}
    return AutoConfig.for_model(model_type, **{key: value for key, value in settings.items() if value is not ABSENT})


def family_base(model_type: str, seed: int = 0, **changes):
    """Return a random model whose attention is far from uniform; its biases, norms and sinks have left their start."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(model_type, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in PROJECTIONS):
                parameter.mul_(8.0)
            elif name.endswith("bias") or "sinks" in name:
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# plans and tokens of tiny students
LOUD = {"log_mass": 0.5}  # a recurrent branch that matters, so that mistakes in it show


def plan_for(mix: str, key_value_heads: int, window: int = 8, sinks: int = 2) -> Plan:
    """Three layers: all heads linear, one head kept (where there are several), all kept. In "windows" kept heads see a
    window too."""
    softmax_window = 13 if mix == "windows" else None
    mix = "outside" if mix == "windows" else mix
    options = LOUD if mix == "outside" else {}
    mixer = NO_BRANCH if mix == NO_BRANCH else "gla"
    every = tuple(range(key_value_heads))
    layers = (
        LayerPlan((), mixer, window=window, sinks=sinks, mix=mix, mix_options=options),
        LayerPlan(every[1:2], mixer, window=window - 3, sinks=sinks + 1, mix=mix, mix_options=options),
        LayerPlan(every),
    )
    return Plan("llama", tuple(replace(layer, softmax_window=softmax_window) for layer in layers))


def tokens(batch: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# inputs of operators and structures
LENGTHS = (1, 63, 64, 65, 500)

# every structure in the shapes to test it in: name of the row -> structure, options
STRUCTURES = {
    "gla": ("gla", {}),
    "gsa": ("gsa", {}),
    "hgrn2": ("hgrn2", {}),
    "hgrn2 bounded": ("hgrn2", {"lower_bound": 0.9}),
    "rwkv6": ("rwkv6", {}),
    "mamba2": ("mamba2", {}),
    "mamba2 step": ("mamba2", {"learned_step": True}),
    "retention": ("retention", {}),
    "mlstm": ("mlstm", {}),
    "retnet": ("retnet", {}),
    "lightning": ("lightning", {}),
    "linear": ("linear", {}),
    "linear relu": ("linear", {"feature_map": "relu"}),
    "linear exp": ("linear", {"feature_map": "exp"}),
    "linear softmax rms": ("linear", {"feature_map": "softmax", "normalization": "rms"}),
    "linear identity none": ("linear", {"feature_map": "identity", "normalization": "none"}),
    "transnormer": ("transnormer", {}),
    "hedgehog": ("hedgehog", {}),
    "vq": ("vq", {"codes": 6}),
    "based": ("based", {"features": 4}),
    "t2r": ("t2r", {"features": 6}),
    "mala": ("mala", {}),
    "longhorn": ("longhorn", {}),
    "deltanet": ("deltanet", {}),
    "deltanet negative": ("deltanet", {"negative_eigenvalues": True}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltaproduct": ("gated_deltaproduct", {"steps": 3}),
    "kda": ("kda", {}),
    "rwkv7": ("rwkv7", {}),
    "mom": ("mom", {"memories": 3, "top": 2}),
    "mom deltanet": ("mom", {"inner": "deltanet", "memories": 2, "top": 1}),
}


def window_inputs(T, S, J=2, G=2, N=3, padding=False, documents=False, sinks=True, seed=0):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, n, h, 8, dtype=torch.float64) for n, h in ((T, J * G), (S, J), (S, J)))
    keywords = {
        "key_mask": torch.rand(2, S) > 0.3 if padding else None,
        "segments": (torch.rand(2, S) < 0.1).cumsum(-1) if documents else None,
    }
    if sinks:
        keywords["sink_keys"], keywords["sink_values"] = (
            torch.randn(2, N, J, 8, dtype=torch.float64) for _ in range(2)
        )
        keywords["sink_mask"] = torch.rand(2, T, N) > 0.5
    return [q, k, v], keywords


def tiny_structure(row, J=2, G=2, K=8, dtype=torch.float64):
    name, options = STRUCTURES[row]
    built = build_mixer(name, Site(tuple(range(J)), J, G, K, 1, 4), options)
    torch.manual_seed(0)
    with torch.no_grad():
        built.reset_parameters()
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.to(dtype)


def structure_inputs(built, T, B=2, extra=1, key_scale=1.0, state=False, gate_offset=False, dtype=torch.float64):
    site = built.site
    J, K = len(site.heads), site.head_dim
    torch.manual_seed(T)
    q, k = torch.randn(B, T, J * site.group, K, dtype=dtype), key_scale * torch.randn(B, T, J, K, dtype=dtype)
    v = torch.randn(B, T, J, K + extra, dtype=dtype)  # one more where a column of ones rides along
    keywords = {}
    if gate_offset:
        keywords["gate_offset"] = torch.randn(B, T, J, built.gate_width(), dtype=dtype)
    if state:  # a state that the structure can really be in
        before = [torch.randn(B, 9, *x.shape[2:], dtype=dtype) for x in (q, k, v)]
        with torch.no_grad():
            keywords["initial_state"] = built.naive(*before)[1]
    return (q, k, v), keywords


def assert_same_with_gradients(fast, naive, inputs, tolerance=1e-10):
    tensors = [x.requires_grad_() for x in inputs if x is not None]
    got, wanted = fast(), naive()
    loss_weights = [torch.randn_like(x) for x in wanted]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(result, loss_weights)), tensors, allow_unused=True)
        for result in (got, wanted)
    ]
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# settings of runs on tiny models
SUITE = Suite(lengths=(32, 64), recall=(8, 40), max_tokens=256, recall_rows=3)
# options of a conversion without softmax heads, for models that are too small to choose some by measured loss
LINEAR = ("--window", "8", "--keep-softmax", "none")
FLAGS = ["--lengths", "32,64", "--recall", "8,40", "--max-tokens", "256"]
SETTINGS = [
    "seq_len=48",
    "batch_size=2",
    "tokens=960",
    "checkpoint_every=2",
    "lora.rank=2",
    "optimizer.lr=0.01",
    "precision=fp32",
]


def quiet(*_) -> None:
    """Take the place of a progress or report function."""


def weights_of(folder) -> dict:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def lora_recipe(*sets: str) -> Recipe:
    """Return the packaged recipe `lora`, shortened to ten steps."""
    return load_recipe("lora", {}, [*SETTINGS, *sets])


def convert_to_train(base: Path, out: Path) -> Path:
    """Convert without calibration to what the training tests train: gla beside a window of 12, one softmax head."""
    from linearize.workflows.convert import convert

    settings = load_config(
        None, {"mixer": "gla", "window": 12, "sinks": 2, "keep_softmax": "1:0"}, ["mix_options.log_mass=-1"]
    )
    convert(str(base), settings, out=out, verify=False, progress=quiet)
    return out


def train(converted: Path, out: Path, recipe: Recipe | None = None, **options):
    """Finetune in this process without a word."""
    from linearize.workflows.finetune import finetune

    options = {"report": quiet, "recipe_name": "lora", **options}
    return finetune(converted, recipe or lora_recipe(), out=out, progress=quiet, **options)


def train_command(converted: Path, out: Path, *sets: str) -> list[str]:
    """Return the command line that does the same in a process of its own."""
    flags = [part for item in (*SETTINGS, *sets) for part in ("--set", item)]
    return [sys.executable, "-m", "linearize", "finetune", str(converted), "-o", str(out), *flags]


def results_of(*metrics: Metric) -> Results:
    """Return results with these metrics and nothing else, as if a tiny model had been evaluated."""
    return Results(
        schema_version=SCHEMA_VERSION,
        model="tiny",
        base="base",
        settings={"window": 12, "sinks": 2},
        coverage={"heads_converted": 9, "heads": 9},
        cache_bytes={"32": {"base": 64, "student": 32}},
        data={"text": "sample-eval", "fingerprint": "0", "tokens": 256},
        metrics=metrics,
        positions={},
        gates=(),
        seed=0,
        seconds=1.0,
        versions={},
        command="",
    )
