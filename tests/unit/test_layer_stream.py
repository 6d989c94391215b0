"""A model that runs layer by layer from its files computes what the same model in memory computes, to the last bit."""

import pytest
import torch
from helpers import FAMILIES, family_base
from transformers import AutoModelForCausalLM

from linearize.conversion.head_gates import gated_heads
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.loading import base_without_weights
from linearize.modeling.readout import readout_of


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request, tmp_path_factory):
    """(model in memory, stream of the same model) of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    family_base(request.param).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, LayerStream(base_without_weights(folder, torch.float32), folder)


def rows_of(model, lengths=(40, 23)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, model.config.vocab_size, (length,), generator=generator) for length in lengths]


def test_hidden_states_and_logits_equal_the_model_in_memory(case):
    model, stream = case
    rows = rows_of(model)
    with torch.no_grad(), stream.readout() as head:
        for row, hidden in zip(rows, stream.last_hidden(rows)):
            assert torch.equal(hidden, model.base_model(row[None], use_cache=False).last_hidden_state[0])
            assert torch.equal(head(hidden), readout_of(model)(hidden))


def test_no_layer_keeps_its_weights(case):
    model, stream = case
    stream.last_hidden(rows_of(model))
    assert all(parameter.is_meta for layer in stream.layers for parameter in layer.parameters())


def test_rows_can_start_anywhere(case):
    model, stream = case
    ids, positions = rows_of(model)[0][None], torch.arange(40)[None] + 17
    (batch,) = stream.start([ids], [positions])
    stream.forward([batch])
    with torch.no_grad():
        expected = model.base_model(ids, position_ids=positions, use_cache=False).last_hidden_state
    assert torch.equal(stream.normalised(batch.hidden), expected)


def test_gradients_of_gates_equal_those_of_the_model_in_memory(case):
    model, stream = case
    rows = rows_of(model)
    found = {}
    with gated_heads(stream.model, 8, 2) as attentions:
        for attention in attentions:
            attention.head_gates = torch.full_like(attention.head_gates, 0.5)
        batches = stream.start([row[None] for row in rows])
        stream.forward(batches, record=True)
        for attention in attentions:
            attention.head_gates.requires_grad_()
        stream.backward(
            batches,
            [torch.ones_like(batch.hidden) for batch in batches],
            lambda layer: [attentions[layer].head_gates],
            lambda layer, row, slopes: found.update({(layer, row): slopes[0]}),
        )
    with gated_heads(model, 8, 2) as attentions:
        for number, row in enumerate(rows):
            gates = [torch.full_like(attention.head_gates, 0.5).requires_grad_() for attention in attentions]
            for attention, gate in zip(attentions, gates):
                attention.head_gates = gate
            memory = LayerStream(model)
            (batch,) = memory.start([row[None]])
            hidden = batch.hidden
            with torch.enable_grad():
                for layer, call in zip(memory.layers, batch.calls):
                    output = layer(hidden, *call.arguments, **call.keywords)
                    hidden = output[0] if isinstance(output, tuple) else output
                expected = torch.autograd.grad(hidden.sum(), gates)
            for layer, slope in enumerate(expected):
                torch.testing.assert_close(found[layer, number], slope, rtol=1e-5, atol=1e-6)
