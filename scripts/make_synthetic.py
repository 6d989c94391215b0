"""Write a checkpoint of a given size with random weights, shard by shard, for tests of scale.

    python scripts/make_synthetic.py OUT --gib 4
    python scripts/make_synthetic.py OUT --gib 4 --family qwen3_moe --shard-mib 256

Names and shapes are those of transformers' own model, so a mixture's experts lie apart as in released checkpoints.
Only one shard is in memory at a time.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

COMMON = {"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16"}
SHAPES = {
    "llama": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen3_moe": {
        "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 768, "num_experts": 32,
        "num_experts_per_tok": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    },
}  # fmt: skip


def main() -> None:
    """Choose the number of layers that comes closest to the size, and write config, shards and index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the bf16 weights, in GiB")
    parser.add_argument("--family", choices=SHAPES, default="llama")
    parser.add_argument("--shard-mib", type=int, default=1024)
    arguments = parser.parse_args()
    one_layer, two_layers = (total_bytes(tensors(arguments.family, layers)[1]) for layers in (1, 2))
    layers = max(1, 1 + round((arguments.gib * 2**30 - one_layer) / (two_layers - one_layer)))
    config, shapes = tensors(arguments.family, layers)

    arguments.out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards, pending, size = [], {}, 0
    for name, shape in shapes.items():
        tensor = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.02
        pending[name] = tensor.bfloat16()
        size += pending[name].nbytes
        if size >= arguments.shard_mib * 2**20:
            shards.append(write(arguments.out, len(shards), pending))
            pending, size = {}, 0
    if pending:
        shards.append(write(arguments.out, len(shards), pending))
    weight_map = {name: file for file, names in shards for name in names}
    total = total_bytes(shapes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config.save_pretrained(arguments.out)
    print(f"{arguments.out}: {layers} layers, {total / 2**30:.2f} GiB in {len(shards)} shards")


def tensors(family: str, layers: int) -> tuple[PretrainedConfig, dict[str, tuple[int, ...]]]:
    """Return the config of a model with `layers` layers, and the shapes of its tensors by their names on disk."""
    config = AutoConfig.for_model(family, **COMMON, **SHAPES[family], num_hidden_layers=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    state = revert_weight_conversion(model, model.state_dict())
    return config, {name: tuple(tensor.shape) for name, tensor in state.items()}


def total_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the bytes of bf16 tensors with these shapes."""
    return 2 * sum(torch.Size(shape).numel() for shape in shapes.values())


def write(folder: Path, number: int, shard: dict[str, torch.Tensor]) -> tuple[str, list[str]]:
    """Write one shard; return its file name and the names of its tensors."""
    name = f"model-{number + 1:05d}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    return name, list(shard)


if __name__ == "__main__":
    main()
