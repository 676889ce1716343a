"""The smoke test of a machine must pass here, and must not pass where something is wrong."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain
from megamtp.config import from_dict
from megamtp.training.run_config import RunConfig
from tools import smoke
from tools.smoke import CONFIG, Machine, Verdict, checks, difference, every_case, not_tried

ROOT = Path(pretrain.__file__).parent
STEP = ([7.0, 6.0], 12.0)


class Pretended(Machine):
    """Trainings that only write their metrics: those of one device, changed where ``wrong`` says."""

    def __init__(self, folder: Path, wrong: dict[str, float] | None = None, dies: str = ""):
        super().__init__(folder, smoke.TORCHRUN, 5)
        self.wrong, self.dies, self.trained = wrong or {}, dies, []

    def train(self, name, ranks, changes, run_dir):
        if name == self.dies:
            raise RuntimeError("exit code 1: an error")
        self.trained.append((name, ranks, changes))
        run_dir.mkdir(exist_ok=True)
        lines = [
            {"step": i, "loss_per_head": [8.0 - i + self.wrong.get(name, 0), 8.0], "grad_norm": 3.0} for i in range(6)
        ]
        (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture(autouse=True)
def no_export(monkeypatch, request):
    if "slow" not in request.keywords:
        monkeypatch.setattr(smoke, "exported", lambda *_: Verdict("export"))


def failures(machine: Machine, precision: str = "fp32", ranks: int = 8) -> list[str]:
    verdicts = list(checks(machine, precision, ranks, smoke.TOLERANCE[precision]))
    assert len({verdict.name for verdict in verdicts}) == len(verdicts)
    return [verdict.name for verdict in verdicts if verdict.failure]


def test_every_layout_is_tried_and_a_wrong_one_is_named(tmp_path):
    machine = Pretended(tmp_path)
    assert failures(machine) == []
    names = [name for name, _, _ in machine.trained]
    assert len(names) == 1 + len(every_case()) + 2 * 3 == len(set(names))
    assert {ranks for _, ranks, _ in machine.trained} == {1, 2, 4, 8}
    assert failures(Pretended(tmp_path, {"fp32-PP-2-1F1B": 1e-4})) == ["fp32, PP 2, 1F1B"]
    assert failures(Pretended(tmp_path, {"fp32-PP-2-1F1B": math.nan})) == ["fp32, PP 2, 1F1B"]
    assert failures(Pretended(tmp_path, dies="fp32-TP-2-PP-2")) == ["fp32, TP 2 x PP 2"]
    # bf16 allows more, and ZeRO-0 does not go with it.
    assert failures(Pretended(tmp_path, {"bf16-PP-2-1F1B": 1e-4}), "bf16") == []
    assert failures(Pretended(tmp_path, {"bf16-PP-2-1F1B": 1e-1}), "bf16") == ["bf16, PP 2, 1F1B"]


def test_nothing_is_compared_with_a_device_that_fails(tmp_path):
    assert failures(Pretended(tmp_path, dies="fp32-one-device")) == ["fp32, one device"]
    assert failures(Pretended(tmp_path, {"fp32-one-device": math.inf})) == ["fp32, one device"]


def test_no_layout_has_more_ranks_than_there_are(tmp_path):
    machine = Pretended(tmp_path)
    assert failures(machine, ranks=2) == []
    assert max(ranks for _, ranks, _ in machine.trained) == 2
    told = "\n".join(not_tried(2, False, ["fp32"], smoke.TORCHRUN))
    for what in ("TP 2 x PP 2 x DP 2 (needs 8 ranks)", "GPUs and NCCL", "bf16", "more than one node"):
        assert what in told
    assert "GPUs" not in "\n".join(not_tried(8, True, ["fp32", "bf16"], "srun"))


@pytest.mark.parametrize("case", every_case(), ids=lambda case: case.name)
def test_a_case_is_a_config_that_exists(case):
    values = json.loads(json.dumps(CONFIG)) | {"run_dir": "run", "data": {"train": "a", "seq_len": 64}}
    values["parallel"] = {key.removeprefix("parallel."): value for key, value in case.changes.items()}
    config = from_dict(RunConfig, values, "test")
    assert config.parallel.data_parallel(case.ranks) * config.parallel.tensor * config.parallel.pipeline == case.ranks
    assert config.micro_batches(case.ranks) >= 2 * config.parallel.pipeline


def test_differences():
    assert difference([STEP], [STEP]) == (0, 0)
    assert difference([([7.0, 6.3], 12.0)], [STEP]) == pytest.approx((0.05, 0))
    assert difference([([7.0, 6.0], 11.4)], [STEP]) == pytest.approx((0, 0.05))
    assert difference([STEP, STEP], [STEP]) == (math.inf, math.inf)
    assert difference([([7.0, math.nan], 12.0)], [STEP]) == (math.inf, 0)


def test_a_training_that_hangs_or_fails_is_told_with_its_log(tmp_path):
    machine = Machine(tmp_path, "env MARK={ranks}", timeout=0.5)
    with pytest.raises(RuntimeError, match=r"hangs \(more than 0 s\); see .*/logs/slow.log"):
        machine.run("slow", ["sleep", "20"])
    with pytest.raises(RuntimeError, match="exit code 3: error: no such thing; see"):
        machine.run("bad", ["bash", "-c", "echo ok; echo 'error: no such thing' >&2; exit 3"])


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as refused:
        smoke.main([str(tmp_path)])
    assert refused.value.code == 2 and "is not empty; name a new folder" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine_passes(tmp_path):
    script = str(ROOT / "launch_scripts" / "smoke.sh")
    command = [script, str(tmp_path / "smoke"), "--ranks", "2", "--precision", "fp32"]
    environment = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    for what in ("ok      fp32, TP 2 with sequence parallelism", "ok      fp32, DP 2, ZeRO-3", "GPUs and NCCL"):
        assert what in result.stdout
    assert "training's validation loss within" in result.stdout
