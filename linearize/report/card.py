"""Render the model card (README.md) of a written checkpoint from its manifest, and add an evaluation to it."""

import re
import urllib.parse
from pathlib import Path
from typing import Any

import yaml

from linearize.checkpoint.manifest import BaseRecord, Manifest
from linearize.checkpoint.writing import write_text
from linearize.plan import NO_BRANCH, LayerPlan
from linearize.report.markdown import plain, summary_table, table
from linearize.report.results import STUDENT, Results
from linearize.report.tables import QUALITY_COLUMNS, cache_rows, quality_rows

# what encloses the section of an evaluation, so that the next evaluation can replace it
BEGIN, END = "<!-- linearize eval -->", "<!-- end of linearize eval -->"
FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?\r?\n|)---[ \t]*\r?\n", re.DOTALL)
# characters that are read of a base's card, and those that the name of a licence has at most
CARD_CHARACTERS, LONGEST_LICENCE = 1 << 16, 100


def conversion_card(manifest: Manifest, base_folder: Path) -> str:
    """Return the card of a converted or finetuned checkpoint, with the licence that the base's card states."""
    base, coverage, name = manifest.base, manifest.coverage, manifest.base.name
    weights = "unchanged" if manifest.finetune is None else "merged with LoRA"
    changed = [layer for layer in manifest.plan.layers if len(layer.softmax_heads) < coverage.heads_per_layer]
    added, softmax_window = manifest.parameters_added, manifest.settings.softmax_window
    other_heads = f" The other heads see {softmax_window:,} keys and the sinks." if softmax_window else ""
    front = yaml.safe_dump(_metadata(base, base_folder), sort_keys=False, allow_unicode=True)
    return f"""---
{front}---

# {plain(name)}, linearized

{_link(base)} with softmax attention replaced in {coverage.heads_converted} of {coverage.heads} key/value
heads by {_replacement(changed)}.{other_heads} Base weights are {weights}; {added:,} parameters were added.
{_calibration_note(manifest)}{_recovery_note(manifest)}
{_cache_table(manifest.cache_bytes)}
{_quality_note(manifest)}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)  # or `import linearize` first
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

`linearize eval PATH` measures it beside its base model.
"""


def _replacement(layers: list[LayerPlan]) -> str:
    """Describe what replaces softmax, once for every kind among the layers."""
    kinds: dict[str, None] = {}
    for layer in layers:
        parts = [f"a window of {layer.window} keys", f"{layer.sinks} sinks"]
        if layer.mixer != NO_BRANCH:
            parts.append(f"a recurrent branch ({layer.mixer}, mixed by `{layer.mix}`)")
        kinds[f"{', '.join(parts[:-1])} and {parts[-1]}"] = None
    return "; elsewhere ".join(kinds) or "nothing"


def _calibration_note(manifest: Manifest) -> str:
    """Say what the added parameters were fitted on and how well; empty for a checkpoint without calibration."""
    calibration = manifest.calibration
    if calibration is None or not calibration.attention_error:
        return ""
    # of every layer: the error of window + sinks, and that of the fit
    errors = calibration.attention_error.values()
    window_error, error = (sum(pair[i] for pair in errors) / len(errors) for i in (0, 1))
    return (
        f"\nThe added parameters were fitted to the base's attention on rows of {calibration.tokens:,} tokens, from "
        f"{plain(calibration.text)} and random ones copied; on two rows held out the relative square error beyond "
        f"the window is {error:.3f} (window + sinks: {window_error:.3f}).\n"
    )


def _recovery_note(manifest: Manifest) -> str:
    """Say how the checkpoint was finetuned; empty if it was not."""
    if (training := manifest.finetune) is None:
        return ""
    data, losses = ", ".join(training.recipe.data), ", then ".join(training.recipe.loss_kinds())
    return (
        f"\nRecovered with recipe {plain(training.recipe_name)} on {training.tokens:,} tokens of {plain(data)} "
        f"(loss {losses}).\n"
    )


def _quality_note(manifest: Manifest) -> str:
    """Say what was measured while the heads were chosen; empty if nothing was."""
    if (quality := manifest.quality) is None:
        return ""
    _, rows = quality_rows(quality)
    verdict = "This model holds that." if quality.holds else f"This model does not: {plain('; '.join(quality.lost))}."
    return (
        f"\nHeads keep softmax so that {quality.target:.0%} of the base's look-ups beyond the window are held, and KL "
        f"from the base on text is at most {quality.divergence_limit:g}, on {quality.tokens:,} tokens that no head was "
        f"chosen on. {verdict}\n\n{table(QUALITY_COLUMNS, rows)}\n"
    )


def _cache_table(sizes: dict[str, Any]) -> str:
    _, rows = cache_rows(sizes)
    return table(["context", "base cache, MiB", "this model's cache, MiB", "ratio"], rows)


def add_evaluation(card: Path, results: Results) -> str | None:
    """Write an evaluation into a card: a section of its own, and the student's metrics as `model-index` metadata.

    The section of an earlier evaluation is replaced. The rest of the card stays as it is.

    Returns:
        Why the card was left alone; None if it was not.
    """
    try:
        text = card.read_text(encoding="utf-8")
        match = FRONT_MATTER.match(text)
        metadata = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return f"{card} is left alone: it is not UTF-8, or its front matter is not YAML"
    if not isinstance(metadata, dict) or not text.strip():
        return f"{card} is left alone: it is empty, or its front matter is not a mapping"
    body = text[match.end() :] if match else text
    metadata["model-index"] = model_index(results)
    section = f"{BEGIN}\n## Evaluation\n\nVerdict: {plain(results.verdict)}.\n\n{summary_table(results)}\n{END}\n"
    before, begin, rest = body.partition(BEGIN)
    earlier, end, after = rest.partition(END)
    if begin:
        body = before + section + (after.removeprefix("\r").removeprefix("\n") if end else earlier)
    else:
        body = body.rstrip() + "\n\n" + section
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    write_text(card, f"---\n{front}---\n{body}")
    return None


def model_index(results: Results) -> list[dict[str, Any]]:
    """Return the student's metrics in the form of the hub's model cards."""
    metrics = [
        {"type": metric.name.partition("@")[0], "name": metric.name, "value": round(metric.values[STUDENT].mean, 6)}
        for metric in results.metrics
        if STUDENT in metric.values
    ]
    return [
        {
            "name": results.model,
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"type": "text", "name": results.data["text"]},
                    "metrics": metrics,
                }
            ],
        }
    ]


def _metadata(base: BaseRecord, base_folder: Path) -> dict[str, Any]:
    """Return the front matter."""
    metadata: dict[str, Any] = {"base_model": base.reference if base.kind == "hub" else base.name}
    if (licence := _licence(base_folder / "README.md")) is not None:
        metadata = {"license": licence, **metadata}
    more = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linearize", "linear-attention"],
    }
    return metadata | more


def _licence(card: Path) -> str | None:
    """Return the licence that a card states in its front matter; None if it states none that can be read."""
    if not card.is_file():
        return None
    with open(card, encoding="utf-8", errors="replace") as file:
        match = FRONT_MATTER.match(file.read(CARD_CHARACTERS))
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except (ValueError, RecursionError, yaml.YAMLError):
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) and licence.isprintable() and len(licence) < LONGEST_LICENCE else None


def _link(base: BaseRecord) -> str:
    """Return the base's name, as a link if it is on the hub."""
    name = plain(base.name)
    return f"[{name}](https://huggingface.co/{urllib.parse.quote(base.reference)})" if base.kind == "hub" else name
