#!/usr/bin/env bash
# The first hour on a new machine or cluster: does every layout train there, save, go on and export? See tools/smoke.py.
#
#   launch_scripts/smoke.sh runs/smoke                                            # the GPUs of this machine
#   launch_scripts/smoke.sh runs/smoke --ranks 8 --launcher "srun --nodes=2 --ntasks={ranks}"
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
exec "$python" "$root/tools/smoke.py" "$@"
