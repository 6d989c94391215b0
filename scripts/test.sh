#!/bin/bash
# Runs the test suite in a fresh environment of its own. Arguments go to pytest: scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -rf .venv-test build
bash scripts/setup.sh .venv-test test
# a file's tests stay in one process, which shares its fixtures
exec .venv-test/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
