"""What the rest of the code needs to know about one base architecture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One architecture of transformers whose attention goes through the attention interface.

    Attributes:
        model_type: as in its config.json.
        config_class, causal_lm_class, decoder_class, attention_class: names in transformers.models.<model_type>.
        attention_attribute: where a decoder layer holds its attention.
        lora_targets: projections of an attention block, for LoRA.
        ignorable_tensors: patterns of buffers that old checkpoints saved and the model computes itself.
        covers: models of this architecture, for people.
    """

    model_type: str
    config_class: str
    causal_lm_class: str
    decoder_class: str
    attention_class: str
    attention_attribute: str = "self_attn"
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    ignorable_tensors: tuple[str, ...] = ()
    covers: str = ""
