"""List every measurement. A new one is a file beside this one and a line here.

Importing this module imports neither torch nor transformers.
"""

import importlib

from linearize.evaluation.measurement import Measurement

# measurement -> its file, in the order in which they run: the cheap and telling ones first
FILES = {
    "parity": "parity",
    "perplexity": "perplexity",
    "recall": "recall",
    "associative": "associative",
    "passkey": "passkey",
    "branch": "branch_share",
    "generation": "generation",
    "choice": "choice",
    "tasks": "tasks",
    "efficiency": "efficiency",
}

MEASUREMENTS: dict[str, Measurement] = {
    name: importlib.import_module(f"linearize.evaluation.{file}").MEASUREMENT for name, file in FILES.items()
}
