"""Place the stages of a recipe in the whole run, and the rates in a stage."""

import math
from dataclasses import dataclass

from linearize.settings.recipe import Recipe, Stage


@dataclass(frozen=True)
class ScheduledStage:
    """A stage with its place in the run.

    Attributes:
        stage: the stage's settings.
        steps: its optimizer steps.
        steps_before, tokens_before: steps and tokens of the stages before it.
        total_steps, total_tokens: steps and tokens of all stages.
    """

    stage: Stage
    steps: int
    steps_before: int
    tokens_before: int
    total_steps: int
    total_tokens: int

    @property
    def last_step(self) -> int:
        """The number of the stage's last step, counted over the whole run."""
        return self.steps_before + self.steps


def schedule_stages(recipe: Recipe) -> list[ScheduledStage]:
    """Share out the tokens of a recipe over its stages."""
    stages = recipe.resolved_stages()
    steps = [stage.steps(recipe.tokens) for stage in stages]
    tokens = [count * stage.tokens_per_step for count, stage in zip(steps, stages)]
    return [
        ScheduledStage(
            stage=stage,
            steps=steps[number],
            steps_before=sum(steps[:number]),
            tokens_before=sum(tokens[:number]),
            total_steps=sum(steps),
            total_tokens=sum(tokens),
        )
        for number, stage in enumerate(stages)
    ]


def rate_factor(stage: Stage, step: int, steps: int) -> float:
    """Return the factor on the learning rates: a linear warm-up, then a cosine or a constant.

    Args:
        step: the step within the stage, from 1.
        steps: steps of the stage.
    """
    warmup = math.ceil(stage.optimizer.warmup_fraction * steps)
    if step <= warmup:
        return step / warmup
    if stage.optimizer.schedule == "constant":
        return 1.0
    position = (step - warmup) / max(1, steps - warmup)
    floor = stage.optimizer.final_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * position))
