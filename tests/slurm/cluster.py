"""A SLURM cluster on this one host: munge, a controller and some nodes, in a folder of its own, on ports of its own.

Each node is a slurmd with a name, a port and a spool folder; all of them have the host's address. Nothing is read from
or written to the machine's own SLURM, and all of it ends with the ``with`` block.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "setpriv")
# Debian's daemons are where a user's PATH does not look.
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])

CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
# Short, so that a test waits seconds for what takes minutes on a cluster.
SlurmdTimeout=15
SlurmctldTimeout=15
KillWait=5
OverTimeLimit=1
CompleteWait=0
SlurmdParameters=config_overrides
"""


class Cluster:
    """``nodes`` slurmd of ``cpus`` (claimed) CPUs, in partition ``test``. ``RuntimeError`` where it does not come up.

    ``extra`` lines go into slurm.conf, ``gres`` into the line of each node.
    """

    def __init__(self, folder: Path, nodes: int, cpus: int = 2, extra: str = "", gres: str = ""):
        self.folder = folder
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in list(self.environment):
            if name.startswith(("SBATCH_", "SLURM_", "SRUN_")) and name != "SLURM_CONF":
                del self.environment[name]
        self._daemons: dict[str, subprocess.Popen] = {}
        ports = iter(free_ports(nodes + 1))
        host = socket.gethostname()
        lines = [CONFIG.format(folder=folder, host=host, controller_port=next(ports)), extra]
        node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=16000 {gres}"
        lines += [f"NodeName={name} Port={next(ports)} {node}" for name in self.nodes]
        lines += ["PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:1"]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def __enter__(self) -> "Cluster":
        try:
            self._start_munge()
            (self.folder / "state").mkdir()
            self._start("slurmctld", ["slurmctld", "-D", "-i"])
            for name in self.nodes:
                (self.folder / f"spool-{name}").mkdir()
                self.start_node(name)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if "slurmctld" in self._daemons:
            self.command("scancel", "--state=PENDING", "--user=root", check=False)
            self.command("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        for name in list(self._daemons):
            self.kill(name)

    def start_node(self, name: str) -> None:
        self._start(name, ["slurmd", "-D", "-N", name])

    def kill(self, name: str) -> None:
        """Kill a daemon and all that it has started: a node that loses its power."""
        daemon = self._daemons.pop(name)
        for process in [daemon, *self._processes_of(name)]:
            try:
                process.send_signal(signal.SIGKILL)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue  # ended by itself meanwhile
        daemon.wait()

    def command(self, *command: str, check: bool = True, timeout: float = 30) -> str:
        """What a SLURM command prints."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.returncode}: {result.stderr}")
        return result.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of ``scontrol show job``."""
        words = self.command("scontrol", "show", "job", "-o", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: str, timeout: float) -> dict[str, str]:
        """The job when it has ended. One that was requeued need not wait its two minutes."""
        deadline = time.monotonic() + timeout
        pending_since = None
        while True:
            job = self.job(job_id)
            if job["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"):
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id}: {job}\n{(self.folder / 'slurmctld.log').read_text()[-3000:]}")
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                pending_since = pending_since or time.monotonic()
                # In the second in which it ended, a node would take the new start for the old one.
                if time.monotonic() - pending_since > 2:
                    self.command("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)
            else:
                pending_since = None
            time.sleep(0.5)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        command = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/socket"]
        self._start("munged", [*command, f"--pid-file={folder}/pid", f"--seed-file={folder}/seed", "--num-threads=2"])
        self._until(lambda: (folder / "socket").exists(), "munged")

    def _start(self, name: str, command: list[str]) -> None:
        # Not even a killed test leaves daemons behind.
        command = ["setpriv", "--pdeathsig", "KILL", *command]
        with open(self.folder / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def _wait_for_nodes(self) -> None:
        def up() -> bool:
            states = self.command("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
            return {f"{name} idle" for name in self.nodes} <= {state.strip() for state in states}

        self._until(up, "slurmctld")

    def _until(self, condition, name: str, timeout: float = 40) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.[lo][ou][gt]"))]
                raise RuntimeError(f"{ended or name} did not come up:\n" + "\n".join(logs))
            time.sleep(0.2)

    def _processes_of(self, name: str) -> list[psutil.Process]:
        """Of a daemon: its children, and on a node slurmstepd and its tasks, which are no longer its children."""
        found = []
        for process in psutil.process_iter():
            try:
                environment, command = process.environ(), process.cmdline()
            except psutil.Error:
                continue
            ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if ours and environment.get("SLURMD_NODENAME") == name:
                found.append(process)
            elif command and command[0].startswith("slurmstepd") and self._is_step_of(process, name):
                found.append(process)
        return found

    def _is_step_of(self, step: psutil.Process, name: str) -> bool:
        spool = str(self.folder / f"spool-{name}")
        try:
            open_files = [file.path for file in step.open_files()] + [
                str(c.laddr) for c in step.net_connections("unix")
            ]
        except psutil.Error:
            return False
        return any(spool in path or f"slurmd-{name}.log" in path for path in open_files)


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
