"""Python's and the packages' versions, for the record."""

import importlib.metadata
import platform

PACKAGES = ("linearize", "torch", "transformers", "safetensors", "peft", "accelerate")


def versions() -> dict[str, str]:
    """Python's and the packages' versions, for the record."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
