"""The facts about one base architecture that the rest of the package needs."""

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
        decoder_attribute: attribute of the causal language model that holds its decoder.
        attention_attribute: attribute of a decoder layer that holds its attention.
        grouped: several query heads can share a key/value head.
        lora_targets: projections of an attention block, for LoRA.
        partial_rotary: the attention class itself cuts q and k to the rotated part.
        rotary_layers: layers that rotate q and k: all, those flagged in `no_rope_layers`, those with a sliding window.
        layers_drop_keywords: a decoder layer does not pass keywords that it does not know to its attention.
        masks_ignore_positions: the decoder builds its masks without the positions. Elsewhere positions that restart
            tell packed documents apart.
        logit_multiplier, logit_divisor: key of the config by which the output logits are multiplied or divided.
        ignorable_tensors: patterns of buffers that old checkpoints stored and the model computes itself.
        experimental: the reason why a conversion may disappoint; empty for a supported family.
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
        """Return the name of the transformers module with its modelling or configuration code."""
        module = self.module or self.model_type
        return f"transformers.models.{module}.{kind}_{module}"

    def heads(self, config: Settings) -> dict[str, int]:
        """Return the config keys about heads that some families leave out."""
        query_heads = config["num_attention_heads"]
        key_value_heads = config.get("num_key_value_heads") if self.grouped else None
        return {
            "num_key_value_heads": query_heads if key_value_heads is None else key_value_heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // query_heads,
        }

    def sliding_windows(self, config: Settings) -> tuple[int | None, ...]:
        """Return the base model's own sliding window of every layer, None for full attention."""
        window, layers = config.get("sliding_window"), config["num_hidden_layers"]
        kinds = config.get("layer_types") or (SLIDING,) * layers
        reaches_all = window is None or window >= config["max_position_embeddings"]
        return tuple(None if reaches_all or kind != SLIDING else window for kind in kinds)

    def rotates(self, config: Settings, layer: int) -> bool:
        """Return True if a layer rotates its queries and keys."""
        match self.rotary_layers:
            case "flagged":
                return bool(config["no_rope_layers"][layer])
            case "sliding":
                return config["layer_types"][layer] == SLIDING
        return True

    def logit_scale(self, config: Settings) -> float:
        """Return the factor of the output logits."""
        scale = config[self.logit_multiplier] if self.logit_multiplier else 1.0
        return scale / config[self.logit_divisor] if self.logit_divisor else scale


def family(model_type: str, prefix: str, **facts: Any) -> Family:
    """Return a family whose classes are named after `prefix`, as nearly all in transformers are."""
    kinds = {"config_class": "Config", "causal_lm_class": "ForCausalLM", "decoder_class": "Model"}
    names = {**{key: prefix + kind for key, kind in kinds.items()}, "attention_class": f"{prefix}Attention"}
    return Family(model_type, **{**names, **facts})
