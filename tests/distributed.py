"""Groups of gloo ranks for tests, cheap enough to start one per case.

Importing torch and deepspeed costs a rank many CPU-seconds, so one server process does it once and every rank is
forked from it: new processes, nothing shared, a fraction of a second each. A rank that raises, dies or hangs makes
``run_ranks`` raise with that rank's traceback and output; nothing outlives the time-out.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_SECONDS = 90.0
GRACE_SECONDS = 10.0  # what the other ranks get when one has failed
# The second line is what deepspeed imports late, when an engine is built: torch.compile and all of its machinery.
PRELOAD = ["pytest", "torch.utils.tensorboard", "megamtp.training.launch", "megamtp.engine.launch", "deepspeed"]
PRELOAD += ["torch._dynamo", "deepspeed.runtime.zero.muon.original_muon", "deepspeed.module_inject.auto_ep_layer"]


class RankError(AssertionError):
    """A rank raised, died or hung."""


class Outcome(NamedTuple):
    """How one rank's process ended."""

    code: int  # exit code; -signal where one killed it
    result: Any
    error: str | None  # traceback of an exception
    stdout: str
    stderr: str


def run_ranks(world_size: int, function: Callable, *args, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """``function(grid, *args)`` on ``world_size`` new ranks; what each returned. Raises ``RankError``."""
    outcomes = start_ranks(world_size, _with_grid, function, args, timeout=timeout)
    failures = [
        f"rank {rank} of {world_size}: exit code {outcome.code}\n{outcome.error or ''}{outcome.stderr[-4000:]}"
        for rank, outcome in enumerate(outcomes)
        if outcome.code != 0
    ]
    if failures:
        raise RankError("\n".join(failures))
    return [outcome.result for outcome in outcomes]


def run_rank(function: Callable, *args, timeout: float = TIMEOUT_SECONDS) -> Any:
    """``run_ranks`` with one rank."""
    return run_ranks(1, function, *args, timeout=timeout)[0]


def start_ranks(
    world_size: int, function: Callable, *args, timeout: float = TIMEOUT_SECONDS, launched: bool = True
) -> list[Outcome]:
    """``function(*args)`` in ``world_size`` new processes with torchrun's variables; raises nothing.

    Without ``launched`` the variables are absent, as for a plain ``python``.
    """
    context = _context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        port = _free_port()
        processes = []
        for rank in range(world_size):
            variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {name: str(value) for name, value in variables.items()} if launched else {}
            arguments = (Path(folder) / str(rank), variables, timeout, function, args)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            processes.append(process)
        _wait(processes, timeout)
        return [_outcome(Path(folder) / str(rank), process.exitcode) for rank, process in enumerate(processes)]


def _with_grid(function: Callable, args: tuple) -> Any:
    from megamtp.engine.launch import start_processes, stop_processes

    result = function(start_processes(), *args)
    stop_processes()
    return result


def _context():
    # The server inherits these when the first rank starts; 1 thread per rank leaves the cores to the ranks.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _rank_main(files: Path, variables: dict[str, str], timeout: float, function: Callable, args: tuple) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(files.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    # A hanging rank says where, and ends even when pytest is gone.
    faulthandler.dump_traceback_later(timeout, exit=True, file=sys.stderr)
    os.environ.update(variables)
    multiprocessing.current_process()._config["daemon"] = False  # a real rank may have children: data workers
    gc.freeze()  # deepspeed collects garbage often; what was imported before the fork need not be looked through
    try:
        result = function(*args)
    except Exception:
        files.with_suffix(".error").write_text(traceback.format_exc())
        sys.stdout.flush()
        # Destructors of a process group whose other ranks have gone may hang.
        os._exit(1)
    # By value: torch would share tensors through file descriptors of a process that is about to end.
    files.with_suffix(".result").write_bytes(pickle.dumps(result))


def _wait(processes: list, timeout: float) -> None:
    deadline = time.monotonic() + timeout + GRACE_SECONDS
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], timeout=0.2)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _outcome(files: Path, code: int) -> Outcome:
    def text(ending: str) -> str:
        path = files.with_suffix(ending)
        return path.read_text(errors="replace") if path.exists() else ""

    result = files.with_suffix(".result")
    return Outcome(
        code=code,
        result=pickle.loads(result.read_bytes()) if result.exists() else None,
        error=text(".error") or None,
        stdout=text(".stdout"),
        stderr=text(".stderr"),
    )


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
