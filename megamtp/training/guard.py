"""Steps that are better not taken: a gradient or loss that is not finite, or far out of what the last steps had.

Skipping spikes by their distance in standard deviations is OLMo-core's way; going back to a checkpoint and past the
data that went wrong is PaLM's (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).
"""

import math
import statistics
from collections import deque
from typing import Annotated, Any, Literal

from pydantic import Field

from megamtp.config import config_dataclass, option

Reason = Literal["non-finite", "spike"]
PositiveInt = Annotated[int, Field(ge=1)]
# Of the mean. Losses that hardly vary would make a spike of nothing.
SMALLEST_DEVIATION = 0.02


@config_dataclass
class GuardConfig:
    """When a step is skipped, and when the run goes back."""

    spike_sigmas: Annotated[float, Field(gt=0)] | None = option(
        None, "skip a step whose loss or gradient norm is that many standard deviations above the mean; null = never"
    )
    spike_window: Annotated[int, Field(ge=2)] = option(128, "accepted steps that mean and deviation are taken of")
    max_skipped: PositiveInt = option(
        8, "steps skipped in a row before the run goes back to the last checkpoint, and on behind these steps' samples"
    )
    max_rollbacks: PositiveInt = option(3, "times that it goes back to the same step before it gives up")


class Guard:
    """Judges each step before its update, from values that are the same on all ranks."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._norms: deque[float] = deque(maxlen=config.spike_window)
        self.skipped_in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> Reason | None:
        """Why the step is to be skipped; None accepts it, and remembers its values. Called once a step."""
        reason = self._reason(loss, grad_norm)
        if reason:
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self._losses.append(loss)
            self._norms.append(grad_norm)
        return reason

    @property
    def gives_up(self) -> bool:
        """So many steps have been skipped in a row that the run should go back."""
        return self.skipped_in_a_row >= self.config.max_skipped

    def _reason(self, loss: float, grad_norm: float) -> Reason | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "non-finite"
        # Half a window tells mean and deviation well enough.
        if self.config.spike_sigmas and len(self._losses) >= self.config.spike_window / 2:
            for value, seen in ((loss, self._losses), (grad_norm, self._norms)):
                mean = statistics.fmean(seen)
                deviation = max(statistics.pstdev(seen, mean), SMALLEST_DEVIATION * abs(mean))
                if value > mean + self.config.spike_sigmas * deviation:
                    return "spike"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"losses": list(self._losses), "norms": list(self._norms), "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; a window that has become shorter keeps the newest."""
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
