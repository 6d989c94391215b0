"""Train a small model of a family from scratch on the packaged sample, and write a checkpoint with a tokenizer.

    python scripts/train_tiny.py qwen3 tiny-qwen3
    python scripts/train_tiny.py gpt_neox tiny-neox --minutes 6

It serves families that have no checkpoint at hand: not a good model, but far from random, so that recovery after
conversion means something. It stops when the minutes are over, and prints the held-out loss beside a unigram model's.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from linearize.data.samples import SAMPLES

# small enough that a CPU takes several steps a second
VOCABULARY, LENGTH, BATCH, WARMUP = 1024, 512, 2, 50
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "max_position_embeddings": LENGTH, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": True},
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def main() -> None:
    """Train tokenizer and model, write them, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, held_out = (texts(name) for name in ("sample", "sample-eval"))
    tokenizer = train_tokenizer(train)
    ids, held_out_ids = (torch.tensor(tokenizer("\n".join(part))["input_ids"]) for part in (train, held_out))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(arguments.family, **SHAPE, **FAMILIES[arguments.family])
    )
    steps = fit(model, ids, minutes=arguments.minutes, lr=arguments.lr)
    loss, unigram = held_out_loss(model, held_out_ids), unigram_loss(ids, held_out_ids)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(
        f"{arguments.out}: {arguments.family}, {model.num_parameters():,} parameters, "
        f"{steps} steps of {BATCH * LENGTH} tokens; "
        f"held-out loss {loss:.3f} nats a token, a unigram model's {unigram:.3f}"
    )


def texts(sample: str) -> list[str]:
    """Return the documents of a packaged sample."""
    return [json.loads(line)["text"] for line in SAMPLES[sample].read_text(encoding="utf-8").splitlines()]


def train_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def fit(model: PreTrainedModel, ids: torch.Tensor, *, minutes: float, lr: float) -> int:
    """Train with AdamW on random windows while the learning rate falls with the remaining time; return the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    start, step = time.monotonic(), 0
    while (used := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * used)) / 2)
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        rows = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {used:.0%} of the time", flush=True)
    return step


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the model's loss on the first 64 windows of the held-out text, in nats a token."""
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:64]
    return model.eval()(input_ids=rows, labels=rows, use_cache=False).loss.item()


def unigram_loss(ids: torch.Tensor, held_out: torch.Tensor) -> float:
    """Return the loss of the training text's token frequencies, with one added to each count (Laplace)."""
    counts = torch.bincount(ids, minlength=VOCABULARY).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()


if __name__ == "__main__":
    main()
