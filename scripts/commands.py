"""Run the tool's own commands from the scripts that measure through them: `from commands import linearize`."""

import json
import shlex
import subprocess
import sys
from typing import Any


def linearize(*arguments: Any) -> dict[str, Any]:
    """Run one command with --json and return its document; exit if it fails."""
    command = [sys.executable, "-m", "linearize", *map(str, arguments), "--json"]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {shlex.join(command)}")
    return json.loads(process.stdout)
