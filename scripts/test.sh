#!/bin/bash
# Run the test suite in a fresh environment of its own, or with --fast the unit tests alone.
# Other arguments go to pytest: scripts/test.sh -m "not slow"; scripts/test.sh --cov=linearize
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tests=tests
if [ "${1:-}" = --fast ]; then
    tests=tests/unit
    shift
fi
rm -rf .venv-test build
bash scripts/setup.sh .venv-test test
# a file's tests stay in one process, which shares its fixtures
exec .venv-test/bin/python -m pytest "$tests" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
