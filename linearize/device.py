"""Where to compute and in what precision."""

from typing import Any


def pick_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def bf16_is_fast() -> bool:
    """bf16 on CUDA cards that compute in it, and on CPUs with matrix units for it (AMX); elsewhere float32 is faster."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return has_amx()


def has_amx() -> bool:
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def compute_dtype(precision: str) -> Any:
    """The dtype of weights and activations for `precision` auto, bf16 or fp32."""
    import torch

    if precision == "auto":
        precision = "bf16" if bf16_is_fast() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
