"""The equations in plain PyTorch: the oracle, and the backend that answers everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .._checks import accumulation

BUDGET = 2**22
"""Steps of quantile functions held at once, about 60 bytes each; what does not fit is done one part after the other."""


def permutation_dtype(points: int) -> torch.dtype:
    """The narrowest signed integer that indexes ``points`` rows: it is what the backward pass keeps in memory."""
    return torch.int16 if points <= 2**15 else torch.int32


def power(x: Tensor, p: float) -> Tensor:
    """``|x|^p``, in as few operations as p allows."""
    return x.square() if p == 2 else x.abs() if p == 1 else x.abs().pow(p)


def project(points: Tensor, projections: Tensor) -> Tensor:
    """(B, N, D) points on (D, K) directions: (B, K, N), contiguous, each row one direction."""
    dtype = accumulation(points, projections)
    return (projections.to(dtype).t() @ points.to(dtype).transpose(1, 2)).contiguous()


def unproject(grad: Tensor, projections: Tensor) -> Tensor:
    """Gradient (B, N, D) for the points of :func:`project`."""
    projections = projections.to(grad.dtype)
    if len(projections) < 32:  # matrix products of few columns are slow, of few rows they are not
        return (projections @ grad).transpose(1, 2).contiguous()
    return grad.transpose(1, 2) @ projections.t()


def project_and_sort(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted projections of (B, N, D) points on (D, K) directions, and the order: two (B, K, N)."""
    values, permutation = project(points, projections).sort(dim=-1, stable=True)
    return values, permutation.to(permutation_dtype(points.shape[1]))


def project_and_sort_backward(grad: Tensor, permutation: Tensor, projections: Tensor) -> Tensor:
    """Gradient (B, N, D) for the points: undo the order, then the projection."""
    _check_places("permutation", permutation)
    return unproject(torch.empty_like(grad).scatter_(-1, permutation.long(), grad), projections)


def _check_places(name: str, order: Tensor) -> None:
    if order.device.type == "cpu" and order.numel():  # elsewhere it would wait, and the device itself refuses
        low, high = map(int, order.aminmax())
        if low < 0 or high >= order.shape[-1]:
            raise ValueError(f"{name}: expected a permutation of 0 to {order.shape[-1] - 1} in each row")


def _levels(weights: Tensor | None, order: Tensor) -> Tensor:
    """Cumulative weight after each of the sorted points, float64, up to 1: (R, N), or (1, N) without weights.

    Row by row ``weights (R, N)`` belong to the points, ``order (R, N)`` sorts them. Without weights all are 1/N, and as
    quotients of whole numbers two levels agree where they should.
    """
    size = order.shape[1]
    if weights is None:
        return torch.arange(1, size + 1, dtype=torch.float64, device=order.device)[None] / size
    levels = weights.gather(1, order.long()).cumsum(1)
    return levels / levels[:, -1:]


def _merge(x_levels: Tensor, y_levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The merged levels of two quantile functions: the width of each step, and who stands there, (R, N + M) each."""
    rows = max(len(x_levels), len(y_levels))
    x_levels, y_levels = (levels.expand(rows, -1).contiguous() for levels in (x_levels, y_levels))
    merged = torch.cat([x_levels, y_levels], 1).sort(1).values
    width = torch.diff(merged, prepend=merged.new_zeros(rows, 1))
    index = (torch.searchsorted(levels, merged).clamp(max=levels.shape[1] - 1) for levels in (x_levels, y_levels))
    return width, *index


def _steps(
    x: Tensor, y: Tensor, x_order: Tensor, y_order: Tensor, x_weights: Tensor | None, y_weights: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """The steps of rows of ``B·K``, at most ``BUDGET`` at once: which rows, widths, indices into x and y, gaps.

    A step without width has no gap: a point of weight 0 counts for nothing, be it infinite or NaN.
    """
    slices = x.shape[1]
    for name, order, weights in (("x_order", x_order, x_weights), ("y_order", y_order, y_weights)):
        if weights is not None:  # else the order is not read
            _check_places(name, order)
    x, y, x_order, y_order = (tensor.flatten(0, 1) for tensor in (x, y, x_order, y_order))
    rows, steps = len(x), x.shape[1] + y.shape[1]
    if rows == 0:
        return
    parts = max(min(-(-rows * steps // BUDGET), rows // 2), 1)  # two rows at least: torch cuts the sum of a single one
    bounds = [rows * part // parts for part in range(parts + 1)]
    alike = x_weights is None and y_weights is None
    if alike:
        merged = _merge(_levels(None, x_order), _levels(None, y_order))
    for chosen in (slice(*bound) for bound in pairwise(bounds)):
        if not alike:
            sample = torch.arange(chosen.start, chosen.stop, device=x.device) // slices
            merged = _merge(
                _levels(None if x_weights is None else x_weights[sample], x_order[chosen]),
                _levels(None if y_weights is None else y_weights[sample], y_order[chosen]),
            )
        width, x_index, y_index = (part.expand(chosen.stop - chosen.start, -1) for part in merged)
        gap = x[chosen].gather(1, x_index) - y[chosen].gather(1, y_index)
        yield chosen, width, x_index, y_index, torch.where(width > 0, gap.double(), 0)  # whose powers stay in range


def quantile_distance(
    x: Tensor,
    y: Tensor,
    x_order: Tensor,
    y_order: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    p: float,
) -> Tensor:
    """``W_p^p (B, K)`` between weighted points on lines: the integral over q of |quantile_x(q) - quantile_y(q)|^p.

    ``x (B, K, N)`` and ``y (B, K, M)`` ascend, as :func:`project_and_sort` gives them with ``x_order`` and ``y_order``;
    ``x_weights (B, N)`` and ``y_weights (B, M)``, float64, are those of the points; None: all are the same.
    """
    result = x.new_empty(x.shape[0] * x.shape[1])  # filled from float64 sums
    for rows, width, _, _, gap in _steps(x, y, x_order, y_order, x_weights, y_weights):
        result[rows] = (width * gap.abs().pow(p)).sum(1)
    return result.view(x.shape[:2])


def quantile_distance_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    x_order: Tensor,
    y_order: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y: of every step, width · p · |gap|^(p-1) · sign(gap) to x, and its negative to y."""
    x_grad, y_grad = (values.new_empty(values.flatten(0, 1).shape) for values in (x, y))
    for rows, width, x_index, y_index, gap in _steps(x, y, x_order, y_order, x_weights, y_weights):
        sign = torch.where(gap.isnan(), gap, gap.sign())  # which is 0 for NaN
        slope = grad.flatten()[rows, None] * width * p * gap.abs().pow(p - 1) * sign
        for target, index, part in ((x_grad, x_index, slope), (y_grad, y_index, -slope)):
            target[rows] = part.new_zeros(len(part), target.shape[1]).scatter_add_(1, index, part)
    return x_grad.view(x.shape), y_grad.view(y.shape)
