"""The one judge of numbers: relative L2 over the whole tensor, one tolerance per dtype, itself tested."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""By the dtype the result was stored in: accumulation is float32 or wider everywhere."""
TENSOR_CORES = TOLERANCE | {torch.float32: 5e-6}
"""The same where tensor cores have multiplied: of float32 they take two halves, which lose about 2⁻²⁰."""


def tolerance(actual: Tensor) -> float:
    """What ``actual`` may be off by: on a GPU, tensor cores may have multiplied."""
    return (TENSOR_CORES if actual.is_cuda else TOLERANCE)[actual.dtype]


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
    assert error <= tolerance(actual), f"relative L2 error {error:.2e} above {tolerance(actual):.0e}"
