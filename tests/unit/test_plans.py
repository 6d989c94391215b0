"""Plans from a config alone: giants, settings per layer, windows that verification leaves."""

import json

import pytest

from linearize.conversion import verify
from linearize.plan import LayerPlan, Plan

# as their makers publish them
GIANTS = {
    "Llama-3.1-405B": {
        "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "max_position_embeddings": 40960, "rope_theta": 1e6,
    },
    "Mixtral-8x22B": {
        "model_type": "mixtral", "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
        "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 65536, "rope_theta": 1e6,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", GIANTS)
def test_a_giant_is_planned_from_its_config_alone(name, cli, tmp_path):
    (tmp_path / name).mkdir()
    config = GIANTS[name]
    (tmp_path / name / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    code, out, err = cli("plan", tmp_path / name, "--keep-softmax", "every:8", "--mixer", "gla", "--json")
    assert code == 0, err
    plan = json.loads(out)
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    kept = len(range(0, layers, 8)) * heads
    assert len(plan["layers"]) == layers and plan["coverage"]["heads_planned"] == layers * heads - kept
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    cache = plan["cache_bytes"]["32768"]
    assert cache["base"] == 2 * 2 * 32768 * layers * heads * head_dim
    assert kept / (layers * heads) < cache["student"] / cache["base"] < 1.2 * kept / (layers * heads)


def test_verification_leaves_every_window():
    """Longer windows than there is time for are shortened, so that the recurrent branch takes part."""
    layers = (LayerPlan((1,), window=5000, softmax_window=9000), LayerPlan((1,), window=12), LayerPlan((), window=512))
    plan = verify._shortened(Plan("llama", layers))
    assert [layer.window for layer in plan.layers] == [512, 12, 512]
    assert [layer.softmax_window for layer in plan.layers] == [560, None, None]
    assert verify.SOFTMAX_WINDOW + 24 <= verify.LONGEST
