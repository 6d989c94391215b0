"""List the supported families. Facts that are not defaults stand in a file of the family's own."""

from linearize.families.cohere2 import COHERE2
from linearize.families.family import Family, family
from linearize.families.gemma3_text import GEMMA3_TEXT
from linearize.families.gpt_neox import GPT_NEOX
from linearize.families.gpt_oss import GPT_OSS
from linearize.families.granite import GRANITE
from linearize.families.llama import LLAMA
from linearize.families.phi import PHI
from linearize.families.phi3 import PHI3
from linearize.families.smollm3 import SMOLLM3
from linearize.families.stablelm import STABLELM

_FAMILIES = (
    LLAMA,
    family("mistral", "Mistral", covers="Mistral 7B, Nemo, Small"),
    family("ministral", "Ministral", covers="Ministral 8B"),
    family("ministral3", "Ministral3", covers="Ministral 3, text"),
    family("qwen2", "Qwen2", covers="Qwen 2, 2.5, QwQ"),
    family("qwen3", "Qwen3", covers="Qwen 3, dense"),
    PHI,
    PHI3,
    family("gemma", "Gemma", covers="Gemma 1"),
    family("gemma2", "Gemma2", covers="Gemma 2"),
    GEMMA3_TEXT,
    GPT_NEOX,
    family("olmo2", "Olmo2", covers="OLMo 2"),
    family("olmo3", "Olmo3", covers="OLMo 3"),
    SMOLLM3,
    GRANITE,
    family("starcoder2", "Starcoder2", covers="StarCoder2"),
    STABLELM,
    COHERE2,
    family("mixtral", "Mixtral", covers="Mixtral 8x7B, 8x22B; experts untouched"),
    family("qwen3_moe", "Qwen3Moe", covers="Qwen 3 30B-A3B, 235B-A22B; experts untouched"),
    family("olmoe", "Olmoe", covers="OLMoE; experts untouched"),
    GPT_OSS,
)
FAMILIES: dict[str, Family] = {entry.model_type: entry for entry in _FAMILIES}


def find_family(model_type: str) -> Family:
    """Return the facts of a listed family, or the facts of an unlisted one, read from transformers' classes."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    from linearize.families.unlisted import read_off  # imports torch

    return read_off(model_type)
