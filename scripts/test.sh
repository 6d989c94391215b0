#!/bin/bash
# Check style and types, then run the test suite, in a fresh environment of its own; with --fast the unit tests alone.
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
# the tests run even where a check fails, so that one run tells everything
checks=0
bash scripts/check.sh .venv-test || checks=$?
# a file's tests stay in one process, which shares its fixtures
.venv-test/bin/python -m pytest "$tests" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
[ "$checks" = 0 ] || { echo "scripts/check.sh failed: see the top of this output" >&2; exit 1; }
