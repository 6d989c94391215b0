"""Head scores of checkpoints that have been scored before: files under configs/, found by the model's fingerprint.

`linearize scores MODEL` writes such a file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.json_file import read_json
from linearize.checkpoint.source import Source
from linearize.checkpoint.weights import read_weights, sampled_tensors
from linearize.conversion.keep_softmax import HeadScores
from linearize.errors import CheckpointError, ConfigError, one_line
from linearize.settings.config import ConversionConfig
from linearize.settings.loading import packaged_folder

FORMAT_VERSION = 1
SUFFIX = ".scores.json"


@dataclass(frozen=True)
class KnownScores:
    """The scores of one checkpoint.

    Attributes:
        name: the file's name.
        scores: [layers][key/value heads].
        document: the whole file.
    """

    name: str
    scores: HeadScores
    document: dict[str, Any]

    def found(self, settings: ConversionConfig) -> tuple[int, int] | None:
        """Return the softmax heads and the window that a search with the same settings chose; None after others."""
        found = self.document.get("found")
        if not found or found["settings"] != deciding_settings(settings):
            return None
        return found["softmax_heads"], found["window"]


def known_scores(source: Source, settings: ConversionConfig) -> KnownScores | None:
    """Return the scores that the package has for a checkpoint with these settings; None if it has none."""
    paths = sorted(packaged_folder("configs").glob(f"*{SUFFIX}"))
    if not paths or settings.softmax_window is not None:  # heads that see less are scored at other distances
        return None
    fingerprint = weights_fingerprint(source)
    for path in paths:
        document = read_scores(path)
        if fingerprint == document["fingerprint"] and document["scoring"] == scoring_settings(settings):
            return KnownScores(path.name, document["scores"], document)
    return None


def weights_fingerprint(source: Source) -> str:
    """Return a digest of a model's shape and weights, however they are distributed over files."""
    config = source.read_config()
    shape = [config.get(name) for name in ("model_type", "num_hidden_layers", "num_attention_heads")]
    files = read_weights(source.folder).files
    tensors = sorted(pieces for file in files for pieces in sampled_tensors(source.folder / file))
    return sha256([json.dumps(shape).encode(), *(piece for pieces in tensors for piece in pieces)])


def read_scores(path: Path) -> dict[str, Any]:
    """Read a file of scores.

    Raises:
        ConfigError: it is damaged, or of another version.
    """
    try:
        document = read_json(path)
        version = document["format_version"]
    except (CheckpointError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a file of head scores ({one_line(error)})") from None
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path}: has format_version {version}, this version of linearize reads {FORMAT_VERSION}")
    return document


def scoring_settings(settings: ConversionConfig) -> dict[str, Any]:
    """Return the settings that decide a model's head scores by recall."""
    return {
        "window": settings.window,
        "sinks": settings.sinks,
        "convert_layers": settings.convert_layers,
        **settings.scoring.model_dump(),
    }


def deciding_settings(settings: ConversionConfig) -> dict[str, Any]:
    """Return the settings that decide how many heads keep softmax, besides those of the scores."""
    names = {"mixer", "mixer_options", "mix", "mix_options", "gate", "quality", "calibration"}
    deciding = settings.model_dump(include=names, mode="json")
    for limit in ("budget", "cache_budget"):
        deciding["quality"].pop(limit)
    return deciding


def scores_document(
    source: Source, settings: ConversionConfig, scores: HeadScores, heads: int, window: int
) -> dict[str, Any]:
    """Return the content of a file of scores.

    Args:
        heads, window: softmax heads and window that the search found.
    """
    from linearize.device import versions

    return {
        "format_version": FORMAT_VERSION,
        "model": source.name,
        "fingerprint": weights_fingerprint(source),
        "scoring": scoring_settings(settings),
        "scores": [[float(f"{score:.4g}") for score in row] for row in scores],
        "found": {"softmax_heads": heads, "window": window, "settings": deciding_settings(settings)},
        "versions": versions(),
    }
