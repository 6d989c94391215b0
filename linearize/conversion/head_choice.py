"""Which key/value heads keep softmax, where running the base decides: its copies, its facts, its long text.

linearize/conversion/scoring.py computes the scores; keep_softmax.py reads `--keep-softmax` and takes the best.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.fingerprint import tokenizer_fingerprint
from linearize.checkpoint.result_cache import cached_on_disk
from linearize.checkpoint.source import Source
from linearize.checkpoint.weights import Weights
from linearize.conversion.keep_softmax import kept_count, scored_share
from linearize.device import can_run_base
from linearize.errors import ConfigError
from linearize.settings.config import ConversionConfig

if TYPE_CHECKING:
    from linearize.conversion.probes import Probe

# `keep_softmax` unless something else is asked for
AUTO, AUTO_KEPT = "auto", "recall:12.5%"


def with_kept_heads(
    source: Source, config: dict, settings: ConversionConfig, weights: Weights, progress: Callable, converting: bool
) -> ConversionConfig:
    """The settings with `keep_softmax: auto` decided: heads chosen by recall where the base can be run, none elsewhere."""
    if settings.keep_softmax != AUTO:
        return settings
    from linearize.conversion.probes import fitting_distances

    usable = fitting_distances(tuple(settings.scoring.distances), settings.window, config["max_position_embeddings"])
    keep = AUTO_KEPT if usable and can_run_base(weights.nbytes) else "none"
    if keep != "none" and not converting:
        progress(
            f"{source.name}: convert keeps softmax in {keep} of the heads (--keep-softmax {keep} shows which); here: none"
        )
        keep = "none"
    elif keep == "none":
        progress(f"{source.name}: no head keeps softmax, since the base cannot be scored here (--keep-softmax chooses)")
    return settings.model_copy(update={"keep_softmax": keep})


def base_head_scores(
    source: Source,
    config: dict[str, Any],
    settings: ConversionConfig,
    by: str,
    layers: tuple[int, ...],
    progress: Callable[[str], None],
) -> list[list[float]]:
    """What recall or long text loses with each head, from running the base; kept for its next conversion."""
    from linearize.checkpoint.student import read_tokenizer
    from linearize.conversion.scoring import combined, eliminate, head_scores
    from linearize.data.documents import data_fingerprint
    from linearize.device import compute_dtype, pick_device
    from linearize.modeling.loading import load_base

    if not layers:  # nothing to choose from; what then converts nothing is refused where heads are counted
        return [[0.0] * config["num_key_value_heads"]] * config["num_hidden_layers"]
    scoring, reach = settings.scoring, {"window": settings.window, "sinks": settings.sinks}
    key = {"base": source.fingerprint(), "by": by, **reach, **scoring.model_dump(), "layers": list(layers)}
    key["data"] = [data_fingerprint([scoring.text]), tokenizer_fingerprint(read_tokenizer(source.folder))]
    key["precision"] = str(compute_dtype("auto"))
    first: list[list[float]] = []
    if eliminating := scoring.method == "elimination":
        keep = kept_count(scored_share(settings.keep_softmax)[1], len(layers) * config["num_key_value_heads"])
        key["keep"] = keep
        by_gradient = settings.model_copy(update={"scoring": scoring.model_copy(update={"method": "gradient"})})
        first = base_head_scores(source, config, by_gradient, by, layers, progress)
    elif by == "both":
        return combined(
            *(base_head_scores(source, config, settings, part, layers, progress) for part in ("recall", "text"))
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

    return cached_on_disk("scores", key, compute)


def _probe_groups(
    source: Source, config: dict[str, Any], settings: ConversionConfig, by: str, model, progress: Callable[[str], None]
) -> "list[list[Probe]]":
    """What the base is asked: copies, and facts where it answers them, for `recall`; long text for `text`; all for `both`."""
    from linearize.conversion.probes import recall_probes, text_probe
    from linearize.conversion.scoring import answers
    from linearize.data.text_rows import text_rows

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
    from linearize.checkpoint.student import read_tokenizer
    from linearize.conversion.probes import BEFORE, facts_probe
    from linearize.data.text_rows import text_rows

    scoring, room = settings.scoring, 2 * BEFORE
    fitting = [n for n in scoring.distances if n > settings.window and n + room <= config["max_position_embeddings"]]
    if not scoring.fact_rows or not fitting or (tokenizer := read_tokenizer(source.folder)) is None:
        return None
    text = text_rows(source, settings.window, scoring.text, scoring.fact_rows)
    if text is None or text.numel() < max(fitting) + room:
        return None

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    return facts_probe(encode, text.flatten().tolist(), settings.window, max(fitting), scoring.fact_rows)
