"""The operators ``project_and_sort`` and ``quantile_distance``, and the sliced Wasserstein distance on top of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from .. import _dispatch
from .._checks import WIDE_FLOATS, accumulation, constant, count, floating, number, one_of, operand, same_device, shaped
from .._module import FunctionModule
from . import reference
from .directions import SAMPLINGS, sample_projections

REDUCTIONS = ("mean", "sum", "none")
SLICE_REDUCTIONS = ("mean", "none")
STREAMED = 2**26
"""Projections B·K·N of one set, 256 MB in float32, above which the slices are worked off in parts of a sixteenth of it,
each again in the backward pass."""


def _fake(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    batch, number_of_points, _ = points.shape
    shape = (batch, projections.shape[1], number_of_points)
    values = points.new_empty(shape, dtype=accumulation(points, projections))
    return values, points.new_empty(shape, dtype=reference.permutation_dtype(number_of_points))


def _fake_backward(grad: Tensor, permutation: Tensor, projections: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[2], projections.shape[0]))


ORDERS = (torch.int16, torch.int32)


def _check(points: Tensor, projections: Tensor) -> None:
    floating("points", points, "B N D")
    operand("projections", projections, "D K")
    shaped("projections", projections, (points.shape[2], projections.shape[1]))


def _check_backward(grad: Tensor, permutation: Tensor, projections: Tensor) -> None:
    operand("grad", grad, "B K N", WIDE_FLOATS)
    shaped("permutation", permutation, grad.shape, ORDERS)
    operand("projections", projections, "D K")
    shaped("projections", projections, (projections.shape[0], grad.shape[1]))


_dispatch.define(
    "project_and_sort(Tensor points, Tensor projections) -> (Tensor values, Tensor permutation)",
    reference.project_and_sort,
    _fake,
    _check,
)
_dispatch.define(
    "project_and_sort_backward(Tensor grad, Tensor permutation, Tensor projections) -> Tensor",
    reference.project_and_sort_backward,
    _fake_backward,
    _check_backward,
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
    gradient = _dispatch.call("project_and_sort_backward", grad, permutation, projections)
    return gradient.to(ctx.dtype), None


_dispatch.differentiate("project_and_sort", _backward, _setup_context)


def _fake_distance(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[:2])


def _fake_distance_backward(grad: Tensor, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _check_distance(
    x: Tensor,
    y: Tensor,
    x_order: Tensor,
    y_order: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    p: float,
) -> None:
    operand("x", x, "B K N", WIDE_FLOATS)
    operand("y", y, "B K M", (x.dtype,))
    shaped("y", y, (*x.shape[:2], y.shape[2]), (x.dtype,))
    sides = (("x", x, x_order, x_weights), ("y", y, y_order, y_weights))
    for name, values, order, weights in sides:
        if values.shape[2] == 0:
            raise ValueError(f"{name}: expected at least one value in a row, got shape {tuple(values.shape)}")
        shaped(f"{name}_order", order, values.shape, ORDERS)
        if weights is not None:
            shaped(f"{name}_weights", weights, values.shape[::2], (torch.float64,))
    number("p", p, at_least=1)


def _check_distance_backward(grad: Tensor, x: Tensor, *rest: Any) -> None:
    _check_distance(x, *rest)
    shaped("grad", grad, x.shape[:2], (x.dtype,))


_QUANTILES = "Tensor x, Tensor y, Tensor x_order, Tensor y_order, Tensor? x_weights, Tensor? y_weights, float p"
_dispatch.define(
    f"quantile_distance({_QUANTILES}) -> Tensor", reference.quantile_distance, _fake_distance, _check_distance
)
_dispatch.define(
    f"quantile_distance_backward(Tensor grad, {_QUANTILES}) -> (Tensor, Tensor)",
    reference.quantile_distance_backward,
    _fake_distance_backward,
    _check_distance_backward,
)
_dispatch.refuse_double_backward("quantile_distance_backward")


def _setup_distance_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.p = inputs
    ctx.save_for_backward(*tensors)


def _distance_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _dispatch.call("quantile_distance_backward", grad, *ctx.saved_tensors, ctx.p)
    return *gradients, None, None, None, None, None


_dispatch.differentiate("quantile_distance", _distance_backward, _setup_distance_context)


def check_projections(name: str, projections: Tensor) -> None:
    """What can be said of them before there are points."""
    floating(name, projections, "D K")
    constant(name, projections)


def _check_projections(name: str, projections: Tensor, points_name: str, points: Tensor) -> None:
    check_projections(name, projections)
    if projections.shape[0] != points.shape[2]:
        raise ValueError(f"{name}: expected shape ({points.shape[2]}, K) with K >= 1, got {tuple(projections.shape)}")
    same_device(name, projections, points_name, points)


def _sorted(points: Tensor, projections: Tensor, points_name: str = "points") -> tuple[Tensor, Tensor]:
    if points.shape[1] > torch.iinfo(torch.int32).max:
        raise ValueError(f"{points_name}: expected at most 2³¹ - 1 points, got {points.shape[1]}")
    return _dispatch.call("project_and_sort", points, projections)


def project_and_sort_values(points: Tensor, projections: Tensor, projections_name: str = "projections") -> Tensor:
    """The sorted projections alone, (B, K, N); the order stays as narrow as the operator keeps it."""
    floating("points", points, "B N D")
    _check_projections(projections_name, projections, "points", points)
    return _sorted(points, projections)[0]


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
    floating("points", points, "B N D")
    _check_projections("projections", projections, "points", points)
    values, permutation = _sorted(points, projections)
    return values, permutation.long()


def _checked_weights(name: str, weights: Tensor | None, points_name: str, points: Tensor) -> Tensor | None:
    """Weights in float64, each row divided by its sum. Their values are not looked at where that would wait."""
    if weights is None:
        return None
    floating(name, weights, "B N")
    if weights.shape != points.shape[:2]:
        expected = f"one weight per point of {points_name}, shape {tuple(points.shape[:2])}"
        raise ValueError(f"{name}: expected {expected}, got {tuple(weights.shape)}")
    same_device(name, weights, points_name, points)
    constant(name, weights)
    wide = weights.double()
    total = wide.sum(1, keepdim=True)
    if weights.is_cpu and _dispatch.plain(weights) and len(weights):
        if not bool((wide >= 0).all()):
            raise ValueError(f"{name}: expected weights >= 0, got {wide[~(wide >= 0)][0].item()}")
        worst = total[(total - 1).abs().argmax()].item()
        if not abs(worst - 1) <= max(1e-5, torch.finfo(weights.dtype).eps):
            raise ValueError(f"{name}: expected rows that sum to 1, got a sum of {worst}")
    return wide / total


def _slices(
    x: Tensor, y: Tensor, projections: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, p: float
) -> Tensor:
    """``W_p^p`` along each direction, (B, K)."""
    (x_values, x_order), (y_values, y_order) = _sorted(x, projections, "x"), _sorted(y, projections, "y")
    if x.shape == y.shape and x_weights is None and y_weights is None:
        return reference.power(x_values - y_values, p).mean(2)
    dtype = torch.promote_types(x_values.dtype, y_values.dtype)
    values = x_values.to(dtype), y_values.to(dtype)
    return _dispatch.call("quantile_distance", *values, x_order, y_order, x_weights, y_weights, float(p))


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    projections: Tensor,
    *,
    p: float = 2,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Sliced Wasserstein distance between point sets, ``SWD_p^p`` (Bonneel et al. 2015): the mean over the directions
    of the exact ``W_p^p`` between the projections. POT's ``sliced_wasserstein_distance`` is its p-th root.

    For equal sizes without weights, ``W_p^p[b, k] = mean_n |sort(x·Θ)[b, k, n] - sort(y·Θ)[b, k, n]|^p``; else the
    integral of ``|quantile_x - quantile_y|^p`` over the merged levels of both cumulative weights. Differentiable in the
    points, not in the weights; a point of weight 0 changes nothing and gets no gradient, be it infinite or NaN.
    Where a set has more than 2²⁶ projections ``B·K·N``, the slices are worked off in parts, each again in the backward
    pass: the memory is that of 2²² of them.

    Args:
        x, y: ``(B, N, D)`` and ``(B, M, D)``, float16, bfloat16, float32 or float64.
        projections: ``(D, K)`` with unit columns, see :func:`sample_projections`.
        p: power, >= 1.
        x_weights, y_weights: ``(B, N)`` and ``(B, M)``, >= 0, each row summing to 1 (to 1e-5, or to the resolution of a
            half-precision dtype; the rest is divided away); None: all the same. On a GPU the values are not checked:
            that would wait for the device.
        reduction: ``"mean"`` over the K slices, or ``"none"``.

    Returns:
        ``(B,)``, or ``(B, K)`` with ``reduction="none"``; float32 or the wider dtype of points and projections.

    Raises:
        TypeError: a tensor is not dense floating point, or ``p`` is no number.
        ValueError: wrong shapes or devices, ``p`` < 1, weights that are negative or do not sum to 1, an unknown word,
            or ``projections`` or weights that require a gradient.
    """
    floating("x", x, "B N D")
    floating("y", y, "B M D")
    if x.shape[::2] != y.shape[::2]:
        raise ValueError(f"y: expected shape ({x.shape[0]}, M, {x.shape[2]}) as that of x, got {tuple(y.shape)}")
    same_device("y", y, "x", x)
    number("p", p, at_least=1)
    one_of("reduction", reduction, SLICE_REDUCTIONS)
    _check_projections("projections", projections, "x", x)
    weights = _checked_weights("x_weights", x_weights, "x", x), _checked_weights("y_weights", y_weights, "y", y)
    row = x.shape[0] * max(x.shape[1], y.shape[1])
    if row * projections.shape[1] <= STREAMED:
        distance = _slices(x, y, projections, *weights, p)
    else:
        distance = torch.cat(
            [
                checkpoint(_slices, x, y, part, *weights, p, use_reentrant=False, preserve_rng_state=False)
                for part in projections.split(max(STREAMED // 16 // row, 1), 1)
            ],
            1,
        )
    return distance.mean(1) if reduction == "mean" else distance


def max_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    num_projections: int = 50,
    steps: int = 20,
    p: float = 2,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    sampling: str = "uniform",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Max-sliced Wasserstein distance (Deshpande et al., CVPR 2019): ``W_p^p`` along the direction that tells the two
    sets apart best, found for each sample from the best of K by gradient steps on the sphere.

    A lower bound of the true maximum. Differentiable in the points; the direction carries no gradient.

    Args:
        x, y, p, x_weights, y_weights: as for :func:`sliced_wasserstein`.
        num_projections, sampling, generator: the K >= 1 directions to start from, see :func:`sample_projections`.
        steps: >= 1; a step that gains nothing is undone, and the next one is a quarter as long.

    Returns:
        The distance ``(B,)`` and the unit directions ``(B, D)``.

    Raises:
        TypeError, ValueError: as :func:`sliced_wasserstein` and :func:`sample_projections`.
    """
    floating("x", x, "B N D")
    count("steps", steps)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "max_sliced_wasserstein takes gradient steps of its own and is refused inside of torch.func's transforms"
            " (grad, vjp, jacrev, vmap); use torch.autograd.grad"
        )
    weights = {"x_weights": x_weights, "y_weights": y_weights}
    theta = sample_projections(x.shape[2], num_projections, sampling=sampling, generator=generator, device=x.device)
    best, index = sliced_wasserstein(x.detach(), y.detach(), theta, p=p, **weights, reduction="none").max(1)
    direction, length = theta.t()[index].to(best.dtype), torch.full_like(best, 1)[:, None]

    def along(direction: Tensor, *sets: Tensor) -> Tensor:
        lines = (points.to(direction.dtype) @ direction[:, :, None] for points in sets)
        return sliced_wasserstein(*lines, direction.new_ones(1, 1), p=p, **weights)

    for _ in range(steps):
        with torch.enable_grad():
            here = direction.clone().requires_grad_()
            (slope,) = torch.autograd.grad(along(here, x.detach(), y.detach()).sum(), here)
        there = normalize(direction + length * normalize(slope, dim=1), dim=1)
        value = along(there, x.detach(), y.detach())
        better = (value > best)[:, None]
        direction, length = torch.where(better, there, direction), torch.where(better, length, length / 4)
        best = torch.maximum(best, value)
    return along(direction, x, y), direction


class SlicedWassersteinLoss(FunctionModule):
    """:func:`sliced_wasserstein` as a module, reduced over the batch; ``forward(x, y, *, x_weights, y_weights)``.

    Args:
        projections: how many to draw anew for each call, or the projections themselves, ``(D, K)`` with unit columns:
            a buffer, saved in the ``state_dict``; its dtype stays when the module's changes.
        p: power, >= 1.
        reduction: over the batch: ``"mean"`` or ``"sum"`` (an empty batch gives 0), or ``"none"``.
        slice_reduction: over the K slices, as the ``reduction`` of the function: ``"mean"``, or ``"none"``, which keeps
            them as the last axis.
        sampling, generator: how projections are drawn, see :func:`sample_projections`.

    Raises:
        TypeError, ValueError: an option of the wrong type, out of bounds, or an unknown word.
    """

    def __init__(
        self,
        *,
        projections: int | Tensor = 50,
        p: float = 2,
        reduction: str = "mean",
        slice_reduction: str = "mean",
        sampling: str = "uniform",
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(projections, Tensor):
            check_projections("projections", projections)
        else:
            count("projections", projections)
        super().__init__(
            projections=projections,
            p=number("p", p, at_least=1),
            reduction=one_of("reduction", reduction, REDUCTIONS),
            slice_reduction=one_of("slice_reduction", slice_reduction, SLICE_REDUCTIONS),
            sampling=one_of("sampling", sampling, SAMPLINGS),
            generator=generator,
        )

    def forward(
        self, x: Tensor, y: Tensor, *, x_weights: Tensor | None = None, y_weights: Tensor | None = None
    ) -> Tensor:
        floating("x", x, "B N D")
        projections = self.projections
        if not isinstance(projections, Tensor):
            where = {"generator": self.generator, "device": x.device}
            projections = sample_projections(x.shape[2], projections, sampling=self.sampling, **where)
        weights = {"x_weights": x_weights, "y_weights": y_weights}
        distance = sliced_wasserstein(x, y, projections, p=self.p, **weights, reduction=self.slice_reduction)
        if self.reduction == "none":
            return distance
        return distance.sum(0) / (max(x.shape[0], 1) if self.reduction == "mean" else 1)


_dispatch.load("cpp", "add_ops.sliced_wasserstein.cpp_kernels")
_dispatch.load("triton", "add_ops.sliced_wasserstein.triton_kernels")
