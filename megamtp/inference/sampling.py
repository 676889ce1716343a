"""From logits to a token: greedy, or a draw from the tempered and cut softmax."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy, and then nothing else matters.

    Raises ``ValueError`` for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None  # of the most likely tokens, this many
    top_p: float = 1.0  # the most likely tokens that together reach this probability (Holtzman et al. 2020)

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be 1 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) -> (..., V) in fp32 or wider: what a token is drawn from."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k, -1)
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, kept.indices, kept.values)
        p = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(dim=-1, descending=True, stable=True)
            # The token that crosses the threshold stays.
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            p = p.masked_fill(torch.zeros_like(beyond).scatter_(-1, order, beyond), 0)
            p = p / p.sum(-1, keepdim=True)
        return p


def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """p (..., V) -> a token for each (...), int64."""
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
