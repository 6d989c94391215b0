"""Define linearize.json, the record that a conversion and a finetune leave in the checkpoint they write.

The schema names every key that the package reads. A file may hold more: files of one format version differ in keys that
nothing reads. A `Manifest` also keeps the document as it was read, so that a finetune writes the unknown keys again.
"""

import copy
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PrivateAttr, ValidationError, model_validator

from linearize.checkpoint.json_file import read_json
from linearize.checkpoint.names import MANIFEST
from linearize.errors import CheckpointError
from linearize.mixers.registry import require_known
from linearize.plan import Plan

MANIFEST_VERSION = 1
# counts that a model can have
Count = Annotated[int, Field(ge=0, lt=2**63)]
PositiveCount = Annotated[int, Field(ge=1, lt=2**63)]


class Section(BaseModel):
    """A part of linearize.json: read-only, with the types of JSON, tolerant of keys it does not know."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class BaseRecord(Section):
    """The base model of a conversion (`Source.describe`)."""

    reference: str
    kind: str
    name: str
    revision: str | None
    fingerprint: str


class CalibrationSettingsRecord(Section):
    """The settings that decided what the added parameters were calibrated on."""

    text: str
    rows: int


class SettingsRecord(Section):
    """The settings of a conversion that later commands read; the document holds all of them."""

    window: Count
    sinks: Count
    mix: str
    dtype: Literal["float32", "bfloat16", "float16"]
    softmax_window: int | None = None
    # absent before calibration existed
    calibration: CalibrationSettingsRecord | None = None


class Coverage(Section):
    """Counts of layers and key/value heads: in the model, planned to become linear, and converted."""

    layers: PositiveCount
    layers_planned: Count
    heads: PositiveCount
    heads_planned: Count
    layers_converted: Count
    heads_converted: Count

    @property
    def heads_per_layer(self) -> int:
        """Return the number of key/value heads in one layer."""
        return self.heads // self.layers


class CalibrationRecord(Section):
    """The outcome of calibration (linearize/conversion/calibrate.py).

    `attention_error` maps a layer to its relative square error beyond the window: of window + sinks, and as fitted.
    """

    text: str
    rows: Count
    tokens: Count
    attention_error: dict[str, tuple[float, float]]
    part: float | None = None
    divergence: tuple[float, float] | None = None


class TrialRecord(Section):
    """One conversion that was measured (linearize/conversion/trials.py).

    `cache` maps a context length to the cache as a share of the base's, `held` a group of look-ups to the shares of the
    base's "hits" and "nats" that are held.
    """

    softmax_heads: int
    window: int
    cache: dict[str, float]
    holds: bool
    held: dict[str, dict[str, float]]
    divergence: float | None


class QualityRecord(Section):
    """The measured loss of a conversion: `lost` names it in words, `curve` has every conversion that was tried."""

    target: float
    divergence_limit: float
    holds: bool
    lost: tuple[str, ...]
    tokens: int
    chosen: TrialRecord
    curve: tuple[TrialRecord, ...]


class WeightsRecord(Section):
    """The weight files of a conversion, how the base's bytes got there, and the base's size in bytes."""

    placed: str
    files: tuple[str, ...]
    bytes: int


class VerificationRecord(Section):
    """The outcome of verification (linearize/conversion/verify.py)."""

    tokens: int
    tensors_finite: int
    softmax_everywhere_max_difference: float
    cached_decode_max_difference: float
    padded_max_difference: float | None = None


class TrainedLoss(Section):
    """The loss of a recipe or of one of its stages."""

    kind: str = "kl"


class TrainedStage(Section):
    """A stage of the recipe that a checkpoint was trained by."""

    loss: TrainedLoss = TrainedLoss()


class TrainedRecipe(Section):
    """The keys of a recipe that cards state."""

    loss: TrainedLoss = TrainedLoss()
    stages: tuple[TrainedStage, ...] | None = None
    data: tuple[str, ...] = ()

    def loss_kinds(self) -> list[str]:
        """Return the kind of loss of every stage."""
        return [stage.loss.kind for stage in self.stages or (self,)]


class FinetuneRecord(Section):
    """The outcome of training. `parent` is the folder of the checkpoint that was trained."""

    recipe_name: str
    recipe: TrainedRecipe
    parent: str
    parent_fingerprint: str | None = None
    teacher: str = "base model"
    tokens: Count
    steps: Count
    stages: tuple[dict[str, Any], ...] = ()
    first_loss: float
    last_loss: float
    seconds: float
    tokens_in_these_seconds: int | None = None
    tokens_per_second: float | None = None
    processes: int = 1


def _read_plan(document: Any) -> Plan:
    """Read the plan, with errors as pydantic expects them."""
    plan = Plan.from_dict(document)
    require_known(plan)
    return plan


class Manifest(Section):
    """The content of linearize.json, checked once, when it is read or written.

    Attributes:
        kind: "converted"; "finetuned", with the trained weights merged in; or "adapter", a LoRA adapter alone.
        cache_bytes: context length -> bytes of one sequence's cache, of the "base" and of the "student".
        state_bytes: bytes of one sequence's recurrent states, all layers; None in older files.
        sha256: hashes of config.json and of the weight index; empty for an adapter.
    """

    format_version: int
    kind: Literal["converted", "finetuned", "adapter"]
    base: BaseRecord
    settings: SettingsRecord
    plan: Annotated[Plan, PlainValidator(_read_plan)]
    plan_fingerprint: str
    coverage: Coverage
    ignored_tensors: tuple[str, ...] = ()
    parameters_added: Count
    calibration: CalibrationRecord | None = None
    quality: QualityRecord | None = None
    state_bytes: int | None = None
    vocabulary: Count
    cache_bytes: dict[Annotated[str, Field(pattern="^[0-9]{1,12}$")], dict[Literal["base", "student"], PositiveCount]]
    weights: WeightsRecord
    sha256: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, Any]
    finetune: FinetuneRecord | None = None
    verification: VerificationRecord | None = None
    _document: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _has_training_record(self) -> Self:
        """Require the record of the training that made a finetuned checkpoint or an adapter."""
        if self.kind != "converted" and self.finetune is None:
            raise ValueError(f"'finetune' is missing, though 'kind' is {self.kind}")
        if lacking := [length for length, sizes in self.cache_bytes.items() if len(sizes) < 2]:
            raise ValueError(f"'cache_bytes.{lacking[0]}' lacks the base's or the student's")
        if self.coverage.layers != len(self.plan.layers):
            raise ValueError(f"'plan' has {len(self.plan.layers)} layers, 'coverage' {self.coverage.layers}")
        return self

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read the linearize.json at `path`.

        Raises:
            CheckpointError: damaged, of a newer format version, or with a missing or mistyped key.
        """
        return cls.from_document(read_json(path), path)

    @classmethod
    def from_document(cls, document: Any, path: Path = Path(MANIFEST)) -> "Manifest":
        """Check the parsed JSON of a linearize.json and return it as a manifest.

        Args:
            path: the file, for errors.

        Raises:
            CheckpointError: not an object, of a newer format version, or with a missing or mistyped key.
        """
        if not isinstance(document, dict):
            raise CheckpointError(f"{path}: damaged, got a {type(document).__name__}, allowed is an object")
        version = document.get("format_version")
        if isinstance(version, int) and version > MANIFEST_VERSION:
            raise CheckpointError(
                f"{path}: 'format_version' is {version}, this version of linearize reads up to {MANIFEST_VERSION}; "
                "update linearize"
            )
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise CheckpointError(f"{path}: damaged, 'format_version' is {str(version)[:40]}")
        try:
            # validate JSON text, since strict validation of Python objects would refuse a list where a tuple belongs
            manifest = cls.model_validate_json(json.dumps(document))
        except ValidationError as error:
            raise CheckpointError(f"{path}: damaged, {_first_problem(error)}") from None
        manifest._document = copy.deepcopy(document)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Return the whole document, every key of the file in its order."""
        return copy.deepcopy(self._document)


def _first_problem(error: ValidationError) -> str:
    """Describe the first wrong key of a manifest, and count the others."""
    problems = error.errors()
    first, key = problems[0], ".".join(str(part) for part in problems[0]["loc"])
    message = first["msg"].removeprefix("Value error, ")
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "missing":
        return f"'{key}' is missing{others}"
    return f"'{key}': {message}{others}" if key else f"{message}{others}"
