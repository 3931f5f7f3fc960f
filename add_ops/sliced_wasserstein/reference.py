"""The equations of projecting and sorting in plain PyTorch: the oracle, and the backend that answers everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation


def permutation_dtype(points: int) -> torch.dtype:
    """The narrowest signed integer that indexes ``points`` rows: it is what the backward pass keeps in memory."""
    return torch.int16 if points <= 2**15 else torch.int32


def project(points: Tensor, projections: Tensor) -> Tensor:
    """(B, N, D) points on (D, K) directions: (B, K, N), contiguous, each row one direction."""
    dtype = accumulation(points, projections)
    return (projections.to(dtype).t() @ points.to(dtype).transpose(1, 2)).contiguous()


def unproject(grad: Tensor, projections: Tensor) -> Tensor:
    """Gradient (B, N, D) for the points of :func:`project`."""
    return grad.transpose(1, 2) @ projections.to(grad.dtype).t()


def project_and_sort(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted projections of (B, N, D) points on (D, K) directions, and the order: two (B, K, N)."""
    values, permutation = project(points, projections).sort(dim=-1, stable=True)
    return values, permutation.to(permutation_dtype(points.shape[1]))


def project_and_sort_backward(grad: Tensor, permutation: Tensor, projections: Tensor) -> Tensor:
    """Gradient (B, N, D) for the points: undo the order, then the projection."""
    return unproject(torch.empty_like(grad).scatter_(-1, permutation.long(), grad), projections)
