"""Making transformers know the linearized classes, in two steps that suit any order of imports.

A config class is registered once the modules it is made from are complete: transformers' modules import one another
in circles, so this may be asked while one of them is only half there. The model classes are registered when the first
config is made: by then whatever import was under way has finished.
"""

import sys

from linearize.families.registry import FAMILIES, find_family


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


def _complete(module: str, last: str) -> bool:
    """False while `module` is being imported and has not yet defined `last`."""
    return module not in sys.modules or hasattr(sys.modules[module], last)
