"""Load configs and tokenizers of checkpoints through transformers, without their code unless the user trusts it.

Without a word from us transformers asks on the terminal whether to run a checkpoint's code, and takes "y" from a pipe.
Some keys of a config name code, too: they are put back to transformers' own choice.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.json_file import read_object
from linearize.errors import CheckpointError, ConfigError, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# attributes of a config that choose an implementation, which can be a kernel from a hub
CHOOSE_CODE = ("_attn_implementation", "_experts_implementation")
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# times that the steps of a tokenizer may make a text longer; one of bytes takes 4
LARGEST_GROWTH = 1000.0
# set by `trusting_code`, for --trust-remote-code
_trusts_code = False


@contextlib.contextmanager
def trusting_code(trusted: bool) -> Iterator[None]:
    """Let tokenizers run the code that comes with them while the block runs; False leaves it as it is."""
    global _trusts_code
    before, _trusts_code = _trusts_code, _trusts_code or trusted
    try:
        yield
    finally:
        _trusts_code = before


def trusts_code() -> bool:
    """Return True if tokenizers may run the code that comes with them."""
    return _trusts_code


def auto_config(folder: Path) -> "PretrainedConfig":
    """Read a checkpoint's config as transformers does; its code is never run."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in CHOOSE_CODE:
            if getattr(part, name, None) is not None:
                setattr(part, name, None)
    return config


def auto_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer as transformers does; its code runs only if the user trusts it.

    Raises:
        ConfigError: it has code of its own.
        CheckpointError: it is damaged.
    """
    from transformers import AutoTokenizer

    if (code := tokenizer_code(folder)) and not _trusts_code:
        raise ConfigError(f"{folder}: its tokenizer has code of its own ({code[0]}); --trust-remote-code runs it")
    _check_growth(folder / TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=_trusts_code)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {one_line(error, 200)}") from None


def _check_growth(path: Path) -> None:
    """Refuse a fast tokenizer whose steps blow a text up: one after another they can multiply its length without end.

    Raises:
        CheckpointError: together they make a text more than LARGEST_GROWTH times as long.
    """
    if not path.is_file():
        return
    tokenizer, growth = read_object(path), 1.0
    for step in ("normalizer", "pre_tokenizer", "decoder"):
        for part in _parts(tokenizer.get(step)):
            pattern = part.get("pattern")
            replaced = pattern.get("String", "") if isinstance(pattern, dict) else ""
            content = next((part[key] for key in ("content", "prepend", "replacement") if key in part), "")
            if isinstance(content, str) and isinstance(replaced, str):
                growth *= max(1.0, len(content) / max(1, len(replaced)))
    if growth > LARGEST_GROWTH:
        raise CheckpointError(f"{path}: its steps can make a text {growth:,.0f} times as long")


def _parts(step: Any) -> Iterator[dict[str, Any]]:
    """Yield a step of a tokenizer and the steps that it consists of."""
    stack = [step]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            yield part
            stack += [item for value in part.values() if isinstance(value, list) for item in value]


def tokenizer_code(folder: Path) -> list[str]:
    """Return the names of the Python files in a folder that its tokenizer says it consists of."""
    if not (folder / TOKENIZER_CONFIG).is_file():
        return []
    auto_map = read_object(folder / TOKENIZER_CONFIG).get("auto_map")
    entries = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    names = entries if isinstance(entries, list) else [entries]
    return [f"{name.split('--')[-1].split('.')[0]}.py" for name in names if isinstance(name, str)]
