#!/bin/bash
# Run the whole job on a real model: set up, convert SmolLM2-135M-Instruct, finetune on a small budget, evaluate.
#   bash scripts/demo.sh
# Everything is written to the current folder: .venv, models/ and linearized/. DEMO_TOKENS sets the training budget.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
started=$SECONDS

bash "$scripts/setup.sh" .venv
linearize=.venv/bin/linearize
model=$(.venv/bin/python "$scripts/get_model.py")
echo "== $((SECONDS - started)) s: installed; base model: $model"

out=linearized/demo tuned=linearized/demo-lora
"$linearize" convert "$model" --config smollm2-135m -o "$out" --overwrite
echo "== $((SECONDS - started)) s: converted"
"$linearize" finetune "$out" --recipe lora -o "$tuned" --tokens "${DEMO_TOKENS:-8192}" --overwrite
echo "== $((SECONDS - started)) s: finetuned"
"$linearize" eval "$tuned"
echo "== $((SECONDS - started)) s: done"
echo "converted: $PWD/$out"
echo "finetuned: $PWD/$tuned (adapter in $tuned/adapter)"
echo "report:    $PWD/$tuned/eval/report.md"
