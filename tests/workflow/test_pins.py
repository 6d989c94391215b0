"""Pinned numbers: logits of every mixer and mix, a conversion and an evaluation, equal to those recorded in pins.json.

A change that moves code must not move numbers. After a change that is meant to move them, record them again:
`pytest tests/workflow/test_pins.py --record-pins`.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, tiny_base, tiny_student

from linearize.evaluation.suite import Suite
from linearize.mixers.registry import CHOICES
from linearize.modeling.cache import CACHE_NAME
from linearize.plan import LayerPlan, Plan
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert
from linearize.workflows.evaluate import evaluate

PINS = Path(__file__).with_name("pins.json")
# float64 logits agree to far more digits; float32 weights come from a generator that may round differently elsewhere
LOGITS, FIGURES = 1e-6, 2e-3
CASES = [
    (mixer, mix, gate)
    for mixer, entry in CHOICES.items()
    for mix in entry.mixes
    if mix != "joint" or entry.shares_normaliser({})
    for gate in (("key", "learned") if entry.has_gates({}) and mix == entry.mixes[0] else ("key",))
]


def logits_of(mixer: str, mix: str, gate: str) -> list[float]:
    """Sixteen weighted sums of the logits of a tiny student, half from a full forward, half from cached decoding."""
    options = {"log_mass": 0.5} if mix == "outside" and CHOICES[mixer].shares_normaliser({}) else {}
    kept = LayerPlan((1,), mixer, window=8, sinks=2, mix=mix, gate=gate, mix_options=options, softmax_window=13)
    layers = (
        LayerPlan((), mixer, window=6, sinks=1, mix=mix, gate=gate, mix_options=options),
        kept,
        LayerPlan((0, 1, 2)),
    )
    student = tiny_student(Plan("llama", layers), tiny_base("gqa")).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # parameters that start at 0 would hide what they multiply
        for name, parameter in student.named_parameters():
            if ".mixer." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ids = torch.randint(2, VOCABULARY, (2, 40), generator=generator)
        full = student(ids, use_cache=False).logits
        cache, pieces = None, []
        for piece in ids.split([20, 12, *[1] * 8], dim=1):
            result = student(piece, use_cache=True, **{CACHE_NAME: cache})
            cache = result[CACHE_NAME]
            pieces.append(result.logits)
    weights = torch.randn(8, 2, 40, VOCABULARY, generator=generator, dtype=torch.float64)
    return [(weights * logits).sum((1, 2, 3)).tolist() for logits in (full, torch.cat(pieces, 1))]


def conversion_of(base: Path, out: Path) -> dict:
    """Checksums of what a conversion copies, and its records without paths, versions and what they change."""
    settings = load_config(None, {"window": 12, "sinks": 2, "keep_softmax": "recall:25%"}, ["scoring.distances=[40]"])
    manifest = convert(str(base), settings, out=out, verify=False, progress=lambda message: None).manifest.to_dict()
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    config = json.loads((out / "config.json").read_bytes())
    names = ("plan", "coverage", "parameters_added", "state_bytes", "cache_bytes", "vocabulary", "weights", "settings")
    return {
        "files": sorted(path.name for path in out.iterdir()),
        "shards": {
            name: hashlib.sha256((out / name).read_bytes()).hexdigest()
            for name in ("model-00001-of-00002.safetensors",)
        },
        "index": index,
        "config": {key: value for key, value in config.items() if key != "transformers_version"},
        "manifest": {name: manifest[name] for name in names},
        "calibration": manifest["calibration"],
    }


def evaluation_of(student: Path) -> dict:
    """The means of every metric of every model."""
    suite = Suite(
        lengths=(32, 64), recall=(8, 40), associative=(40,), passkey=(128,), generation=4, max_tokens=256,
        recall_rows=3, branch=True, parity=True,
    )  # fmt: skip
    results = evaluate(student, suite, precision="fp32", progress=lambda message: None)
    return {metric.name: {model: value.mean for model, value in metric.values.items()} for metric in results.metrics}


@pytest.fixture(scope="module")
def pins():
    return json.loads(PINS.read_bytes())


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_logits_have_not_moved(case, pins):
    pinned = pins["logits"][" ".join(case)]
    for found, wanted in zip(logits_of(*case), pinned):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=LOGITS, atol=LOGITS * 100)


def test_a_conversion_and_its_evaluation_have_not_moved(base_folder, tmp_path, pins, in_float32):
    out = tmp_path / "out"
    found, wanted = conversion_of(base_folder(), out), pins["conversion"]
    same, fitted = ({**record, "calibration": None} for record in (found, wanted))
    assert json.loads(json.dumps(same)) == fitted
    assert found["calibration"]["part"] == wanted["calibration"]["part"]
    errors = [list(record["calibration"]["attention_error"].values()) for record in (found, wanted)]
    torch.testing.assert_close(torch.tensor(errors[0]), torch.tensor(errors[1]), rtol=FIGURES, atol=0)
    figures = evaluation_of(out)
    assert figures.keys() == pins["evaluation"].keys()
    for name, models in pins["evaluation"].items():
        assert figures[name] == pytest.approx(models, rel=FIGURES, abs=FIGURES), name


def test_recording(base_folder, tmp_path, in_float32, request):
    if not request.config.getoption("--record-pins"):
        pytest.skip("records pins.json only with --record-pins")
    out = tmp_path / "out"
    conversion = conversion_of(base_folder(), out)
    logits = {" ".join(case): logits_of(*case) for case in CASES}
    pins = {"logits": logits, "conversion": conversion, "evaluation": evaluation_of(out)}
    PINS.write_text(json.dumps(pins, indent=1) + "\n")
