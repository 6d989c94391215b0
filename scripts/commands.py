"""The tool's own commands, for the scripts that measure through them."""

import json
import shlex
import subprocess
import sys
from typing import Any


def linearize(*arguments: Any) -> dict[str, Any]:
    """Runs one command and returns its JSON document; ends this process where it fails."""
    command = [sys.executable, "-m", "linearize", *map(str, arguments), "--json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"exit code {run.returncode}: {shlex.join(command)}")
    return json.loads(run.stdout)
