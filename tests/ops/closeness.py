"""What "equal" means: ||a - b|| / ||b|| of a whole tensor."""

from torch import Tensor

EXACT = 1e-12  # fp64, sums taken in another order


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in fp64; 0 where both are zero, and inf for NaN or for a wrong shape."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    difference = (actual.double() - expected.double()).norm().item()
    return difference / expected.double().norm().item() if difference else 0.0
