"""Score the heads of a model, and write a file of scores that later conversions of this model find."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.checkpoint.open import open_source
from linearize.checkpoint.writing import write_json
from linearize.conversion.inspection import inspect_source
from linearize.conversion.known_scores import SUFFIX, scores_document
from linearize.errors import ConfigError
from linearize.settings.config import ConversionConfig


def write_scores(
    model: str,
    settings: ConversionConfig,
    out: Path | None = None,
    *,
    progress: Callable[[str], None] = print,
    **source_options: Any,
) -> tuple[Path, dict[str, Any]]:
    """Score a model, search for the number of softmax heads, and write both.

    Args:
        settings: with `keep_softmax: auto`.
        out: the file; by default NAME.scores.json in the current folder.
        source_options: further arguments of `open_source`.

    Returns:
        The file, and its content.

    Raises:
        LinearizeError: the model cannot be converted or measured.
    """
    if out is not None and not out.name.endswith(SUFFIX):
        raise ConfigError(f"--out: got '{out}', allowed is a name that ends in {SUFFIX}")
    with open_source(model, dtype=settings.dtype, **source_options) as source:
        inspection = inspect_source(source, settings, progress=progress, converting=True)
        choice = inspection.choice
        if choice is None or choice.quality is None:
            raise ConfigError(f"{source.name}: no layer is converted, so that there is nothing to score")
        chosen = choice.quality["chosen"]
        document = scores_document(source, settings, choice.scores, chosen["softmax_heads"], chosen["window"])
        path = out or Path(f"{source.name.replace('/', '--')}{SUFFIX}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)
    return path.resolve(), document
