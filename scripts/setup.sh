#!/bin/bash
# Make a virtual environment with linearize in it.
#   bash scripts/setup.sh VENV [EXTRA]
# Without a CUDA device, first install a CPU build of torch, so that nothing downloads gigabytes of CUDA packages.
# TORCH_INDEX names another index for that build, where the default index has CUDA builds only. PYTHON names the python.
set -euo pipefail
venv=$1 extra=${2:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: needs Python 3.11 or later, got $("$python" --version 2>&1); name one with PYTHON=..." >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" 2> >(grep -v "is ignored: it is neither" >&2); }
if ! nvidia-smi -L >/dev/null 2>&1 && ! "$venv/bin/python" -c "import torch" 2>/dev/null; then
    pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==2.13.0"
fi
pip install "$root${extra:+[$extra]}"
