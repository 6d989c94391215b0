"""Every gated structure by name. A new one is one file beside this one, one line here, one row in tests/helpers.py."""

import importlib
from dataclasses import dataclass, field
from typing import Any

from linearize.plan import NO_BRANCH


@dataclass(frozen=True)
class MixerEntry:
    """Facts about a structure, readable without importing torch.

    Attributes:
        path: "module:Class" of the implementation.
        summary, source: what it is and where it is defined.
        options: its settings and their defaults; of a setting with a few allowed values, those, the default first.
        gated: whether it has gates, which the keys drive and a learned gate can correct.
        positive: whether no token gets a negative weight, so that window and past can share one normaliser.
            Where one of these depends on options, {option: values that make it so}.
        mixes: how it can meet the window, the default first.
    """

    path: str
    summary: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    gated: bool | dict[str, tuple] = True
    positive: bool | dict[str, tuple] = False
    mixes: tuple[str, ...] = ("outside", "sum", "joint")

    def defaults(self) -> dict[str, Any]:
        return {name: value[0] if isinstance(value, tuple) else value for name, value in self.options.items()}

    def shares_normaliser(self, options: dict[str, Any]) -> bool:
        """Whether the structure with these options can share a normaliser with the window."""
        return self._holds(self.positive, options)

    def has_gates(self, options: dict[str, Any]) -> bool:
        return self._holds(self.gated, options)

    def _holds(self, fact: bool | dict[str, tuple], options: dict[str, Any]) -> bool:
        if isinstance(fact, bool):
            return fact
        chosen = {**self.defaults(), **options}
        return all(chosen[name] in values for name, values in fact.items())


def _entry(path: str, summary: str, source: str, **facts) -> MixerEntry:
    return MixerEntry(f"linearize.mixers.{path}", summary, source, **facts)


FEATURES = ("elu", "relu", "exp", "softmax", "identity")
POSITIVE_STRUCTURES = ("gla", "gsa", "hgrn2", "linear", "hedgehog", "t2r", "based")
SIGNED_STRUCTURES = (
    "rwkv6", "mamba2", "retention", "mlstm", "retnet", "lightning", "transnormer", "mala", "longhorn", "deltanet",
    "gated_deltanet", "gated_deltaproduct", "kda", "rwkv7",
)  # fmt: skip

GATED_STRUCTURES = (
    "gla", "gsa", "hgrn2", "rwkv6", "mamba2", "retention", "mlstm", "longhorn", "deltanet", "gated_deltanet",
    "gated_deltaproduct", "kda", "rwkv7",
)  # fmt: skip

# the first, which costs least of those with gates, is what a memory is unless something else is asked for
MEMORY_STRUCTURES = ("mamba2", *(n for n in (*POSITIVE_STRUCTURES, *SIGNED_STRUCTURES) if n != "mamba2"))

MIXERS = {
    "gla": _entry("gla:GatedLinearAttention", "decay per channel, softmax features", "Liger 2503.01496; GLA 2312.06635", options={"gate_logit_normalizer": 16.0}, positive=True),
    "gsa": _entry("gsa:GatedSlotAttention", "gated slots read by softmax", "Liger 2503.01496; GSA 2409.07146", options={"gate_logit_normalizer": 16.0}, positive=True),
    "hgrn2": _entry("hgrn2:HGRN2", "decay per channel, what is not kept is written", "Liger 2503.01496; HGRN2 2404.07904", options={"lower_bound": 0.0}, positive=True),
    "rwkv6": _entry("rwkv6:RWKV6", "doubly exponential decay per channel, bonus for the current token", "Liger 2503.01496; Finch 2404.05892"),
    "mamba2": _entry("mamba2:Mamba2", "softplus decay per head, optionally a learned step", "Liger 2503.01496; SSD 2405.21060", options={"gate_logit_normalizer": 1.0, "learned_step": False}),
    "mlstm": _entry("mlstm:MLSTM", "exponential input gate, sigmoid forget gate, floored normaliser", "Liger 2503.01496; xLSTM 2405.04517"),
    "retention": _entry("retention:GatedRetention", "sigmoid decay per head", "Liger 2503.01496; RetNet 2307.08621", options={"gate_logit_normalizer": 16.0}),
    "retnet": _entry("retnet:Retention", "fixed decay per head, rotary", "RetNet 2307.08621", gated=False),
    "lightning": _entry("lightning:LightningAttention", "fixed decay per head and layer, SiLU features", "Lightning Attention-2 2401.04658", gated=False),
    "linear": _entry("linear:LinearAttention", "no decay, a feature map, normaliser or norm", "Linear Transformers 2006.16236; SUPRA 2405.06640", options={"feature_map": FEATURES, "normalization": ("sum", "rms", "none")}, gated=False, positive={"feature_map": FEATURES[:-1], "normalization": ("sum", "none")}),
    "transnormer": _entry("transnormer:NormAttention", "no decay, a norm in place of the normaliser", "TransNormer 2210.10340", gated=False),
    "hedgehog": _entry("hedgehog:Hedgehog", "learned softmax features, rotary", "Hedgehog 2402.04347; LoLCATs 2410.10254", gated=False, positive=True),
    "vq": _entry("vq:VectorQuantized", "softmax over the means of clustered keys, rotary", "Transformer-VQ 2309.16354; GSA 2409.07146", options={"codes": 16}, gated=False, positive=True, mixes=("joint", "sum")),
    "based": _entry("based:Based", "second-order Taylor features of a learned projection", "Based 2402.18668", options={"features": 16}, gated=False, positive=True),
    "t2r": _entry("t2r:T2R", "learned ReLU features", "T2R 2103.13076", options={"features": 32}, gated=False, positive=True),
    "mala": _entry("mala:MagnitudeAwareLinearAttention", "no decay, the query's magnitude restored", "MALA 2507.00698", gated=False),
    "longhorn": _entry("longhorn:Longhorn", "decay from an implicit online regression", "Longhorn 2407.14207"),
    "deltanet": _entry("deltanet:DeltaNet", "delta rule", "DeltaNet 2406.06484; 2411.12537", options={"negative_eigenvalues": False}),
    "gated_deltanet": _entry("gated_deltanet:GatedDeltaNet", "delta rule, decay per head", "Gated DeltaNet 2412.06464", options={"gate_logit_normalizer": 1.0, "negative_eigenvalues": False}),
    "gated_deltaproduct": _entry("gated_deltaproduct:GatedDeltaProduct", "several delta-rule steps a token, decay per head", "DeltaProduct 2502.10297", options={"steps": 2, "gate_logit_normalizer": 1.0}),
    "kda": _entry("kda:KimiDeltaAttention", "delta rule, decay per channel", "Kimi Linear 2510.26692", options={"gate_logit_normalizer": 16.0}),
    "rwkv7": _entry("rwkv7:RWKV7", "generalised delta rule, decay and write strength per channel", "RWKV-7 2503.14456"),
    "mom": _entry("mom:MixtureOfMemories", "several memories of any other structure, routed", "MoM 2502.13685", options={"inner": MEMORY_STRUCTURES, "memories": 4, "top": 2}, gated={"inner": GATED_STRUCTURES}, positive={"inner": POSITIVE_STRUCTURES}),
}  # fmt: skip

WINDOW_ALONE = MixerEntry(
    path="",
    summary="no recurrent branch, window and sinks alone",
    source="StreamingLLM 2309.17453; DuoAttention 2410.10819",
    gated=False,
    mixes=(NO_BRANCH,),
)
# what `mixer` can be
CHOICES = {**MIXERS, NO_BRANCH: WINDOW_ALONE}


def mixer_class(name: str) -> type:
    """The torch module of a structure."""
    module, cls = MIXERS[name].path.split(":")
    return getattr(importlib.import_module(module), cls)
