"""The conversion: a base checkpoint in, a linearized checkpoint out, every head accounted for.

1. Resolve the settings, the source and its family; refuse what cannot be converted.
2. Make the plan, layer by layer and head by head.
3. Check the base's tensors, from the safetensors headers, against what the family expects.
4. Where the base can be run, fit the added parameters to it (linearize/calibrate.py).
5. Write beside the target: base weights linked or copied, new parameters in a file of their own, index, config,
   tokenizer and licence files, the portable modelling file, the model card.
6. Verify in a fresh process.
7. Rename into place.

Only steps 2 (heads chosen by score) and 4 read weights (and a GGUF file must be dequantised), so memory does not grow with the model.
"""

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.assets import asset_files
from linearize.checkpoint.fingerprint import fingerprint_of, sha256, tokenizer_fingerprint
from linearize.checkpoint.source import Source, open_source
from linearize.checkpoint.weights import BITS, FLOATING, INDEX, SINGLE, TensorInfo, Weights, has_weights, read_weights
from linearize.checkpoint.writing import atomic_folder, check_space, check_target, placing, write_json, write_text
from linearize.errors import CheckpointError, ConfigError, CoverageError, UnsupportedModelError, nearest
from linearize.families.refused import reason_to_refuse
from linearize.families.registry import FAMILIES, find_family
from linearize.modeling.plan import LayerPlan, Plan
from linearize.placement import kept_count, scored_share, softmax_heads
from linearize.recipe import ConversionConfig, layer_numbers

if TYPE_CHECKING:
    from linearize.calibrate import Calibration
    from linearize.modeling.branch import WindowHeads
    from linearize.scoring import Probe

OUTPUT_ROOT = Path("linearized")
PACKAGES = ("linearize", "torch", "transformers", "safetensors", "peft", "accelerate")
# weights that a CPU gets through in seconds to minutes
CPU_LIMIT = 1 << 30
# `keep_softmax` unless something else is asked for
AUTO, AUTO_KEPT = "auto", "recall:12.5%"
CONTEXTS = (4096, 32768, 131072)
PLAIN_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class Inspection:
    """What is known about a conversion before anything is written.

    Attributes:
        added: names, shapes of the parameters the conversion adds (float32).
        cache_bytes: context length -> bytes of one sequence's cache, of the base and of the student.
        scores: by layer and key/value head, where heads were chosen by them.
        from_config: no weights lie beside config.json; `weights` is what they would be.
    """

    source: Source
    config: dict[str, Any]
    settings: ConversionConfig
    plan: Plan
    weights: Weights
    ignored: tuple[str, ...]
    added: dict[str, tuple[int, ...]]
    cache_bytes: dict[int, dict[str, int]]
    scores: tuple[tuple[float, ...], ...] = ()
    from_config: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's recurrent states, all layers."""
        branches = _branches(self.config, self.plan, device="meta")
        return sum(4 * len(b.site.heads) * _product(b.state_shape()) for b in branches.values())

    @property
    def key_value_heads(self) -> int:
        return self.config["num_key_value_heads"]

    @property
    def added_parameters(self) -> int:
        return sum(_product(shape) for shape in self.added.values())

    def coverage(self) -> dict[str, int]:
        heads = len(self.plan.layers) * self.key_value_heads
        linear = sum(len(layer.linear_heads(self.key_value_heads)) for layer in self.plan.layers)
        return {
            "layers": len(self.plan.layers),
            "layers_planned": len(self.plan.linear_layers(self.key_value_heads)),
            "heads": heads,
            "heads_planned": linear,
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as printed by `linearize plan --json`."""
        group = self.config["num_attention_heads"] // self.key_value_heads
        windows = find_family(self.plan.base_model_type).sliding_windows(self.config)
        layers = [
            {
                "layer": i,
                "softmax_heads": list(layer.softmax_heads),
                "softmax_window": layer.softmax_window,
                "linear_heads": list(layer.linear_heads(self.key_value_heads)),
                "mixer": layer.mixer,
                "mix": layer.mix,
                "gate": layer.gate,
                "scores": list(self.scores[i]) if self.scores else None,
                "window": layer.window,
                "sinks": layer.sinks,
                "native": layer.native,
                "sliding_window": windows[i],
            }
            for i, layer in enumerate(self.plan.layers)
        ]
        return {
            "model": self.source.name,
            "family": self.plan.base_model_type,
            "query_heads_per_key_value_head": group,
            "experimental": find_family(self.plan.base_model_type).experimental,
            "from_config_alone": self.from_config,
            "settings": self.settings.model_dump(),
            "coverage": self.coverage(),
            "layers": layers,
            "parameters_base": sum(_product(info.shape) for info in self.weights.tensors.values()),
            "parameters_added": self.added_parameters,
            "tensors_added": {name: list(shape) for name, shape in self.added.items()},
            "state_bytes": self.state_bytes,
            "cache_bytes": {str(length): sizes for length, sizes in self.cache_bytes.items()},
            "weights_bytes": self.weights.nbytes,
            "disk_bytes_copying": self.weights.nbytes + 4 * self.added_parameters,
            "disk_bytes_linking": 4 * self.added_parameters,
            "peak_memory_bytes": 2**29,
        }


def inspect_source(
    source: Source,
    settings: ConversionConfig,
    weights: Weights | None = None,
    progress: Callable[[str], None] = lambda text: None,
    *,
    converting: bool = False,
) -> Inspection:
    """Steps 1 to 3: everything that can be checked without writing.

    Args:
        weights: what `read_weights` found, where it has been called already.
        converting: whether `keep_softmax: auto` may run the base model.
        progress: hears of the heads being scored, the one thing here that runs the base model.
    """
    raw = checked_model_type(source)
    config, family_name = _full_config(source, raw), raw["model_type"]
    from_config = weights is None and not has_weights(source.folder)
    weights = weights or (_weights_of_config(source, config) if from_config else read_weights(source.folder))
    settings = _with_kept_heads(source, config, settings, weights, progress, converting)
    scores: list[list[float]] = []

    def score(by: str) -> list[list[float]]:
        layers = chosen_layers(family_name, config, settings)
        scores.extend(_head_scores(source, config, settings, by, layers, progress))
        return scores

    plan = make_plan(family_name, config, settings, None if from_config else score)
    ignored = () if from_config else _check_tensors(source, config, family_name, weights)
    added = added_parameters(config, plan)
    dtype = PLAIN_DTYPES.get(next(iter(weights.tensors.values())).dtype, "bfloat16")
    width = BITS[{value: key for key, value in PLAIN_DTYPES.items()}[dtype]] // 8
    return Inspection(
        source,
        config,
        settings,
        plan,
        weights,
        ignored,
        added,
        cache_sizes(config, plan, width),
        tuple(map(tuple, scores)),
        from_config,
    )


def _with_kept_heads(
    source: Source, config: dict, settings: ConversionConfig, weights: Weights, progress: Callable, converting: bool
) -> ConversionConfig:
    """The settings with `keep_softmax: auto` decided: heads chosen by recall where the base can be run, none elsewhere."""
    if settings.keep_softmax != AUTO:
        return settings
    from linearize.scoring import fitting_distances

    usable = fitting_distances(tuple(settings.scoring.distances), settings.window, config["max_position_embeddings"])
    kept = AUTO_KEPT if usable and base_runs(weights) else "none"
    if kept != "none" and not converting:
        progress(
            f"{source.name}: convert keeps softmax in {kept} of the heads (--keep-softmax {kept} shows which); here: none"
        )
        kept = "none"
    elif kept == "none":
        progress(f"{source.name}: no head keeps softmax, since the base cannot be scored here (--keep-softmax chooses)")
    return settings.model_copy(update={"keep_softmax": kept})


def _head_scores(
    source: Source,
    config: dict[str, Any],
    settings: ConversionConfig,
    by: str,
    layers: tuple[int, ...],
    progress: Callable[[str], None],
) -> list[list[float]]:
    """What recall or long text loses with each head, from running the base; kept for its next conversion."""
    from linearize.device import compute_dtype, pick_device
    from linearize.modeling.loading import load_base, tokenizer_of
    from linearize.scoring import cached_scores, combined, eliminate, head_scores
    from linearize.training.data import data_fingerprint

    if not layers:  # nothing to choose from; what then converts nothing is refused where heads are counted
        return [[0.0] * config["num_key_value_heads"]] * config["num_hidden_layers"]
    scoring, reach = settings.scoring, {"window": settings.window, "sinks": settings.sinks}
    key = {"base": source.fingerprint(), "by": by, **reach, **scoring.model_dump(), "layers": list(layers)}
    key["data"] = [data_fingerprint([scoring.text]), tokenizer_fingerprint(tokenizer_of(source.folder))]
    key["precision"] = str(compute_dtype("auto"))
    first: list[list[float]] = []
    if eliminating := scoring.method == "elimination":
        keep = kept_count(scored_share(settings.keep_softmax)[1], len(layers) * config["num_key_value_heads"])
        key["keep"] = keep
        by_gradient = settings.model_copy(update={"scoring": scoring.model_copy(update={"method": "gradient"})})
        first = _head_scores(source, config, by_gradient, by, layers, progress)
    elif by == "both":
        return combined(
            *(_head_scores(source, config, settings, part, layers, progress) for part in ("recall", "text"))
        )

    def compute() -> list[list[float]]:
        progress(f"{source.name}: scoring key/value heads by {by} ({scoring.method})")
        model = load_base(source, dtype=compute_dtype("auto")).to(pick_device())
        groups = _probe_groups(source, config, settings, by, model, progress)
        reported = {**reach, "layers": layers, "progress": progress}
        if eliminating:
            return eliminate(model, groups, first, keep, **reported)
        scores = [head_scores(model, probes, method=scoring.method, **reported) for probes in groups]
        return combined(*scores) if len(scores) > 1 else scores[0]

    return cached_scores(key, compute)


def _probe_groups(
    source: Source, config: dict[str, Any], settings: ConversionConfig, by: str, model, progress: Callable[[str], None]
) -> "list[list[Probe]]":
    """What the base is asked: copies, and facts where it answers them, for `recall`; long text for `text`; all for `both`."""
    from linearize.calibrate import text_rows
    from linearize.scoring import answers, recall_probes, text_probe

    scoring, reach = settings.scoring, {"window": settings.window, "sinks": settings.sinks}
    groups = []
    if by != "text":
        groups += [
            recall_probes(
                scoring.distances, scoring.rows, window=settings.window, positions=config["max_position_embeddings"],
                vocabulary=config["vocab_size"], start_token=config.get("bos_token_id"),
            )
        ]  # fmt: skip
        if (facts := _facts(source, config, settings)) is not None and answers(model, facts, **reach):
            groups += [[facts]]
        elif facts is not None:
            progress(f"{source.name}: the base does not answer {facts.name}; heads are scored by copies alone")
    if by != "recall":
        if (rows := text_rows(source, settings.window, scoring.text, scoring.text_rows)) is None:
            raise ConfigError(
                f"keep_softmax: no text can be scored: without a tokenizer, or since rows of {scoring.text} in the "
                f"model's positions do not leave the window of {settings.window}"
            )
        groups += [[text_probe(model, rows, **reach)]]
    return groups


def _facts(source: Source, config: dict[str, Any], settings: ConversionConfig) -> "Probe | None":
    """Facts at the longest distance that fits; None without a tokenizer, or where neither text nor positions are long enough."""
    from linearize.calibrate import text_rows
    from linearize.modeling.loading import tokenizer_of
    from linearize.scoring import BEFORE, facts_probe

    scoring, room = settings.scoring, 2 * BEFORE
    fitting = [n for n in scoring.distances if n > settings.window and n + room <= config["max_position_embeddings"]]
    if not scoring.fact_rows or not fitting or (tokenizer := tokenizer_of(source.folder)) is None:
        return None
    text = text_rows(source, settings.window, scoring.text, scoring.fact_rows)
    if text is None or text.numel() < max(fitting) + room:
        return None

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    return facts_probe(encode, text.flatten().tolist(), settings.window, max(fitting), scoring.fact_rows)


def make_plan(
    family_name: str,
    config: dict[str, Any],
    settings: ConversionConfig,
    score: Callable[[str], list[list[float]]] | None = None,
) -> Plan:
    """One LayerPlan for every layer of the model; `score` is called where heads are chosen by their scores."""
    layers = config["num_hidden_layers"]
    chosen = chosen_layers(family_name, config, settings)
    kept = softmax_heads(settings.keep_softmax, layers, config["num_key_value_heads"], score, chosen)
    changes: dict[int, dict[str, Any]] = {}
    for spec, changed in settings.layers.items():
        for number in layer_numbers(spec):
            if number >= layers:
                raise ConfigError(f"layers.{spec}: got layer {number}, the model has layers 0 to {layers - 1}")
            changes[number] = changed.model_dump(exclude_none=True)
    every_head = tuple(range(config["num_key_value_heads"]))
    windows = find_family(family_name).sliding_windows(config)
    return Plan(
        family_name,
        tuple(
            LayerPlan(heads, **_fitting(settings.layer_settings(changes.get(i, {})), windows[i]))
            if i in chosen
            else LayerPlan(every_head, native=True)
            for i, heads in enumerate(kept)
        ),
    )


def _fitting(settings: dict[str, Any], sliding_window: int | None) -> dict[str, Any]:
    """A layer's settings; where the family gives it a sliding window, that is its softmax heads' too."""
    return settings if sliding_window is None else settings | {"softmax_window": None}


def chosen_layers(family_name: str, config: dict[str, Any], settings: ConversionConfig) -> tuple[int, ...]:
    """The layers that are converted, ascending. One with a sliding window of its own costs constant memory already."""
    layers = config["num_hidden_layers"]
    if settings.convert_layers == "all":
        return tuple(range(layers))
    if settings.convert_layers == "full":
        windows = find_family(family_name).sliding_windows(config)
        return tuple(i for i, window in enumerate(windows) if window is None)
    chosen = sorted(set(layer_numbers(settings.convert_layers)))
    if chosen[-1] >= layers:
        raise ConfigError(f"convert_layers: got layer {chosen[-1]}, the model has layers 0 to {layers - 1}")
    return tuple(chosen)


def cache_sizes(config: dict[str, Any], plan: Plan, width: int) -> dict[int, dict[str, int]]:
    """Bytes that one sequence's cache takes at each context length, at `width` bytes a cached number."""
    J, K = config["num_key_value_heads"], config["head_dim"]
    branches = _branches(config, plan, device="meta")
    windows = find_family(plan.base_model_type).sliding_windows(config)
    sizes = {}
    for length in CONTEXTS:
        base = student = 0
        for i, layer in enumerate(plan.layers):
            linear = len(layer.linear_heads(J))
            softmax_head = 2 * K * width * (length if windows[i] is None else min(length, windows[i] - 1))
            base += J * softmax_head
            if layer.softmax_window is None:
                student += (J - linear) * softmax_head
            elif linear < J:
                slots = min(layer.softmax_window, length) + layer.sinks
                student += (J - linear) * 2 * K * width * slots + bookkeeping(layer.softmax_window, layer.sinks, length)
            if linear:
                student += linear * _linear_head_bytes(branches[i], K, width, length)
                student += bookkeeping(layer.window, layer.sinks, length)
        sizes[length] = {"base": base, "student": student}
    return sizes


def _linear_head_bytes(branch: "WindowHeads", head_dim: int, width: int, length: int) -> int:
    """Window keys and values, what the recurrent branch waits for, sinks, state."""
    slots = min(branch.window, length)
    waiting = branch.noted_bytes(width) * slots
    return 2 * (slots + branch.sinks) * head_dim * width + waiting + 4 * _product(branch.state_shape())


def bookkeeping(window: int, sinks: int, length: int) -> int:
    """Ordinals of a window's slots, the sinks' slots and the token count, 8 bytes each."""
    return 8 * (min(window, length) + sinks + 1)


def added_parameters(config: dict[str, Any], plan: Plan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that the conversion adds to the checkpoint."""
    return {name: tuple(tensor.shape) for name, tensor in _added_tensors(config, plan, device="meta").items()}


def _added_tensors(config: dict[str, Any], plan: Plan, device: str) -> dict[str, Any]:
    family = find_family(plan.base_model_type)
    return {
        f"{family.decoder_attribute}.layers.{i}.{family.attention_attribute}.mixer.{name}": value
        for i, branch in _branches(config, plan, device).items()
        for name, value in branch.state_dict().items()
    }


def _branches(config: dict[str, Any], plan: Plan, device: str) -> dict[int, "WindowHeads"]:
    """The linear heads of every layer that has some, with their parameters at their first values."""
    import torch

    from linearize.mixers.structure import Site
    from linearize.modeling.branch import linear_heads

    heads, layers = config["num_key_value_heads"], len(plan.layers)
    group = config["num_attention_heads"] // heads
    branches = {}
    with torch.device(device):
        for i, layer in enumerate(plan.layers):
            if linear := layer.linear_heads(heads):
                site = Site(linear, heads, group, config["head_dim"], i, layers)
                branches[i] = linear_heads(layer, site, config["hidden_size"])
    return branches


def checked_model_type(source: Source) -> dict[str, Any]:
    """The base's config.json, if it is of a model that can be converted. Needs no torch."""
    raw = source.read_config()
    model_type = raw.get("model_type")
    if "linearize" in raw or str(model_type).startswith("linearized_"):
        raise UnsupportedModelError(f"{source.name}: is already linearized; convert its base model instead")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{source.name}: is quantised ({method}); convert the original floating-point checkpoint (or a GGUF file, "
            "which is dequantised) and quantise the result"
        )
    if why := reason_to_refuse(raw):
        raise UnsupportedModelError(f"{source.name}: {model_type} cannot be converted: {why}")
    try:
        find_family(str(model_type))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{source.name}: {error}; supported are {', '.join(FAMILIES)}{nearest(str(model_type), FAMILIES)}"
        ) from None
    return raw


def _full_config(source: Source, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the family's defaults filled in."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**raw).to_dict()
        config |= find_family(raw["model_type"]).heads(config)
        find_family(raw["model_type"]).sliding_windows(config)
    except Exception as error:  # strict configs raise their own types for impossible values
        raise CheckpointError(f"{source.folder / 'config.json'}: {' '.join(str(error).split())[:300]}") from None
    _check_heads(source, config)
    return config


def _check_heads(source: Source, config: dict[str, Any]) -> None:
    heads, key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
    where = source.folder / "config.json"
    if not isinstance(heads, int) or not isinstance(key_value_heads, int) or heads < 1 or key_value_heads < 1:
        raise CheckpointError(
            f"{where}: num_attention_heads {heads} and num_key_value_heads {key_value_heads}, allowed "
            "are whole numbers above 0"
        )
    if heads % key_value_heads:
        raise CheckpointError(
            f"{where}: {heads} query heads (num_attention_heads) do not divide over {key_value_heads} key/value heads "
            "(num_key_value_heads)"
        )
    if not config.get("head_dim") or config["head_dim"] % 2:
        raise CheckpointError(f"{where}: head_dim {config.get('head_dim')}, allowed is an even number above 0")


def _check_tensors(source: Source, config: dict, family_name: str, weights: Weights) -> tuple[str, ...]:
    """Holds the checkpoint's names, shapes and dtypes against the family's own model; returns the ignorable names."""
    family = find_family(family_name)
    expected, optional = _expected_tensors(config, family_name)
    found = weights.tensors
    missing = [name for name in expected if name not in found and name not in optional]
    if missing:
        raise CoverageError(f"{source.name}: {len(missing)} tensors are missing, first '{missing[0]}'")
    ignored = tuple(n for n in found if n not in expected and any(re.search(p, n) for p in family.ignorable_tensors))
    unexpected = [name for name in found if name not in expected and name not in ignored]
    if unexpected:
        raise CoverageError(
            f"{source.name}: {len(unexpected)} unexpected tensors, first '{unexpected[0]}'"
            f"{nearest(unexpected[0], expected)}"
        )
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            raise CoverageError(
                f"{source.name}: tensor '{name}' in {found[name].file} has shape {list(found[name].shape)}, config.json "
                f"asks for {list(shape)}"
            )
        if name in found and found[name].dtype not in FLOATING:
            raise UnsupportedModelError(
                f"{source.name}: tensor '{name}' is {found[name].dtype}; convert the original floating-point checkpoint"
            )
    return ignored


def _weights_of_config(source: Source, config: dict[str, Any]) -> Weights:
    """The tensors that a checkpoint with this config.json would hold."""
    shapes, tied = _expected_tensors(config, config["model_type"])
    dtype = {name: code for code, name in PLAIN_DTYPES.items()}[str(config.get("dtype") or "bfloat16")]
    tensors = {
        name: TensorInfo("", 0, dtype, shape, _product(shape) * BITS[dtype] // 8)
        for name, shape in shapes.items()
        if name not in tied
    }
    return Weights(source.folder, tensors, ())


def _expected_tensors(config: dict, family_name: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Names and shapes of the base model's tensors, and those a checkpoint may leave out because they are tied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception as error:  # of every kind: the values are anybody's
        raise CheckpointError(
            f"config.json: transformers cannot build {family_name} from it: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from None
    weights = model.state_dict()
    tied = model.all_tied_weights_keys if config.get("tie_word_embeddings") else {}
    # checkpoints have names of their own: those of mixtures hold every expert apart, GPT-NeoX's head is embed_out
    on_disk, tied_on_disk = (
        revert_weight_conversion(model, part) for part in (weights, {name: weights[name] for name in tied})
    )
    return {name: tuple(value.shape) for name, value in on_disk.items()}, set(tied_on_disk)


def convert(
    model: str,
    settings: ConversionConfig,
    *,
    out: Path | None = None,
    revision: str | None = None,
    link: str = "auto",
    verify: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    merge_adapter: bool = False,
    text_model: bool = False,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Converts `model` into the folder `out` and returns what linearize.json says, with the paths.

    Raises:
        LinearizeError: every foreseen failure, with its exit code. Nothing is left at `out`.
    """
    if out is not None:
        check_target(out, overwrite=overwrite)
    with open_source(
        model, revision=revision, dtype=settings.dtype, merge_adapter=merge_adapter, text_model=text_model
    ) as source:
        if source.kind == "gguf":
            progress(f"{source.name}: GGUF weights dequantised to {settings.dtype}; this is the base from here on")
        if source.read_config().get("auto_map") and not trust_remote_code:
            progress(f"{source.name} brings modelling code of its own, which is not run (--trust-remote-code)")
        checked_model_type(source)
        weights = read_weights(source.folder)
        out = out or default_output(source.name, "converted")
        check_target(out, overwrite=overwrite)
        if link == "copy":
            check_space(out.parent, weights.nbytes)
        with (
            atomic_folder(out, overwrite=overwrite) as folder,
            # the bytes flow while torch and transformers are being imported
            placing({weights.folder / name: folder / name for name in weights.files}, link) as placed,
        ):
            inspection = inspect_source(source, settings, weights, progress, converting=True)
            if experimental := find_family(inspection.plan.base_model_type).experimental:
                progress(f"{source.name}: {inspection.plan.base_model_type} is experimental: {experimental}")
            coverage = inspection.coverage()
            if coverage["heads_planned"] == 0 and settings.keep_softmax != "all":
                raise CoverageError(
                    "nothing to convert: the plan leaves every head as it is"
                    + (
                        "; every layer has a sliding window of its own, --layers all converts them"
                        if all(layer.native for layer in inspection.plan.layers)
                        else ""
                    )
                )
            progress(
                f"{source.name}: {coverage['layers_planned']} of {coverage['layers']} layers, "
                f"{coverage['heads_planned']} of {coverage['heads']} key/value heads become linear"
            )
            manifest = write_checkpoint(folder, inspection, placed, _calibration(inspection, progress))
            if verify:
                progress("verifying in a fresh process: softmax everywhere = base, cached = uncached")
                manifest["verification"] = run_verification(folder, source.folder)
            write_json(folder / "linearize.json", manifest)
    return {"output": str(out.resolve()), **manifest}


def base_runs(weights: Weights) -> bool:
    """Whether the base can be run here in reasonable time: a GPU has room for it, or it is small."""
    import torch

    if torch.cuda.is_available():
        return weights.nbytes < 0.7 * torch.cuda.mem_get_info()[0]
    return weights.nbytes <= CPU_LIMIT


def _calibration(inspection: Inspection, progress: Callable[[str], None]) -> "Calibration | None":
    """Step 4; None where the settings or the machine say no."""
    settings = inspection.settings.calibration
    if settings.when == "never" or not inspection.added:
        if settings.when == "always":
            progress("not calibrated: this conversion adds no parameters")
        return None
    if settings.when == "auto" and not base_runs(inspection.weights):
        progress("not calibrated: the base is too large to be run here (--calibrate insists)")
        return None
    from linearize.calibrate import calibrate, text_rows

    window = max(layer.window for layer in inspection.plan.layers)
    rows = text_rows(inspection.source, window, settings.text, settings.rows)
    if rows is None and settings.when == "auto":
        progress(
            "not calibrated: there is no tokenizer, or rows of text in the model's positions do not leave the window"
        )
        return None
    if rows is None:
        raise ConfigError(
            "calibration: rows of text in the model's positions do not leave the window; use a smaller --window"
        )
    return calibrate(inspection.source, inspection.plan, rows, settings.text, progress)


def write_checkpoint(
    folder: Path, inspection: Inspection, placed: Callable[[], str], calibration: "Calibration | None" = None
) -> dict[str, Any]:
    """Step 5, the base's shards being on their way. Returns the manifest that becomes linearize.json."""
    from linearize.modeling.export import write_portable
    from linearize.report.card import conversion_card

    converted = _assert_coverage(inspection)
    for asset in asset_files(inspection.source.folder):
        (folder / asset).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inspection.source.folder / asset, folder / asset)
    config = student_config(inspection)
    write_json(folder / "config.json", config)
    write_portable(folder, inspection.plan)
    how = placed()
    shard_names = _complete_weights(folder, inspection, calibration)
    manifest = {
        "format_version": 1,
        "kind": "converted",
        "base": inspection.source.describe(),
        "settings": inspection.settings.model_dump(),
        "plan": inspection.plan.to_dict(),
        "plan_fingerprint": fingerprint_of(inspection.plan.to_dict()),
        "coverage": {**inspection.coverage(), **converted},
        "ignored_tensors": list(inspection.ignored),
        "parameters_added": inspection.added_parameters,
        "calibration": None if calibration is None else calibration.to_dict(),
        "state_bytes": inspection.state_bytes,
        "vocabulary": inspection.config["vocab_size"],
        "cache_bytes": {str(length): sizes for length, sizes in inspection.cache_bytes.items()},
        "weights": {"placed": how, "files": shard_names, "bytes": inspection.weights.nbytes},
        "sha256": {name: sha256(folder / name) for name in ("config.json", INDEX) if (folder / name).is_file()},
        "versions": versions(),
    }
    write_text(folder / "README.md", conversion_card(manifest, inspection.source.folder))
    write_json(folder / "linearize.json", manifest)
    return manifest


def student_config(inspection: Inspection) -> dict[str, Any]:
    """The base's config.json, word for word, with the linearized architecture and the plan on top."""
    from linearize.modeling.export import auto_map, class_names

    config = inspection.source.read_config()
    family = inspection.plan.base_model_type
    config.pop("auto_map", None)
    config["model_type"] = f"linearized_{family}"
    config["architectures"] = [class_names(family)["causal_lm"]]
    config["auto_map"] = auto_map(family)
    config["linearize"] = inspection.plan.to_dict()
    return config


def _complete_weights(folder: Path, inspection: Inspection, calibration: "Calibration | None") -> list[str]:
    """Writes the added parameters and the index beside the base's shards; returns all weight files."""
    weights = inspection.weights
    names = dict.fromkeys(weights.files)
    if weights.files == (SINGLE,) and inspection.added:
        # readers take a lone model.safetensors for the whole model, so beside a second file it needs a shard's name
        names = {SINGLE: "model-00001-of-00002.safetensors"}
        (folder / SINGLE).rename(folder / names[SINGLE])
    weight_map = {name: names[info.file] or info.file for name, info in weights.tensors.items()}
    files = [new or old for old, new in names.items()]
    if inspection.added:
        added_file = "model-00002-of-00002.safetensors" if len(files) == 1 else "model-mixer.safetensors"
        _write_added(folder / added_file, inspection, calibration)
        weight_map.update(dict.fromkeys(inspection.added, added_file))
        files.append(added_file)
    if files != [SINGLE]:
        total = sum(info.nbytes for info in weights.tensors.values()) + 4 * inspection.added_parameters
        parameters = sum(_product(info.shape) for info in weights.tensors.values()) + inspection.added_parameters
        metadata = {"total_parameters": parameters, "total_size": total}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return files


def _write_added(path: Path, inspection: Inspection, calibration: "Calibration | None") -> None:
    from safetensors.torch import save_file

    tensors = _added_tensors(inspection.config, inspection.plan, device="cpu")
    if calibration is not None:
        assert calibration.tensors.keys() == tensors.keys()
        tensors = calibration.tensors
    save_file(tensors, path, metadata={"format": "pt"})


def _assert_coverage(inspection: Inspection) -> dict[str, int]:
    """Builds the student without weights and counts what became linear; it must be exactly what was planned."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from linearize.modeling.factory import linearized_classes

    classes = linearized_classes(find_family(inspection.plan.base_model_type))
    config = {**inspection.config, "linearize": inspection.plan.to_dict()}
    config.pop("model_type")
    with torch.device("meta"):
        student = classes.causal_lm(classes.config.from_dict(config))
    attentions = [module for _, module in student.linear_attentions()]
    converted = {
        "layers_converted": sum(1 for module in attentions if module.linear_heads),
        "heads_converted": sum(len(module.linear_heads) for module in attentions),
    }
    planned = inspection.coverage()
    if (planned["layers_planned"], planned["heads_planned"]) != tuple(converted.values()):
        raise CoverageError(
            f"planned {planned['layers_planned']} layers and {planned['heads_planned']} heads, converted "
            f"{converted['layers_converted']} and {converted['heads_converted']}"
        )
    names = set(revert_weight_conversion(student, student.state_dict()))
    base_names, _ = _expected_tensors(inspection.config, inspection.plan.base_model_type)
    if names != set(base_names) | set(inspection.added):
        odd = sorted(names ^ (set(base_names) | set(inspection.added)))
        raise CoverageError(f"the student's tensors differ from base and additions, first '{odd[0]}'")
    return converted


def run_verification(folder: Path, base: Path) -> dict[str, Any]:
    """Step 5: `python -m linearize.verify` on the written folder; its JSON, or an error that says what differs."""
    command = [sys.executable, "-m", "linearize.verify", str(folder), str(base)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        result = json.loads(run.stdout)
    except ValueError:
        tail = " | ".join(run.stderr.strip().splitlines()[-3:])
        raise CheckpointError(f"verification could not run (exit code {run.returncode}): {tail}") from None
    if "failure" in result:
        raise CheckpointError(f"verification failed: {result['failure']}")
    return result


def default_output(name: str, suffix: str) -> Path:
    """`linearized/<model>-<suffix>`, under the current folder."""
    stem = re.sub(r"[^\w.-]+", "-", name.split("/")[-1])
    return OUTPUT_ROOT / f"{stem}-{suffix}"


def newest_output() -> Path:
    """The most recently written checkpoint under ./linearized/."""
    found = [path.parent for path in OUTPUT_ROOT.glob("*/linearize.json") if not path.parent.name.startswith(".")]
    if not found:
        raise ConfigError("MODEL: none given and none found under ./linearized/; run `linearize convert MODEL` first")
    return max(found, key=lambda folder: (folder / "linearize.json").stat().st_mtime_ns)


def versions() -> dict[str, str]:
    """Python's and the packages' versions, for the record."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _product(shape) -> int:
    result = 1
    for n in shape:
        result *= n
    return result
