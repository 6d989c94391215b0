"""The oldest supported transformers passes the tests of the model code; the rest of the suite runs on the newest."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

# families whose code differs most; test_families.py itself runs all of them on the newest version
CASES = "llama or gemma2 or gpt_neox or mixtral or gguf"


@pytest.mark.slow
def test_the_oldest_transformers(tmp_path):
    bound = re.search(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text())[1]
    oldest = tmp_path / "oldest"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(oldest)]
    # with the hub's client of its time, whose dependencies are others
    for wanted in (["--no-deps", f"transformers=={bound}.0"], ["huggingface-hub<2"]):
        fetched = subprocess.run([*command, *wanted], capture_output=True, text=True)
        if fetched.returncode:
            pytest.skip(f"transformers {bound}.0 cannot be had: {fetched.stderr.strip().splitlines()[-1:]}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(oldest), "OMP_NUM_THREADS": "1"}
    version = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert version.stdout.strip() == f"{bound}.0", version.stderr[-2000:]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CASES,
         "tests/workflow/test_families.py"],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 15, run.stdout[-500:]
