"""How far a run is, besides its weights and its place in the data: what a checkpoint holds as plain values."""

from typing import Any

from megamtp.engine.engine import Engine
from megamtp.training.checkpoint import Checkpoint
from megamtp.training.guard import Guard
from megamtp.training.run_config import RunConfig


class RunState:
    """The step, counters, and the guard, which judges the engine's steps. The same on every rank."""

    def __init__(self, config: RunConfig, engine: Engine):
        self.step = 0
        self.counters = {"tokens": 0, "skipped_steps": 0, "rollbacks": 0, "rollbacks_to_this_step": 0}
        self.guard = Guard(config.guard)
        self.tokens_per_step = config.training.global_batch_size * config.data.seq_len
        self._weights = config.heads.loss_weights or [1.0] * config.model.n_future_tokens
        engine.judge = self._judge

    def _judge(self, sums: list[float], counts: list[float], grad_norm: float) -> str | None:
        # A head that has no target in the whole step says nothing; its loss is 0 here.
        means = (total / max(count, 1) for total, count in zip(sums, counts, strict=True))
        return self.guard.judge(self.weighted(means), grad_norm)

    def weighted(self, losses) -> float:
        """The loss that is trained on, of the heads' own."""
        return sum(weight * loss for weight, loss in zip(self._weights, losses, strict=True))

    def count(self, skipped: str | None) -> None:
        """A step is done."""
        self.step += 1
        self.counters["tokens"] += self.tokens_per_step
        self.counters["skipped_steps"] += bool(skipped)
        if not skipped:
            self.counters["rollbacks_to_this_step"] = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"counters": self.counters, "guard": self.guard.state_dict()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; earlier versions and imported weights come without some of the values."""
        self.step, saved = checkpoint.manifest["step"], checkpoint.manifest["state"]
        self.counters |= saved["counters"]
        if "guard" in saved:
            self.guard.load_state_dict(saved["guard"])

    def go_back(self, checkpoint: Checkpoint) -> None:
        """To the step and window of ``checkpoint``; what has been counted stays counted."""
        counters = dict(self.counters)
        was_here = checkpoint.manifest["state"]["counters"].get("rollbacks_to_this_step", 0)
        self.load(checkpoint)
        self.counters |= counters
        self.counters["rollbacks"] += 1
        self.counters["rollbacks_to_this_step"] = was_here + 1
        self.guard.skipped_in_a_row = 0
