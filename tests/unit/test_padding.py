"""Padding is not there, wherever it stands: no slot of a window, no sink, no place in a state."""

import pytest
import torch
from helpers import LOUD, STRUCTURES, plan_for, tiny_base, tiny_student, tokens

from linearize.mixers.registry import MIXERS
from linearize.plan import NO_BRANCH, LayerPlan, Plan

TOKENS = 60
# stretches of padding in the rows of a batch
HOLES = {
    "between": [(10, 25), (30, 31)],
    "right": [(45, 60)],
    "left, and longer than the window": [(0, 31)],
    "everywhere": [(0, 3), (5, 6), (8, 20), (33, 50), (59, 60)],
    "none": [],
}
# the second chunk is a turn that begins with padding; later ones end with it, are nothing else, or are single tokens
CHUNKS = {"at once": (60,), "turns": (24, 36), "pieces": (7, 3, 1, 1, 12, 2, 1, 23, 1, 9)}


def holey_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and positions [B, T] of rows with padding in all kinds of places."""
    mask = torch.ones(len(HOLES), TOKENS, dtype=torch.long)
    for row, holes in enumerate(HOLES.values()):
        for start, end in holes:
            mask[row, start:end] = 0
    return tokens(len(HOLES), TOKENS), mask, (mask.cumsum(-1) - 1).clamp(min=0)


def require_rows_as_if_alone(student, chunks: tuple[int, ...], use_cache: bool = True) -> None:
    """Compare every token of the rows with the same row without padding."""
    ids, mask, positions = holey_rows()
    cache, pieces = None, []
    for end, length in zip(torch.tensor(chunks).cumsum(0).tolist(), chunks):
        new = slice(end - length, end)
        output = student(
            ids[:, new], attention_mask=mask[:, :end], position_ids=positions[:, new], past_key_values=cache,
            use_cache=use_cache,
        )  # fmt: skip
        cache = output.past_key_values
        pieces.append(output.logits)
    logits = torch.cat(pieces, 1)
    for row, name in enumerate(HOLES):
        seen = mask[row].bool()
        alone = student(ids[row, seen][None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, seen], alone, rtol=2e-4, atol=2e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("chunks", list(CHUNKS))
@pytest.mark.parametrize("mix", ["outside", "windows", "sum", NO_BRANCH])
@pytest.mark.parametrize("shape", ["gqa", "mqa_tied"])
def test_padding_anywhere_changes_nothing(shape, mix, chunks):
    base = tiny_base(shape)
    require_rows_as_if_alone(tiny_student(plan_for(mix, base.config.num_key_value_heads), base), CHUNKS[chunks])


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "mix"), [*((case, mix) for case in STRUCTURES for mix in ("outside", "sum")), ("vq", "joint")]
)
def test_no_structure_sees_padding(case, mix):
    mixer, options = STRUCTURES[case]
    if mix not in MIXERS[mixer].mixes:
        pytest.skip(f"{mixer} has no mix {mix}")
    loud = LOUD if mix == "outside" and MIXERS[mixer].positive else {}
    plan = LayerPlan((), mixer, window=6, sinks=2, mix=mix, mixer_options=options, mix_options=loud)
    student = tiny_student(Plan("llama", (plan,)), tiny_base("gqa", num_hidden_layers=1))
    for chunks in CHUNKS.values():
        require_rows_as_if_alone(student, chunks)


@pytest.mark.parametrize("mix", ["outside", "sum"])
def test_padding_inside_a_row_has_no_part_in_gradients(mix):
    student = tiny_student(plan_for(mix, 3), tiny_base("gqa"))
    ids, mask, positions = holey_rows()
    gradients = []
    parameters = [p for p in student.parameters() if p.requires_grad]
    rows = [ids[row, mask[row].bool()][None] for row in range(len(ids))]
    padded = student(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    alone = torch.cat([student(row, use_cache=False).logits[0] for row in rows])
    for logits in (padded, alone):
        loss = logits.square().sum()
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_second_turn_of_a_batched_conversation():
    """Cache 40 tokens, then 21 of padding and 50 more: the same as one forward over the 90."""
    student = tiny_student(plan_for("outside", 3), tiny_base("gqa", max_position_embeddings=128))
    ids = tokens(2, 90)
    mask = torch.ones(2, 111, dtype=torch.long)
    mask[:, 40:61] = 0
    cache = student(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
    second = torch.cat([torch.zeros(2, 21, dtype=torch.long), ids[:, 40:]], 1)
    for positions in ((mask.cumsum(-1) - 1)[:, 40:], None):
        copy = student(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
        output = student(
            second, attention_mask=mask, position_ids=positions, past_key_values=copy, use_cache=True
        ).logits[:, 21:]
        torch.testing.assert_close(output, student(ids, use_cache=False).logits[:, 40:], rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_generation_goes_on_behind_padding():
    student = tiny_student(plan_for("outside", 3), tiny_base("gqa", max_position_embeddings=128))
    ids, mask, _ = holey_rows()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    together = student.generate(ids, attention_mask=mask, **options)[:, TOKENS:]
    for row in range(len(ids)):
        if mask[row, -1]:  # generation goes on from the last token
            alone = student.generate(ids[row, mask[row].bool()][None], **options)[0, int(mask[row].sum()) :]
            assert together[row].tolist() == alone.tolist()
