#!/bin/bash
# Makes a virtual environment with linearize in it: setup.sh VENV [EXTRA]
# Without a CUDA device a CPU build of torch goes in first, so that nothing pulls gigabytes of CUDA packages.
# TORCH_INDEX names another index for that build, where the default one serves CUDA builds only.
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
