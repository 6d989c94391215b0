#!/bin/bash
# Check style, formatting and types with the tools of an environment: check.sh [VENV]
# Without VENV the tools on the path serve.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:+$1/bin/}python
failed=0
"$python" -m ruff check linearize tests scripts || failed=1
"$python" -m ruff format --check linearize tests scripts || failed=1
"$python" scripts/check_types.py || failed=1
exit $failed
