"""The linearized model against a plain loop and its base: cached, padded, packed, batched and reloaded."""

import copy
import itertools
from dataclasses import replace

import accelerate
import pytest
import torch
from helpers import LOUD, SHAPES, plan_for, tiny_base, tiny_student, tokens
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from linearize.mixers.registry import MIXERS
from linearize.plan import NO_BRANCH, LayerPlan, Plan


@pytest.fixture(params=["outside", "windows", "sum", NO_BRANCH])
def mix(request):
    return request.param


@pytest.fixture(params=list(SHAPES))
def pair(request, mix):
    """(base, student) of one shape and one mix."""
    base = tiny_base(request.param)
    return base, tiny_student(plan_for(mix, base.config.num_key_value_heads), base)


def loop_attention(q, k, v, q_rotary, k_rotary, plan: LayerPlan, scale: float, log_mass: float, normalizer: float):
    """One head of methods.md, a token at a time in float64. All inputs [T, K]; returns [T, K]."""
    outputs = []
    W = plan.window
    log_decay = (torch.nn.functional.logsigmoid(k) / normalizer).cumsum(0)
    for t in range(len(q)):
        window = list(range(max(0, t - W + 1), t + 1))
        keys = [j for j in range(plan.sinks) if j <= t - W] + window
        weights = torch.softmax(torch.stack([q_rotary[t] @ k_rotary[j] * scale for j in keys]), 0)
        windowed = sum(w * v[j] for w, j in zip(weights, keys))
        last = t if plan.mix == "sum" else t - W
        past = [j for j in range(last + 1) if plan.mix == "sum" or j >= plan.sinks]
        numerator, mass = torch.zeros_like(v[0]), torch.zeros((), dtype=v.dtype)
        for j in past:
            decay = log_decay[last] - log_decay[j]  # of the tokens after j
            f = (torch.softmax(q[t], -1) * torch.softmax(k[j], -1) * decay.exp()).sum()
            numerator, mass = numerator + f * v[j], mass + f
        if plan.mix == "sum":
            outputs.append(0.5 * windowed + 0.5 * numerator)
        else:
            c = torch.tensor(log_mass, dtype=v.dtype).exp()
            outputs.append((windowed + c * numerator) / (1 + c * mass))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "layer",
    [
        LayerPlan((), window=8, sinks=2, mix="outside", mix_options=LOUD),
        LayerPlan((), window=5, sinks=0, mix="outside", mix_options=LOUD, mixer_options={"gate_logit_normalizer": 4.0}),
        LayerPlan((1,), window=8, sinks=2, mix="outside", mix_options=LOUD),
        # configs/liger: 64 earlier keys and self, no sinks, halves, gate / 16
        LayerPlan((), window=65, sinks=0, mix="sum"),
        LayerPlan((2,), window=7, sinks=3, mix="sum"),
        LayerPlan((0, 2), window=7, sinks=3, mix="outside", mix_options=LOUD, softmax_window=12),
    ],
)
def test_attention_equals_a_plain_loop(layer):
    base = tiny_base("gqa", num_hidden_layers=1)
    student = tiny_student(Plan("llama", (layer,)), base).double()
    attention, reference = student.model.layers[0].self_attn, base.double().model.layers[0].self_attn
    T = layer.window + 20
    hidden = torch.randn(1, T, base.config.hidden_size, dtype=torch.float64)
    rotary = base.model.rotary_emb(hidden, position_ids=torch.arange(T)[None])
    with torch.no_grad():
        got, _ = attention(hidden, position_embeddings=rotary, attention_mask=None)
        q, k, v = (
            p(hidden).view(1, T, -1, reference.head_dim).transpose(1, 2)
            for p in (reference.q_proj, reference.k_proj, reference.v_proj)
        )
        q_rotary, k_rotary = apply_rotary_pos_emb(q, k, *rotary)
        group = base.config.num_attention_heads // base.config.num_key_value_heads
        heads = []
        for h in range(base.config.num_attention_heads):
            j = h // group
            if j in layer.softmax_heads:
                scores = q_rotary[0, h] @ k_rotary[0, j].T * reference.scaling
                seen = torch.ones(T, T, dtype=torch.bool).tril()
                if layer.softmax_window is not None:
                    seen &= torch.ones(T, T, dtype=torch.bool).triu(1 - layer.softmax_window)
                    seen[:, : layer.sinks] = torch.ones(T, layer.sinks, dtype=torch.bool).tril()
                scores = scores.masked_fill(~seen, float("-inf"))
                heads.append(scores.softmax(-1) @ v[0, j])
            else:
                heads.append(
                    loop_attention(
                        q[0, h],
                        k[0, j],
                        v[0, j],
                        q_rotary[0, h],
                        k_rotary[0, j],
                        layer,
                        reference.scaling,
                        log_mass=layer.mix_options.get("log_mass", 0.0),
                        normalizer=layer.mixer_options.get("gate_logit_normalizer", 16.0),
                    )
                )
        wanted = reference.o_proj(torch.stack(heads, 1).flatten(1)[None])
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_softmax_everywhere_is_the_base(pair):
    base, student = pair
    ids = tokens()
    reference = base(ids).logits
    everywhere = tiny_student(student.config.plan.keep_all_softmax(base.config.num_key_value_heads), base)
    assert torch.equal(everywhere(ids).logits, reference)
    with student.softmax_attention():
        assert torch.equal(student(ids).logits, reference)
    assert not torch.equal(student(ids).logits, reference)


@torch.no_grad()
@pytest.mark.parametrize(
    "chunks",
    [[40], [1] * 40, [3] * 13 + [1], [20, 20], [9, 1, 1, 12, 17], [39, 1], [12, *[1] * 15, 5, *[1] * 8]],
)
def test_cached_decode_equals_full_forward(pair, chunks):
    _, student = pair
    ids = tokens()
    full = student(ids, use_cache=False).logits
    cache, pieces = None, []
    for piece in ids.split(chunks, dim=1):
        output = student(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-5)


def test_single_tokens_are_written_in_place_where_that_is_allowed():
    base = tiny_base("gqa", num_hidden_layers=1)
    student = tiny_student(Plan("llama", (LayerPlan((), mixer="vq", window=8, sinks=2),)), base)
    ids = tokens(1)
    full = student(ids, use_cache=False).logits
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for first, then in itertools.product(modes, modes):
        with first():
            output = student(ids[:, :20], use_cache=True)
        held = output.past_key_values.layers[0].linear_cache
        before, pieces = held.keys, [output.logits]
        with then():
            for piece in ids[:, 20:].split(1, dim=1):
                pieces.append(student(piece, past_key_values=output.past_key_values, use_cache=True).logits)
        torch.testing.assert_close(torch.cat([x.detach() for x in pieces], 1), full.detach(), rtol=1e-4, atol=1e-5)
        # not under gradients, and not what gradients or inference mode have made
        assert (held.keys is before) == (then != torch.enable_grad and first in (torch.no_grad, then)), (first, then)
    pieces[-1].sum().backward()


def test_softmax_heads_take_tokens_in_place_where_that_is_allowed(monkeypatch):
    from linearize.modeling import cache as module

    monkeypatch.setattr(module, "SPARE", 6)
    plan = Plan("llama", (LayerPlan((0,), mixer="vq", window=8, sinks=2),) * 3)
    student = tiny_student(plan, tiny_base("gqa"))
    ids = tokens(2)
    full = student(ids, use_cache=False).logits.detach()
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for first, then in itertools.product(modes, modes):
        with first():
            output = student(ids[:, :20], use_cache=True)
        cache, pieces, rooms = output.past_key_values, [output.logits.detach()], []
        for step, piece in enumerate(ids[:, 20:].split(1, dim=1)):
            if step == 15 and then != torch.enable_grad:
                other, cache = cache, copy.deepcopy(cache)
                with then():
                    student(tokens(2, 1), past_key_values=other, use_cache=True)
                    cache.reorder_cache(torch.tensor([0, 1]))
            with then():
                pieces.append(student(piece, past_key_values=cache, use_cache=True).logits.detach())
            layer = cache.layers[0]
            rooms.append(layer.buffers and layer.buffers[0].data_ptr())
            held = layer.buffers or (layer.keys, layer.values)
            assert layer.nbytes() == sum(x.nbytes for x in held) + _nbytes(layer.linear_cache)
        torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-5)
        if then == torch.enable_grad:
            assert not any(rooms), first
        else:  # the first of 7 tokens makes room for 6 others; what another mode has made is copied once more
            made = rooms[first not in (torch.no_grad, then) :]
            assert all(made) and len(set(made[:7])) == 1 and made[7] != made[6], first


def _nbytes(cache) -> int:
    return sum(x.nbytes for x in cache.tensors())


@pytest.mark.parametrize(
    ("trained", "plan"),
    [
        ("v_proj", LayerPlan((), NO_BRANCH, window=4, sinks=0, mix=NO_BRANCH)),
        ("gate_projection", LayerPlan((), "gla", window=4, sinks=0, gate="learned", mix_options=LOUD)),
    ],
)
def test_what_has_left_the_window_has_left_the_graph(trained, plan):
    student = tiny_student(Plan("llama", (plan,)), tiny_base("gqa", num_hidden_layers=1)).double()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trained in name)
    ids, gradients = tokens(1), []
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            cache = student(ids[:, :8], use_cache=True).past_key_values
        with torch.no_grad():
            for piece in ids[:, 8:16].split(1, dim=1):
                student(piece, past_key_values=cache, use_cache=True)
        held = cache.layers[0].linear_cache
        held.recurrent_state = None if held.recurrent_state is None else held.recurrent_state.detach()
        loss = student(ids[:, 16:17], past_key_values=cache, use_cache=True).logits.square().sum()
        parameters = [p for p in student.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["outside", NO_BRANCH])
def test_a_prefill_under_autocast_decodes_without(plan):
    student = tiny_student(plan_for(plan, 2), tiny_base("gqa"))
    ids = tokens(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = student(ids[:, :20], use_cache=True)
    pieces = [
        student(piece, past_key_values=output.past_key_values, use_cache=True).logits
        for piece in ids[:, 20:].split(1, dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), student(ids, use_cache=False).logits[:, 20:], rtol=0.02, atol=0.02)


@torch.no_grad()
def test_sinks_of_a_padded_row_shorter_than_their_number():
    plan = LayerPlan((), NO_BRANCH, window=2, sinks=6, mix=NO_BRANCH)
    student = tiny_student(Plan("llama", (plan,)), tiny_base("gqa", num_hidden_layers=1))
    ids, mask = tokens(1)[:, :6], torch.tensor([[0, 1, 1, 1, 1, 1]])
    alone = student(ids[:, 1:], use_cache=False).logits
    torch.testing.assert_close(
        student(ids, attention_mask=mask, use_cache=False).logits[:, 1:], alone, rtol=1e-4, atol=1e-5
    )


def left_padded(lengths=(40, 33, 5)):
    ids, mask = tokens(len(lengths)), torch.ones(len(lengths), 40, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : 40 - length] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def test_left_padding_changes_nothing(pair):
    _, student = pair
    ids, mask, positions = left_padded()
    full = student(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, pieces, start = None, [], 0
    for length in (3, 11, 1, 1, 10, 14):
        end = start + length
        output = student(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = output.past_key_values
        pieces.append(output.logits)
        start = end
    cached = torch.cat(pieces, 1)
    for row, length in enumerate(mask.sum(-1).tolist()):
        alone = student(ids[row : row + 1, 40 - length :]).logits[0]
        torch.testing.assert_close(full[row, 40 - length :], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cached[row, 40 - length :], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_right_padding_and_holes_are_not_seen(pair):
    _, student = pair
    ids, mask = tokens(2), torch.ones(2, 40, dtype=torch.long)
    mask[0, 30:] = 0
    other = ids.clone()
    other[0, 30:] = 5
    first, second = (student(x, attention_mask=mask, use_cache=False).logits for x in (ids, other))
    assert torch.equal(first[0, :30], second[0, :30])
    torch.testing.assert_close(first[0, :30], student(ids[:1, :30]).logits[0], rtol=1e-4, atol=1e-5)
    mask[:] = 1
    mask[0, 12:15] = 0
    other = ids.clone()
    other[0, 12:15] = 7
    first, second = (student(x, attention_mask=mask, use_cache=False).logits for x in (ids, other))
    torch.testing.assert_close(first[0, 15:], second[0, 15:])


@torch.no_grad()
def test_batch_equals_single(pair):
    _, student = pair
    ids = tokens(4)
    batch = student(ids).logits
    for row in range(4):
        torch.testing.assert_close(batch[row], student(ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-5)


def test_packed_documents_equal_separate_ones(pair):
    """Values and gradients; nothing of one document reaches another, through the window, the sinks or the state."""
    _, student = pair
    ids = tokens(1, 60)
    lengths = (3, 24, 1, 32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = student(ids, position_ids=positions, use_cache=False).logits[0]
    separate = torch.cat([student(x, use_cache=False).logits[0] for x in ids.split(lengths, dim=1)])
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)
    parameters = [p for p in student.parameters() if p.requires_grad]
    weights = torch.randn_like(packed)
    one, other = (
        torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True) for logits in (packed, separate)
    )
    for a, b in zip(one, other):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1e-6))


@torch.no_grad()
def test_generate_greedy_beam_and_sampling(pair):
    _, student = pair
    ids, mask, _ = left_padded()
    options = {"max_new_tokens": 14, "pad_token_id": 1, "eos_token_id": None}
    together = student.generate(ids, attention_mask=mask, do_sample=False, **options)
    beams = student.generate(ids, attention_mask=mask, do_sample=False, num_beams=3, **options)
    chunked = student.generate(ids, attention_mask=mask, do_sample=False, prefill_chunk_size=7, **options)
    for row, length in enumerate(mask.sum(-1).tolist()):
        alone = ids[row : row + 1, 40 - length :]
        whole = student.generate(alone, do_sample=False, **options)
        assert torch.equal(together[row, 40 - length :], whole[0])
        assert torch.equal(chunked[row, 40 - length :], whole[0])
        assert torch.equal(
            beams[row, 40 - length :], student.generate(alone, do_sample=False, num_beams=3, **options)[0]
        )
        for _ in range(14):  # by hand, without a cache
            alone = torch.cat([alone, student(alone, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(alone[0], whole[0])
    torch.manual_seed(0)
    with_cache = student.generate(ids[:1], do_sample=True, top_k=20, **options)
    torch.manual_seed(0)
    assert torch.equal(with_cache, student.generate(ids[:1], do_sample=True, top_k=20, use_cache=False, **options))


@torch.no_grad()
def test_generate_continues_a_returned_cache(pair):
    _, student = pair
    ids = tokens(1)
    options = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    whole = student.generate(ids, max_new_tokens=20, **options)
    first = student.generate(ids, max_new_tokens=9, return_dict_in_generate=True, **options)
    # a mask of its own, because generate takes a generated padding token for padding
    again = student.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
        max_new_tokens=11,
        **options,
    )
    assert torch.equal(again, whole)


@torch.no_grad()
@pytest.mark.parametrize("kept", [(), (1,), (0, 1, 2)])
def test_no_cache_grows_where_every_head_has_a_window(kept):
    base = tiny_base("gqa", num_hidden_layers=1)
    student = tiny_student(Plan("llama", (LayerPlan(kept, window=8, sinks=2, softmax_window=16),)), base)
    sizes = []
    cache = None
    for piece in tokens(1, 200).split(20, dim=1):
        cache = student(piece, past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache.layers[0].nbytes())
    assert len(set(sizes)) == 1


@torch.no_grad()
@pytest.mark.parametrize("plan", ["outside", "windows", "sum", NO_BRANCH, *MIXERS])
def test_planned_cache_bytes_are_the_real_ones(plan):
    from linearize.modeling import cache_size

    base = tiny_base("gqa")
    if plan in MIXERS:
        gates = ("key", "learned" if MIXERS[plan].has_gates({}) else "key", "key")
        plan = Plan("llama", tuple(LayerPlan((1,), mixer=plan, window=9, gate=gate) for gate in gates))
    else:
        plan = plan_for(plan, 3)
    student = tiny_student(plan, base)
    cache = student(tokens(1, 100), use_cache=True).past_key_values
    held = sum(
        layer.nbytes() if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )
    contexts, cache_size.CONTEXTS = cache_size.CONTEXTS, (100,)
    try:
        planned = cache_size.cache_sizes(base.config.to_dict(), plan, width=4)[100]["student"]
    finally:
        cache_size.CONTEXTS = contexts
    assert held == planned


@torch.no_grad()
@pytest.mark.parametrize("segment", [7, 13, 16, 39])
def test_long_prefills_in_parts_equal_the_whole(pair, monkeypatch, segment):
    """Plain, padded, packed (a document may start where a part does) and after a cached prefix."""
    from linearize.modeling import window_heads

    _, student = pair
    ids, mask, positions = left_padded()
    packed = torch.cat([torch.arange(n) for n in (13, 27)])[None].expand(3, -1)

    def outputs():
        cache = student(ids[:, :11], use_cache=True).past_key_values
        return [
            student(ids, use_cache=False).logits,
            student(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits * mask[..., None],
            student(ids, position_ids=packed, use_cache=False).logits,
            student(ids[:, 11:], past_key_values=cache, use_cache=True).logits,
        ]

    whole = outputs()
    monkeypatch.setattr(window_heads, "PREFILL_PART", segment)
    for a, b in zip(outputs(), whole):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(pair):
    _, student = pair
    ids = tokens()

    def gradients():
        student.train()
        student.zero_grad()
        student(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    plain = gradients()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value)


def test_every_added_parameter_gets_a_gradient(pair):
    _, student = pair
    student(tokens(), labels=tokens(), use_cache=False).loss.backward()
    added = {name: p for name, p in student.named_parameters() if ".mixer." in name}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in added.values())
    if student.config.plan.layers[0].mix == "outside":
        assert added


@torch.no_grad()
def test_a_window_that_nothing_leaves_changes_no_kept_head():
    base = tiny_base("gqa")
    plan = plan_for("outside", 3)
    wide = replace(plan, layers=tuple(replace(layer, softmax_window=40) for layer in plan.layers))
    logits = [tiny_student(p, base)(tokens(), use_cache=False).logits for p in (plan, wide)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_branch_off_is_the_window_and_a_vanishing_mass_comes_close():
    base = tiny_base("gqa", num_hidden_layers=2)
    plan = Plan("llama", (LayerPlan((), window=8, sinks=2, mix_options={"log_mass": -25.0}),) * 2)
    student = tiny_student(plan, base)
    with student.recurrent_branch_off():
        off = student(tokens()).logits
    torch.testing.assert_close(student(tokens()).logits, off, rtol=1e-4, atol=1e-4)
    for _, attention in student.linear_attentions():
        attention.mixer.log_mass.fill_(1.0)
    assert (student(tokens()).logits - off).abs().max() > 1e-2


@torch.no_grad()
def test_output_hidden_states_and_eager_attention(pair):
    base, student = pair
    assert len(student(tokens(), output_hidden_states=True).hidden_states) == base.config.num_hidden_layers + 1
    config = student.config
    eager = type(student)(type(config).from_dict({**config.to_dict()}, attn_implementation="eager")).eval()
    eager.load_state_dict(student.state_dict())
    torch.testing.assert_close(eager(tokens()).logits, student(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def refusing():
    """Return (base, student) of which only what is refused is asked."""
    base = tiny_base("gqa")
    return base, tiny_student(plan_for("outside", 3), base)


def test_continuous_batching_is_refused(refusing):
    with pytest.raises(NotImplementedError, match="continuous batching"):
        refusing[1].generate_batch([tokens(1)[0].tolist()])


def test_assisted_generation_is_refused(refusing):
    base, student = refusing
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        student.generate(tokens(1), assistant_model=base, max_new_tokens=4, pad_token_id=1)


def test_a_static_cache_is_refused(refusing):
    with pytest.raises(ValueError, match="DynamicCache"):
        refusing[1].generate(tokens(1), cache_implementation="static", max_new_tokens=4, pad_token_id=1)


def test_a_mask_of_every_pair_is_refused(refusing):
    with pytest.raises(ValueError, match="2-D attention mask"):
        refusing[1](tokens(1), attention_mask=torch.ones(1, 1, 40, 40))


@torch.no_grad()
def test_cropping_a_cache_is_refused(refusing):
    cache = refusing[1](tokens(1), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-3)


@torch.no_grad()
def test_a_cache_filled_in_linear_mode_is_refused_in_softmax_mode(refusing):
    _, student = refusing
    cache = student(tokens(1), use_cache=True).past_key_values
    with student.softmax_attention(), pytest.raises(ValueError, match="filled in linear mode"):
        student(tokens(1), past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_the_base_is_refused(refusing):
    base, student = refusing
    cache = base(tokens(1), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cache of its own"):
        student(tokens(1), past_key_values=cache)


@torch.no_grad()
def test_offloading_added_parameters_is_refused(refusing):
    base, _ = refusing
    student = tiny_student(Plan("llama", (LayerPlan((), mixer="vq"),) * 3), base)
    with pytest.raises(RuntimeError, match="have to stay in memory"):
        accelerate.cpu_offload(student)(tokens(1))


def test_other_attention_implementations_are_refused(refusing):
    student = refusing[1]
    assert not type(student).is_backend_compatible() and not student._can_set_attn_implementation()


@torch.no_grad()
def test_a_copy_computes_the_same_and_shares_no_weight(pair):
    _, student = pair
    ids = tokens()
    logits = student(ids).logits
    twin = copy.deepcopy(student)
    assert torch.equal(twin(ids).logits, logits)
    twin.model.layers[0].self_attn.q_proj.weight.zero_()
    assert torch.equal(student(ids).logits, logits)


@torch.no_grad()
def test_switches_nest_and_the_decoder_takes_what_its_base_takes():
    student = tiny_student(plan_for("outside", 3), tiny_base("gqa"))
    ids = tokens()
    with student.recurrent_branch_off():
        off = student(ids).logits
        with student.recurrent_branch_off():
            pass
        assert torch.equal(student(ids).logits, off)
    with student.softmax_attention():
        base = student(ids).logits
        with student.softmax_attention():
            pass
        assert torch.equal(student(ids).logits, base)
    assert not torch.equal(student(ids).logits, off) and not torch.equal(student(ids).logits, base)
    cache = student(ids[:, :30], use_cache=True).past_key_values
    again = student(ids[:, :30], use_cache=True).past_key_values
    by_place = student.model(ids[:, 30:], None, None, cache).last_hidden_state
    assert torch.equal(by_place, student.model(ids[:, 30:], past_key_values=again).last_hidden_state)


@pytest.mark.parametrize("mixer", ["vq", "gla", "hedgehog"])
def test_a_cache_that_is_filled_changes_no_gradient(mixer):
    plan = Plan("llama", (LayerPlan((1,), mixer=mixer, mix="joint" if mixer == "vq" else "outside", window=9),) * 3)
    student = tiny_student(plan, tiny_base("gqa"))
    ids, found = tokens(), []
    for use_cache in (False, True):
        student.zero_grad()
        student(ids, labels=ids, use_cache=use_cache).loss.backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_reload(pair, tmp_path, dtype):
    _, student = pair
    student.to(dtype).save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(p.dtype == torch.float32 for n, p in again.named_parameters() if ".mixer." in n)
    if dtype == torch.float32:
        assert torch.equal(again.eval()(tokens()).logits, student(tokens()).logits)
    assert (tmp_path / "modeling_linearized.py").is_file()


def test_the_portable_file_counts_as_new_when_a_folder_is_uploaded(tmp_path):
    student = tiny_student(plan_for("outside", 3), tiny_base("gqa"))
    (tmp_path / "notes.txt").touch()
    student.save_pretrained(tmp_path)
    assert student._get_files_timestamps(tmp_path).keys() == {
        "notes.txt", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


def test_missing_mixer_parameters_start_at_their_initial_value(tmp_path):
    base = tiny_base("gqa")
    base.save_pretrained(tmp_path)
    plan = plan_for("outside", 3)
    student = tiny_student(plan, base)
    loaded = type(student).from_pretrained(tmp_path, config=student.config)
    assert torch.equal(loaded.model.layers[0].self_attn.mixer.log_mass, torch.full((6,), LOUD["log_mass"]))
