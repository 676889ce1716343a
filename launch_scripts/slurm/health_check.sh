#!/usr/bin/env bash
# Exit code 0 where this node can train: the driver answers, and shows as many GPUs as SLURM has given.
set -euo pipefail

asked=${SLURM_GPUS_ON_NODE:-0}
[ "$asked" -gt 0 ] || exit 0
# A GPU that has fallen off the bus makes nvidia-smi fail or hang.
found=$(timeout 60 nvidia-smi --query-gpu=uuid --format=csv,noheader | wc -l)
if [ "$found" -lt "$asked" ]; then
  echo "$(hostname): $found GPUs of $asked"
  exit 1
fi
# Rows of memory that could not be replaced: the next job there fails as this one has.
if timeout 60 nvidia-smi --query-remapped-rows=remapped_rows.failure --format=csv,noheader | grep -qiE '^([1-9]|yes)'; then
  echo "$(hostname): memory rows that cannot be remapped"
  exit 1
fi
