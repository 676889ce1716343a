# shellcheck shell=bash
# What each start of a pretraining job does: sourced by the batch scripts, which only say how much they ask for.
#
#   pretrain_*.sbatch RUN_DIR [--section.key VALUE ...]
#
# Job and run go on without a human: at the time limit, when a rank or a node fails, when the job is preempted, the ranks
# save where they can, and the job puts itself back into the queue under its own number (so --dependency=afterok:JOB means
# the end of the run). It ends for good when training is done, when the input is wrong (exit code 2), when someone stops
# it (scancel), and when STARTS_WITHOUT_PROGRESS starts have led to no newer checkpoint.
#
#   RUN_DIR/code/            what runs                RUN_DIR/slurm/batch-JOB.log    what this script has to say
#   RUN_DIR/slurm/job-J-start-S/rank-RRR.log          each rank's output              .../srun.log, health.log
set -uo pipefail
export LC_ALL=C

STARTS_WITHOUT_PROGRESS=3

run=$1
shift
job=$SLURM_JOB_ID start=${SLURM_RESTART_COUNT:-0}
logs=$run/slurm/job-$job-start-$start
# shellcheck source=launch_scripts/slurm/site.sh
. "$run/code/launch_scripts/slurm/site.sh"
mkdir -p "$logs"

say() { echo "$(date +%FT%T) start $start: $*"; }
give_up() { say "stopped: $2"; exit "$1"; }
newest_checkpoint() { cat "$run/checkpoints/latest" 2>/dev/null || echo none; }

# Nodes of this job that do not answer, do not see this run's files or Python, or whose health check fails, one a line.
unhealthy_nodes() {
  local check=("${HEALTH_CHECK[@]}") healthy
  [ ${#check[@]} -gt 0 ] || check=("$run/code/launch_scripts/slurm/health_check.sh")
  # shellcheck disable=SC2016  # the node expands it
  timeout 300 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --mpi=none --kill-on-bad-exit=0 "${SRUN_OPTIONS[@]}" \
    bash -c 'echo "up $SLURMD_NODENAME"
             { [ -r "$1" ] && command -v "$2" && "${@:3}"; } >&2 && echo "healthy $SLURMD_NODENAME"' check \
    "$run/code/run.yaml" "${IN_CONTAINER[0]:-$PYTHON}" "${check[@]}" >"$logs/health.txt" 2>>"$logs/health.log"
  healthy=$(sed -n 's/^healthy //p' "$logs/health.txt")
  if [ -z "$healthy" ]; then
    say "the health check fails on every node, so the check is at fault and no node is avoided; see $logs/health.log" >&2
  else
    nodes_of_job | grep -vxF "$healthy"
  fi
}

nodes_of_job() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

# SLURM (22.05 at least) loses count of a job's GPUs when the job is requeued, which takes until all of its nodes have cleaned
# up, and one of them is given up meanwhile: the job starts with none, and never gets any again. So nodes that did not answer
# the health check are left to SLURM, which requeues the job itself when it gives them up; that ends this script.
await_silent_nodes() {
  local answered silent timeout
  answered=$(sed -n 's/^up //p' "$logs/health.txt" 2>/dev/null)
  [ -n "$answered" ] || return 0
  silent=$(nodes_of_job | grep -vxF "$answered" | paste -sd,)
  [ -n "$silent" ] || return 0
  timeout=$(scontrol show config | sed -nE 's/^SlurmdTimeout *= *([0-9]+) sec.*/\1/p')
  timeout=$((${timeout:-300} + 60))
  say "no answer from $silent: SLURM should give it up and requeue this job within $timeout s"
  trap 'exit 143' TERM
  trap 'stopped=USR1' USR1  # the time limit is near, after which the job could no longer requeue itself
  sleep "$timeout" &
  local sleeping=$!
  while kill -0 $sleeping 2>/dev/null && [ "$stopped" != USR1 ]; do wait $sleeping; done
  kill $sleeping 2>/dev/null
  say "SLURM has not requeued this job"
}

# The node whose rank failed first, from srun's messages; nothing where ranks of several nodes failed at once.
first_to_fail() {
  sed -nE 's/^srun: error: ([^ :]+): tasks? .*/\1/p' "$logs/srun.log" | head -n 1 | grep -v '[[,]'
}

# The node of the rank that hung, as the other ranks tell; nothing where none did, or those of several nodes.
hanging() {
  local nodes
  nodes=$(sed -nE 's/^hang: rank [0-9]+ on ([^ ]+) .*/\1/p' "$logs"/rank-*.log 2>/dev/null | sort -u)
  [ "$(wc -l <<<"$nodes")" -gt 1 ] || echo "$nodes"
}

# Back into the queue, never again on the nodes given (one a line).
requeue() {
  local nodes=$1 excluded
  await_silent_nodes
  # SLURM ends this script by SIGTERM as soon as the job is requeued, but only a job in the queue takes an exclusion.
  trap '' TERM USR1
  nodes=$(paste -sd, <<<"$nodes")
  [ -z "$nodes" ] || say "avoiding from now on: $nodes"
  excluded=$(scontrol show job -o "$job" | sed -nE 's/.* ExcNodeList=([^ ]+).*/\1/p' | grep -v null)
  scontrol requeue "$job" || give_up 1 "SLURM does not let this job requeue itself; submit it again to go on"
  [ -z "$nodes" ] || scontrol update "JobId=$job" "ExcNodeList=${excluded:+$excluded,}$nodes" ||
    say "SLURM did not take the exclusion"
  exit 0
}

# --- is somebody else in this folder, and do the starts lead anywhere?

other=$(cat "$run/slurm/job" 2>/dev/null)
if [ -n "$other" ] && [ "$other" != "$job" ] && [ -n "$(squeue -h -j "$other" -t RUNNING,COMPLETING 2>/dev/null)" ]; then
  give_up 2 "job $other is running in $run; cancel one of the two"
fi
echo "$job" >"$run/slurm/job"

# A line: the newest checkpoint at the last start, and how many starts have begun from there. It is written before anything
# can fail, and read by the next start, so that it also counts the starts which end with their node.
from=$(newest_checkpoint) starts=1
if [ "$start" -gt 0 ] && read -r last count <"$run/slurm/starts" && ! [[ $from > $last ]]; then  # none < step-...
  starts=$((count + 1)) from=$last
fi
echo "$from $starts" >"$run/slurm/starts"
no_progress="$STARTS_WITHOUT_PROGRESS starts from checkpoint $from have led to no newer one; see rank-*.log and srun.log in $run/slurm/job-$job-start-*, mend the cause, and submit it again"
[ $starts -le $STARTS_WITHOUT_PROGRESS ] || give_up 1 "$no_progress"

say "job $job on $SLURM_JOB_NODELIST, commit $(head -n 1 "$run/code/COMMIT"), from checkpoint $from"

# --- train

training='' stopped='' watchdog=''
# Some minutes before the time limit (--signal): the ranks finish their step, save, and exit with 138. Those that hang are
# given up when nine tenths of the minutes are gone: once the limit itself ends the job, it cannot requeue itself.
# shellcheck disable=SC2317,SC2329
before_time_limit() {
  stopped=USR1
  say "the time limit is near: the ranks save"
  [ -n "$training" ] || return 0
  kill -USR1 "$training"  # srun passes it on to every rank
  local end
  end=$(date -d "$(scontrol show job -o "$job" | sed -nE 's/.* EndTime=([^ ]+).*/\1/p')" +%s)
  (sleep $(((end - $(date +%s)) * 9 / 10)) && kill -KILL "$training") >/dev/null 2>&1 &
  watchdog=$!
}
trap before_time_limit USR1
# The job is cancelled or preempted. SLURM has told the ranks as well: nothing to do but to outlive them.
trap 'stopped=TERM' TERM

unhealthy=$(unhealthy_nodes)
[ -z "$unhealthy" ] || requeue "$unhealthy"

# One task is one rank: no layer of processes between SLURM and the ranks, so that its signals, its limits and its report of
# who failed reach and concern the ranks themselves; torchrun's restarts would be in the way of those by SLURM.
# megamtp/parallel/environment.py reads rank, local rank and meeting point from srun's variables.
#   --cpus-per-task   srun does not take it over from sbatch since SLURM 22.05
#   --export=ALL      what site.sh exports, also where sites submit with --export=NONE
#   --mpi=none        the ranks meet by themselves
#   --wait            when one rank has ended, the others have a minute to say why before they are killed; without
#                     --kill-on-bad-exit=0 the first would have the others' tracebacks and exit codes cut off
# PYTHONUNBUFFERED: what a rank said before it was killed is in its log.
# No --gpus-per-task: a rank must see its neighbours' GPUs, or NCCL goes through host memory.
if [ -z "$stopped" ]; then
  PYTHONUNBUFFERED=1 srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --mpi=none --export=ALL --wait=60 \
    --kill-on-bad-exit=0 --output="$logs/rank-%3t.log" "${SRUN_OPTIONS[@]}" "${IN_CONTAINER[@]}" \
    "$PYTHON" "$run/code/pretrain.py" "$run/code/run.yaml" --run_dir "$run" "$@" 2>"$logs/srun.log" &
  training=$!
  wait $training
  while kill -0 $training 2>/dev/null; do wait $training; done  # a signal had ended `wait`, not srun
  wait $training
  code=$?
  [ -z "$watchdog" ] || kill "$watchdog" 2>/dev/null
  [ ! -s "$logs/srun.log" ] || cat "$logs/srun.log"
else
  code=138
fi

# --- what now

# Checked first: srun returns the highest code of all ranks, and those that waited for the one with wrong input were killed.
# Not by the code alone: 2 is also what a node without its file system makes of a file that is there.
wrong=$(grep -hE '^(rank [0-9]+: |pretrain\.py: )?error: ' "$logs"/rank-*.log 2>/dev/null | sort | uniq -c | head -n 5)
if [ -n "$wrong" ] && grep -qE '^srun: error: .*: Exited with exit code 2$' "$logs/srun.log"; then
  echo "$wrong"
  give_up 2 "the input is wrong (exit code 2), which no restart mends"
fi
case $code in
  0) say "training is done, newest checkpoint $(newest_checkpoint)"; exit 0 ;;
  130) give_up 130 "interrupted by hand, newest checkpoint $(newest_checkpoint); submit it again to go on" ;;
  143) [ "$(squeue -h -j "$job" -o %T)" = RUNNING ] || exit 143 ;; # cancelled or requeued by someone else
esac
if [ "$starts" -ge $STARTS_WITHOUT_PROGRESS ] && ! [[ $(newest_checkpoint) > $from ]]; then
  give_up "$code" "$no_progress"
fi
if [ $code = 138 ] || [ $code = 143 ] || [ "$stopped" = USR1 ]; then
  say "stopped by a signal (exit code $code), newest checkpoint $(newest_checkpoint); back into the queue"
  requeue ""
fi
# A rank has failed, or hung. Its node is avoided when the health check says so, or when it was the suspect at the last
# failure as well: once may be chance, and an exclusion that is not needed may leave too few nodes.
suspect=$(hanging)
if [ -n "$suspect" ]; then
  say "a rank on $suspect hung; back into the queue"
else
  suspect=$(first_to_fail)
  say "failed with exit code $code${suspect:+, first on $suspect}; back into the queue"
fi
avoid=$(unhealthy_nodes)
if [ -n "$suspect" ] && [ "$suspect" = "$(cat "$run/slurm/suspect" 2>/dev/null)" ]; then
  avoid=$(printf '%s\n' "$avoid" "$suspect" | sed '/^$/d' | sort -u)
fi
echo "$suspect" >"$run/slurm/suspect"
requeue "$avoid"
