"""Which rank this process is, and where rank 0 waits, from the variables of whatever started it.

Nothing here imports torch: a wrong launch is refused before the seconds that torch takes.
"""

import contextlib
import os
import re
import socket
import subprocess
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from megamtp.errors import UserError, exit_code


class LaunchEnvironment(NamedTuple):
    """One process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # "python" when nothing but the shell started it


class _Launcher(NamedTuple):
    name: str
    rank: str
    world_size: str
    local_rank: str
    sign: str  # set in every process of this launcher, and only there


# The innermost first: torchrun runs inside srun, and mpirun starts its daemons with srun. deepspeed sets the same
# variables as torchrun. A batch script and the shell of salloc see SLURM_PROCID and SLURM_NTASKS too, those of the
# job; only srun sets the variables of a step.
_TORCHRUN = _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", sign="RANK")
_OPEN_MPI = _Launcher("Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "RANK")))
_MPICH = _Launcher("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", sign="MPI_LOCALRANKID")  # Intel MPI as well
_SLURM = _Launcher("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", sign="SLURM_STEP_NUM_TASKS")

_HOW = "start the run with torchrun, deepspeed, mpirun or srun"


def launch_environment() -> LaunchEnvironment:
    """This process's place, as torchrun, deepspeed, mpirun or srun give it; rank 0 of 1 for a plain ``python``.

    Raises ``UserError`` for variables that are missing or contradict each other.
    """
    for launcher in (_TORCHRUN, _OPEN_MPI, _MPICH, _SLURM):
        # A step of one task may be an interactive shell, in which this is a plain `python`.
        if launcher.sign in os.environ and not (launcher is _SLURM and os.environ[launcher.sign] == "1"):
            return _place(launcher)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"environment: WORLD_SIZE is {os.environ['WORLD_SIZE']} but RANK is not set; unset it or {_HOW}"
        )
    return LaunchEnvironment(0, 1, 0, "python")


def set_rendezvous(environment: LaunchEnvironment) -> None:
    """Export what ``torch.distributed`` needs to meet by ``env://`` where the launcher has not; collective under MPI.

    One process alone meets nobody: nothing is set. Raises ``UserError`` when it cannot tell where rank 0 waits.
    """
    if environment.world_size == 1:
        return
    if not ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ):
        if environment.launcher == _TORCHRUN.name:
            raise UserError(f"environment: RANK is set but MASTER_ADDR or MASTER_PORT is not; set both or {_HOW}")
        if environment.launcher == _SLURM.name:
            # Either alone is heeded: a host by another name, or a port that the site leaves open.
            address = os.environ.get("MASTER_ADDR") or _first_host()
            port = os.environ.get("MASTER_PORT") or _derived_port("SLURM_JOB_ID", "SLURM_STEP_ID")
        else:
            address, port = _meeting_point_by_mpi(environment)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), environment[:3], strict=True):
        os.environ[name] = str(value)


def mpi_world(environment: LaunchEnvironment, advice: str):
    """mpi4py's communicator of all ranks; importing it starts MPI. ``ImportError`` where there is no mpi4py or MPI.

    ``UserError``, ending in ``advice``, where mpi4py sees other ranks than the launcher has started.
    """
    try:
        from mpi4py import MPI
    except RuntimeError as error:  # it finds no MPI library
        raise ImportError(str(error)) from None
    world = MPI.COMM_WORLD
    if world.size != environment.world_size:
        raise UserError(
            f"mpi4py: sees {world.size} of {environment.world_size} ranks; it is built for another "
            f"MPI ({MPI.Get_library_version().split(',')[0].strip()}); rebuild it with this one's mpicc or {advice}"
        )
    return world


@contextlib.contextmanager
def mpi_ranks(environment: LaunchEnvironment, advice: str) -> Iterator[Any]:
    """``mpi_world`` for a job whose ranks end together: where the block raises, exiting ends the others, by MPI_Abort.

    Enter it before a rank can fail: Open MPI's mpirun hangs where one ends while another is still starting MPI.
    ``UserError``, ending in ``advice``, where mpi4py is of no use.
    """
    try:
        world = mpi_world(environment, advice)
    except ImportError as error:
        raise UserError(f"mpi4py: cannot be used ({' '.join(str(error).split())}); {advice}") from None
    try:
        yield world
    except BaseException as error:
        from mpi4py.run import set_abort_status

        set_abort_status(exit_code(error))
        raise


def _place(launcher: _Launcher) -> LaunchEnvironment:
    names = (launcher.rank, launcher.world_size, launcher.local_rank)
    for name in names:
        if name not in os.environ:
            raise UserError(f"environment: {launcher.sign} is set but {name} is not; set it or {_HOW}")
        if not os.environ[name].isdecimal():
            raise UserError(f"environment: {name} is {os.environ[name]!r}, not a number; {_HOW}")
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    # Open MPI may number an oversubscribed node's ranks out of order.
    ordered = local_rank <= rank or launcher is _OPEN_MPI
    if not (ordered and max(rank, local_rank) < world_size):
        values = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise UserError(f"environment: {values} contradict each other; {_HOW}")
    return LaunchEnvironment(rank, world_size, local_rank, launcher.name)


def _meeting_point_by_mpi(environment: LaunchEnvironment) -> tuple[str, int]:
    advice = "pass `-x MASTER_ADDR=HOST -x MASTER_PORT=PORT` to mpirun (MPICH: `-genv NAME VALUE`)"
    try:
        world = mpi_world(environment, advice)
    except ImportError:
        if os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(environment.world_size):
            return "127.0.0.1", _derived_port("PMIX_NAMESPACE")
        raise UserError(f"{environment.launcher}: where is rank 0? Install mpi4py or {advice}") from None
    from mpi4py import MPI

    hosts = world.allgather(socket.gethostname())
    port = world.bcast(_free_port() if world.rank == 0 else None)
    # MPI has done its part. Left for the interpreter's exit, a rank that fails would wait there for the others.
    MPI.Finalize()
    return hosts[0] if len(set(hosts)) > 1 else "127.0.0.1", port


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    # "gpu7", "gpu7,cpu1", "gpu[07-09,12]-ib,cpu1". A name with two pairs of brackets is left to scontrol.
    if match := re.fullmatch(r"([^\[\],]+)(?:,.*)?|([^\[\],]*)\[(\d+)[^\[\]]*\]([^\[\],]*)(?:,.*)?", nodes):
        return match[1] or f"{match[2]}{match[3]}{match[4]}"
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(f"SLURM: cannot tell the first host of {nodes!r}; export MASTER_ADDR and MASTER_PORT") from None


def _derived_port(*names: str) -> int:
    """The same on every rank without a word between them; below the range that the system hands out by itself."""
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(f"environment: no {missing[0]} to choose a port by; export MASTER_ADDR and MASTER_PORT")
    return 10_000 + zlib.crc32(".".join(os.environ[name] for name in names).encode()) % 20_000


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]
