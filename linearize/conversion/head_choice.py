"""Choose the heads that keep softmax by running the base: on copies, made-up facts and long text.

The probes are in linearize/conversion/probes.py, the scores in scoring.py. keep_softmax.py reads `--keep-softmax` and
takes the heads that score best.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from linearize.checkpoint.fingerprint import tokenizer_fingerprint
from linearize.checkpoint.result_cache import cached_on_disk
from linearize.checkpoint.source import Source
from linearize.checkpoint.student import read_tokenizer
from linearize.conversion.keep_softmax import HeadScores, scored_share, share_count
from linearize.conversion.probes import TEXT_BEFORE_FACTS, Probe, facts_probe, recall_probes, text_probe
from linearize.conversion.scoring import answers, combined, eliminate, head_scores
from linearize.data.documents import data_fingerprint
from linearize.data.text_rows import text_rows
from linearize.device import compute_dtype, pick_device
from linearize.errors import ConfigError
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.loading import open_base
from linearize.settings.config import ConversionConfig


@dataclass(frozen=True)
class ScoreRequest:
    """Scores to compute.

    Attributes:
        config: the base's config, with every default filled in.
        by: "recall", "text" or "both".
        layers: layers whose heads are scored, ascending.
        progress: receives one line of text at a time.
    """

    source: Source
    config: dict[str, Any]
    settings: ConversionConfig
    by: str
    layers: tuple[int, ...]
    progress: Callable[[str], None]

    @property
    def reach(self) -> dict[str, int]:
        """Return window and sinks of a linear head, as the scoring functions take them."""
        return {"window": self.settings.window, "sinks": self.settings.sinks}

    @property
    def count(self) -> int:
        """Return the number of heads that keep softmax in the end."""
        share = scored_share(self.settings.keep_softmax)[1]
        return share_count(share, len(self.layers) * self.config["num_key_value_heads"])

    def with_method(self, method: str) -> "ScoreRequest":
        """Return the same request with another scoring method."""
        scoring = self.settings.scoring.model_copy(update={"method": method})
        return replace(self, settings=self.settings.model_copy(update={"scoring": scoring}))


def base_head_scores(request: ScoreRequest) -> HeadScores:
    """Run the base and return its heads' scores. They are cached on disk for the next conversion of this base."""
    if not request.layers:  # no choice to make; a plan that converts nothing is refused later, where heads are counted
        return [[0.0] * request.config["num_key_value_heads"]] * request.config["num_hidden_layers"]
    if request.by == "both" and request.settings.scoring.method != "elimination":
        return combined(*(base_head_scores(replace(request, by=part)) for part in ("recall", "text")))
    return cached_on_disk("scores", _cache_key(request), lambda: _compute_scores(request))


def _cache_key(request: ScoreRequest) -> dict[str, Any]:
    """Return everything that decides the scores."""
    scoring = request.settings.scoring
    key = {
        "base": request.source.fingerprint(),
        "by": request.by,
        **request.reach,
        **scoring.model_dump(),
        "layers": list(request.layers),
        "data": [data_fingerprint([scoring.text]), tokenizer_fingerprint(read_tokenizer(request.source.folder))],
        "precision": str(compute_dtype("auto")),
    }
    return key | {"keep": request.count} if scoring.method == "elimination" else key


def _compute_scores(request: ScoreRequest) -> HeadScores:
    """Run the base over the probes."""
    method, progress, layers = request.settings.scoring.method, request.progress, request.layers
    # elimination starts from the gradient's scores
    first = base_head_scores(request.with_method("gradient")) if method == "elimination" else []
    progress(f"{request.source.name}: scoring key/value heads by {request.by} ({method})")
    stream = open_base(request.source, dtype=compute_dtype("auto"), device=pick_device())
    groups = _probe_groups(request, stream)
    if method == "elimination":
        return eliminate(stream, groups, first, request.count, layers=layers, progress=progress, **request.reach)
    scores = [
        head_scores(stream, probes, method=method, layers=layers, progress=progress, **request.reach)
        for probes in groups
    ]
    return combined(*scores) if len(scores) > 1 else scores[0]


def _probe_groups(request: ScoreRequest, stream: LayerStream) -> list[list[Probe]]:
    """Build the probes: for recall copies, and facts if the base answers them; for text long text; for both all three.

    Returns:
        Groups of probes. Every group counts the same.

    Raises:
        ConfigError: there is no text to score, or no distance fits the model.
    """
    source, config, settings = request.source, request.config, request.settings
    scoring, groups = settings.scoring, []
    if request.by != "text":
        copies = recall_probes(
            scoring.distances,
            scoring.rows,
            window=settings.window,
            positions=config["max_position_embeddings"],
            vocabulary=config["vocab_size"],
            start_token=config.get("bos_token_id"),
        )
        groups.append(copies)
        facts = _facts(request)
        if facts is not None and answers(stream, facts, **request.reach):
            groups.append([facts])
        elif facts is not None:
            request.progress(f"{source.name}: the base does not answer {facts.name}; heads are scored by copies alone")
    if request.by != "recall":
        if (rows := text_rows(source, settings.window, scoring.text, scoring.text_rows)) is None:
            raise ConfigError(
                f"keep_softmax: no text can be scored: without a tokenizer, or since rows of {scoring.text} in the "
                f"model's positions do not leave the window of {settings.window}"
            )
        groups.append([text_probe(stream, rows, **request.reach)])
    return groups


def _facts(request: ScoreRequest) -> Probe | None:
    """Build the probe of facts at the longest distance that fits.

    Returns:
        None without a tokenizer, or if the text or the model's positions are too short.
    """
    scoring, window = request.settings.scoring, request.settings.window
    room = 2 * TEXT_BEFORE_FACTS
    positions = request.config["max_position_embeddings"]
    fitting = [distance for distance in scoring.distances if distance > window and distance + room <= positions]
    if not scoring.fact_rows or not fitting or (tokenizer := read_tokenizer(request.source.folder)) is None:
        return None
    text = text_rows(request.source, window, scoring.text, scoring.fact_rows)
    if text is None or text.numel() < max(fitting) + room:
        return None

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    return facts_probe(encode, text.flatten().tolist(), window, max(fitting), scoring.fact_rows)
