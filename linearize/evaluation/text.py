"""Read the evaluation text as one row of token ids, and record where it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize.errors import ConfigError
from linearize.evaluation.registry import MEASUREMENTS
from linearize.evaluation.suite import Suite
from linearize.report.comparison import OlderResults, check_comparable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def read_evaluation_text(
    suite: Suite, tokenizer: Any, older: OlderResults | None, dtype: torch.dtype, device: str
) -> tuple[Tensor, dict[str, Any]]:
    """Read the text and record it for the report.

    Returns:
        Token ids [N], and `Results.data`.

    Raises:
        ConfigError: the text is too short, or older results come from another text.
    """
    text = text_ids_of(suite, tokenizer)
    data = _data_record(suite, text, dtype, device)
    if older is not None:
        check_comparable(older, data)
    return text, data


def text_ids_of(suite: Suite, tokenizer: Any) -> Tensor:
    """Tokenize the evaluation texts into one row [N], documents joined by an end-of-sequence token.

    One text comes as it is read. Of several texts each gives an equal share of the tokens that the suite needs. What a
    short text lacks, the longer ones make up for.

    Raises:
        ConfigError: there are fewer tokens than the longest window.
    """
    import torch

    longest = max(2, *(measurement.window_tokens(suite) for measurement in MEASUREMENTS.values()))
    needed = max(longest, *(measurement.text_tokens(suite) for measurement in MEASUREMENTS.values()))
    texts = [_token_ids(name, tokenizer, suite.text_field, needed) for name in suite.data]
    ids = texts[0] if len(texts) == 1 else _equal_shares(texts, needed)
    if len(ids) < longest:
        raise ConfigError(
            f"--data: {', '.join(suite.data)} hold {len(ids)} tokens, fewer than one window of {longest} (--lengths)"
        )
    return torch.tensor(ids)


def _token_ids(name: str, tokenizer: Any, text_field: str, needed: int) -> list[int]:
    """Tokenize whole documents of a text until there are `needed` tokens."""
    from linearize.data.documents import read_documents

    ids: list[int] = []
    for document in read_documents(name, tokenizer, text_field=text_field, completion_only=False, seed=None):
        ids += document.ids
        if len(ids) >= needed:
            break
    return ids


def _equal_shares(texts: list[list[int]], needed: int) -> list[int]:
    """Join the beginnings of the texts, `needed` tokens in all, from every text as many as it has of an equal share."""
    remaining = needed
    shares: dict[int, int] = {}
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        equal_share = -(-remaining // (len(texts) - len(shares)))  # rounded up
        shares[i] = min(len(texts[i]), equal_share)
        remaining -= shares[i]
    return [token for i, text in enumerate(texts) for token in text[: shares[i]]]


def _data_record(suite: Suite, text_ids: Tensor, dtype: torch.dtype, device: str) -> dict[str, Any]:
    from linearize.data.documents import data_fingerprint

    return {
        "text": ", ".join(suite.data),
        "text fingerprint": data_fingerprint(list(suite.data))[:16],
        "tokens per length": min(suite.max_tokens, text_ids.numel()),
        "recall rows per distance": suite.recall_rows,
        "precision": f"{str(dtype).removeprefix('torch.')} on {device}",
    }
