"""linearize: turn a pretrained causal language model into a linear-time, constant-memory one.

    import linearize

    student = linearize.convert("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m", out="student")
    tuned = linearize.finetune(student, "lora", out="tuned")
    results = linearize.evaluate(tuned.folder, "quick")

Importing the package makes AutoModelForCausalLM.from_pretrained load linearized checkpoints, in whichever order it and
transformers are imported. It loads no heavy library: torch comes with the first function or class that is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from linearize.modeling.registration import register_on_import

if TYPE_CHECKING:
    from linearize.checkpoint.student import Student
    from linearize.evaluation.suite import Suite
    from linearize.report.results import Results
    from linearize.settings.config import ConversionConfig
    from linearize.settings.recipe import Recipe
    from linearize.workflows.convert import convert
    from linearize.workflows.evaluate import evaluate
    from linearize.workflows.finetune import finetune

__version__ = "0.1.0"
__all__ = ["ConversionConfig", "Recipe", "Results", "Student", "Suite", "convert", "evaluate", "finetune"]

# the module of each public name, imported when the name is first used (PEP 562)
_MODULES = {
    "ConversionConfig": "linearize.settings.config",
    "Recipe": "linearize.settings.recipe",
    "Results": "linearize.report.results",
    "Student": "linearize.checkpoint.student",
    "Suite": "linearize.evaluation.suite",
    "convert": "linearize.workflows.convert",
    "evaluate": "linearize.workflows.evaluate",
    "finetune": "linearize.workflows.finetune",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use and remember it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'linearize' has no attribute '{name}'")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too, those that are not imported yet included."""
    return sorted({*globals(), *__all__})


register_on_import()
