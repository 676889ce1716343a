"""The launchers that exist start the run: torchrun, deepspeed and mpirun for real, srun by its variables."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

import pretrain
from megamtp.errors import UserError
from megamtp.parallel.environment import LaunchEnvironment, launch_environment, set_rendezvous
from tests.distributed import run_ranks, start_ranks
from tests.training.tiny import config_dict, exact, run_config, run_training, step_lines, write_corpus

ROOT = Path(pretrain.__file__).parent
BIN = Path(sys.executable).parent
MPIRUN = shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "OMPI_", "PMI", "MPI_", "SLURM_")  # names start so
LAYOUT = {"training.steps": 2, "parallel.zero_stage": 1}


# --- real launchers, two ranks each


def torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def deepspeed() -> list[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    return [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port)]


def mpirun() -> list[str]:
    # Without --oversubscribe it refuses more ranks than cores.
    return [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train", n_documents=60, seed=0)
    write_corpus(folder / "validation", n_documents=10, seed=1)
    return folder


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory) -> list[dict]:
    """The step lines of the same layout without a launcher."""
    folder = tmp_path_factory.mktemp("reference")
    run_ranks(2, run_training, run_config(folder, corpus, LAYOUT))
    return step_lines(folder)


def launch(command: list[str], folder: Path, corpus: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """``command`` with a config of two steps into ``folder / "run"``. Fails when it leaves a process behind."""
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(config_dict(folder / "run", corpus, LAYOUT)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    environment |= {"PYTHONPATH": str(ROOT)}
    try:
        return subprocess.run(
            [*command, str(config)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
        )
    finally:
        left = [process for process in psutil.process_iter() if mentions(process, str(config))]
        for process in left:
            process.kill()
        assert not left


def mentions(process: psutil.Process, argument: str) -> bool:
    try:
        return argument in process.cmdline()
    except psutil.Error:
        return False


@pytest.mark.parametrize(
    "launcher",
    [torchrun, deepspeed, pytest.param(mpirun, marks=pytest.mark.skipif(not MPIRUN, reason="there is no mpirun"))],
)
def test_a_launcher_starts_the_run(launcher, corpus, reference, tmp_path):
    result = launch([*launcher(), "pretrain.py"], tmp_path, corpus)
    assert result.returncode == 0, result.stderr
    lines = step_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert [exact(line) for line in lines] == [exact(line) for line in reference]


def as_launched(names: dict[str, str], arguments: list[str]) -> int:
    """For ``start_ranks``: the command on a rank that sees ``names`` (RANK filled in) and no torchrun."""
    rank, number = os.environ["RANK"], os.environ["MASTER_PORT"]
    for name in list(os.environ):
        if name.startswith(LAUNCHED):
            del os.environ[name]
    os.environ.update({name: value.format(rank=rank, number=number) for name, value in names.items()})
    sys.modules["mpi4py"] = None
    return pretrain.main(arguments)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(
            {
                "SLURM_PROCID": "{rank}",
                "SLURM_LOCALID": "{rank}",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_JOB_ID": "{number}",
                "SLURM_STEP_ID": "0",
            },
            id="srun",
        ),
        pytest.param(
            {
                "OMPI_COMM_WORLD_RANK": "{rank}",
                "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "PMIX_NAMESPACE": "prterun-{number}@1",
            },
            id="mpirun-without-mpi4py",
        ),
    ],
)
def test_ranks_that_agree_without_a_word_train_together(names, corpus, reference, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(config_dict(tmp_path / "run", corpus, LAYOUT)))
    outcomes = start_ranks(2, as_launched, names, [str(config)])
    assert [outcome.result for outcome in outcomes] == [0, 0], outcomes
    assert [exact(line) for line in step_lines(tmp_path / "run")] == [exact(line) for line in reference]


# Rank 1 fails at its second step, when rank 0 waits for it in an all-reduce.
FAILING = """
import sys
import pretrain
from megamtp.data.loader import Loader
from megamtp.parallel.environment import launch_environment

next_step, steps = Loader.next_step, []

def failing(self):
    steps.append(self)
    if len(steps) == 2 and launch_environment().rank == 1:
        raise ArithmeticError("the second step of this rank")
    return next_step(self)

Loader.next_step = failing
sys.exit(pretrain.main(sys.argv[1:]))
"""


def test_a_rank_that_fails_ends_the_run_with_its_traceback(corpus, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    started = time.monotonic()
    result = launch([*torchrun(), str(tmp_path / "failing.py")], tmp_path, corpus, timeout=60)
    assert result.returncode not in (0, 2), result.stderr
    assert "Traceback" in result.stderr
    assert "ArithmeticError: the second step of this rank" in result.stderr
    assert time.monotonic() - started < 60
    assert len(step_lines(tmp_path / "run")) == 1


# --- variables


@pytest.fixture
def variables(monkeypatch):
    """``os.environ`` without a launcher; a function that sets more. What a test adds goes again."""
    for name in list(os.environ):
        if name.startswith(LAUNCHED):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that set_rendezvous's own are undone as well
        monkeypatch.delenv(name)

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_all


TORCHRUN = {"RANK": 3, "WORLD_SIZE": 8, "LOCAL_RANK": 1}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": 5, "OMPI_COMM_WORLD_SIZE": 6, "OMPI_COMM_WORLD_LOCAL_RANK": 2}
MPICH = {"PMI_RANK": 1, "PMI_SIZE": 4, "MPI_LOCALRANKID": 0}
JOB = {"SLURM_JOB_ID": 71, "SLURM_NTASKS": 64, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_JOB_NODELIST": "a[1-8]"}
STEP = JOB | {"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 16, "SLURM_PROCID": 9, "SLURM_LOCALID": 1}
STEP |= {"SLURM_STEP_NODELIST": "a[3-4]"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 1, 0, "python")),
        ({"LOCAL_RANK": 0}, (0, 1, 0, "python")),
        (TORCHRUN, (3, 8, 1, "torchrun")),
        (OPEN_MPI, (5, 6, 2, "Open MPI")),
        (MPICH, (1, 4, 0, "MPICH")),
        (STEP, (9, 16, 1, "SLURM")),
        (JOB, (0, 1, 0, "python")),  # a batch script, or the shell of salloc
        (JOB | {"SLURM_STEP_ID": 4294967290, "SLURM_STEP_NUM_TASKS": 1}, (0, 1, 0, "python")),  # an interactive step
        (JOB | {"PMI_RANK": 0, "PMI_SIZE": 1}, (0, 1, 0, "python")),  # srun's PMI says nothing of the local rank
        (STEP | {"PMI_RANK": 9, "PMI_SIZE": 16}, (9, 16, 1, "SLURM")),
        (STEP | TORCHRUN, (3, 8, 1, "torchrun")),
        (STEP | OPEN_MPI, (5, 6, 2, "Open MPI")),
        (OPEN_MPI | TORCHRUN, (3, 8, 1, "torchrun")),
    ],
)
def test_the_place_in_the_launch(variables, values, expected):
    variables(**values)
    assert launch_environment() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"RANK": 0, "WORLD_SIZE": 2}, "RANK is set but LOCAL_RANK is not; set it or start the run with torchrun"),
        ({"RANK": 0, "LOCAL_RANK": 0}, "RANK is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": 2}, "WORLD_SIZE is 2 but RANK is not set"),
        (TORCHRUN | {"RANK": "one"}, "RANK is 'one', not a number"),
        (TORCHRUN | {"RANK": 8}, "RANK=8, WORLD_SIZE=8, LOCAL_RANK=1 contradict each other"),
        (TORCHRUN | {"LOCAL_RANK": 4}, "RANK=3, WORLD_SIZE=8, LOCAL_RANK=4 contradict each other"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": -1}, "OMPI_COMM_WORLD_SIZE is '-1', not a number"),
        ({"SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": 0}, "SLURM_STEP_NUM_TASKS is set but SLURM_PROCID is not"),
    ],
)
def test_half_set_variables_are_refused(variables, values, expected):
    variables(**values)
    with pytest.raises(UserError, match=expected) as refused:
        launch_environment()
    assert "\n" not in str(refused.value)


def test_the_place_is_known_before_torch_is_imported():
    check = "import sys, megamtp.parallel.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_only_the_first_rank_of_a_launcher_says_error_without_its_number(variables, capsys):
    for rank, prefix in ((0, "error: "), (1, "rank 1: error: ")):
        variables(**OPEN_MPI | {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank})
        with pytest.raises(SystemExit):
            pretrain.main(["nowhere.yaml"])
        assert capsys.readouterr().err.startswith(prefix)


# --- meeting


def meeting_point() -> tuple[str, int]:
    environment = launch_environment()
    set_rendezvous(environment)
    exported = tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    assert exported == environment[:3]
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def test_one_process_meets_nobody(variables):
    set_rendezvous(LaunchEnvironment(0, 1, 0, "python"))
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)


@pytest.mark.parametrize("values", [TORCHRUN, OPEN_MPI, MPICH, STEP])
def test_what_the_user_says_is_left(variables, values):
    variables(**values, MASTER_ADDR="head", MASTER_PORT=1234)
    assert meeting_point() == ("head", 1234)


def test_srun_ranks_heed_an_address_or_a_port_alone(variables):
    variables(**STEP, MASTER_ADDR="head")
    address, port = meeting_point()
    assert address == "head" and 10_000 <= port < 30_000
    os.environ.pop("RANK")
    os.environ.pop("MASTER_ADDR")
    variables(MASTER_PORT=1234)
    assert meeting_point() == ("a3", 1234)


def test_torchrun_without_an_address_is_refused(variables):
    variables(**TORCHRUN, MASTER_ADDR="head")
    with pytest.raises(UserError, match="MASTER_ADDR or MASTER_PORT is not; set both"):
        meeting_point()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu-7.site", "gpu-7.site"),
        ("gpu7,cpu[1-3]", "gpu7"),
        ("gpu[007-009,12],cpu[1-3]", "gpu007"),
        ("gpu[3,1]-ib,cpu1", "gpu3-ib"),
        ("[11-12]", "11"),
    ],
)
def test_srun_ranks_meet_on_the_first_host_of_their_step(variables, nodes, first):
    variables(**STEP | {"SLURM_STEP_NODELIST": nodes})
    address, port = meeting_point()
    assert address == first
    assert 10_000 <= port < 30_000


def test_srun_ranks_agree_on_a_port_and_steps_differ_in_it(variables):
    ports = []
    for changes in ({}, {"SLURM_PROCID": 3}, {"SLURM_STEP_ID": 1}, {"SLURM_JOB_ID": 72}):
        variables(**STEP | changes)
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):  # of the last round
            os.environ.pop(name, None)
        ports.append(meeting_point()[1])
    assert ports[0] == ports[1]
    assert len(set(ports)) == 3


def test_a_list_of_hosts_with_several_brackets_goes_to_scontrol(variables, tmp_path):
    variables(**STEP | {"SLURM_STEP_NODELIST": "r[1-2]n[3-4]"}, PATH=tmp_path)
    with pytest.raises(UserError, match=r"first host of 'r\[1-2\]n\[3-4\]'; export MASTER_ADDR and MASTER_PORT"):
        meeting_point()
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames r[1-2]n[3-4]" ] && echo r1n3 && echo r1n4\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    assert meeting_point()[0] == "r1n3"


def with_mpi4py(monkeypatch, size: int, hosts: list[str]) -> None:
    world = SimpleNamespace(size=size, rank=5, allgather=lambda host: hosts, bcast=lambda port: 4321)
    mpi = SimpleNamespace(
        COMM_WORLD=world, Finalize=lambda: None, Get_library_version=lambda: "OtherMPI 1, built today"
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))


@pytest.mark.parametrize(
    ("hosts", "address"), [(["b2", "b1", "b1", "b1", "b2", "b2"], "b2"), (["b1"] * 6, "127.0.0.1")]
)
def test_mpirun_ranks_learn_from_the_first_where_it_is(variables, monkeypatch, hosts, address):
    variables(**OPEN_MPI)
    with_mpi4py(monkeypatch, 6, hosts)
    assert meeting_point() == (address, 4321)


def test_an_mpi4py_of_another_mpi_is_refused(variables, monkeypatch):
    variables(**OPEN_MPI)
    with_mpi4py(monkeypatch, 1, ["b1"])
    with pytest.raises(UserError, match=r"sees 1 of 6 ranks; it is built for another MPI \(OtherMPI 1\)"):
        meeting_point()


def test_without_mpi4py_the_ranks_of_one_node_meet_and_others_are_told_how(variables, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    variables(**OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE=3, PMIX_NAMESPACE="prterun-b1-99@1")
    with pytest.raises(UserError, match="Open MPI: where is rank 0.*mpi4py or pass `-x MASTER_ADDR"):
        meeting_point()
    variables(OMPI_COMM_WORLD_LOCAL_SIZE=6)
    address, port = meeting_point()
    assert address == "127.0.0.1"
    assert 10_000 <= port < 30_000
