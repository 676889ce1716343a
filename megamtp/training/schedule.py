"""Learning rate: linear warm-up, then cosine to a fraction of the peak (arXiv:2404.19737, table S13)."""

import math
from typing import Annotated

from pydantic import Field

from megamtp.config import config_dataclass, option


@config_dataclass
class ScheduleConfig:
    warmup_steps: Annotated[int, Field(ge=0)] = option(0, "steps of linear warm-up")
    decay_steps: Annotated[int, Field(ge=1)] | None = option(None, "step at which the cosine ends; null = the last")
    final_ratio: Annotated[float, Field(ge=0, le=1)] = option(0.03, "learning rate at the end over the peak")


def learning_rate(step: int, total_steps: int, peak: float, config: ScheduleConfig) -> float:
    """Rate of the 0-based ``step``: the warm-up's first step is peak / warmup_steps, the last step ends the cosine."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    end = config.decay_steps or total_steps
    progress = min(1.0, (step + 1 - config.warmup_steps) / max(1, end - config.warmup_steps))
    return peak * (config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
