"""The batch scripts without SLURM, whose commands only pretend (``fakes``)."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megamtp.training.watchdog import Beat, describe
from tests.slurm.fakes import NODES, ROOT, SCRIPTS, Run, saving


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


REQUEUED = ["scontrol requeue 7"]


@pytest.mark.parametrize(
    "script", [*sorted(SCRIPTS.iterdir()), SCRIPTS.parent / "smoke.sh"], ids=lambda path: path.name
)
def test_a_script_is_sound(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if not shutil.which("shellcheck"):
        pytest.skip("there is no shellcheck")
    result = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# --- submitting


def test_code_and_config_are_copied_and_the_copy_is_submitted(run):
    result = run.submit("--nodes=4", "pretrain_13b.sbatch", "config.yaml", str(run.dir), "--training.steps", "9")
    assert result.returncode == 0, result.stderr
    arguments = (run.fake / "submitted").read_text().splitlines()
    copy = run.dir / "code"
    assert arguments[-5:] == [
        "--nodes=4",
        str(copy / "launch_scripts/slurm/pretrain_13b.sbatch"),
        str(run.dir),
        "--training.steps",
        "9",
    ]
    assert f"--output={run.dir}/slurm/batch-%j.log" in arguments and "--open-mode=append" in arguments
    assert (run.dir / "slurm").is_dir()  # or SLURM could not open the log
    assert (copy / "run.yaml").read_text() == "model: small\n"
    assert (copy / "megamtp/code.py").exists() and (copy / "tools/code.py").exists() and (copy / "pretrain.py").exists()
    assert (copy / "COMMIT").read_text() == "unknown\n"


def test_the_commit_and_what_was_not_committed_are_recorded(run):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=run.tree, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    assert run.submit("pretrain_13b.sbatch", "config.yaml", str(run.folder / "clean")).returncode == 0
    assert (run.folder / "clean/code/COMMIT").read_text().strip() == git("rev-parse", "HEAD")
    (run.tree / "pretrain.py").write_text("b = 2\n")
    assert run.submit("pretrain_13b.sbatch", "config.yaml", str(run.folder / "changed")).returncode == 0
    assert (run.folder / "changed/code/COMMIT").read_text().startswith(git("rev-parse", "HEAD") + " with changes")
    assert "+b = 2" in (run.folder / "changed/code/uncommitted.diff").read_text()


def test_a_second_submission_runs_the_same_copy_and_refuses_another_config(run):
    assert run.submit("pretrain_13b.sbatch", "config.yaml", str(run.dir)).returncode == 0
    (run.tree / "pretrain.py").write_text("b = 2\n")
    again = run.submit("pretrain_13b.sbatch", "config.yaml", str(run.dir))
    assert again.returncode == 0 and "the copy in" in again.stderr
    assert (run.dir / "code/pretrain.py").read_text() == "b = 1\n"
    (run.tree / "config.yaml").write_text("model: large\n")
    refused = run.submit("pretrain_13b.sbatch", "config.yaml", str(run.dir))
    assert refused.returncode == 2 and "differs from" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain_13b.sbatch", "config.yaml"], "usage: submit.sh"),
        (["nowhere.sbatch", "config.yaml", "run"], "nowhere.sbatch: no such script"),
        (["pretrain_13b.sbatch", "nowhere.yaml", "run"], "nowhere.yaml: no such config"),
    ],
)
def test_a_wrong_submission_is_refused_in_one_line(run, arguments, message):
    refused = run.submit(*arguments)
    assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    assert not (run.fake / "submitted").exists()


def test_a_python_that_is_not_there_is_told_before_the_queue(run):
    run.site("PYTHON=/nowhere/python SRUN_OPTIONS=() IN_CONTAINER=()")
    refused = run.submit("pretrain_13b.sbatch", "config.yaml", str(run.dir))
    assert refused.returncode == 2 and "/nowhere/python, which is not there" in refused.stderr


# --- exit codes


def test_the_ranks_are_started_from_the_copy_with_the_overrides(run):
    code, _, calls = run.run(0, saving(10))
    assert (code, calls) == (0, [])
    command = (run.fake / "calls").read_text()
    assert (
        f"python3 {run.dir}/code/pretrain.py {run.dir}/code/run.yaml --run_dir {run.dir} --training.seed 3" in command
    )
    assert f"--output={run.dir}/slurm/job-7-start-0/rank-%3t.log" in command


TOLD = 'echo "rank 1: error: data.train: nowhere" > "$RUN/slurm/job-7-start-0/rank-001.log"; '


def test_wrong_input_is_never_requeued(run):
    code, output, calls = run.run(0, TOLD + 'echo "srun: error: n2: task 1: Exited with exit code 2" >&2; exit 2')
    assert (code, calls) == (2, []) and "the input is wrong" in output and "data.train: nowhere" in output
    # One rank has found it; those that waited for it were killed, and srun returns the highest code.
    messages = "srun: error: n2: task 1: Exited with exit code 2\nsrun: error: n1: task 0: Killed"
    code, _, calls = run.run(0, TOLD + f'echo "{messages}" >&2; exit 137')
    assert (code, calls) == (2, [])


def test_a_node_without_its_file_system_is_no_wrong_input(run):
    """Python and SLURM itself end with 2 where a file is missing."""
    missing = """
echo "slurmstepd: error: execve(): /nowhere/python: No such file or directory" > "$RUN/slurm/job-7-start-0/rank-001.log"
echo "srun: error: n2: task 1: Exited with exit code 2" >&2
exit 2
"""
    assert run.run(0, missing)[::2] == (0, REQUEUED)


@pytest.mark.parametrize("exit_code", [138, 1, 75, 134, 137, 139])
def test_a_stop_that_a_restart_mends_is_requeued(run, exit_code):
    code, _, calls = run.run(0, saving(10) + f'echo "srun: error: n1: task 0: failed" >&2; exit {exit_code}')
    assert (code, calls) == (0, REQUEUED)


def test_a_preempted_job_is_requeued_and_a_cancelled_one_is_not(run):
    (run.fake / "in_queue").write_text("RUNNING\n")
    assert run.run(0, "exit 143")[::2] == (0, REQUEUED)
    (run.fake / "in_queue").write_text("COMPLETING\n")
    assert run.run(0, "exit 143")[::2] == (143, [])
    (run.fake / "in_queue").write_text("RUNNING\n")
    assert run.run(0, "exit 130")[::2] == (130, [])


def test_a_requeue_that_slurm_refuses_ends_the_job_with_a_line(run):
    (run.fake / "scontrol").write_text('#!/bin/bash\n[ "$1" = show ] && echo n1\n')
    code, output, _ = run.run(0, "exit 138")
    assert code == 1 and "does not let this job requeue itself" in output


# --- progress


def test_three_starts_without_progress_end_the_job(run):
    failing = 'echo "srun: error: n1: task 0: Exited with exit code 1" >&2; exit 1'
    assert run.run(0, saving(10) + "exit 1")[2] == REQUEUED
    assert run.run(1, failing)[2][:1] == REQUEUED
    assert run.run(2, failing)[2][:1] == REQUEUED
    code, output, calls = run.run(3, failing)
    assert (code, calls) == (1, []) and "3 starts from checkpoint step-00000010 have led to no newer one" in output
    # Submitted again by someone who has mended it, it may try again.
    assert run.run(0, failing, job="8")[2] == ["scontrol requeue 8", "scontrol update JobId=8 ExcNodeList=n1"]


def test_progress_resets_the_count(run):
    for start in range(6):
        code, output, calls = run.run(start, saving(10 * start) + "exit 138" if start % 2 else "exit 1")
        assert (code, calls) == (0, REQUEUED), output


def test_starts_that_end_with_their_node_count_too(run):
    run.run(0, saving(10))
    for start in (1, 2, 3):
        process = run.start(start, "touch $FAKE/started; sleep 20")
        wait_for(run.fake / "started")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)
        (run.fake / "started").unlink()
    code, output, _ = run.run(4, "touch $FAKE/started")
    assert code == 1 and "3 starts from checkpoint step-00000010" in output
    assert not (run.fake / "started").exists()


def test_a_save_of_an_older_step_is_no_progress(run):
    run.run(0, saving(20) + "exit 1")
    run.run(1, saving(10) + "exit 1")
    run.run(2, saving(10) + "exit 1")
    code, output, calls = run.run(3, saving(10) + "exit 1")
    assert (code, calls) == (1, []) and "from checkpoint step-00000020" in output


# --- signals


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


# What srun does: it hands the signal to the ranks, which save and exit with 138.
RANKS = "trap '" + saving(30) + "sleep 0.3; exit 138' USR1; touch $FAKE/started; for i in {1..200}; do sleep 0.1; done"


def test_the_signal_before_the_time_limit_reaches_srun_and_the_job_is_requeued(run):
    process = run.start(0, RANKS)
    wait_for(run.fake / "started")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert run.calls() == REQUEUED
    assert "newest checkpoint step-00000030" in output
    # The next start knows where it begins, and ends.
    code, output, calls = run.run(1, saving(40))
    assert (code, calls) == (0, []) and "from checkpoint step-00000030" in output


def test_ranks_that_do_not_heed_the_signal_do_not_take_the_job_into_its_limit(run):
    process = run.start(0, "trap '' USR1; touch $FAKE/started; sleep 20")
    wait_for(run.fake / "started")
    begun = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    # The sleep outlives its shell, which was killed, and holds the pipe.
    process.wait(timeout=10)
    assert time.monotonic() - begun < 3
    assert run.calls() == REQUEUED
    os.killpg(process.pid, signal.SIGKILL)
    assert "exit code 137" in process.communicate(timeout=10)[0]


def test_a_training_that_ends_just_after_the_signal_is_done(run):
    ranks = "trap 'sleep 0.3; exit 0' USR1; touch $FAKE/started; for i in {1..200}; do sleep 0.1; done"
    process = run.start(0, ranks)
    wait_for(run.fake / "started")
    process.send_signal(signal.SIGUSR1)
    assert "training is done" in process.communicate(timeout=20)[0]
    assert process.returncode == 0 and run.calls() == []


# --- nodes


def site_where_sick(*nodes: str) -> str:
    return f"""
PYTHON=python3 SRUN_OPTIONS=() IN_CONTAINER=() HEALTH_CHECK=(check)
check() {{ [[ " {" ".join(nodes)} " != *" $SLURMD_NODENAME "* ]]; }}
export -f check
"""


def test_a_sick_node_is_excluded_before_training_beside_what_the_user_excludes(run):
    run.site(site_where_sick("n2"))
    (run.fake / "excluded").write_text("n8,n[10-12]")
    code, output, calls = run.run(0, "touch $FAKE/started")
    assert (code, calls) == (0, [*REQUEUED, "scontrol update JobId=7 ExcNodeList=n8,n[10-12],n2"])
    assert not (run.fake / "started").exists()


def test_a_node_that_does_not_see_python_is_excluded(run):
    python = run.folder / "python"
    python.symlink_to("/usr/bin/env")
    run.site(f"PYTHON={python} SRUN_OPTIONS=() IN_CONTAINER=() HEALTH_CHECK=(true)")
    run.submit("pretrain_13b.sbatch", "config.yaml", str(run.dir))
    # A function of the site may stand for what differs between nodes.
    run.site(f"""
PYTHON={python} SRUN_OPTIONS=() IN_CONTAINER=() HEALTH_CHECK=(true)
command() {{ [ "$SLURMD_NODENAME" != n2 ]; }}
export -f command
""")
    assert run.run(0, "touch $FAKE/started")[2] == [*REQUEUED, "scontrol update JobId=7 ExcNodeList=n2"]


def failing_with_silent(node: str) -> str:
    return f'echo {node} > "$FAKE/silent"; echo "srun: error: {node}: task 1: Killed" >&2; exit 137'


def test_a_node_that_does_not_answer_is_left_to_slurm_for_a_while(run):
    """SLURM requeues the job when it gives the node up, and a requeue just before would cost the job its GPUs."""
    code, output, calls = run.run(0, saving(10) + failing_with_silent("n2"))
    assert (code, calls) == (0, [*REQUEUED, "scontrol update JobId=7 ExcNodeList=n2"])
    assert "no answer from n2: SLURM should give it up and requeue this job within 300 s" in output
    assert "sleep 300" in (run.fake / "calls").read_text()


def waiting_for_slurm(run: Run) -> subprocess.Popen:
    """A batch script that has begun to wait for SLURM to give a node up."""
    (run.fake / "sleep").write_text('#!/bin/bash\necho "sleep $1" >> "$FAKE/calls"; exec /bin/sleep 20\n')
    process = run.start(0, saving(10) + failing_with_silent("n2"))
    wait_for(run.fake / "calls")
    while "sleep 300" not in (run.fake / "calls").read_text():
        time.sleep(0.05)
    return process


def test_slurm_ends_the_script_that_waits_for_it(run):
    process = waiting_for_slurm(run)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, run.calls()) == (143, []), output


def test_the_time_limit_ends_the_wait(run):
    process = waiting_for_slurm(run)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, run.calls()) == (0, [*REQUEUED, "scontrol update JobId=7 ExcNodeList=n2"]), output


def test_a_check_that_fails_everywhere_accuses_no_node(run):
    run.site(site_where_sick(*NODES))
    code, output, calls = run.run(0, saving(10))
    assert (code, calls) == (0, []) and "the check is at fault" in output


def test_a_node_that_fails_first_twice_is_excluded(run):
    def failing(step: int, first: str) -> str:
        messages = f"srun: error: {first}: task 9: Killed\nsrun: error: n1: tasks 0-7: Exited with exit code 1"
        return saving(step) + f'echo "{messages}" >&2; exit 137'

    assert run.run(0, failing(10, "n2"))[2] == REQUEUED
    assert run.run(1, failing(20, "n3"))[2] == REQUEUED
    assert run.run(2, failing(30, "n3"))[2] == [*REQUEUED, "scontrol update JobId=7 ExcNodeList=n3"]
    # Several nodes at once are no sign.
    assert run.run(3, failing(40, "n[1-2]"))[2] == REQUEUED
    assert run.run(4, failing(50, "n[1-2]"))[2] == REQUEUED


def test_a_node_that_hangs_twice_is_excluded_not_the_one_that_tells(run):
    def hanging(start: int, *nodes: str) -> str:
        beats = [Beat(9, 7, 3, "training", 40, True, "a file.py:1 f", node, 1) for node in ("n1", *nodes)]
        told = "\n".join(describe(beats, list(range(1, len(beats))), [1], 360, "n1"))
        messages = "srun: error: n1: task 0: Exited with exit code 75\nsrun: error: n3: task 9: Killed"
        log = f"$RUN/slurm/job-7-start-{start}/rank-000.log"
        return saving(10 + start) + f'echo "{told}" > "{log}"; echo "{messages}" >&2; exit 137'

    code, output, calls = run.run(0, hanging(0, "n2", "n2"))
    assert (code, calls) == (0, REQUEUED) and "a rank on n2 hung" in output
    assert run.run(1, hanging(1, "n2"))[2] == [*REQUEUED, "scontrol update JobId=7 ExcNodeList=n2"]
    # Several nodes at once are no sign, so it is srun's word that counts: n1 was the first to end.
    assert "a rank on" not in run.run(2, hanging(2, "n2", "n3"))[1]


@pytest.mark.parametrize(
    ("gpus", "remap_failures", "healthy"), [("a\nb", "0\n0", True), ("a", "0", False), ("a\nb", "0\n1", False)]
)
def test_the_health_check(run, gpus, remap_failures, healthy):
    answers = f"case $* in *remapped*) echo '{remap_failures}' ;; *) echo '{gpus}' ;; esac"
    (run.fake / "nvidia-smi").write_text(f"#!/bin/bash\n{answers}\n")
    (run.fake / "nvidia-smi").chmod(0o755)
    result = subprocess.run([SCRIPTS / "health_check.sh"], env=run.environment | {"SLURM_GPUS_ON_NODE": "2"})
    assert (result.returncode == 0) == healthy


def test_another_job_in_the_same_folder_is_refused(run):
    run.run(0, saving(10), job="6")
    (run.fake / "in_queue").write_text("6 test run\n")
    code, output, _ = run.run(0, "touch $FAKE/started", job="7")
    assert code == 2 and "job 6 is running in" in output
    assert not (run.fake / "started").exists()
