"""Whether a Triton kernel of flash-linear-attention may serve a call.

The kernels need a CUDA device and an importable `fla` (an installed one can still fail to import for want of a
matching triton), so importing is the test. The mixers know nothing of this.
"""

import functools
import importlib
from collections.abc import Callable

from torch import Tensor


@functools.cache
def _load(module: str, name: str) -> Callable | None:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # a broken triton raises anything from ImportError to RuntimeError
        return None


def fla_operator(module: str, name: str, reference: Tensor) -> Callable | None:
    """The kernel `module.name`, or None where it cannot run on `reference`'s device and dtype."""
    if not reference.is_cuda or reference.element_size() == 8:
        return None
    return _load(module, name)


def fla_available() -> bool:
    return _load("fla.ops.gla", "chunk_gla") is not None
