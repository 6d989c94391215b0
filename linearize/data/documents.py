"""Read datasets as documents of token ids, for training, scoring and evaluation alike.

A dataset is the name `sample`, a file (.txt, .jsonl, .json, .parquet, each also compressed), a folder of .parquet
files, or a hub id. Its rows hold a text field, `messages` for the chat template, or `instruction`, `input` and
`output`. Rows whose text is null, or that have no messages, are skipped. Reading streams: a file may have any size, a
row of JSON and a JSON array may not (text_files.py).
"""

import contextlib
import glob
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from linearize.checkpoint.fingerprint import fingerprint_of, sha256
from linearize.checkpoint.hub import hub_answers, is_hub_id, why_no_hub
from linearize.data.limits import limited
from linearize.data.samples import SAMPLES
from linearize.data.text_files import json_rows, text_documents
from linearize.errors import CheckpointError, ConfigError, one_line

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
# rows among which the next one is chosen at random
SHUFFLE_BUFFER = 2000
# rows that one call of the tokenizer spreads over the cores
TOKENISED_TOGETHER = 64
# bounds of one rendering of a chat template, which is a program; characters of its result
TEMPLATE_SECONDS, TEMPLATE_BYTES, LONGEST_CHAT = 10.0, 1 << 30, 16 * 1024**2
# characters of an error of a library that a message shows
LONGEST_REASON = 200
# the prompt of a model without a chat template
ALPACA_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"

Row = dict[str, Any]
Message = dict[str, Any]


class ChatError(ConfigError):
    """Messages that cannot be turned into one text."""


class Document(NamedTuple):
    """Token ids of one document, and for each token whether the loss may count it."""

    ids: list[int]
    counted: list[bool]


def data_fingerprint(datasets: list[str]) -> str:
    """Return a hash that changes with a dataset's name and with the bytes of a local file or of a folder's files."""
    return fingerprint_of([[name, _local_fingerprint(_local_path(name))] for name in datasets])


def _local_path(name: str) -> Path:
    """Return the path that a dataset's name stands for, if it is one of this machine."""
    return SAMPLES.get(name, Path(name).expanduser())


def _local_fingerprint(path: Path) -> Any:
    """Hash a file, or the files of a folder; None for a path that does not exist."""
    if path.is_dir():
        return [[file.name, sha256(file)] for file in _parquet_files(path)]
    return sha256(path) if path.is_file() else None


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def check_dataset(name: str) -> None:
    """Refuse a name that stands for no dataset, without opening it and without the libraries that take seconds.

    Raises:
        ConfigError: no such file and no hub id, an unknown file type, an empty file, or a folder without rows.
    """
    path = _local_path(name)
    if path.is_file():
        if _suffix(path) not in FORMATS:
            raise ConfigError(f"--data: got '{name}', allowed file types are {', '.join(FORMATS)} (also compressed)")
        if path.stat().st_size == 0:
            raise ConfigError(f"--data: {name} is empty")
    elif path.is_dir():
        if not _parquet_files(path):
            raise ConfigError(f"--data: the folder {name} holds no .parquet files")
    elif _suffix(Path(name)) in FORMATS or name.count("/") != 1 or not is_hub_id(name):
        raise ConfigError(
            f"--data: no file '{name}'; allowed are {', '.join(SAMPLES)}, a file, or a hub id (owner/name)"
        )


def open_dataset(name: str) -> "IterableDataset":
    """Open a dataset as a stream of rows.

    Raises:
        ConfigError: no such file or hub dataset, an unknown file type, or a damaged file.
        CheckpointError: the hub does not answer.
    """
    check_dataset(name)
    with _read_errors(name):
        path = _local_path(name)
        if path.is_file():
            return _open_file(path)
        if path.is_dir():
            return _open_folder(path)
        return _open_from_hub(name)


@contextlib.contextmanager
def _read_errors(name: str) -> Iterator[None]:
    """Name the dataset in every error. A damaged file surfaces in the middle of reading, as some library's error."""
    try:
        yield
    except ChatError as error:
        raise ConfigError(f"--data: {name}: {error}") from None
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:
        raise ConfigError(f"--data: {name} cannot be read: {one_line(error, LONGEST_REASON)}") from None


def _suffix(path: Path) -> str:
    """Return the suffix of a file's format, without that of the compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _open_file(path: Path) -> "IterableDataset":
    """Open a file as one stream of rows."""
    suffix = _suffix(path)
    if FORMATS[suffix] == "parquet":
        return _stream("parquet", [path])
    rows = text_documents if FORMATS[suffix] == "text" else json_rows
    return _import_datasets().IterableDataset.from_generator(rows, gen_kwargs={"path": str(path)})


def _open_folder(folder: Path) -> "IterableDataset":
    """Open the .parquet files of a folder, in the order of their names, as one stream."""
    return _stream("parquet", _parquet_files(folder))


def _stream(file_format: str, files: list[Path], **options: Any) -> "IterableDataset":
    """Open files of one format. Their names are escaped, since the library takes them for patterns."""
    names = [glob.escape(str(file)) for file in files]
    return _import_datasets().load_dataset(file_format, data_files=names, split="train", streaming=True, **options)


def _open_from_hub(name: str) -> "IterableDataset":
    """Open a dataset of the hub, once the hub has answered: the library itself would wait long for it."""
    if not hub_answers():
        raise CheckpointError(f"--data: no file '{name}' here, and {why_no_hub()}; give a file, or sample")
    try:
        return _import_datasets().load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the library raises its own errors and those of its file systems
        reason = one_line(error, LONGEST_REASON)
        raise ConfigError(f"--data: cannot load '{name}' from the hub: {reason}") from None


def _import_datasets() -> ModuleType:
    """Import the library late, since it takes most of a second; a wrong name fails without it."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a local file concerns no hub
    return datasets


def read_documents(
    dataset: str, tokenizer: "PreTrainedTokenizerBase", *, text_field: str, completion_only: bool, seed: int | None
) -> Iterator[Document]:
    """Read a dataset document by document, each ending with the end-of-sequence token.

    Args:
        text_field: the field of a row that holds its text.
        completion_only: count only the tokens of a conversation's last answer.
        seed: shuffles the rows; None keeps their order.

    Raises:
        ConfigError: a row without any of the known fields, or messages that the chat template refuses; and as
            `open_dataset`.
    """
    stream = open_dataset(dataset)
    with _read_errors(dataset):
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        numbered = enumerate(stream)
        while rows := list(itertools.islice(numbered, TOKENISED_TOGETHER)):
            for prompt_length, ids in _tokenise(rows, dataset, tokenizer, text_field):
                _require_embedded(ids, tokenizer)
                yield _document(ids, prompt_length if completion_only else 0, tokenizer.eos_token_id)


def _require_embedded(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse tokens that the model has no embedding for; `read_tokenizer` notes their number on the tokenizer."""
    embedded = getattr(tokenizer, "embedded_tokens", None)
    if embedded is not None and ids and max(ids) >= embedded:
        raise CheckpointError(f"the tokenizer makes token {max(ids)}, the model has {embedded}; is it another model's?")


def _document(ids: list[int], uncounted: int, end_token: int | None) -> Document:
    """Return a document that ends with the end token and whose first `uncounted` tokens do not count."""
    if end_token is not None and (not ids or ids[-1] != end_token):
        ids = [*ids, end_token]
    return Document(ids, [position >= uncounted for position in range(len(ids))])


def _tokenise(
    rows: list[tuple[int, Row]], dataset: str, tokenizer: "PreTrainedTokenizerBase", text_field: str
) -> Iterator[tuple[int, list[int]]]:
    """Yield the prompt's length and the token ids of every numbered row that is not blank.

    All plain text goes to the tokenizer in one call, which it spreads over the cores.
    """
    texts = [row[text_field] for _, row in rows if isinstance(row.get(text_field), str)]
    ids_of_texts = iter(tokenizer(texts).input_ids if texts else [])
    for number, row in rows:
        if isinstance(row.get(text_field), str):
            yield 0, next(ids_of_texts)
        elif messages := _messages_of(row):
            prompt, ids = _tokenise_chat(messages, tokenizer)
            yield len(prompt), ids
        elif not _is_blank(row, text_field):
            raise ConfigError(
                f"--data: row {number} of {dataset} has the fields {', '.join(row) or 'none'}; needed is "
                f"'{text_field}' (text), 'messages', or 'instruction' and 'output'"
            )


def _messages_of(row: Row) -> list[Message] | None:
    """Return the conversation of a row: its `messages`, or its instruction and output as two of them."""
    if row.get("messages") and isinstance(row["messages"], list):
        return row["messages"]
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        request = row["instruction"]
        if row.get("input"):
            request += f"\n\n{row['input']}"
        return [{"role": "user", "content": request}, {"role": "assistant", "content": row["output"]}]
    return None


def _is_blank(row: Row, text_field: str) -> bool:
    """Return True for a row that has a known field without content."""
    return row.get(text_field, "") is None or row.get("messages", "") in (None, [])


def _tokenise_chat(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, and of the prompt with the answer.

    The answer is the assistant's last turn, and the prompt all before it with the opening of the answer. Turns behind
    the answer are left out.
    """
    answers = [number for number, turn in enumerate(messages) if turn.get("role") == "assistant"]
    if answers:
        messages = messages[: answers[-1] + 1]
    if not tokenizer.chat_template:
        return _tokenise_alpaca(messages, tokenizer)
    prompt = chat_text(tokenizer, messages[:-1], add_generation_prompt=True) if messages[:-1] else ""
    conversation = chat_text(tokenizer, messages).rstrip("\n")
    ids_of_prompt, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, conversation))
    return ids_of_prompt, ids


def _tokenise_alpaca(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Do the same with Alpaca's prompt, for a tokenizer without a chat template."""
    for turn in messages:
        if not isinstance(turn.get("content"), str):
            raise ChatError(
                f"a turn of the {turn.get('role')} is {turn.get('content')!r}; without a chat template it has to be "
                "text"
            )
    *earlier, answer = (turn["content"] for turn in messages)
    prompt = ALPACA_PROMPT.format(instruction="\n\n".join(earlier))
    return prompt_tokens(tokenizer, prompt), tokenizer(prompt + answer).input_ids


def chat_text(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], *, add_generation_prompt: bool = False
) -> str:
    """Render messages with the tokenizer's chat template.

    Raises:
        ChatError: the template refuses them.
    """
    try:
        with limited(TEMPLATE_SECONDS, TEMPLATE_BYTES):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template refuses in its own words, with exceptions of jinja
        roles = ", ".join(str(turn.get("role")) for turn in messages)
        reason = one_line(error, LONGEST_REASON) or type(error).__name__
        raise ChatError(f"the chat template refuses turns of {roles[:LONGEST_REASON]}: {reason}") from None
    if not isinstance(text, str) or len(text) > LONGEST_CHAT:
        raise ChatError(f"the chat template makes no text of at most {LONGEST_CHAT:,} characters of them")
    return text


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokenise a text that is to be continued, without the end token that some tokenizers append to every text."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
