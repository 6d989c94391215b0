"""linearize: turns a pretrained causal language model into a linear-time, constant-memory one.

Importing the package makes AutoModelForCausalLM.from_pretrained load converted checkpoints, whether transformers is
imported before or after it. The import itself stays light: the command line answers `--help` without loading torch.
"""

from linearize.families.registry import FAMILIES
from linearize.import_hook import AfterImport

__version__ = "0.1.0"


def _register() -> None:
    from linearize.modeling.registration import register_configs

    register_configs()


# whichever of these comes last in an import under way finds the others complete; see modeling/registration.py
AfterImport(
    {
        "transformers.models.auto.configuration_auto",
        "transformers.models.auto.modeling_auto",
        *(family.import_path("configuration") for family in FAMILIES.values()),
    },
    _register,
).install()
