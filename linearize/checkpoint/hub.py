"""Download checkpoints from the model hub, after checking that it answers."""

import os
import re
import threading
import urllib.request
from pathlib import Path

from linearize.checkpoint.auto import trusts_code
from linearize.errors import CheckpointError, ConfigError, one_line

# a hub that has not answered by then is treated as unreachable
HUB_SECONDS = 8

HUB_FILES = [
    "*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*",
    "LICENCE*", "USE_POLICY*", "NOTICE*",
]  # fmt: skip


def download(model: str, revision: str | None, option: str) -> Path:
    """Download a hub model, or find it in the local cache, and return its folder.

    Args:
        revision: branch, tag or commit.
        option: the argument or option that names the model, for errors.

    Raises:
        ConfigError: the hub has no such model or revision, or the model is gated.
        CheckpointError: the hub does not answer and the model is not in the cache, or the download fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    answers = hub_answers()
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=[*HUB_FILES, "*.py"] if trusts_code() else HUB_FILES,
                local_files_only=not answers,
                etag_timeout=HUB_SECONDS,
            )
        )
    except GatedRepoError:
        raise ConfigError(
            f"{option}: '{model}' is gated; accept its licence on the hub and log in (`hf auth login`)"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(f"{option}: the hub has no model '{model}', and there is no such file or folder") from None
    except RevisionNotFoundError:
        raise ConfigError(f"--revision: the hub's '{model}' has no revision '{revision}'") from None
    except (LocalEntryNotFoundError, EntryNotFoundError, FileNotFoundError):
        raise CheckpointError(
            f"{option}: no file or folder '{model}' here, {why_no_hub()}, and the model is not in the local cache; "
            "name a local folder or .gguf file, or try again online"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{option}: downloading '{model}' failed: {one_line(error)}") from None


def is_hub_id(name: str) -> bool:
    """Return True if a name can be that of a model on the hub: name or owner/name, by the hub's own rules."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) or name.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _offline() -> bool:
    """Return True if the user has told the hub's libraries to work offline."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def why_no_hub() -> str:
    """Say why `hub_answers` returned False."""
    return "the hub was not asked (HF_HUB_OFFLINE)" if _offline() else f"the hub did not answer within {HUB_SECONDS} s"


def hub_answers() -> bool:
    """Return True if the model hub answers within HUB_SECONDS."""
    if _offline():
        return False
    answered = threading.Event()

    def ask() -> None:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "linearize"})
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an error page is an answer, too
        except (OSError, ValueError):
            return
        answered.set()

    # in a thread, because name resolution has no timeout
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answered.is_set()
