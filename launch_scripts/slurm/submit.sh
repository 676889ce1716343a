#!/usr/bin/env bash
# Submit a pretraining, or go on with one:
#
#   submit.sh [--SBATCH-OPTION=VALUE ...] SCRIPT CONFIG RUN_DIR [--section.key VALUE ...]
#   submit.sh --nodes=16 --time=24:00:00 pretrain_13b.sbatch configs/13b_n4.yaml /scratch/13b_n4
#
# Code and config are copied into RUN_DIR/code and run from there, on the first start and on every later one, whatever
# happens to this tree meanwhile. Relative paths in the config are seen from the folder where this is called.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

options=()
while [[ ${1-} == -* ]]; do options+=("$1"); shift; done
[ $# -ge 3 ] || fail "usage: submit.sh [--SBATCH-OPTION=VALUE ...] SCRIPT CONFIG RUN_DIR [--section.key VALUE ...]"
script=$(basename "$1") config=$2 run=$(realpath -m "$3")
shift 3

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ -f "$root/launch_scripts/slurm/$script" ] || fail "$script: no such script in launch_scripts/slurm"
[ -f "$config" ] || fail "$config: no such config"

code=$run/code
if [ -d "$code" ]; then
  cmp -s "$config" "$code/run.yaml" ||
    fail "$config: differs from $code/run.yaml, with which this run has begun; remove $code to take the present config and code"
  echo "code and config: the copy in $code, commit $(head -n 1 "$code/COMMIT")" >&2
else
  # Renamed when it is whole: an interrupted copy is made again.
  copy=$run/code.tmp
  rm -rf "$copy"
  mkdir -p "$copy"
  cp -R "$root"/{megamtp,tools,launch_scripts,pretrain.py} "$copy"
  find "$copy" -name __pycache__ -prune -exec rm -r {} +
  cp "$config" "$copy/run.yaml"
  commit=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
  if [ "$commit" != unknown ] && [ -n "$(git -C "$root" status --porcelain)" ]; then
    commit="$commit with changes: uncommitted.diff, git-status.txt"
    git -C "$root" diff HEAD >"$copy/uncommitted.diff"
    git -C "$root" status --porcelain >"$copy/git-status.txt"
  fi
  echo "$commit" >"$copy/COMMIT"
  mv "$copy" "$code"
fi

# shellcheck source=launch_scripts/slurm/site.sh
. "$code/launch_scripts/slurm/site.sh"
[ ${#IN_CONTAINER[@]} -gt 0 ] || [[ ${SRUN_OPTIONS[*]} == *--container* ]] || command -v "$PYTHON" >/dev/null ||
  fail "$code/launch_scripts/slurm/site.sh: PYTHON is $PYTHON, which is not there"
mkdir -p "$run/slurm"
exec sbatch --job-name="$(basename "$run")" --output="$run/slurm/batch-%j.log" --open-mode=append \
  "${options[@]}" "$code/launch_scripts/slurm/$script" "$run" "$@"
