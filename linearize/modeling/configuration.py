"""Build the config classes of linearized models: the family's own config, with the plan in `linearize`."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.family import Family
from linearize.plan import PREFIX, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as ConfigBase
else:  # a mixin stands before a family's config class, which has the methods that `super()` calls
    ConfigBase = object


class LinearizedConfig(ConfigBase):
    """A mixin that goes before the family's config class.

    Attributes:
        linearize: the plan, as `Plan.to_dict` writes it.
        on_creation: called with the base model type when a config is made. The package registers the model classes then
            (modeling/registration.py, step 4).
    """

    linearize: dict | None = None
    family: ClassVar[Family]
    on_creation: ClassVar[Callable[[str], None] | None] = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if LinearizedConfig.on_creation is not None:
            LinearizedConfig.on_creation(self.model_type.removeprefix(PREFIX))

    @property
    def plan(self) -> Plan:
        """The plan that the model was converted by."""
        assert self.linearize is not None, "the config of a linearized model has a plan"
        return Plan.from_dict(self.linearize)

    @property
    def key_value_heads(self) -> int:
        """Key/value heads per layer."""
        return self.family.heads(self.to_dict())["num_key_value_heads"]


def config_class(family: Family) -> Any:
    """Build the config class of one family and register it with AutoConfig. The family's model code is not imported."""
    # here, since importing it may lead to this very function (modeling/registration.py, step 2)
    from transformers import AutoConfig

    if family.model_type in _CONFIGS:
        return _CONFIGS[family.model_type]
    module = importlib.import_module(family.import_path("configuration"))
    base = getattr(module, family.config_class)
    name = f"Linearized{base.__name__}"
    attributes = {
        "__module__": __name__,
        "__qualname__": name,
        "__annotations__": {"linearize": dict | None},
        "model_type": PREFIX + family.model_type,
        "linearize": None,
        "family": family,
    }
    cls: Any = type(name, (LinearizedConfig, base), attributes)
    _CONFIGS[family.model_type] = globals()[name] = cls
    AutoConfig.register(cls.model_type, cls, exist_ok=True)
    return cls


_CONFIGS: dict[str, Any] = {}
