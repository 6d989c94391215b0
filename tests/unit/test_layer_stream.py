"""A model that runs layer by layer from its files computes what the same model in memory computes, to the last bit."""

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from helpers import FAMILIES, family_base, tiny_base
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.conversion.head_gates import gated_heads
from linearize.modeling import layer_pass
from linearize.modeling.layer_pass import LayerPass
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
    (batch,) = stream.start([ids], [{"position_ids": positions}])
    stream.forward([batch])
    with torch.no_grad():
        expected = model.base_model(ids, position_ids=positions, use_cache=False).last_hidden_state
    assert torch.equal(stream.normalised(batch.hidden), expected)


def ones(batches) -> list[torch.Tensor]:
    return [torch.ones_like(batch.hidden) for batch in batches]


def test_gradients_of_gates_equal_those_of_the_model_in_memory(case):
    model, stream = case
    rows = rows_of(model)
    with gated_heads(stream.model, 8, 2) as attentions:
        for attention in attentions:
            attention.head_gates = torch.full_like(attention.head_gates, 0.5)
        batches = stream.start([row[None] for row in rows])
        stream.forward(batches, record=True)
        for attention in attentions:
            attention.head_gates.requires_grad_()
        found = stream.backward(batches, lambda: ones(batches), lambda layer: attentions[layer].head_gates)
    with gated_heads(model, 8, 2) as attentions:
        gates = [torch.full_like(attention.head_gates, 0.5).requires_grad_() for attention in attentions]
        for attention, gate in zip(attentions, gates):
            attention.head_gates = gate
        memory = LayerStream(model)
        loss = 0.0
        for batch in memory.start([row[None] for row in rows]):
            hidden = batch.hidden
            with torch.enable_grad():
                for layer, call in zip(memory.layers, batch.calls):
                    output = layer(hidden, *call.arguments, **call.keywords)
                    hidden = output[0] if isinstance(output, tuple) else output
                loss += hidden.sum()
        for layer, slope in enumerate(torch.autograd.grad(loss, gates)):
            torch.testing.assert_close(found[layer], slope, rtol=1e-5, atol=1e-6)


def gradients(stream: LayerStream, rows: list[torch.Tensor], kept: LayerPass) -> dict[int, torch.Tensor]:
    """Return gradients of norms, as a scoring pass computes those of gates."""
    batches = stream.start(rows)
    stream.forward(batches, kept, record=True)
    return stream.backward(
        batches, lambda: ones(batches), lambda index: stream.layers[index].input_layernorm.weight, kept
    )


def test_recorded_inputs_beyond_the_limit_wait_on_disk(monkeypatch):
    base, rows = tiny_base(), [torch.arange(2, 30)[None], torch.arange(5, 40)[None]]
    stream = LayerStream(base)
    in_memory = gradients(stream, rows, LayerPass())
    monkeypatch.setattr(layer_pass, "RECORDED_BYTES", 0)
    kept = LayerPass()
    batches = stream.start(rows)
    stream.forward(batches, kept, record=True)
    assert all(isinstance(one, Path) and one.is_file() for batch in batches for one in batch.inputs)
    found = stream.backward(
        batches, lambda: ones(batches), lambda index: stream.layers[index].input_layernorm.weight, kept
    )
    assert list(Path(kept.temporary.name).iterdir()) == []
    assert found.keys() == in_memory.keys()
    assert all(torch.equal(found[layer], in_memory[layer]) for layer in found)


class Stopped(Exception):
    """Stands for whatever ends a process."""


def stop_at(stream: LayerStream, monkeypatch, counter: list[int], after: int) -> None:
    """Make a stream stop when it has read `after` layers; it counts them in `counter`."""
    load = stream._load_layer

    def loads(index: int) -> None:
        if len(counter) == after:
            raise Stopped
        counter.append(index)
        load(index)

    monkeypatch.setattr(stream, "_load_layer", loads)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_an_interrupted_pass_goes_on_with_the_layers_that_are_left(after, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_pass, "SAVE_SECONDS", 0.0)
    folder = base_folder()
    rows = [torch.arange(2, 30)[None], torch.arange(5, 40)[None]]
    opened = [
        LayerStream(base_without_weights(folder, torch.float32), folder, unfinished=tmp_path / "kept") for _ in range(3)
    ]
    layers = len(opened[0].layers)
    expected = gradients(opened[0], rows, LayerPass())
    first, second = [], []
    stop_at(opened[1], monkeypatch, first, after)
    with pytest.raises(Stopped):
        gradients(opened[1], rows, opened[1].kept_pass("gates"))
    stop_at(opened[2], monkeypatch, second, -1)
    found = gradients(opened[2], rows, opened[2].kept_pass("gates"))
    assert len(first) + len(second) == 2 * layers
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[layer], expected[layer]) for layer in found)


def test_a_damaged_save_is_no_save(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_pass, "SAVE_SECONDS", 0.0)
    folder = base_folder()
    stream = LayerStream(base_without_weights(folder, torch.float32), folder, unfinished=tmp_path)
    expected = stream.last_hidden([torch.arange(2, 30)])[0]
    for damage in (b"", b"\x08\0\0\0\0\0\0\0garbage!"):
        (tmp_path / "rows.safetensors").write_bytes(damage)
        assert torch.equal(stream.last_hidden([torch.arange(2, 30)])[0], expected)
    # of other rows
    assert stream.last_hidden([torch.arange(2, 50)])[0].shape[0] == 48


def test_a_pass_belongs_to_one_process(tmp_path):
    """Another one, which would write and remove the same files, keeps nothing."""
    first, second = LayerPass(tmp_path, "rows"), LayerPass(tmp_path, "rows")
    assert first.folder == tmp_path and second.folder is None and LayerPass(tmp_path, "other").folder == tmp_path
    first.save("forward", 1, lambda: {"x": torch.zeros(1)}, now=True)
    second.remove()
    assert first.load("forward")[0] == 1 and second.load("forward") == (0, {})
    first.remove()
    assert LayerPass(tmp_path, "rows").folder == tmp_path and not list(tmp_path.glob("rows.safetensors"))


def test_layers_that_are_loaded_ahead_are_the_same(base_folder):
    folder, rows = base_folder(), [torch.arange(2, 30)[None]]
    ahead, plain = (
        LayerStream(base_without_weights(folder, torch.float32), folder, ahead=ahead) for ahead in (True, False)
    )
    assert plain.next_layer is None
    found, expected = (gradients(stream, rows, LayerPass()) for stream in (ahead, plain))
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
    assert all(parameter.is_meta for layer in ahead.layers for parameter in layer.parameters())


def test_a_model_spread_by_accelerate_runs_the_same(base_folder):
    folder, ids = base_folder(), torch.arange(2, 30)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = LayerStream(model).last_hidden([ids])[0]
    places = {"": "cpu"} | {f"model.layers.{index}": "cpu" for index in range(len(model.model.layers))}
    dispatched = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    stream = LayerStream(dispatched)
    assert "forward" in vars(stream.layers[0])
    for _ in range(2):  # the hooks are there again
        assert torch.equal(stream.last_hidden([ids])[0], expected)
        assert "forward" in vars(stream.layers[0])


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
