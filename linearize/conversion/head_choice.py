"""Choose the heads that keep softmax by running the base: on copies, made-up facts and long text.

The probes are in linearize/conversion/probes.py, the scores in scoring.py. keep_softmax.py reads `--keep-softmax` and
takes the heads that score best.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from linearize.checkpoint.fingerprint import tokenizer_fingerprint
from linearize.checkpoint.result_cache import cached_on_disk, unfinished_folder
from linearize.checkpoint.source import Source
from linearize.checkpoint.student import read_tokenizer
from linearize.conversion.keep_softmax import HeadScores, scored_share, share_count
from linearize.conversion.look_ups import TEXT_BEFORE
from linearize.conversion.probes import Probe, copies_probe, require_distances, text_look_ups_probe, text_probe
from linearize.conversion.scoring import combined, eliminate, head_scores
from linearize.data.documents import data_fingerprint
from linearize.data.text_rows import text_rows, text_tokens
from linearize.device import compute_dtype, pick_device
from linearize.errors import ConfigError
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.loading import open_base
from linearize.progress import doing
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
    layers, heads = request.config["num_hidden_layers"], request.config["num_key_value_heads"]

    def parse(stored: HeadScores) -> HeadScores:
        scores = [[float(score) for score in row] for row in stored]
        if [len(row) for row in scores] != [heads] * layers:
            raise ValueError("scores of another shape")
        return scores

    return cached_on_disk("scores", _cache_key(request), lambda: _compute_scores(request), parse=parse)


def _cache_key(request: ScoreRequest) -> dict[str, Any]:
    """Return everything that decides the scores."""
    scoring = request.settings.scoring
    key = {
        "base": request.source.fingerprint(),
        "by": request.by,
        **request.reach,
        **scoring.model_dump(),
        "softmax_window": request.settings.softmax_window,
        "layers": list(request.layers),
        "data": [data_fingerprint([scoring.text]), tokenizer_fingerprint(read_tokenizer(request.source.folder))],
        "precision": str(compute_dtype("auto")),
    }
    return key | {"keep": request.count} if scoring.method == "elimination" else key


def _compute_scores(request: ScoreRequest) -> HeadScores:
    """Run the base over the probes."""
    method = request.settings.scoring.method
    # elimination starts from the gradient's scores
    first = base_head_scores(request.with_method("gradient")) if method == "elimination" else []
    request.progress(f"{request.source.name}: scoring key/value heads by {request.by} ({method})")
    with doing(f"scoring heads by {request.by}"):
        return _run_base(request, first)


def _run_base(request: ScoreRequest, first: HeadScores) -> HeadScores:
    """Run the base; `first` are the scores that elimination starts from."""
    method, progress, layers = request.settings.scoring.method, request.progress, request.layers
    unfinished = unfinished_folder("scores", _cache_key(request))
    stream = open_base(request.source, dtype=compute_dtype("auto"), device=pick_device(), unfinished=unfinished)
    groups = _probe_groups(request, stream)
    if method == "elimination":
        return eliminate(stream, groups, first, request.count, layers=layers, progress=progress, **request.reach)
    scores = [
        head_scores(stream, probes, method=method, layers=layers, progress=progress, **request.reach)
        for probes in groups
    ]
    return combined(*scores) if len(scores) > 1 else scores[0]


def _probe_groups(request: ScoreRequest, stream: LayerStream) -> list[list[Probe]]:
    """Build the probes: for recall look-ups in text, or copies without a tokenizer; for text long text; or both.

    Returns:
        Groups of probes. Every group counts the same.

    Raises:
        ConfigError: there is no text to score, or no distance fits the model.
    """
    source, config, settings = request.source, request.config, request.settings
    scoring, groups = settings.scoring, []
    if request.by != "text":
        positions = min(config["max_position_embeddings"], settings.softmax_window or math.inf)
        distances = require_distances(scoring.distances, settings.window, int(positions))
        probe = _look_ups(request, distances)
        start_token = config.get("bos_token_id")
        groups.append([probe or copies_probe(distances, scoring.rows, config["vocab_size"], start_token)])
    if request.by != "recall":
        if (rows := text_rows(source, settings.window, scoring.text, scoring.text_rows)) is None:
            raise ConfigError(
                f"keep_softmax: no text can be scored: without a tokenizer, or since rows of {scoring.text} in the "
                f"model's positions do not leave the window of {settings.window}"
            )
        groups.append([text_probe(stream, rows, **request.reach)])
    return groups


def _look_ups(request: ScoreRequest, distances: tuple[int, ...]) -> Probe | None:
    """Build the probe of look-ups in text; None without a tokenizer, or if the text is too short."""
    scoring, window = request.settings.scoring, request.settings.window
    if (tokenizer := read_tokenizer(request.source.folder)) is None:
        return None
    text = text_tokens(tokenizer, scoring.text, scoring.rows * (max(distances) + TEXT_BEFORE))

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    return text_look_ups_probe(encode, text, window, distances, scoring.rows, request.config["vocab_size"])
