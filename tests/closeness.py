"""The one judge of numbers: relative L2 over the whole tensor, one tolerance per dtype, itself tested."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""By the dtype the result was stored in: accumulation is float32 or wider everywhere."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖`` in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Fail unless ``actual`` has the shape of the float64 ``expected`` and its numbers, to ``actual``'s tolerance."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert bool(torch.isfinite(expected).all()) and bool(expected.any()), "expected: want finite numbers, not all zero"
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[actual.dtype], f"relative L2 error {error:.2e} above {TOLERANCE[actual.dtype]:.0e}"
