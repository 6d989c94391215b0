"""Making transformers know the linearized classes, in two steps that suit any order of imports.

A config class is registered once the modules it is made from are complete: transformers' modules import one another
in circles, so this may be asked while one of them is only half there. The model classes are registered when the first
config is made: by then whatever import was under way has finished.
"""

import json
import sys
from pathlib import Path

from linearize.families.registry import FAMILIES, find_family
from linearize.plan import PREFIX


def register_configs() -> None:
    """Registers with AutoConfig the linearized config class of every family whose modules are not half imported."""
    if not _complete("transformers.models.auto.modeling_auto", "AutoModelForCausalLM"):
        return
    for family in FAMILIES.values():
        if _complete(family.import_path("configuration"), family.config_class):
            from linearize.modeling.configuration import LinearizedConfig, config_class

            LinearizedConfig.on_creation = staticmethod(register_models)
            config_class(family)


def register_models(model_type: str) -> None:
    """Registers the linearized model class of one family with AutoModelForCausalLM."""
    from linearize.modeling import factory
    from linearize.modeling.export import write_portable

    factory.PORTABLE_WRITER = write_portable
    factory.linearized_classes(find_family(model_type))


def register_checkpoint(folder: Path) -> None:
    """Registers the classes that a checkpoint asks for, of whichever family: unlisted ones are not known on import."""
    model_type = str(json.loads((folder / "config.json").read_bytes()).get("model_type"))
    if model_type.startswith(PREFIX):
        register_models(model_type.removeprefix(PREFIX))


def _complete(module: str, last: str) -> bool:
    """False while `module` is being imported and has not yet defined `last`."""
    return module not in sys.modules or hasattr(sys.modules[module], last)
