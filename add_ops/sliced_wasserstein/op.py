"""The operator ``add_ops::project_and_sort``, and the sliced Wasserstein distance that stands on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _dispatch
from .._checks import accumulation, constant, count, floating, number, one_of, same_device
from . import reference

REDUCTIONS = ("mean", "sum", "none")


def _fake(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    batch, number_of_points, _ = points.shape
    shape = (batch, projections.shape[1], number_of_points)
    values = points.new_empty(shape, dtype=accumulation(points, projections))
    return values, points.new_empty(shape, dtype=reference.permutation_dtype(number_of_points))


def _fake_backward(grad: Tensor, permutation: Tensor, projections: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[2], projections.shape[0]))


_dispatch.define(
    "project_and_sort(Tensor points, Tensor projections) -> (Tensor values, Tensor permutation)",
    reference.project_and_sort,
    _fake,
)
_dispatch.define(
    "project_and_sort_backward(Tensor grad, Tensor permutation, Tensor projections) -> Tensor",
    reference.project_and_sort_backward,
    _fake_backward,
)
_dispatch.refuse_double_backward("project_and_sort_backward")


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    points, projections = inputs
    _, permutation = output
    ctx.dtype = points.dtype
    ctx.mark_non_differentiable(permutation)
    ctx.save_for_backward(permutation, projections)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    permutation, projections = ctx.saved_tensors
    gradient = torch.ops.add_ops.project_and_sort_backward(grad.contiguous(), permutation, projections)
    return gradient.to(ctx.dtype), None


torch.library.register_autograd(
    "add_ops::project_and_sort", _backward, setup_context=_setup_context, lib=_dispatch.library
)


def random_directions(
    number_of: int, dim: int, generator: torch.Generator | None, device: torch.device | str | None
) -> Tensor:
    """Rows uniform on the unit sphere, (number_of, dim), drawn where the generator lives."""
    drawn_on = generator.device if generator is not None else device
    directions = torch.randn(number_of, dim, generator=generator, device=drawn_on)
    return nn.functional.normalize(directions, dim=1).to(device if device is not None else drawn_on)


def sample_projections(
    dim: int,
    num_projections: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw unit columns uniformly on the sphere of ``dim`` dimensions: normalised Gaussians.

    Args:
        dim: D >= 1, the dimension of the points. num_projections: K >= 1.
        generator: source of the numbers; the draw happens on its device.
        device: where the result lies; default the generator's device, else the CPU.

    Returns:
        ``(dim, num_projections)``, float32.

    Raises:
        TypeError, ValueError: a number is not an integer >= 1.
    """
    count("dim", dim)
    return random_directions(count("num_projections", num_projections), dim, generator, device).t().contiguous()


def _sorted(points: Tensor, projections: Tensor, points_name: str, projections_name: str) -> tuple[Tensor, Tensor]:
    floating(points_name, points, "B N D")
    floating(projections_name, projections, "D K")
    if projections.shape[0] != points.shape[2] or projections.shape[1] == 0:
        raise ValueError(
            f"{projections_name}: expected shape ({points.shape[2]}, K) with K >= 1, got {tuple(projections.shape)}"
        )
    if points.shape[1] > torch.iinfo(torch.int32).max:
        raise ValueError(f"{points_name}: expected at most 2³¹ - 1 points, got {points.shape[1]}")
    same_device(projections_name, projections, points_name, points)
    constant(projections_name, projections)
    return torch.ops.add_ops.project_and_sort(points, projections)


def project_and_sort_values(points: Tensor, projections: Tensor, projections_name: str = "projections") -> Tensor:
    """The sorted projections alone, (B, K, N); the order stays as narrow as the operator keeps it."""
    return _sorted(points, projections, "points", projections_name)[0]


def project_and_sort(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """Project point sets on directions and sort along each: the slices of the sliced Wasserstein distance.

    Differentiable in ``points``: ``values[b, k] = (points[b] @ projections[:, k])[permutation[b, k]]``. Equal values
    keep their order; NaN sorts last.

    Args:
        points: ``(B, N, D)``, float16, bfloat16, float32 or float64, any strides.
        projections: ``(D, K)`` on the same device, usually with unit columns (:func:`sample_projections`).

    Returns:
        ``values (B, K, N)``, ascending, float32 or the wider input dtype, and ``permutation (B, K, N)``, int64.

    Raises:
        TypeError: a tensor is not dense floating point.
        ValueError: wrong shape or device, or ``projections`` requires a gradient.
    """
    values, permutation = _sorted(points, projections, "points", "projections")
    return values, permutation.long()


def sliced_wasserstein(x: Tensor, y: Tensor, projections: Tensor, *, p: float = 2) -> Tensor:
    """Sliced Wasserstein distance between point sets of equal size, to the p-th power (Bonneel et al. 2015):

    ``SWD_p^p[b] = mean_{k,n} |sort(x·Θ)[b, k, n] - sort(y·Θ)[b, k, n]|^p``. POT's ``sliced_wasserstein_distance`` is
    its p-th root.

    Args:
        x, y: ``(B, N, D)`` of equal shape, float16, bfloat16, float32 or float64.
        projections: ``(D, K)`` with unit columns, see :func:`sample_projections`.
        p: power, >= 1.

    Returns:
        ``(B,)``, float32 or the wider input dtype.

    Raises:
        TypeError: a tensor is not dense floating point, or ``p`` is no number.
        ValueError: wrong shapes or devices, ``p`` < 1, or ``projections`` requires a gradient.
    """
    floating("x", x, "B N D")
    floating("y", y, "B N D")
    if x.shape != y.shape:
        raise ValueError(f"y: expected the shape of x {tuple(x.shape)}, got {tuple(y.shape)}")
    same_device("y", y, "x", x)
    number("p", p, at_least=1)
    difference = _sorted(x, projections, "x", "projections")[0] - _sorted(y, projections, "y", "projections")[0]
    return difference.abs().pow(p).mean((1, 2))


class SlicedWassersteinLoss(nn.Module):
    """:func:`sliced_wasserstein` with fresh projections at every call, reduced over the batch.

    Args:
        num_projections: K >= 1, drawn anew for each ``forward(x, y)``.
        p: power, >= 1.
        reduction: ``"mean"`` or ``"sum"`` over the batch (an empty one gives 0), or ``"none"`` for ``(B,)``.
        generator: source of the projections.
    """

    def __init__(
        self,
        num_projections: int = 50,
        p: float = 2,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_projections = count("num_projections", num_projections)
        self.p = number("p", p, at_least=1)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.generator = generator

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        floating("x", x, "B N D")
        projections = sample_projections(x.shape[2], self.num_projections, generator=self.generator, device=x.device)
        distance = sliced_wasserstein(x, y, projections, p=self.p)
        if self.reduction == "none":
            return distance
        return distance.sum() / (max(x.shape[0], 1) if self.reduction == "mean" else 1)

    def extra_repr(self) -> str:
        return f"num_projections={self.num_projections}, p={self.p}, reduction={self.reduction!r}"


_dispatch.load("cpp", "add_ops.sliced_wasserstein.cpp_kernels")
_dispatch.load("triton", "add_ops.sliced_wasserstein.triton_kernels")
