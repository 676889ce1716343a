"""Weights & Biases, through DeepSpeed's monitor."""

from collections.abc import Iterable

from megamtp.errors import UserError


class WandbRun:
    """A run at Weights & Biases; only the rank that logs makes one, after DeepSpeed's communication is up.

    Each start of a training run is one of its own there, in the same ``group``, with the steps that it did itself:
    DeepSpeed's monitor has no way to go on with an earlier one, and wandb none to take numbers back, except with
    ``WANDB_RUN_ID`` and ``WANDB_RESUME`` in the environment, which it heeds. ``WANDB_ENTITY`` and ``WANDB_MODE``
    work as well. Raises ``UserError`` where wandb is not installed, or refuses: no key, no such entity.
    """

    def __init__(self, project: str, group: str):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "monitor.wandb true needs the package wandb, which is not installed; pip install wandb, or use "
                "--monitor.wandb false"
            ) from None
        from deepspeed.monitor.config import WandbConfig
        from deepspeed.monitor.wandb import WandbMonitor

        try:
            self._monitor = WandbMonitor(WandbConfig(enabled=True, project=project, group=group))
        except wandb.Error as error:
            told = " ".join(str(error).split())
            raise UserError(f"monitor.wandb: {told}; mend that, or use WANDB_MODE=offline") from None
        self._finish = wandb.finish

    def write(self, numbers: Iterable[tuple[str, float]], step: int) -> None:
        """Log (name, number) pairs of ``step``."""
        self._monitor.write_events([(name, number, step) for name, number in numbers])

    def close(self) -> None:
        """Send what is left. DeepSpeed's monitor leaves that to wandb's exit hook."""
        self._finish()
