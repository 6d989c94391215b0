"""Writes a Llama checkpoint of a given size with random weights, shard by shard, for tests of scale.

    python scripts/make_synthetic.py OUT --gib 4

Memory stays at one tensor; the file is as good as a real one for anything that does not read meaning into weights.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 2048, 5632, 32, 8, 32000
SHARD_BYTES = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the weights in bf16")
    arguments = parser.parse_args()
    head_dim = HIDDEN // HEADS
    kv = KEY_VALUE_HEADS * head_dim
    layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    per_layer = 2 * sum(torch.Size(shape).numel() for shape in layer.values())
    outer = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    layers = max(1, round((arguments.gib * 2**30 - 4 * VOCABULARY * HIDDEN) / per_layer))
    shapes = {**outer, **{f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}}

    arguments.out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards, held, size = [], {}, 0
    for name, shape in shapes.items():
        tensor = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.02
        held[name] = tensor.bfloat16()
        size += held[name].nbytes
        if size >= SHARD_BYTES:
            shards.append(_write(arguments.out, len(shards), held))
            held, size = {}, 0
    if held:
        shards.append(_write(arguments.out, len(shards), held))
    weight_map = {name: file for file, names in shards for name in names}
    total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2))
    print(f"{arguments.out}: {layers} layers, {total / 2**30:.2f} GiB in {len(shards)} shards")


def _write(folder: Path, number: int, tensors: dict) -> tuple[str, list[str]]:
    name = f"model-{number + 1:05d}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return name, list(tensors)


if __name__ == "__main__":
    main()
