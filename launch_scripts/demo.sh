#!/usr/bin/env bash
# From nothing to a trained 4-head model on two CPU processes. Every step is a command that can be run by hand;
# a step whose result is there is not repeated, and training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
data=data/demo

run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

mkdir -p "$data"
[ -f "$data/train.jsonl" ] && [ -f "$data/validation.jsonl" ] ||
  run "$python" tools/gather_stdlib.py --output-dir "$data"
[ -f "$data/tokenizer.json" ] ||
  run "$python" tools/train_tokenizer.py --input "$data/train.jsonl" --vocab-size 4096 --output "$data/tokenizer.json"
for split in train validation; do
  # The manifest is written last: where it stands, the pair is complete.
  [ -f "$data/$split.json" ] ||
    run "$python" tools/preprocess_data.py --input "$data/$split.jsonl" --tokenizer "$data/tokenizer.json" --output "$data/$split"
done
run "$python" -m torch.distributed.run --nproc_per_node 2 --standalone pretrain.py configs/demo.yaml "$@"
run "$python" tools/demo_report.py runs/demo --validation-text "$data/validation.jsonl"
