"""Register the linearized classes with transformers, so that a written checkpoint loads with AutoModelForCausalLM.

The sequence works in any order of imports, and `import linearize` alone imports neither torch nor transformers:

1. `import linearize` calls `register_on_import`, which puts an import hook (modeling/import_hook.py) on transformers'
   auto modules and on every family's configuration module. Nothing is imported yet.
2. After each of these modules has been executed, the hook calls `register_configs`. It builds a family's config class
   (modeling/configuration.py) once the modules that the class is made from are complete: transformers' modules import
   one another in circles, so the hook may fire while one of them is half imported.
3. The config class registers itself with AutoConfig under `linearized_<model_type>`.
4. The first config object of a family calls `register_models`: by then every import under way has finished.
5. `register_models` builds the family's model classes (modeling/factory.py), which register themselves with
   AutoModelForCausalLM, and gives them the writer of the portable file (modeling/export.py).

Families that are not listed in families/registry.py have no module to hook. Code that opens a checkpoint folder calls
`register_checkpoint`, which starts at step 5. A portable file holds the code of steps 3 and 5 and runs it when it is
loaded; it needs none of this module.
"""

import sys
from pathlib import Path

from linearize.checkpoint.source import read_config
from linearize.families.registry import FAMILIES, find_family
from linearize.modeling.import_hook import AfterImport
from linearize.plan import PREFIX

AUTO_CONFIGS = "transformers.models.auto.configuration_auto"
AUTO_MODELS = "transformers.models.auto.modeling_auto"


def register_on_import() -> None:
    """Hook the imports of transformers' auto modules and of every listed family (step 1)."""
    families = {family.import_path("configuration") for family in FAMILIES.values()}
    AfterImport({AUTO_CONFIGS, AUTO_MODELS, *families}, register_configs).install()


def register_configs() -> None:
    """Register with AutoConfig the config class of every family whose modules are complete (steps 2 and 3)."""
    if _half_imported(AUTO_MODELS, "AutoModelForCausalLM"):
        return
    for family in FAMILIES.values():
        if not _half_imported(family.import_path("configuration"), family.config_class):
            # not at the top: it imports transformers
            from linearize.modeling.configuration import LinearizedConfig, config_class

            LinearizedConfig.on_creation = staticmethod(register_models)
            config_class(family)


def register_models(model_type: str) -> None:
    """Register the model classes of one family with AutoModelForCausalLM (step 5)."""
    # not at the top: they import torch and transformers
    from linearize.modeling import factory
    from linearize.modeling.export import write_portable

    factory.PORTABLE_WRITER = write_portable
    factory.linearized_classes(find_family(model_type))


def register_checkpoint(folder: Path) -> None:
    """Register the classes that the checkpoint in `folder` needs, also those of a family that is not listed."""
    model_type = str(read_config(folder).get("model_type"))
    if model_type.startswith(PREFIX):
        register_models(model_type.removeprefix(PREFIX))


def _half_imported(module: str, last: str) -> bool:
    """Return True while `module` is being imported and has not yet defined `last`."""
    return module in sys.modules and not hasattr(sys.modules[module], last)
