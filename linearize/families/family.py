"""What the rest of the code needs to know about one base architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FULL, SLIDING = "full_attention", "sliding_attention"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One architecture of transformers whose attention goes through the attention interface.

    Attributes:
        model_type: as in its config.json.
        config_class, causal_lm_class, decoder_class, attention_class: names in transformers.models.<module>.
        module: folder in transformers.models, where it is not the model type.
        decoder_attribute: where the causal language model holds its decoder.
        attention_attribute: where a decoder layer holds its attention.
        grouped: whether several query heads can share a key/value head.
        lora_targets: projections of an attention block, for LoRA.
        partial_rotary: whether the attention class itself cuts q and k to the rotated part.
        rotary_layers: which layers rotate q and k: all, those flagged in `no_rope_layers`, those with a sliding window.
        layers_drop_keywords: whether a decoder layer keeps keywords that it does not know from its attention.
        masks_ignore_positions: whether the decoder makes its masks without the positions, whose restarting tells packed
            documents apart elsewhere.
        logit_multiplier, logit_divisor: key of the config by which the output logits are multiplied or divided.
        ignorable_tensors: patterns of buffers that old checkpoints saved and the model computes itself.
        experimental: why a conversion may disappoint; empty for a supported family.
        covers: models of this architecture, for people.
    """

    model_type: str
    config_class: str
    causal_lm_class: str
    decoder_class: str
    attention_class: str
    module: str = ""
    decoder_attribute: str = "model"
    attention_attribute: str = "self_attn"
    grouped: bool = True
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    partial_rotary: bool = False
    rotary_layers: Literal["all", "flagged", "sliding"] = "all"
    layers_drop_keywords: bool = False
    masks_ignore_positions: bool = False
    logit_multiplier: str | None = None
    logit_divisor: str | None = None
    ignorable_tensors: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    experimental: str = ""
    covers: str = ""

    def import_path(self, kind: Literal["modeling", "configuration"]) -> str:
        """Name of the module of transformers with its modelling or configuration code."""
        module = self.module or self.model_type
        return f"transformers.models.{module}.{kind}_{module}"

    def heads(self, config: Settings) -> dict[str, int]:
        """The keys about heads that not every family's config has."""
        query_heads = config["num_attention_heads"]
        key_value_heads = config.get("num_key_value_heads") if self.grouped else None
        return {
            "num_key_value_heads": query_heads if key_value_heads is None else key_value_heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // query_heads,
        }

    def sliding_windows(self, config: Settings) -> tuple[int | None, ...]:
        """For every layer the sliding window it has of its own, None where it attends to everything."""
        window, layers = config.get("sliding_window"), config["num_hidden_layers"]
        kinds = config.get("layer_types") or (SLIDING,) * layers
        reaches_all = window is None or window >= config["max_position_embeddings"]
        return tuple(None if reaches_all or kind != SLIDING else window for kind in kinds)

    def rotates(self, config: Settings, layer: int) -> bool:
        """Whether a layer rotates its queries and keys."""
        match self.rotary_layers:
            case "flagged":
                return bool(config["no_rope_layers"][layer])
            case "sliding":
                return config["layer_types"][layer] == SLIDING
        return True

    def logit_scale(self, config: Settings) -> float:
        """What the output embeddings' logits are multiplied by."""
        scale = config[self.logit_multiplier] if self.logit_multiplier else 1.0
        return scale / config[self.logit_divisor] if self.logit_divisor else scale


def family(model_type: str, prefix: str, **facts: Any) -> Family:
    """A family whose classes are named after `prefix`, as in transformers they nearly all are."""
    kinds = {"config_class": "Config", "causal_lm_class": "ForCausalLM", "decoder_class": "Model"}
    names = {**{key: prefix + kind for key, kind in kinds.items()}, "attention_class": f"{prefix}Attention"}
    return Family(model_type, **{**names, **facts})
