"""Written checkpoints as objects: the manifest's schema, its errors, and the round trip of its document."""

import copy
import json

import pytest

from linearize.checkpoint.manifest import Manifest
from linearize.checkpoint.student import Student
from linearize.errors import CheckpointError, ConfigError

# a conversion's record with the keys that the first files of this format had
OLDEST = {
    "format_version": 1,
    "kind": "converted",
    "base": {"reference": "/base", "kind": "folder", "name": "base", "revision": None, "fingerprint": "f" * 64},
    "settings": {
        "mixer": "gla",
        "window": 12,
        "sinks": 2,
        "mix": "outside",
        "keep_softmax": "none",
        "dtype": "bfloat16",
    },
    "plan": {
        "format_version": 1,
        "base_model_type": "llama",
        "layers": [{"softmax_heads": [1], "mixer": "gla", "window": 12, "sinks": 2, "mix": "outside"}],
    },
    "plan_fingerprint": "p" * 64,
    "coverage": {
        "layers": 1,
        "layers_planned": 1,
        "heads": 2,
        "heads_planned": 1,
        "layers_converted": 1,
        "heads_converted": 1,
    },
    "ignored_tensors": ["inv_freq"],
    "parameters_added": 0,
    "vocabulary": 32,
    "cache_bytes": {"8192": {"base": 8, "student": 4}},
    "weights": {"placed": "hard", "files": ["model.safetensors"], "bytes": 1},
    "sha256": {"config.json": "c" * 64},
    "versions": {"linearize": "0.1.0"},
}
TRAINING = {
    "recipe_name": "lora",
    "recipe": {},
    "parent": "/parent",
    "tokens": 1,
    "steps": 1,
    "first_loss": 2,
    "last_loss": 1.5,
    "seconds": 0.5,
}


@pytest.fixture
def document():
    return copy.deepcopy(OLDEST)


def write(folder, document):
    (folder / "linearize.json").write_text(json.dumps(document))


def test_the_keys_have_their_types(document, tmp_path):
    write(tmp_path, {**document, "kind": "finetuned", "finetune": TRAINING})
    student = Student.read(tmp_path)
    manifest = student.manifest
    assert student.kind == "finetuned" and not student.is_adapter_only and student.weights_folder == tmp_path
    assert manifest.plan.layers[0].softmax_heads == (1,) and manifest.coverage.heads_per_layer == 2
    assert manifest.ignored_tensors == ("inv_freq",) and manifest.finetune.first_loss == 2.0


def test_keys_of_later_versions_may_be_missing(document):
    manifest = Manifest.from_document(document)
    later = (manifest.calibration, manifest.finetune, manifest.verification, manifest.state_bytes)
    assert later == (None,) * 4 and manifest.settings.softmax_window is None


def test_the_document_keeps_keys_that_the_schema_does_not_know(document):
    document = {"later": {"key": [1, 2]}, **document, "settings": {"later": 1, **document["settings"]}}
    assert json.dumps(Manifest.from_document(document).to_dict()) == json.dumps(document)


def test_the_folder_leads_the_printed_document(document, tmp_path):
    write(tmp_path, document)
    assert Student.read(tmp_path).to_dict() == {"output": str(tmp_path), **document}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), r"'format_version' is 2, .*update linearize"),
        (lambda d: d.pop("base"), r"'base' is missing"),
        (lambda d: d["base"].pop("fingerprint"), r"'base.fingerprint' is missing"),
        (lambda d: d["settings"].update(window="12"), r"'settings.window': .*integer"),
        (lambda d: d.update(kind="other"), r"'kind': .*'converted', 'finetuned' or 'adapter'"),
        (lambda d: d.update(kind="adapter"), r"'finetune' is missing"),
        (lambda d: d["plan"].update(format_version=9), r"'plan': .*format_version 9"),
        (lambda d: d["plan"]["layers"][0].update(later=1), r"'plan': layer 0: unknown key"),
        (lambda d: (d.pop("coverage"), d.pop("weights")), r"'coverage' is missing \(and 1 more\)"),
    ],
)
def test_a_wrong_key_is_named_in_one_line(document, tmp_path, change, message):
    change(document)
    write(tmp_path, document)
    with pytest.raises(CheckpointError, match=message) as error:
        Student.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'linearize.json'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "got a list, allowed is an object")])
def test_a_damaged_manifest_is_named(tmp_path, text, message):
    (tmp_path / "linearize.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Student.read(tmp_path)


def test_an_adapter_whose_parent_is_gone_is_refused(document, tmp_path):
    write(tmp_path, {**document, "kind": "adapter", "finetune": TRAINING})
    student = Student.read(tmp_path)
    assert student.is_adapter_only
    with pytest.raises(ConfigError, match=r"holds an adapter only, .* /parent, is gone"):
        student.parent()
