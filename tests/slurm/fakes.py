"""A run folder on a machine without SLURM: its commands are small scripts that note how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pretrain

ROOT = Path(pretrain.__file__).parent
SCRIPTS = ROOT / "launch_scripts" / "slurm"
NODES = ["n1", "n2", "n3"]

# Each notes its arguments. A job step that checks health runs on every node; the step that trains is the file `train`.
FAKES = {
    "sbatch": 'printf "%s\\n" "$@" > "$FAKE/submitted"',
    "squeue": 'cat "$FAKE/in_queue" 2>/dev/null',
    "scontrol": """
case $1 in
  show)
    [ "$2" != hostnames ] || tr , '\\n' <<< "$3"
    [ "$2" != config ] || echo "SlurmdTimeout           = 240 sec"
    [ "$2" != job ] || echo "JobId=7 EndTime=$(date -d "+3 sec" +%FT%T) ExcNodeList=$(cat "$FAKE/excluded") X=1" ;;
  *) echo "scontrol $*" >> "$FAKE/calls" ;;
esac
""",
    # Minutes pass in no time.
    "sleep": '[ "$1" -lt 300 ] || { echo "sleep $1" >> "$FAKE/calls"; set 1; }; exec /bin/sleep "$1"',
    "srun": """
if [[ "$*" == *--overlap* ]]; then
  while [[ $1 == -* ]]; do shift; done
  for node in ${SLURM_JOB_NODELIST//,/ }; do
    grep -qx "$node" "$FAKE/silent" || SLURMD_NODENAME=$node "$@"
  done
  exit 0
fi
echo "srun $*" >> "$FAKE/calls"
. "$FAKE/train"
""",
}


class Run:
    """A run folder with the copied code, and commands that only pretend."""

    def __init__(self, folder: Path):
        self.folder, self.fake, self.dir = folder, folder / "fake", folder / "run"
        self.fake.mkdir()
        for name, body in FAKES.items():
            (self.fake / name).write_text("#!/bin/bash\n" + body)
            (self.fake / name).chmod(0o755)
        (self.fake / "excluded").write_text("(null)")
        (self.fake / "silent").write_text("")
        (self.fake / "in_queue").write_text("")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment |= {"PATH": f"{self.fake}:{os.environ['PATH']}", "FAKE": str(self.fake), "RUN": str(self.dir)}
        self.environment.setdefault("USER", "somebody")
        self.tree = folder / "tree"
        (self.tree / "launch_scripts").mkdir(parents=True)
        shutil.copytree(SCRIPTS, self.tree / "launch_scripts" / "slurm")
        for name in ("megamtp", "tools"):
            (self.tree / name).mkdir()
            (self.tree / name / "code.py").write_text("a = 1\n")
        (self.tree / "pretrain.py").write_text("b = 1\n")
        (self.tree / "config.yaml").write_text("model: small\n")
        self.site("PYTHON=python3 HEALTH_CHECK=(true) SRUN_OPTIONS=() IN_CONTAINER=()")

    def site(self, text: str) -> None:
        for tree in (self.tree, self.dir / "code"):
            if tree.exists():
                (tree / "launch_scripts" / "slurm" / "site.sh").write_text(text + "\n")

    def submit(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [self.tree / "launch_scripts" / "slurm" / "submit.sh", *arguments]
        return subprocess.run(command, cwd=self.tree, env=self.environment, capture_output=True, text=True, timeout=20)

    def start(self, number: int, train: str, nodes: list[str] = NODES[:2], job: str = "7") -> subprocess.Popen:
        """The batch script as SLURM starts it; ``train`` stands for srun's ranks."""
        if not (self.dir / "code").exists():
            submitted = self.submit("pretrain_13b.sbatch", "config.yaml", str(self.dir))
            assert submitted.returncode == 0, submitted.stderr
        (self.fake / "train").write_text(train)
        slurm = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": ",".join(nodes), "SLURM_JOB_NUM_NODES": str(len(nodes))}
        if number:
            slurm["SLURM_RESTART_COUNT"] = str(number)
        return subprocess.Popen(
            ["bash", self.dir / "code/launch_scripts/slurm/pretrain_13b.sbatch", str(self.dir), "--training.seed", "3"],
            env=self.environment | slurm,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, number: int, train: str, **options) -> tuple[int, str, list[str]]:
        """Exit code, output, and the calls of SLURM that the script made, of one start."""
        (self.fake / "calls").write_text("")
        process = self.start(number, train, **options)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output, self.calls()

    def calls(self) -> list[str]:
        return [call for call in (self.fake / "calls").read_text().splitlines() if call.startswith("scontrol")]


def saving(step: int) -> str:
    """A shell line by which the ranks have saved a checkpoint."""
    return f'mkdir -p "$RUN/checkpoints"; echo step-{step:08d} > "$RUN/checkpoints/latest"; '
