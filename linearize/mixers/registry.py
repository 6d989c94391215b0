"""List every mixer by name. A new one is one file beside this one, one entry here and one row in tests/helpers.py.

Importing this module imports no torch: settings and the command line read the entries.
"""

import importlib
from typing import TYPE_CHECKING, Any

from linearize.mixers.entry import MixerEntry, Option
from linearize.plan import NO_BRANCH, Plan

if TYPE_CHECKING:
    from linearize.mixers.mixer import Mixer, Site


def _entry(path: str, summary: str, source: str, **facts: Any) -> MixerEntry:
    return MixerEntry(f"linearize.mixers.{path}", summary, source, **facts)


FEATURE_MAPS_OF_LINEAR = ("elu", "relu", "exp", "softmax", "identity")
# divides a log-decay: 16 in GLA and Liger, 1 in Mamba-2
GLA_NORMALIZER = {"gate_logit_normalizer": Option(16.0, above=0)}
MAMBA_NORMALIZER = {"gate_logit_normalizer": Option(1.0, above=0)}

MIXERS = {
    "gla": _entry(
        "gla:GatedLinearAttention",
        "decay per channel, softmax features",
        "Liger 2503.01496; GLA 2312.06635",
        options=GLA_NORMALIZER,
        gates=("channel",),
        positive=True,
    ),
    "gsa": _entry(
        "gsa:GatedSlotAttention",
        "gated slots read by softmax",
        "Liger 2503.01496; GSA 2409.07146",
        options=GLA_NORMALIZER,
        gates=("channel",),
        positive=True,
    ),
    "hgrn2": _entry(
        "hgrn2:HGRN2",
        "decay per channel, what is not kept is written",
        "Liger 2503.01496; HGRN2 2404.07904",
        options={"lower_bound": Option(0.0, at_least=0, below=1)},
        gates=("channel",),
        positive=True,
    ),
    "rwkv6": _entry(
        "rwkv6:RWKV6",
        "doubly exponential decay per channel, bonus for the current token",
        "Liger 2503.01496; Finch 2404.05892",
        gates=("channel",),
    ),
    "mamba2": _entry(
        "mamba2:Mamba2",
        "softplus decay per head, optionally a learned step",
        "Liger 2503.01496; SSD 2405.21060",
        options={**MAMBA_NORMALIZER, "learned_step": Option(False)},
        gates=("head",),
    ),
    "mlstm": _entry(
        "mlstm:MLSTM",
        "exponential input gate, sigmoid forget gate, floored normaliser",
        "Liger 2503.01496; xLSTM 2405.04517",
        gates=("head", "head"),
    ),
    "retention": _entry(
        "retention:GatedRetention",
        "sigmoid decay per head",
        "Liger 2503.01496; RetNet 2307.08621",
        options=GLA_NORMALIZER,
        gates=("head",),
    ),
    "retnet": _entry("retnet:Retention", "fixed decay per head, rotary", "RetNet 2307.08621"),
    "lightning": _entry(
        "lightning:LightningAttention",
        "fixed decay per head and layer, SiLU features",
        "Lightning Attention-2 2401.04658",
    ),
    "linear": _entry(
        "linear:LinearAttention",
        "no decay, a feature map, normaliser or norm",
        "Linear Transformers 2006.16236; SUPRA 2405.06640",
        options={
            "feature_map": Option("elu", choices=FEATURE_MAPS_OF_LINEAR),
            "normalization": Option("sum", choices=("sum", "rms", "none")),
        },
        positive={"feature_map": FEATURE_MAPS_OF_LINEAR[:-1], "normalization": ("sum", "none")},
    ),
    "transnormer": _entry(
        "transnormer:NormAttention",
        "no decay, a norm in place of the normaliser",
        "TransNormer 2210.10340",
    ),
    "hedgehog": _entry(
        "hedgehog:Hedgehog",
        "learned softmax features, rotary",
        "Hedgehog 2402.04347; LoLCATs 2410.10254",
        positive=True,
    ),
    "vq": _entry(
        "vq:VectorQuantized",
        "softmax over the means of clustered keys, rotary",
        "Transformer-VQ 2309.16354; GSA 2409.07146",
        options={"codes": Option(16)},
        positive=True,
        mixes=("joint", "sum"),
    ),
    "based": _entry(
        "based:Based",
        "second-order Taylor features of a learned projection",
        "Based 2402.18668",
        options={"features": Option(16)},
        positive=True,
    ),
    "t2r": _entry(
        "t2r:T2R",
        "learned ReLU features",
        "T2R 2103.13076",
        options={"features": Option(32)},
        positive=True,
    ),
    "mala": _entry(
        "mala:MagnitudeAwareLinearAttention",
        "no decay, the query's magnitude restored",
        "MALA 2507.00698",
    ),
    "longhorn": _entry(
        "longhorn:Longhorn",
        "decay from an implicit online regression",
        "Longhorn 2407.14207",
        gates=("head",),
    ),
    "deltanet": _entry(
        "deltanet:DeltaNet",
        "delta rule",
        "DeltaNet 2406.06484; 2411.12537",
        options={"negative_eigenvalues": Option(False)},
        gates=("head",),
    ),
    "gated_deltanet": _entry(
        "gated_deltanet:GatedDeltaNet",
        "delta rule, decay per head",
        "Gated DeltaNet 2412.06464",
        options={**MAMBA_NORMALIZER, "negative_eigenvalues": Option(False)},
        gates=("head", "head"),
    ),
    "gated_deltaproduct": _entry(
        "gated_deltaproduct:GatedDeltaProduct",
        "several delta-rule steps a token, decay per head",
        "DeltaProduct 2502.10297",
        options={"steps": Option(2), **MAMBA_NORMALIZER},
        gates=("head", "head"),
    ),
    "kda": _entry(
        "kda:KimiDeltaAttention",
        "delta rule, decay per channel",
        "Kimi Linear 2510.26692",
        options=GLA_NORMALIZER,
        gates=("channel", "head"),
    ),
    "rwkv7": _entry(
        "rwkv7:RWKV7",
        "generalised delta rule, decay and write strength per channel",
        "RWKV-7 2503.14456",
        gates=("channel", "channel"),
    ),
}
# the mixers that a memory of `mom` can be: all but vq, whose assignments a memory does not route
MEMORIES = {name: entry for name, entry in MIXERS.items() if name != "vq"}
MIXERS["mom"] = _entry(
    "mom:MixtureOfMemories",
    "several memories of any other mixer, routed",
    "MoM 2502.13685",
    options={
        # mamba2 costs least of those with gates
        "inner": Option("mamba2", choices=("mamba2", *(name for name in MEMORIES if name != "mamba2"))),
        "memories": Option(4),
        "top": Option(2, at_most="memories"),
    },
    gates={"inner": {name: entry.gates_with({}) for name, entry in MEMORIES.items()}},
    positive={"inner": tuple(name for name, entry in MEMORIES.items() if entry.shares_normaliser({}))},
)

WINDOW_ALONE = MixerEntry(
    path="",
    summary="no recurrent branch, window and sinks alone",
    source="StreamingLLM 2309.17453; DuoAttention 2410.10819",
    mixes=(NO_BRANCH,),
)
# the values that `mixer` can have
CHOICES = {**MIXERS, NO_BRANCH: WINDOW_ALONE}


def mixer_class(name: str) -> "type[Mixer]":
    """Return the torch module of a mixer."""
    module, cls = MIXERS[name].path.split(":")
    return getattr(importlib.import_module(module), cls)


def build_mixer(name: str, site: "Site", options: dict[str, Any]) -> "Mixer":
    """Build a mixer at a site, with the facts of its entry."""
    return mixer_class(name)(site, **options).with_facts(MIXERS[name], options)


def require_known(plan: Plan) -> None:
    """Refuse a plan with mixers, or settings of them, that this package does not have.

    Raises:
        ValueError: the first of them.
    """
    for index, layer in enumerate(plan.layers):
        if layer.native:
            continue
        if (entry := CHOICES.get(layer.mixer)) is None:
            raise ValueError(
                f"layer {index}: mixer: got '{layer.mixer}', which this version of linearize does not have"
            )
        if layer.mix not in entry.mixes:
            raise ValueError(f"layer {index}: mix: got '{layer.mix}', {layer.mixer} has {', '.join(entry.mixes)}")
        for name, value in layer.mixer_options.items():
            option = entry.options.get(name)
            refusal = "are none of that name" if option is None else option.refusal(value)
            if refusal is not None:
                raise ValueError(f"layer {index}: mixer_options.{name}: got {value!r}, allowed {refusal}")
