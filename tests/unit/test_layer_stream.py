"""A model that runs layer by layer from its files computes what the same model in memory computes, to the last bit."""

from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, family_base, tiny_base
from transformers import AutoConfig, AutoModelForCausalLM

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


def test_recorded_inputs_beyond_the_limit_wait_on_disk(monkeypatch):
    base, rows = tiny_base(), [torch.arange(2, 30)[None], torch.arange(5, 40)[None]]

    def gradients() -> list[torch.Tensor]:
        stream, found = LayerStream(base), []
        batches = stream.start(rows)
        stream.forward(batches, record=True)
        on_disk = [any(not isinstance(one, torch.Tensor) for one in batch.inputs) for batch in batches]
        stream.backward(
            batches,
            [torch.ones_like(batch.hidden) for batch in batches],
            lambda index: [stream.layers[index].self_attn.q_proj.weight],
            lambda index, number, collected: found.append(collected[0]),
        )
        folders = stream.recordings
        assert all(on_disk) == (folders is not None)
        assert folders is None or not list(Path(folders.name).iterdir())
        return found

    in_memory = gradients()
    monkeypatch.setattr("linearize.modeling.layer_stream.RECORDED_BYTES", 0)
    assert all(torch.equal(one, other) for one, other in zip(in_memory, gradients(), strict=True))


def test_only_embeddings_that_occur_are_read_whatever_the_padding_token(base_folder):
    folder = base_folder(pad_token_id=299)
    config = AutoConfig.from_pretrained(folder)
    assert config.pad_token_id == 299
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    stream = LayerStream(base_without_weights(folder, torch.float32), folder)
    ids = torch.arange(2, 30)
    with torch.no_grad():
        expected = whole.base_model(ids[None], use_cache=False).last_hidden_state[0]
    assert torch.equal(stream.last_hidden([ids])[0], expected)
