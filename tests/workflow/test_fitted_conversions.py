"""Conversions whose added parameters are fitted to the base."""

import json

import pytest
import torch
from helpers import quiet

from linearize import device
from linearize.checkpoint.student import Student
from linearize.modeling import layer_pass
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.loading import load_student
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert


def test_convert_calibrates_and_says_so(base_folder, tmp_path):
    base = base_folder()
    settings = load_config(None, {"mixer": "vq", "window": 12, "sinks": 2})
    fitted = convert(str(base), settings, out=tmp_path / "out", progress=quiet).manifest.calibration
    assert fitted.text == "sample" and fitted.rows == 5 and fitted.tokens == 512
    assert all(after < before for before, after in fitted.attention_error.values())
    assert "were fitted to the base's attention" in (tmp_path / "out" / "README.md").read_text()
    never = load_config(None, {"mixer": "vq", "window": 12, "sinks": 2}, ["calibration.when=never"])
    convert(str(base), never, out=tmp_path / "plain", verify=False, progress=quiet)
    assert Student.read(tmp_path / "plain").manifest.calibration is None
    ids = torch.randint(2, 300, (2, 200), generator=torch.Generator().manual_seed(0))
    students = [load_student(tmp_path / name, dtype=torch.float32) for name in ("out", "plain")]
    with torch.no_grad(), students[0].softmax_attention():
        target = students[0](ids).logits.log_softmax(-1)
    with torch.no_grad():
        away = [(target.exp() * (target - s(ids).logits.log_softmax(-1))).sum(-1).mean().item() for s in students]
        with students[0].recurrent_branch_off():
            window = (target.exp() * (target - students[0](ids).logits.log_softmax(-1))).sum(-1).mean().item()
    assert away[0] < window


def test_settings_that_were_given_are_kept(base_folder, tmp_path):
    settings = load_config(None, {"window": 12}, ["mix_options.log_mass=-1.25"])
    convert(str(base_folder()), settings, out=tmp_path / "out", verify=False, progress=quiet)
    masses = [p for n, p in load_student(tmp_path / "out", dtype=torch.float32).named_parameters() if "log_mass" in n]
    assert len(masses) == 3 and all((p - p[0] == 0).all() for p in masses)


def test_no_room_to_calibrate(base_folder, cli, tmp_path):
    base = base_folder()
    code, _, err = cli(
        "convert", base, "--window", "300", "--keep-softmax", "none", "-o", tmp_path / "out", "--no-verify"
    )
    assert code == 0 and "not calibrated" in err
    code, _, err = cli(
        "convert", base, "--window", "300", "--keep-softmax", "none", "-o", tmp_path / "never", "--calibrate"
    )
    assert code == 2 and "--window" in err and not (tmp_path / "never").exists()
    code, out, _ = cli(
        "convert", base, "--window", "12", "-o", tmp_path / "no", "--no-verify", "--no-calibrate", "--json"
    )
    assert code == 0 and json.loads(out)["calibration"] is None


def test_a_stopped_conversion_goes_on_with_the_layers_that_are_left(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(layer_pass, "SAVE_SECONDS", 0.0)
    base, settings = str(base_folder(num_hidden_layers=3)), load_config(None, {"mixer": "vq", "window": 12})
    read, stop_after = [], [-1]
    load = LayerStream._load_layer

    def load_until_stopped(stream: LayerStream, index: int) -> None:
        if len(read) == stop_after[0]:
            raise KeyboardInterrupt
        read.append(index)
        load(stream, index)

    monkeypatch.setattr(LayerStream, "_load_layer", load_until_stopped)

    def fitted(name: str) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name / "cache"))
        convert(base, settings, out=tmp_path / name / "out", verify=False, progress=quiet)
        assert not list((tmp_path / name / "cache/linearize/unfinished").rglob("*.*"))
        return load_student(tmp_path / name / "out", dtype=torch.float32).state_dict()

    expected, undisturbed = fitted("undisturbed"), len(read)
    read.clear()
    # forward and backward of the scores, the fit, the shares of all branches, the base's reading
    for stop_after[0] in (2, 4, 8, 11, undisturbed - 1):
        with pytest.raises(KeyboardInterrupt):
            fitted("stopped")
    stop_after[0] = -1
    again = fitted("stopped")
    # the shares of all branches are measured in one go: four models of three layers at most
    assert len(read) <= undisturbed + 12
    assert all(torch.equal(again[name], expected[name]) for name in expected)
