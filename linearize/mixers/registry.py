"""Every gated structure by name. A new one is one file beside this one, one line here, one row in tests/test_mixers.py."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class MixerEntry:
    """Facts about a structure, readable without importing torch.

    Attributes:
        path: "module:Class" of the implementation.
        mixes: the ways it can be mixed with the window ("outside" needs positive features).
        options: its settings and their defaults.
        state: shape of its recurrent state per key/value head, in head dims ("K", "V") and numbers.
    """

    path: str
    mixes: tuple[str, ...]
    options: dict[str, float | int | bool | str]
    state: tuple[str | int, ...]
    source: str
    summary: str


MIXERS = {
    "gla": MixerEntry(
        path="linearize.mixers.gla:GatedLinearAttention",
        mixes=("sum", "outside"),
        options={"gate_logit_normalizer": 16.0},
        source="Liger, arXiv 2503.01496; GLA, arXiv 2312.06635",
        state=("K", "V"),
        summary="per-channel decay from the keys, softmax features",
    ),
}


def mixer_class(name: str) -> type:
    """The torch module of a structure."""
    module, cls = MIXERS[name].path.split(":")
    return getattr(importlib.import_module(module), cls)
