"""`linearize run`: convert, finetune, evaluate and gate from one file, in one command that resumes where it stopped.

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    out: linearized/nightly
    convert: {config: smollm2-135m, keep_softmax: "18:2,17:1"}
    finetune: {recipe: lora, tokens: 300000}
    eval: {suite: quick, gates: [perplexity@2048.ratio<=1.10], compare: last-release.json}

1. Read the file and every setting in it; refuse what cannot be read or measured, before hours go into earlier steps.
2. Convert, to OUT/converted.
3. Check what needs a conversion to be checked: the evaluation text and the older results.
4. Finetune, to OUT/finetuned.
5. Evaluate, to OUT/eval, and judge the gates.

A step is skipped if its result is there and was made with the same settings from the same inputs. `finetune` and `eval`
resume inside a step.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, create_model

from linearize.checkpoint.fingerprint import fingerprint_of
from linearize.checkpoint.json_file import read_json, read_object
from linearize.checkpoint.names import MANIFEST
from linearize.checkpoint.source import local_fingerprint
from linearize.checkpoint.writing import write_json
from linearize.data.documents import data_fingerprint, open_dataset
from linearize.errors import CheckpointError, ConfigError
from linearize.evaluation.measurement import Option
from linearize.evaluation.suite import OPTIONS, Suite, choose_suite
from linearize.report.results import Results
from linearize.settings.config import ConversionConfig
from linearize.settings.loading import load_config, load_recipe
from linearize.settings.recipe import Recipe
from linearize.settings.schema import Strict, explain
from linearize.settings.yaml_file import read_yaml

if TYPE_CHECKING:
    from linearize.training.loop import StepRecord

# the file in OUT that records the finished steps
STATE = "pipeline.json"


class ConvertStep(Strict):
    """The conversion: `config` names a config or YAML file; every other key is a key of the config, as with --set."""

    model_config = ConfigDict(extra="allow")
    config: str | None = None
    revision: str | None = None


class FinetuneStep(Strict):
    """The training: `recipe` names a recipe or YAML file; every other key is a key of the recipe."""

    model_config = ConfigDict(extra="allow")
    recipe: str = "lora"


def _key_type(option: Option) -> Any:
    """Return the type of a measurement's option as a key of `eval`; leaving the key out is None."""
    number = Annotated[option.kind, Field(ge=option.least)] if option.is_list and option.least else option.kind
    return (list[number] if option.is_list else number) | None  # type: ignore[valid-type]  # known only at run time


_MEASUREMENT_KEYS: dict[str, Any] = {name: (_key_type(option), None) for name, option in OPTIONS.items()}
# a key for every option of every measurement; a type checker cannot see them and takes each for Any
_MeasurementKeys: Any = create_model("_MeasurementKeys", __base__=Strict, **_MEASUREMENT_KEYS)


class EvalStep(_MeasurementKeys):
    """Hold the options of `linearize eval`, and those of every measurement."""

    suite: str = "quick"
    only: str | None = None
    data: list[str] | None = None
    seed: int | None = None
    uniform: bool = False
    control: str | None = None
    hold: Literal["auto", "together", "in-turn"] = "auto"
    gates: list[str] = []
    min_recovery: float | None = None
    compare: str | None = None
    summary_file: str | None = None

    def chosen(self) -> Suite:
        """Return the suite with the step's options; an empty list leaves the suite's own.

        Raises:
            ConfigError: an unknown suite or part, or a number out of range.
        """
        suite_fields = {field.name for field in fields(Suite)}
        given = {name: value for name, value in self if name in suite_fields and value != []}
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return choose_suite(self.suite, self.only, **options)

    def demands(self) -> dict[str, Any]:
        """Return the arguments of `evaluate` that judge the results, and the file that the verdict is added to."""
        files = {"compare": self.compare, "summary_file": self.summary_file}
        paths = {name: Path(file) if file else None for name, file in files.items()}
        return {"gates": self.gates, "min_recovery": self.min_recovery, **paths}


class Pipeline(Strict):
    """A pipeline file. Without `finetune` the conversion itself is evaluated."""

    model: Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
    out: Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
    convert: ConvertStep = ConvertStep()
    finetune: FinetuneStep | None = None
    eval: EvalStep | None = None

    @property
    def converted_folder(self) -> Path:
        """Folder of the conversion."""
        return Path(self.out) / "converted"

    @property
    def finetuned_folder(self) -> Path:
        """Folder of the trained checkpoint."""
        return Path(self.out) / "finetuned"

    @property
    def evaluation_folder(self) -> Path:
        """Folder of the report."""
        return Path(self.out) / "eval"


@dataclass(frozen=True)
class Outcome:
    """The folders that a pipeline wrote, and the results of its evaluation.

    Attributes:
        converted: folder of the conversion.
        student: folder of the last checkpoint: the finetuned one, or the conversion.
        results: None without an `eval` step.
    """

    converted: Path
    student: Path
    results: Results | None

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        results = None if self.results is None else self.results.to_dict()
        return {"converted": str(self.converted), "student": str(self.student), "results": results}


def load_pipeline(path: Path) -> tuple[Pipeline, ConversionConfig, Recipe | None]:
    """Read a pipeline file and every setting in it.

    Raises:
        ConfigError: no such file, unknown keys, or wrong values.
    """
    if not path.is_file():
        raise ConfigError(f"PIPELINE: no file '{path}'")
    try:
        pipeline = Pipeline.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {explain(item, Pipeline)}" for item in error.errors())) from None
    convert, finetune = pipeline.convert, pipeline.finetune
    config = load_config(convert.config, convert.model_extra, given_in=f"{path}: convert")
    recipe = None
    if finetune is not None:
        recipe = load_recipe(finetune.recipe, finetune.model_extra, given_in=f"{path}: finetune")
    if pipeline.eval is not None:
        try:
            pipeline.eval.chosen()
        except ConfigError as error:
            # the message names an option of the command line, and the file has a key in its place
            option, colon, rest = str(error).removeprefix("--").partition(":")
            raise ConfigError(f"{path}: eval: {option.replace('-', '_')}{colon}{rest}") from None
    return pipeline, config, recipe


def run_pipeline(
    pipeline: Pipeline,
    config: ConversionConfig,
    recipe: Recipe | None,
    *,
    restart: bool = False,
    progress: Callable[[str], None] = print,
    report: "Callable[[StepRecord], None] | None" = None,
) -> Outcome:
    """Do the steps that are not finished yet.

    Args:
        pipeline, config, recipe: as `load_pipeline` returns them.
        restart: discard an unfinished finetune, for example after its settings were changed.
        progress: receives one line of text at a time.
        report: receives the record of every step of training.

    Raises:
        LinearizeError: a step failed. A gate that fails is in the results instead.
    """
    _check_inputs(pipeline.eval, config, None if pipeline.finetuned_folder.is_dir() else recipe)
    finished_steps = _FinishedSteps(Path(pipeline.out) / STATE, progress)
    _convert(pipeline, config, finished_steps, progress)
    student = pipeline.converted_folder
    if pipeline.eval is not None:
        _check_text(student, pipeline.eval)
    if recipe is not None:
        _finetune(pipeline, recipe, finished_steps, restart=restart, progress=progress, report=report)
        student = pipeline.finetuned_folder
    results = None if pipeline.eval is None else _evaluate(pipeline, pipeline.eval, student, progress)
    return Outcome(pipeline.converted_folder, student, results)


def _check_inputs(step: EvalStep | None, config: ConversionConfig, recipe: Recipe | None) -> None:
    """Check everything that needs no conversion: datasets, tasks, gates, older results, and the length of rows.

    Args:
        recipe: None if the training is finished or there is none.

    Raises:
        ConfigError: something cannot be read or measured, or the rows train nothing.
    """
    from linearize.evaluation.request import check_request

    datasets: list[str] = []
    if recipe is not None:
        datasets += recipe.data
        recipe.check_leaves_window(config.mix, config.window, config.sinks)
    if step is not None:
        suite = step.chosen()
        check_request(suite, config.window, **step.demands())
        datasets += suite.data
    for name in datasets:
        open_dataset(name)


def _check_text(converted: Path, step: EvalStep) -> None:
    """Check the evaluation text and the older results with the tokenizer and the positions of the conversion."""
    from linearize.evaluation.request import check_text

    demands = step.demands()
    del demands["summary_file"]
    check_text(converted, step.chosen(), **demands)


class _FinishedSteps:
    """The finished steps, each with a fingerprint of its inputs and of its result, in OUT/pipeline.json."""

    def __init__(self, path: Path, progress: Callable[[str], None]) -> None:
        """Read the file; one that is absent or damaged means that no step is finished."""
        self.path, self.progress = path, progress
        self.fingerprints: dict[str, str] = {}
        with contextlib.suppress(CheckpointError):
            self.fingerprints = {step: str(digest) for step, digest in read_object(path).items()}

    def has(self, step: str, inputs: dict[str, Any], out: Path) -> bool:
        """Return True, and say so, if the step's result at `out` was made from these inputs."""
        up_to_date = (out / MANIFEST).is_file() and self.fingerprints.get(step) == self._fingerprint(inputs, out)
        if up_to_date:
            self.progress(f"{step}: {out} is up to date")
        return up_to_date

    def add(self, step: str, inputs: dict[str, Any], out: Path) -> None:
        """Record that the step wrote its result to `out`."""
        self.fingerprints[step] = self._fingerprint(inputs, out)
        write_json(self.path, self.fingerprints)

    def _fingerprint(self, inputs: dict[str, Any], out: Path) -> str:
        """Hash the inputs of a step with the linearize.json of its result."""
        return fingerprint_of({"inputs": inputs, "made": read_json(out / MANIFEST)})


def _convert(
    pipeline: Pipeline,
    config: ConversionConfig,
    finished_steps: _FinishedSteps,
    progress: Callable[[str], None],
) -> None:
    """Convert the model, unless it was already converted from the same inputs."""
    out, revision = pipeline.converted_folder, pipeline.convert.revision
    inputs = {
        "model": pipeline.model,
        "revision": revision,
        "settings": config.model_dump(),
        "local": local_fingerprint(pipeline.model),  # of a folder or file; None for a hub id
    }
    if finished_steps.has("convert", inputs, out):
        return
    from linearize.workflows.convert import convert

    # what exists at `out` was converted from other inputs, and is replaced
    convert(pipeline.model, config, out=out, revision=revision, overwrite=out.exists(), progress=progress)
    finished_steps.add("convert", inputs, out)


def _finetune(
    pipeline: Pipeline,
    recipe: Recipe,
    finished_steps: _FinishedSteps,
    *,
    restart: bool,
    progress: Callable[[str], None],
    report: "Callable[[StepRecord], None] | None",
) -> None:
    """Finetune the conversion, unless it was already finetuned from the same inputs."""
    assert pipeline.finetune is not None, "a recipe comes from a finetune step"
    out = pipeline.finetuned_folder
    inputs = {
        "from": finished_steps.fingerprints["convert"],
        "recipe": recipe.model_dump(),
        "data": data_fingerprint(recipe.data),
    }
    if finished_steps.has("finetune", inputs, out):
        return
    if _was_finetuned(out, pipeline.converted_folder, recipe):  # a run that died before it said so
        finished_steps.add("finetune", inputs, out)
        return
    from linearize.workflows.finetune import finetune

    finetune(
        pipeline.converted_folder, recipe, recipe_name=pipeline.finetune.recipe, out=out, overwrite=out.exists(),
        restart=restart, progress=progress, report=report,
    )  # fmt: skip
    finished_steps.add("finetune", inputs, out)


def _was_finetuned(out: Path, converted: Path, recipe: Recipe) -> bool:
    """Return True if the checkpoint at `out` is what this recipe makes of the conversion."""
    if not (out / MANIFEST).is_file():
        return False
    training = read_object(out / MANIFEST).get("finetune")
    made_by = {
        "recipe": recipe.model_dump(mode="json"), "data_fingerprint": data_fingerprint(recipe.data),
        "parent_fingerprint": local_fingerprint(str(converted)),
    }  # fmt: skip
    return isinstance(training, dict) and all(training.get(name) == value for name, value in made_by.items())


def _evaluate(pipeline: Pipeline, step: EvalStep, student: Path, progress: Callable[[str], None]) -> Results:
    """Evaluate a checkpoint and write the report."""
    from linearize.workflows.evaluate import evaluate

    out = pipeline.evaluation_folder
    return evaluate(student, step.chosen(), **step.demands(), out=out, hold=step.hold, progress=progress)
