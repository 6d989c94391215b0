"""`linearize run`: convert, finetune, eval and gate from one file, as one command that goes on where it stopped.

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    out: linearized/nightly
    convert: {config: smollm2-135m, keep_softmax: "18:2,17:1"}
    finetune: {recipe: lora, tokens: 300000}
    eval: {suite: quick, gates: [perplexity@2048.ratio<=1.10], compare: last-release.json}

The steps write OUT/converted, OUT/finetuned and OUT/eval. A step whose result is there, made with the same settings from
the same inputs, is not done again; `finetune` and `eval` resume inside a step.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from linearize.checkpoint.fingerprint import fingerprint_of
from linearize.checkpoint.names import MANIFEST
from linearize.checkpoint.source import local_fingerprint
from linearize.checkpoint.writing import write_json
from linearize.errors import ConfigError
from linearize.evaluation.suite import Suite, choose_suite
from linearize.settings.config import ConversionConfig
from linearize.settings.loading import load_config, load_recipe
from linearize.settings.recipe import Recipe
from linearize.settings.schema import Strict, explain
from linearize.settings.yaml_file import read_yaml

STATE = "pipeline.json"


class ConvertStep(Strict):
    """`config` names a config or YAML file; every other key is a key of it, as with --set."""

    model_config = ConfigDict(extra="allow")
    config: str | None = None
    revision: str | None = None


class FinetuneStep(Strict):
    """`recipe` names a recipe or YAML file; every other key is a key of it."""

    model_config = ConfigDict(extra="allow")
    recipe: str = "lora"


class EvalStep(Strict):
    """The options of `linearize eval`."""

    suite: str = "quick"
    only: str | None = None
    data: list[str] | None = None
    lengths: list[Annotated[int, Field(ge=2)]] | None = None
    recall: list[Annotated[int, Field(ge=1)]] | None = None
    associative: list[Annotated[int, Field(ge=1)]] | None = None
    passkey: list[Annotated[int, Field(ge=64)]] | None = None
    recall_rows: int | None = None
    passkey_rows: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    tasks: list[str] | None = None
    tasks_dir: str | None = None
    task_limit: int | None = None
    choice: list[str] | None = None
    uniform: bool = False
    control: str | None = None
    hold: Literal["auto", "together", "in-turn"] = "auto"
    gates: list[str] = []
    min_recovery: float | None = None
    compare: str | None = None
    summary_file: str | None = None

    def chosen(self) -> Suite:
        """Raises: ConfigError: an unknown suite or part, a number out of range."""
        names = {field.name for field in fields(Suite)}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in self if name in names}
        return choose_suite(self.suite, self.only, **{name: value for name, value in given.items() if value != ()})

    def demands(self) -> dict[str, Any]:
        """What the evaluation is judged by and reported to, as `evaluate` takes it."""
        files = {"compare": self.compare, "summary_file": self.summary_file}
        paths = {name: Path(file) if file else None for name, file in files.items()}
        return {"gates": self.gates, "min_recovery": self.min_recovery, **paths}


class Pipeline(Strict):
    """The file. Without `finetune` the conversion itself is evaluated."""

    model: str
    out: str
    convert: ConvertStep = ConvertStep()
    finetune: FinetuneStep | None = None
    eval: EvalStep | None = None


def load_pipeline(path: Path) -> tuple[Pipeline, ConversionConfig, Recipe | None]:
    """Reads the file and every setting in it, so that nothing starts that cannot end.

    Raises:
        ConfigError: no such file, unknown keys, wrong values.
    """
    if not path.is_file():
        raise ConfigError(f"PIPELINE: no file '{path}'")
    try:
        pipeline = Pipeline.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {explain(item, Pipeline)}" for item in error.errors())) from None
    step = pipeline.convert
    settings = load_config(step.config, step.model_extra, given_in=f"{path}: convert")
    recipe = None
    if (step := pipeline.finetune) is not None:
        recipe = load_recipe(step.recipe, step.model_extra, given_in=f"{path}: finetune")
    if pipeline.eval is not None:
        try:
            pipeline.eval.chosen()
        except ConfigError as error:
            option, colon, rest = str(error).removeprefix("--").partition(":")
            raise ConfigError(f"{path}: eval: {option.replace('-', '_')}{colon}{rest}") from None
    return pipeline, settings, recipe


def run_pipeline(
    pipeline: Pipeline,
    settings: ConversionConfig,
    recipe: Recipe | None,
    *,
    restart: bool = False,
    progress: Callable[[str], None] = print,
    report: Callable | None = None,
) -> dict[str, Any]:
    """Runs the steps of what `load_pipeline` read; returns what each made, and the results of the evaluation where there is
    one.

    Args:
        restart: an unfinished finetune is discarded, whatever its settings.

    Raises:
        LinearizeError: what a step raises. A gate that fails is in the results, not raised.
    """
    from linearize.data.documents import data_fingerprint
    from linearize.evaluation.request import check_text
    from linearize.workflows.evaluate import evaluate

    out = Path(pipeline.out)
    done = _State(out / STATE)
    converted, tuned = out / "converted", out / "finetuned"
    _check_inputs(pipeline.eval, settings, None if tuned.is_dir() else recipe)
    inputs = {"model": pipeline.model, "revision": pipeline.convert.revision, "settings": settings.model_dump()}
    inputs["local"] = local_fingerprint(pipeline.model)
    if done.has("convert", inputs, converted):
        progress(f"convert: {converted} is up to date")
    else:
        from linearize.workflows.convert import convert

        convert(
            pipeline.model, settings, out=converted, revision=pipeline.convert.revision, overwrite=converted.exists(),
            progress=progress,
        )  # fmt: skip
        done.record("convert", inputs, converted)
    if pipeline.eval is not None:
        demands = pipeline.eval.demands()
        del demands["summary_file"]
        check_text(converted, pipeline.eval.chosen(), **demands)
    student = converted
    if recipe is not None:
        inputs = {"from": done.steps["convert"], "recipe": recipe.model_dump(), "data": data_fingerprint(recipe.data)}
        if done.has("finetune", inputs, tuned):
            progress(f"finetune: {tuned} is up to date")
        else:
            from linearize.workflows.finetune import finetune

            finetune(
                converted, recipe, recipe_name=pipeline.finetune.recipe, out=tuned, overwrite=tuned.exists(),
                restart=restart, progress=progress, report=report or (lambda step: None),
            )  # fmt: skip
            done.record("finetune", inputs, tuned)
        student = tuned
    made = {"converted": str(converted), "student": str(student), "results": None}
    if pipeline.eval is not None:
        made["results"] = evaluate(
            student, pipeline.eval.chosen(), **pipeline.eval.demands(), out=out / "eval", hold=pipeline.eval.hold,
            progress=progress,
        )  # fmt: skip
    return made


def _check_inputs(step: EvalStep | None, settings: ConversionConfig, recipe: Recipe | None) -> None:
    """Refuses text, tasks, gates and older results that cannot be read, and rows that train nothing, before hours go into
    what comes before them."""
    from linearize.data.documents import open_dataset
    from linearize.evaluation.request import check_request

    data = []
    if recipe is not None:
        data += recipe.data
        recipe.check_leaves_window(settings.mix, settings.window, settings.sinks)
    if step is not None:
        suite = step.chosen()
        check_request(suite, settings.window, **step.demands())
        data += suite.data
    for name in data:
        open_dataset(name)


class _State:
    """Which steps are done, with a fingerprint of what went into each and of what came out."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.steps: dict[str, str] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            self.steps = {}

    def has(self, step: str, inputs: dict, out: Path) -> bool:
        return (out / MANIFEST).is_file() and self.steps.get(step) == self._fingerprint(inputs, out)

    def record(self, step: str, inputs: dict, out: Path) -> None:
        self.steps[step] = self._fingerprint(inputs, out)
        write_json(self.path, self.steps)

    def _fingerprint(self, inputs: dict, out: Path) -> str:
        return fingerprint_of({"inputs": inputs, "made": json.loads((out / MANIFEST).read_bytes())})
