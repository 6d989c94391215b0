"""Read the evaluation text as one row of token ids, and record where it came from."""

from typing import Any

from linearize.errors import ConfigError
from linearize.evaluation.suite import Suite
from linearize.report.gates import check_comparable


def read_evaluation_text(suite: Suite, tokenizer, older: dict | None, dtype, device: str):
    """The token ids of the text, and what the report says of it, which must fit that of the older results."""
    text = text_ids_of(suite, tokenizer)
    data = _data_record(suite, text, dtype, device)
    if older is not None:
        check_comparable(older, data)
    return text, data


def text_ids_of(suite: Suite, tokenizer):
    """The evaluation text as one row of token ids, documents joined by an end-of-sequence token."""
    import torch

    from linearize.data.documents import read_documents

    longest = max([16 if suite.parity else 2, *suite.lengths, *suite.passkey])
    needed = max(suite.max_tokens, longest, suite.passkey_rows * max(suite.passkey, default=0))
    texts: list[list[int]] = []
    for name in suite.data:
        texts.append([])
        for document, _ in read_documents(
            name, tokenizer, text_field=suite.text_field, completion_only=False, seed=None
        ):
            texts[-1] += document
            if len(texts[-1]) >= needed:
                break
    ids = texts[0]
    if len(texts) > 1:  # each its share, and of what the short ones lack the others' more
        left, shares = needed, {}
        for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
            shares[i] = min(len(texts[i]), -(-left // (len(texts) - len(shares))))
            left -= shares[i]
        ids = [token for i, text in enumerate(texts) for token in text[: shares[i]]]
    if len(ids) < longest:
        raise ConfigError(
            f"--data: {', '.join(suite.data)} hold {len(ids)} tokens, fewer than one window of {longest} (--lengths)"
        )
    return torch.tensor(ids)


def _data_record(suite: Suite, text_ids, dtype, device: str) -> dict[str, Any]:
    from linearize.data.documents import data_fingerprint

    return {
        "text": ", ".join(suite.data),
        "text fingerprint": data_fingerprint(list(suite.data))[:16],
        "tokens per length": min(suite.max_tokens, text_ids.numel()),
        "recall rows per distance": suite.recall_rows,
        "precision": f"{str(dtype).removeprefix('torch.')} on {device}",
    }
