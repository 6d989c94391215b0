"""The first cases of the campaign; scripts/campaign.sh runs all of it."""

import os
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).parent / "campaign.py"


def test_damaged_inputs_and_kills():
    command = [sys.executable, str(CAMPAIGN), "--mutations", "80", "--crashes", "12", "--environments", "12"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-1000:]}"
    assert "0 of 104 cases failed" in run.stdout
