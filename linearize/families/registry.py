"""Supported families, and those that cannot be converted with the reason. One line each."""

from linearize.families.family import Family
from linearize.families.llama import LLAMA

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA,)}

_NO_INTERFACE = "its attention does not go through the attention interface of transformers, so it cannot be replaced"
REFUSED: dict[str, str] = {
    "gpt2": "its attention drops the keyword arguments that a linearized layer needs",
    "gpt_neo": _NO_INTERFACE,
    "gptj": _NO_INTERFACE,
    "falcon": _NO_INTERFACE,
    "mpt": _NO_INTERFACE,
    "bloom": _NO_INTERFACE,
    "codegen": _NO_INTERFACE,
}
