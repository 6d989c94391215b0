"""`--keep-softmax auto`: as few softmax heads as hold what the base can do, found by measured loss."""

import json

import pytest
import torch

from linearize.checkpoint.student import Student
from linearize.conversion.quality import Held, Standard
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert

WINDOW = ("--window", "12", "--no-verify")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def softmax_heads(layers) -> list[list[int]]:
    return [layer["softmax_heads"] for layer in layers]


def test_a_conversion_records_the_curve_that_chose_its_heads(base_folder, cli, tmp_path):
    code, out, err = cli("convert", base_folder(), "-o", tmp_path / "out", *WINDOW)
    assert code == 0, err
    quality = Student.read(tmp_path / "out").manifest.quality
    assert quality is not None and quality.holds and quality.chosen in quality.curve
    smaller = [trial for trial in quality.curve if trial.cache["32768"] < quality.chosen.cache["32768"]]
    assert not any(trial.holds for trial in smaller)
    assert "yes, chosen" in out and "yes, chosen" in (tmp_path / "out" / "README.md").read_text()
    assert "cache beside the base's" in out and "next: linearize eval" in out


def test_a_plan_shows_the_shares_until_a_conversion_has_chosen(base_folder, cli, tmp_path):
    base = base_folder()
    code, out, err = cli("plan", base, "--window", "12", "--json")
    before = json.loads(out)
    assert code == 0 and before["choice"]["measured"] is None, err
    assert [option["softmax_heads"] for option in before["choice"]["possible"]] == [0, 1, 2, 3, 4, 6, 7]
    assert "convert finds out by measured loss" in cli("plan", base, "--window", "12")[1]
    assert cli("convert", base, "-o", tmp_path / "out", *WINDOW)[0] == 0
    code, out, err = cli("plan", base, "--window", "12", "--json")
    after, written = json.loads(out), Student.read(tmp_path / "out").manifest.to_dict()
    assert code == 0 and after["choice"]["possible"] == [], err
    assert softmax_heads(after["layers"]) == softmax_heads(written["plan"]["layers"])
    assert after["cache_bytes"] == written["cache_bytes"]


def test_a_second_conversion_takes_the_choice_over(base_folder, cli, tmp_path):
    base = base_folder()
    assert "scoring" in cli("convert", base, "-o", tmp_path / "first", *WINDOW)[2]
    code, _, err = cli("convert", base, "-o", tmp_path / "second", *WINDOW)
    assert code == 0 and "scoring" not in err and "held-out" not in err
    first, second = (Student.read(tmp_path / name).manifest.to_dict() for name in ("first", "second"))
    assert first["plan"] == second["plan"] and first["quality"] == second["quality"]
    files = sorted(path.name for path in (tmp_path / "first").glob("*.safetensors"))
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_model_without_room_beyond_the_window_is_refused(base_folder, cli, tmp_path):
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "out")
    assert code == 2 and "--keep-softmax every:4" in err and "--keep-softmax none" in err and "--window" in err
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_measured_is_refused(base_folder, cli, tmp_path):
    base = base_folder()
    for path in base.glob("token*"):
        path.unlink()
    code, _, err = cli("convert", base, "-o", tmp_path / "out", *WINDOW)
    assert code == 2 and "want of a tokenizer" in err and "--keep-softmax none" in err
    assert not (tmp_path / "out").exists()


def test_where_look_ups_are_always_lost_nothing_is_gained(base_folder, cli, tmp_path, monkeypatch):
    half = {"look-ups@30": {"hits": Held(0.5, 0.0), "nats": Held(0.5, 0.0)}}
    monkeypatch.setattr(Standard, "lost", lambda standard, reading: half)
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "out", *WINDOW)
    assert code == 1 and "nothing is to be gained" in err and "--cache-budget" in err
    assert not (tmp_path / "out").exists()


def test_a_budget_says_what_is_lost_and_may_fail(base_folder, cli, tmp_path):
    flags = [*WINDOW, "--set", "quality.divergence=1e-12", "--cache-budget", "40%"]
    code, out, err = cli("convert", base_folder(), "-o", tmp_path / "out", *flags, "--require-quality")
    assert code == 3 and out.strip().splitlines()[-1].startswith("lost: text beyond the window"), err
    manifest = Student.read(tmp_path / "out").manifest
    assert manifest.quality.chosen.cache["32768"] <= 0.4 and not manifest.quality.holds
    sizes = manifest.cache_bytes["32768"]
    assert sizes["student"] / sizes["base"] == pytest.approx(manifest.quality.chosen.cache["32768"], abs=1e-4)


def test_a_budget_below_windows_and_states_is_refused(base_folder, cli, tmp_path):
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "out", *WINDOW, "--cache-budget", "0.01%")
    assert code == 2 and "--cache-budget" in err and not (tmp_path / "out").exists()


def test_heads_chosen_by_hand_are_measured_where_quality_is_required(base_folder, cli, tmp_path):
    flags = [*WINDOW, "--keep-softmax", "none", "--require-quality"]
    code, out, err = cli("convert", base_folder(), "-o", tmp_path / "out", *flags, "--set", "quality.divergence=1e-12")
    assert code == 3 and "lost: " in out, err
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "other", *flags, "--set", "quality.divergence=9")
    assert code == 0 and Student.read(tmp_path / "other").manifest.quality.holds, err


def test_the_fit_of_a_choice_is_the_fit_of_its_plan(base_folder, tmp_path, in_float32):
    """Heads fitted together, of which some then keep softmax, have the parameters of heads fitted without these."""
    settings = load_config(None, {"window": 12}, ["quality.divergence=1e-12", "quality.cache_budget=0.4"])
    chosen = convert(str(base_folder()), settings, out=tmp_path / "chosen", verify=False, progress=lambda text: None)
    heads = ",".join(
        f"{number}:{head}" for number, layer in enumerate(chosen.manifest.plan.layers) for head in layer.softmax_heads
    )
    by_hand = load_config(None, {"window": chosen.manifest.plan.longest_window(), "keep_softmax": heads})
    convert(str(base_folder()), by_hand, out=tmp_path / "hand", verify=False, progress=lambda text: None)
    from linearize.modeling.loading import added_of

    fitted, refitted = added_of(tmp_path / "chosen"), added_of(tmp_path / "hand")
    assert fitted.keys() == refitted.keys() and fitted
    for name in fitted:
        if "structure" in name:  # the mix depends on how far all heads together move away from the base
            torch.testing.assert_close(fitted[name], refitted[name], rtol=1e-4, atol=1e-5)


def test_a_plan_says_what_a_conversion_will_take(base_folder, cli):
    code, out, err = cli("plan", base_folder(), "--window", "12", "--json")
    takes = json.loads(out)["estimate"]
    assert code == 0 and set(takes["steps"]) == {"score heads", "calibrate", "measure", "verify", "read and write"}, err
    assert takes["seconds"] == pytest.approx(sum(takes["steps"].values()), abs=0.5)
    text = cli("plan", base_folder(), "--window", "12")[1]
    assert "convert takes about" in text and "next: linearize convert" in text


def test_a_time_that_no_conversion_meets_is_refused(base_folder, cli, tmp_path):
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "out", *WINDOW, "--budget", "1s")
    assert code == 2 and "--budget: got 1 s" in err and "--keep-softmax every:4" in err
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "out", *WINDOW, "--budget", "1h")
    assert code == 0, err


def test_scores_of_a_model_are_found_again(base_folder, cli, tmp_path, monkeypatch):
    base, folder = base_folder(), tmp_path / "configs"
    folder.mkdir()
    path = folder / "tiny.scores.json"
    code, out, err = cli("scores", base, "--window", "12", "-o", path)
    assert code == 0 and str(path) in out, err
    monkeypatch.setattr("linearize.conversion.known_scores.packaged_folder", lambda kind: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-cache"))
    code, _, err = cli("convert", base, "-o", tmp_path / "out", *WINDOW)
    assert code == 0 and "head scores are known (tiny.scores.json)" in err and "scoring key/value heads" not in err
    found = json.loads(path.read_text())["found"]
    quality = Student.read(tmp_path / "out").manifest.quality
    assert (quality.chosen.softmax_heads, quality.chosen.window) == (found["softmax_heads"], found["window"])
    assert len(quality.curve) == 1
    code, _, err = cli("scores", base, "-o", tmp_path / "scores.json")
    assert code == 2 and ".scores.json" in err


def test_an_interrupted_search_goes_on_with_the_steps_that_are_done(base_folder, cli, tmp_path, monkeypatch):
    from linearize.conversion import trials

    base, read_rows, reads = base_folder(), trials.read_rows, []

    def stopped_at_the_third(*arguments):
        reads.append(arguments)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return read_rows(*arguments)

    monkeypatch.setattr(trials, "read_rows", stopped_at_the_third)
    assert cli("convert", base, "-o", tmp_path / "out", *WINDOW)[0] == 130
    assert not (tmp_path / "out").exists()
    code, _, err = cli("convert", base, "-o", tmp_path / "out", *WINDOW)
    # window + sinks alone was read before; the base once more, since conversions are held against its hidden states
    assert code == 0 and "scoring" not in err and "calibrating" not in err, err
    modes = [arguments[3] is None if len(arguments) > 3 else True for arguments in reads[3:]]
    assert modes.count(True) == 1
    assert cli("convert", base, "-o", tmp_path / "other", *WINDOW)[0] == 0
    first, second = (Student.read(tmp_path / name).manifest.to_dict() for name in ("out", "other"))
    assert first["plan"] == second["plan"] and first["quality"] == second["quality"]


def test_a_plan_shows_what_is_known_of_a_model(base_folder, cli, tmp_path, monkeypatch):
    base, folder = base_folder(), tmp_path / "configs"
    folder.mkdir()
    assert cli("scores", base, "--window", "12", "-o", folder / "tiny.scores.json")[0] == 0
    monkeypatch.setattr("linearize.conversion.known_scores.packaged_folder", lambda kind: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-cache"))
    code, out, err = cli("plan", base, "--window", "12", "--json")
    planned, found = json.loads(out), json.loads((folder / "tiny.scores.json").read_text())["found"]
    assert code == 0 and planned["choice"]["possible"] == [], err
    assert sum(len(heads) for heads in softmax_heads(planned["layers"])) == found["softmax_heads"]


def test_another_target_takes_over_what_was_fitted_and_read(base_folder, cli, tmp_path):
    base = base_folder()
    assert cli("convert", base, "-o", tmp_path / "out", *WINDOW)[0] == 0
    code, _, err = cli("convert", base, "-o", tmp_path / "other", *WINDOW, "--quality", "0.5")
    assert code == 0 and "calibrating" not in err and "scoring" not in err, err


def test_layers_too_large_to_time_cost_a_plan_nothing(base_folder, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("linearize.conversion.estimate.TIMED_BYTES", 1000)
    base = base_folder()
    code, out, err = cli("plan", base, "--window", "12", "--json")
    assert code == 0 and json.loads(out)["estimate"] is None, err
    code, _, err = cli("convert", base, "-o", tmp_path / "out", *WINDOW)
    assert code == 0 and "too large to time" in err, err


def test_a_layer_with_a_window_of_its_own_keeps_it(base_folder, tmp_path):
    """Trials with another window are other conversions, though the longest window is the same."""
    settings = load_config(None, {"window": 12}, ["layers={'1': {window: 40}}", "quality.divergence=1e-12"])
    student = convert(str(base_folder()), settings, out=tmp_path / "out", verify=False, progress=lambda text: None)
    assert {layer.window for number, layer in enumerate(student.manifest.plan.layers) if number != 1} <= {12, 24}
    assert student.manifest.plan.layers[1].window == 40
    readings = list((tmp_path / "cache" / "linearize" / "readings").iterdir())
    assert len(readings) == len(student.manifest.quality.curve) + 2  # the base, and window + sinks alone


def test_softmax_heads_with_a_window_are_measured_within_it(base_folder, cli, tmp_path):
    flags = ["--window", "12", "--softmax-window", "300", "--no-verify"]
    code, out, err = cli("convert", base_folder(), "-o", tmp_path / "out", *flags)
    assert code == 0 and "yes, chosen" in out, err
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "narrow", *flags, "--softmax-window", "14")
    assert code == 2 and "--softmax-window of 14" in err


def test_a_short_text_is_still_held_out(base_folder, cli, tmp_path):
    """Rows come from the end of a text that ends before the usual place."""
    from linearize.data.samples import SAMPLES

    lines = SAMPLES["sample"].read_text(encoding="utf-8").splitlines()[:2]
    (tmp_path / "short.txt").write_text("\n".join(json.loads(line)["text"] for line in lines)[:20_000])
    flags = ["--set", f"scoring.text={tmp_path / 'short.txt'}"]
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "out", *WINDOW, *flags)
    assert code == 0 and Student.read(tmp_path / "out").manifest.quality.chosen.divergence is not None, err


def test_damaged_results_are_computed_again(base_folder, cli, tmp_path):
    base = base_folder()
    assert cli("convert", base, "-o", tmp_path / "out", *WINDOW)[0] == 0
    for kind in ("choices", "readings", "calibrations", "scores"):
        for path in (tmp_path / "cache" / "linearize" / kind).iterdir():
            path.write_text('{"value": {"hits": 3}}')
    code, _, err = cli("convert", base, "-o", tmp_path / "other", *WINDOW)
    assert code == 0 and "Traceback" not in err, err
    first, second = (Student.read(tmp_path / name).manifest.to_dict() for name in ("out", "other"))
    assert first["plan"] == second["plan"] and first["quality"] == second["quality"]


def test_quality_cannot_be_required_of_what_cannot_be_measured(base_folder, cli, tmp_path):
    flags = ["--window", "300", "--keep-softmax", "none", "--no-verify", "--require-quality"]
    base = base_folder()
    for path in base.glob("token*"):
        path.unlink()
    code, _, err = cli("convert", base, "-o", tmp_path / "out", *flags)
    assert code == 2 and "cannot be measured" in err and not (tmp_path / "out").exists()


def test_a_mixer_whose_heads_depend_on_each_other_is_fitted_for_its_plan(base_folder, tmp_path):
    changes = {"window": 12, "mixer": "mom"}
    quality = ["quality.divergence=1e-12", "quality.cache_budget=0.6"]
    chosen = convert(
        str(base_folder()), load_config(None, changes, quality), out=tmp_path / "chosen", verify=False, progress=print
    )
    layers = enumerate(chosen.manifest.plan.layers)
    heads = ",".join(f"{number}:{head}" for number, layer in layers for head in layer.softmax_heads)
    by_hand = load_config(None, changes | {"window": chosen.manifest.plan.longest_window(), "keep_softmax": heads})
    convert(str(base_folder()), by_hand, out=tmp_path / "hand", verify=False, progress=print)
    from linearize.modeling.loading import added_of

    fitted, refitted = added_of(tmp_path / "chosen"), added_of(tmp_path / "hand")
    assert fitted.keys() == refitted.keys() and all(torch.equal(fitted[name], refitted[name]) for name in fitted)
