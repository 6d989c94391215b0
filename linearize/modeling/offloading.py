"""Refuse a device map that offloads added parameters."""

from torch import Tensor


def require_in_memory(parameter: Tensor) -> None:
    """Check that a parameter that is read outside its module's forward is there.

    accelerate loads the parameters of an offloaded module when its forward is called, and only then.

    Raises:
        RuntimeError: the parameter is offloaded.
    """
    if parameter.is_meta:
        raise RuntimeError(
            "the added parameters of a linearized model (`mixer`) have to stay in memory; give a device_map that "
            "offloads none of its layers"
        )
