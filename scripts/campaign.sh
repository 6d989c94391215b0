#!/bin/bash
# Try 2,500 damaged inputs, 500 kills and 200 odd environments on the command line; some 90 minutes on two cores.
# Usage: scripts/campaign.sh [PYTHON] [--mutations N] [--crashes N] [--environments N] [--seed N] [--only NAME]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv-test/bin/python
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    python=$1
    shift
fi
HF_HUB_OFFLINE=1 exec "$python" tests/robustness/campaign.py "$@"
