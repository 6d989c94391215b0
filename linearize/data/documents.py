"""Training text: reading documents, tokenising, and packing rows whose documents do not see one another.

A dataset is the name `sample`, a file (.txt, .jsonl, .json, .parquet, each also compressed) or a hub id. Its rows hold a
text field, `instruction`/`input`/`output`, or `messages` for the chat template; rows whose text is null, or that have no
messages, are passed over. Reading streams, so size does not matter.
"""

import contextlib
import glob
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import fingerprint_of, sha256
from linearize.data.samples import SAMPLES
from linearize.errors import CheckpointError, ConfigError, one_line

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
SHUFFLE_BUFFER = 2000
TOKENISED_TOGETHER = 64
# characters of a text file that are one document and held in memory at once
LONGEST_TEXT = 4 * 1024**2
ALPACA_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"


class ChatError(ConfigError):
    """Messages that cannot be made into one text."""


def data_fingerprint(datasets: list[str]) -> str:
    """Changes when a dataset's name, or the bytes of a local file or of a folder's files, change."""
    return fingerprint_of([[name, _local_fingerprint(SAMPLES.get(name, Path(name).expanduser()))] for name in datasets])


def _local_fingerprint(path: Path) -> Any:
    if path.is_dir():
        return [[file.name, sha256(file)] for file in _parquet_files(path)]
    return sha256(path) if path.is_file() else None


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def open_dataset(name: str) -> Any:
    """A stream of rows (datasets.IterableDataset).

    Raises:
        ConfigError: no such file or hub dataset, an unknown file type, a damaged file. CheckpointError: the hub does not
            answer.
    """
    with _read_errors(name):
        return _open(name)


@contextlib.contextmanager
def _read_errors(name: str) -> Iterator[None]:
    """A damaged file surfaces wherever its reader stumbles."""
    try:
        yield
    except ChatError as error:
        raise ConfigError(f"--data: {name}: {error}") from None
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:
        raise ConfigError(f"--data: {name} cannot be read: {one_line(error, 200)}") from None


def _open(name: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    path = SAMPLES.get(name, Path(name).expanduser())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    if path.is_file():
        if suffix not in FORMATS:
            raise ConfigError(f"--data: got '{name}', allowed file types are {', '.join(FORMATS)} (also compressed)")
        if path.stat().st_size == 0:
            raise ConfigError(f"--data: {name} is empty")
        if FORMATS[suffix] == "text" and path.suffix not in COMPRESSIONS and path.stat().st_size > LONGEST_TEXT:
            return datasets.IterableDataset.from_generator(_pieces, gen_kwargs={"path": str(path)})
        options = {"sample_by": "document"} if FORMATS[suffix] == "text" else {}
        name = glob.escape(str(path))
        return datasets.load_dataset(FORMATS[suffix], data_files=name, split="train", streaming=True, **options)
    if path.is_dir():
        files = [glob.escape(str(file)) for file in _parquet_files(path)]
        if not files:
            raise ConfigError(f"--data: the folder {name} holds no .parquet files")
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    if suffix in FORMATS or name.count("/") != 1:
        raise ConfigError(
            f"--data: no file '{name}'; allowed are {', '.join(SAMPLES)}, a file, or a hub id (owner/name)"
        )
    from linearize.checkpoint.hub import hub_answers, why_no_hub

    if not hub_answers():
        raise CheckpointError(f"--data: no file '{name}' here, and {why_no_hub()}; give a file, or sample")
    try:
        return datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the library raises its own and its file systems' errors
        raise ConfigError(f"--data: cannot load '{name}' from the hub: {one_line(error, 200)}") from None


def _pieces(path: str) -> Iterator[dict[str, str]]:
    """A long text file in documents of LONGEST_TEXT characters and what is left of the line."""
    with open(path, encoding="utf-8", newline="") as file:
        while piece := file.read(LONGEST_TEXT):
            yield {"text": piece + file.readline()}


def documents(dataset: str, tokenizer, *, text_field: str, completion_only: bool, seed: int | None) -> Iterator[tuple]:
    """Token ids and which of them count, document by document: ([T], [T] bool). Shuffled unless seed is None."""
    with _read_errors(dataset):
        rows = _open(dataset)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        rows = enumerate(rows)
        while some := list(itertools.islice(rows, TOKENISED_TOGETHER)):
            yield from _tokenise(some, dataset, tokenizer, text_field, completion_only)


def _tokenise(
    rows: list[tuple[int, dict]], dataset: str, tokenizer, text_field: str, completion_only: bool
) -> Iterator[tuple]:
    """Numbered rows as documents; all plain text at once, which a tokenizer shares out over the cores."""
    texts = [row[text_field] for _, row in rows if isinstance(row.get(text_field), str)]
    of_text = iter(tokenizer(texts).input_ids if texts else [])
    for number, row in rows:
        if isinstance(row.get(text_field), str):
            prompt, ids = [], next(of_text)
        elif row.get("messages") and isinstance(row["messages"], list):
            prompt, ids = _chat(row["messages"], tokenizer)
        elif isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
            request = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
            turns = [{"role": "user", "content": request}, {"role": "assistant", "content": row["output"]}]
            prompt, ids = _chat(turns, tokenizer)
        elif row.get(text_field, "") is None or row.get("messages", "") in (None, []):
            continue
        else:
            raise ConfigError(
                f"--data: row {number} of {dataset} has the fields {', '.join(row) or 'none'}; needed is '{text_field}' "
                "(text), 'messages', or 'instruction' and 'output'"
            )
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        yield ids, [not completion_only or i >= len(prompt) for i in range(len(ids))]


def _chat(messages: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of all turns before the assistant's last, with its opening, and of the conversation up to its end."""
    answers = [i for i, turn in enumerate(messages) if turn.get("role") == "assistant"]
    messages = messages[: answers[-1] + 1 if answers else None]
    if not tokenizer.chat_template:
        for turn in messages:
            if not isinstance(turn.get("content"), str):
                raise ChatError(
                    f"a turn of the {turn.get('role')} is {turn.get('content')!r}; without a chat template it has to be text"
                )
        prompt = "\n\n".join(turn["content"] for turn in messages[:-1])
        prompt = ALPACA_PROMPT.format(instruction=prompt)
        return prompt_tokens(tokenizer, prompt), tokenizer(prompt + messages[-1]["content"]).input_ids
    prompt = ""
    if messages[:-1]:
        prompt = chat_text(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = chat_text(tokenizer, messages).rstrip("\n")
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    return tokenizer(prompt, add_special_tokens=False).input_ids, ids


def chat_text(tokenizer, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
    """Messages through the tokenizer's chat template.

    Raises:
        ChatError: the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template's own words, by jinja's exceptions
        roles = ", ".join(str(turn.get("role")) for turn in messages)
        raise ChatError(f"the chat template refuses turns of {roles}: {one_line(error, 200)}") from None


def prompt_tokens(tokenizer, text: str) -> list[int]:
    """Token ids of a text that is to be continued: without the end that some tokenizers put behind every text."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
