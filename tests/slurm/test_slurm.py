"""The batch scripts under a real SLURM: three nodes on this host, jobs of two, and what befalls them on a cluster."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import pretrain
from tests.distributed import run_ranks
from tests.slurm.cluster import Cluster, missing_programs
from tests.training.tiny import config_dict, exact, run_config, run_training, step_lines, write_corpus

pytestmark = pytest.mark.slow

ROOT = Path(pretrain.__file__).parent
LAYOUT = {"parallel.zero_stage": 1, "data.workers": 0}
SITE = f"""
PYTHON={sys.executable} SRUN_OPTIONS=(--wait=10) IN_CONTAINER=() HEALTH_CHECK=(check)
check() {{ [ ! -e "$RUN_TREE/sick-$SLURMD_NODENAME" ]; }}
export -f check
# The nodes are one host, whose names for them nobody can look up.
export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
"""
# A step takes as long as a larger model's, without its work: the other tests want the cores.
PAUSE = """
import time
from megamtp.data.loader import Loader
next_step = Loader.next_step
def slow_step(self):
    time.sleep({seconds})
    return next_step(self)
Loader.next_step = slow_step
"""
SMALL = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = missing_programs()
    reason = f"SLURM is not installed: no {', '.join(missing)}" if missing else None
    if not missing and os.geteuid() != 0:
        reason = "SLURM's daemons need root"
    if reason and os.environ.get("MEGAMTP_REQUIRE_SLURM"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    with Cluster(folder, nodes=3, cpus=16, **gpus(folder)) as cluster:
        yield cluster


def gpus(folder: Path) -> dict[str, str]:
    """What makes SLURM believe in 8 GPUs a node: files that stand for devices."""
    for i in range(8):
        (folder / f"gpu{i}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    return {"extra": "GresTypes=gpu", "gres": "Gres=gpu:8"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train", n_documents=60, seed=0)
    write_corpus(folder / "validation", n_documents=10, seed=1)
    return folder


def make_tree(folder: Path, before_main: str) -> Path:
    """A source tree for a CPU cluster; ``before_main`` runs in ``pretrain.py`` before it begins."""
    shutil.copytree(ROOT / "megamtp", folder / "megamtp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "launch_scripts", folder / "launch_scripts")
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "launch_scripts/slurm/site.sh").write_text(f"export RUN_TREE={folder}\n" + SITE)
    source = (ROOT / "pretrain.py").read_text()
    assert source.count("\nif __name__") == 1
    (folder / "pretrain.py").write_text(source.replace("\nif __name__", f"{before_main}\nif __name__"))
    return folder


def submit(
    cluster: Cluster, tree: Path, run_dir: Path, config: dict, *options: str, script: str = "pretrain_13b.sbatch"
) -> str:
    """The number of a job, of two ranks on two nodes unless ``options`` say otherwise."""
    (tree / "config.yaml").write_text(yaml.safe_dump(config))
    command = [str(tree / "launch_scripts/slurm/submit.sh"), "--parsable", *SMALL, *options, script]
    return cluster.command(*command, str(tree / "config.yaml"), str(run_dir)).split(";")[0]


def logs(run_dir: Path) -> str:
    """For the message of a failure: all that the job has said."""
    files = [*sorted((run_dir / "slurm").glob("*.log")), *sorted((run_dir / "slurm").glob("*/*.log"))]
    return "\n".join(f"--- {file.relative_to(run_dir)}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


def batch_log(run_dir: Path) -> str:
    return next((run_dir / "slurm").glob("batch-*.log")).read_text()


def nodes_of_starts(run_dir: Path) -> list[str]:
    return re.findall(r"start \d+: job \d+ on (\S+),", batch_log(run_dir))


def reference(corpus: Path, folder: Path, changes: dict) -> list[dict]:
    """What a run that nothing happens to writes."""
    run_ranks(2, run_training, run_config(folder, corpus, changes))
    return [exact(line) for line in step_lines(folder)]


def test_a_run_hit_by_its_time_limit_goes_on_by_itself_and_loses_nothing(cluster, corpus, tmp_path):
    # Limit and warning are watched twice a minute: the signal comes 60 to 90 s after the start.
    changes = LAYOUT | {"training.steps": 190}
    tree, run_dir = make_tree(tmp_path / "tree", PAUSE.format(seconds=0.5)), tmp_path / "run"
    config = config_dict(run_dir, corpus, changes)
    job = submit(cluster, tree, run_dir, config, "--time=2", "--signal=B:USR1@30")
    # What happens to the tree no longer concerns the run.
    (tree / "pretrain.py").write_text("raise SystemExit(2)\n")
    expected = reference(corpus, tmp_path / "reference", changes)
    ended = cluster.wait(job, timeout=400)
    assert ended["JobState"] == "COMPLETED", logs(run_dir)
    assert int(ended["Restarts"]) >= 1
    first = (run_dir / f"slurm/job-{job}-start-0/rank-000.log").read_text()
    assert "stopped by SIGUSR1" in first, logs(run_dir)
    assert (run_dir / f"slurm/job-{job}-start-0/rank-001.log").exists()
    assert "going on from" in (run_dir / f"slurm/job-{job}-start-1/rank-000.log").read_text()
    assert [exact(line) for line in step_lines(run_dir)] == expected


@pytest.mark.parametrize("which", [0, 1], ids=["with the batch script", "without it"])
def test_a_node_that_dies_does_not_end_the_run(cluster, corpus, tmp_path, which):
    changes = LAYOUT | {"training.steps": 60, "training.checkpoint_every": 10}
    tree, run_dir = make_tree(tmp_path / "tree", PAUSE.format(seconds=0.5)), tmp_path / "run"
    job = submit(cluster, tree, run_dir, config_dict(run_dir, corpus, changes))
    wait_for(run_dir / "checkpoints/latest", run_dir)
    dead = cluster.command("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).splitlines()[which]
    cluster.kill(dead)
    expected = reference(corpus, tmp_path / "reference", changes)
    try:
        ended = cluster.wait(job, timeout=240)
    finally:
        cluster.start_node(dead)
    assert ended["JobState"] == "COMPLETED", logs(run_dir)
    starts = [
        cluster.command("scontrol", "show", "hostnames", nodes).splitlines() for nodes in nodes_of_starts(run_dir)
    ]
    assert dead in starts[0] and dead not in starts[1], logs(run_dir)
    assert "from checkpoint step-" in batch_log(run_dir)
    assert [exact(line) for line in step_lines(run_dir)] == expected


def wait_for(path: Path, run_dir: Path, timeout: float = 120, containing: str = "") -> None:
    deadline = time.monotonic() + timeout
    while not path.exists() or containing not in path.read_text():
        assert time.monotonic() < deadline, logs(run_dir)
        time.sleep(0.2)


def test_wrong_input_ends_the_job_at_once(cluster, corpus, tmp_path):
    tree, run_dir = make_tree(tmp_path / "tree", ""), tmp_path / "run"
    job = submit(cluster, tree, run_dir, config_dict(run_dir, corpus, {"optimizer.learning_rate": 1}))
    ended = cluster.wait(job, timeout=60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), logs(run_dir)
    assert "unknown key" in batch_log(run_dir), logs(run_dir)


def test_a_run_that_never_gets_anywhere_stops_after_three_starts(cluster, corpus, tmp_path):
    failing = 'import os\nos._exit(1 if os.environ["SLURM_PROCID"] == "1" else 0)\n'
    tree, run_dir = make_tree(tmp_path / "tree", failing), tmp_path / "run"
    job = submit(cluster, tree, run_dir, config_dict(run_dir, corpus))
    ended = cluster.wait(job, timeout=120)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), logs(run_dir)
    assert "3 starts from checkpoint none have led to no newer one" in batch_log(run_dir)
    # Its second node was the first to fail twice.
    first, second, third = (nodes for nodes in nodes_of_starts(run_dir))
    assert first == second != third
    # An operator's view of the same.
    assert ended["ExcNodeList"] == cluster.command("scontrol", "show", "hostnames", first).splitlines()[1]


# Each start saves one more checkpoint and is told to stop.
EIGHT_LIMITS = """
import os
from pathlib import Path
start, folder = int(os.environ.get("SLURM_RESTART_COUNT", 0)), Path(os.environ["RUN_TREE"]).parent / "run/checkpoints"
folder.mkdir(exist_ok=True)
if os.environ["SLURM_PROCID"] == "0":
    (folder / "latest").write_text(f"step-{start:08d}")
raise SystemExit(138 if start < 8 else 0)
"""


def test_slurm_does_not_mind_how_often_a_job_requeues_itself(cluster, corpus, tmp_path):
    tree, run_dir = make_tree(tmp_path / "tree", EIGHT_LIMITS), tmp_path / "run"
    job = submit(cluster, tree, run_dir, config_dict(run_dir, corpus))
    ended = cluster.wait(job, timeout=120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "8"), logs(run_dir)


def test_a_sick_node_is_left_before_training(cluster, corpus, tmp_path):
    tree, run_dir = make_tree(tmp_path / "tree", "raise SystemExit(0)\n"), tmp_path / "run"
    (tree / "sick-n1").touch()
    job = submit(cluster, tree, run_dir, config_dict(run_dir, corpus))
    ended = cluster.wait(job, timeout=60)
    assert (ended["JobState"], ended["Restarts"], ended["ExcNodeList"]) == ("COMPLETED", "1", "n1"), logs(run_dir)
    # docs/running.md: when it is mended.
    job = cluster.command(
        "sbatch", "--parsable", "--hold", "--exclude=n1", "--wrap", "true", f"--output={tmp_path}/log"
    )
    cluster.command("scontrol", "update", f"JobId={job}", "ExcNodeList=")
    assert cluster.job(job)["ExcNodeList"] == "(null)"
    cluster.command("scancel", job)
    assert [nodes for nodes in nodes_of_starts(run_dir)] == ["n[1-2]", "n[2-3]"]


@pytest.mark.parametrize(("option", "state"), [("--signal=INT", "FAILED"), (None, "CANCELLED")])
def test_a_run_that_someone_stops_saves_and_stays_ended(cluster, corpus, tmp_path, option, state):
    tree, run_dir = make_tree(tmp_path / "tree", PAUSE.format(seconds=0.5)), tmp_path / "run"
    changes = LAYOUT | {"training.steps": 1000}
    job = submit(cluster, tree, run_dir, config_dict(run_dir, corpus, changes))
    wait_for(run_dir / "metrics.jsonl", run_dir, containing='"loss"')  # before its first step there is nothing to save
    cluster.command("scancel", *([option] if option else []), job)
    ended = cluster.wait(job, timeout=60)
    assert (ended["JobState"], ended["Restarts"]) == (state, "0"), logs(run_dir)
    time.sleep(3)
    assert cluster.job(job)["JobState"] == state
    assert (run_dir / "checkpoints/latest").exists(), logs(run_dir)


def test_from_text_to_an_export_by_jobs_that_wait_for_each_other(cluster, tmp_path):
    tree, run_dir, data = make_tree(tmp_path / "tree", ""), tmp_path / "run", tmp_path / "data" / "corpus"
    texts = [f"document {i}: " + "one two three " * (i % 7 + 3) for i in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

    def sbatch(script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        command = ["sbatch", "--parsable", "--cpus-per-task=1", "--mem=1G", f"--chdir={tree}", *options]
        return cluster.command(*command, str(tree / "launch_scripts/slurm" / script), *arguments)

    prepare = sbatch(
        *("preprocess.sbatch", "2", str(data), "--input", str(tmp_path / "text.jsonl"), "--tokenizer", "bytes"),
        options=("--array=0-1",),
    )
    merge = sbatch("merge.sbatch", "2", str(data), options=(f"--dependency=afterok:{prepare}",))
    config = config_dict(run_dir, tmp_path, {"model.vocab_size": 257, "training.steps": 4} | LAYOUT)
    config["data"] |= {"train": str(data), "validation": str(data)}
    options = ["--nodes=1", "--ntasks-per-node=2", f"--dependency=afterok:{merge}"]
    train = submit(cluster, tree, run_dir, config, *options, script="pretrain_node.sbatch")
    export = tmp_path / "export"
    convert = sbatch("convert.sbatch", str(run_dir), str(export), options=(f"--dependency=afterok:{train}",))
    ended = cluster.wait(convert, timeout=200)
    told = "\n".join(path.read_text() for path in tree.glob("*.log")) + logs(run_dir)
    assert ended["JobState"] == "COMPLETED", told
    # Each text is a document, with a byte a token and one for its end.
    manifest = json.loads(data.with_suffix(".json").read_text())
    assert (manifest["documents"], manifest["tokens"]) == (200, sum(len(text) + 1 for text in texts))
    assert not list(data.parent.glob("*-of-*"))
    assert [line["step"] for line in step_lines(run_dir)] == [1, 2, 3, 4]
    assert "health" not in batch_log(run_dir)
    assert json.loads((export / "config.json").read_text())["vocab_size"] == 257


def test_the_scripts_as_they_are_fit_a_cluster_of_32_nodes_of_8_gpus(cluster, tmp_path):
    """Nodes that claim 128 processors and 8 GPUs each; SLURM judges what the #SBATCH lines ask for."""
    del cluster  # wanted for its skip alone
    with Cluster(tmp_path, nodes=32, cpus=128, **gpus(tmp_path)) as large:

        def only_tested(script: str, *options: str) -> subprocess.CompletedProcess:
            command = ["sbatch", "--test-only", *options, str(ROOT / "launch_scripts/slurm" / script), str(tmp_path)]
            return subprocess.run(command, env=large.environment, capture_output=True, text=True, timeout=30)

        for script, nodes in (("pretrain_13b.sbatch", "n[1-32]"), ("pretrain_node.sbatch", "n1")):
            accepted = only_tested(script)
            assert accepted.returncode == 0 and f"on nodes {nodes} " in accepted.stderr, accepted.stderr
        # So the judge does judge.
        assert only_tested("pretrain_13b.sbatch", "--gpus-per-node=9").returncode != 0
        assert only_tested("pretrain_13b.sbatch", "--nodes=33").returncode != 0
