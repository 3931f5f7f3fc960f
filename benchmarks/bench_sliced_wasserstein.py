"""Project and sort, and the sliced Wasserstein distance; 64 projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import add_ops

from . import plain
from .entry import POINTS, Entry, Points, itemsize

BASE = Points(16, 256, 64)


def _points(shape: Points, device: torch.device) -> tuple[Tensor, Tensor]:
    projections = add_ops.sample_projections(shape.dim, shape.projections, device=device)
    return shape.random(device).requires_grad_(), projections


def _two_sets(shape: Points, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Far from each other: points in a near tie swap their partners, which must not be what the gradient is made of."""
    x, projections = _points(shape, device)
    return x, torch.randn_like(x) + 4 * torch.randn(shape.dim, device=device), projections


def _smooth_along_rank(value: Tensor) -> Tensor:
    """Random parabolas along the sorted axis.

    Two points whose projections agree to float32 may come in either order; white noise would call that an error.
    """
    rank = torch.linspace(-1, 1, value.shape[2], device=value.device, dtype=value.dtype)
    constant, slope, curve = torch.randn(3, *value.shape[:2], 1, device=value.device, dtype=value.dtype)
    return constant + slope * rank + curve * rank.square()


def _sorted(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], shape: Points) -> Tensor:
    return function(*inputs)[0]


def _distance(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], shape: Points) -> Tensor:
    return function(*inputs)


ENTRIES = (
    Entry(
        name="project_and_sort",
        ours=add_ops.project_and_sort,
        plain=plain.project_and_sort,
        released=None,
        call=_sorted,
        inputs=_points,
        # Points in, gradient out; values out, upstream gradient in, and two bytes of order, out and in.
        floor=lambda shape: 2 * itemsize(shape) * shape.elements + 12 * shape.batch * shape.points * shape.projections,
        shapes=POINTS,
        quick=POINTS[:2],
        compiled=(POINTS[2],),
        growth={
            "batch": tuple(BASE._replace(batch=size) for size in (4, 16, 64)),
            "points": tuple(BASE._replace(points=size) for size in (64, 256, 1024, 4096)),
            "dim": tuple(BASE._replace(dim=size) for size in (16, 64, 256)),
            "projections": tuple(BASE._replace(projections=size) for size in (16, 64, 256)),
        },
        upstream=_smooth_along_rank,
        rivals={"packed": plain.project_and_sort_packed},
    ),
    Entry(
        name="sliced_wasserstein",
        ours=add_ops.sliced_wasserstein,
        plain=plain.sliced_wasserstein,
        released=None,
        call=_distance,
        inputs=_two_sets,
        floor=lambda shape: 3 * itemsize(shape) * shape.elements + 16 * shape.batch * shape.points * shape.projections,
        shapes=POINTS[4:],
        quick=POINTS[5:6],
    ),
)
