"""The operator ``add_ops::view_histogram``, and the multi-view attention loss that stands on its small output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import WIDE_FLOATS, accumulation, constant, count, floating, number, one_of, operand, same_device, shaped
from .._module import FunctionModule
from ..sliced_wasserstein.directions import SAMPLINGS, random_directions, sample_projections
from ..sliced_wasserstein.op import check_projections, project_and_sort_values
from . import reference
from .pairs import all_pairs, matching, sampled_pairs

COORDINATES = ("index", "unit")
SLICINGS = ("grid", "points")
DISTANCES = ("bins", "wasserstein")
PAIRS = ("all", "sampled")


def _fake(features: Tensor, views: Tensor, bins: int, coordinates: str) -> tuple[Tensor, Tensor]:
    batch = features.shape[0]
    attention = features.new_empty((batch, views.shape[0], bins), dtype=accumulation(features))
    return attention, features.new_empty((batch,), dtype=torch.float64)


def _fake_backward(grad: Tensor, features: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(features)


def _check(features: Tensor, views: Tensor, bins: int, coordinates: str) -> None:
    floating("features", features, "B C H W")
    shaped("views", views, (views.shape[0] if views.ndim else 0, 3))
    count("bins", bins)
    one_of("coordinates", coordinates, COORDINATES)


def _check_backward(
    grad: Tensor, features: Tensor, views: Tensor, attention: Tensor, energy: Tensor, coordinates: str
) -> None:
    operand("attention", attention, "B K M")
    bins = attention.shape[2]
    _check(features, views, bins, coordinates)
    shape = len(features), len(views), bins
    shaped("attention", attention, shape)
    shaped("grad", grad, shape)
    shaped("energy", energy, shape[:1], (torch.float64,))


_dispatch.define(
    "view_histogram(Tensor features, Tensor views, SymInt bins, str coordinates) -> (Tensor attention, Tensor energy)",
    reference.view_histogram,
    _fake,
    _check,
)
_dispatch.define(
    "view_histogram_backward(Tensor grad, Tensor features, Tensor views, Tensor attention, Tensor energy,"
    " str coordinates) -> Tensor",
    reference.view_histogram_backward,
    _fake_backward,
    _check_backward,
)
_dispatch.refuse_double_backward("view_histogram_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, views, _, ctx.coordinates = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(features, views, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    features, views, attention, energy = ctx.saved_tensors
    arguments = grad, features, views, attention, energy, ctx.coordinates
    return _dispatch.call("view_histogram_backward", *arguments), None, None, None


_dispatch.differentiate("view_histogram", _backward, _setup_context)


def sample_views(
    num_views: int,
    *,
    sampling: str = "uniform",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw unit vectors, each of them uniform on the sphere.

    Args:
        num_views: how many, >= 1.
        sampling: ``"uniform"`` (independent), ``"orthogonal"`` (by threes) or ``"quasi"`` (evenly spread), see
            :func:`sample_projections`.
        generator: source of the numbers; the draw happens on its device.
        device: where the result lies; default the generator's device, else torch's default device.

    Returns:
        ``(num_views, 3)``, float32 whatever torch's default dtype.

    Raises:
        TypeError, ValueError: ``num_views`` is not an integer >= 1, or an unknown word.
    """
    return random_directions(count("num_views", num_views), 3, sampling, generator, device).contiguous()


def multi_view_attention(features: Tensor, views: Tensor, bins: int, *, coordinates: str = "index") -> Tensor:
    """Attention vectors: the mass ``x²/Σx²`` of a feature map in equal-width bins along each view (Le & Woo 2022).

    A position is binned by the integer rule, the same on every backend, bit for bit. An all-zero sample has mass 0
    everywhere; every other row sums to 1. The result is differentiable in ``features`` only: bins carry no gradient.

    Args:
        features: ``(B, C, H, W)``, float16, bfloat16, float32 or float64, any strides.
        views: ``(K, 3)`` unit vectors, float32 or float64, on the device of ``features``. On a GPU their length, which
            does not change the bins, is not checked: that would wait for the device.
        bins: M >= 1.
        coordinates: ``"index"`` projects raw indices, ``"unit"`` scales each axis to [-1, 1] first.

    Returns:
        ``(B, K, M)``, float32 or the wider input dtype.

    Raises:
        TypeError: a tensor is not dense floating point, or ``bins`` is no integer.
        ValueError: wrong shape or device, ``bins`` < 1, a view that is not a unit vector, an unknown word.
    """
    floating("features", features, "B C H W")
    _check_views(views)
    same_device("views", views, "features", features)
    count("bins", bins)
    one_of("coordinates", coordinates, COORDINATES)
    return _dispatch.call("view_histogram", features, views, bins, coordinates)[0]


def _check_views(views: Tensor) -> None:
    if not isinstance(views, Tensor) or views.dtype not in WIDE_FLOATS:
        got = views.dtype if isinstance(views, Tensor) else type(views).__name__
        raise TypeError(f"views: expected a float32 or float64 tensor, got {got}")
    if views.ndim != 2 or views.shape[1] != 3 or views.shape[0] == 0:
        raise ValueError(f"views: expected shape (K, 3) with K >= 1, got {tuple(views.shape)}")
    constant("views", views)
    if views.is_cpu and _dispatch.plain(views):  # on a GPU or in a trace their values are not to be had
        lengths = views.norm(dim=1)
        if not bool(((lengths - 1).abs() <= 1e-3).all()):
            raise ValueError(f"views: expected unit vectors, got lengths {lengths.tolist()}")


def _check_labels(labels: Tensor, features: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an integer or boolean tensor, got {got}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels: expected shape ({features.shape[0]},), got {tuple(labels.shape)}")
    same_device("labels", labels, "student", features)


def _grid_slices(
    student: Tensor,
    teacher: Tensor,
    views: int | Tensor,
    bins: int | None,
    coordinates: str,
    sampling: str,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    if isinstance(views, Tensor):
        _check_views(views)
        same_device("views", views, "student", student)
    else:
        views = sample_views(views, sampling=sampling, generator=generator, device=student.device)
    if bins is None:
        divisor, rest = student.shape[1], teacher.shape[1]
        while rest:  # math.gcd, which torch.compile does not know of symbolic numbers
            divisor, rest = rest, divisor % rest
        bins = max(divisor // 2, 1)
    attention = [_dispatch.call("view_histogram", x, views, bins, coordinates)[0] for x in (student, teacher)]
    return attention[0], attention[1]


def _point_slices(
    student: Tensor, teacher: Tensor, views: int | Tensor, sampling: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        expected = f"the student's shape {tuple(student.shape)} with slicing='points'"
        raise ValueError(f"teacher: expected {expected}, got {tuple(teacher.shape)}")
    if not isinstance(views, Tensor):
        where = {"generator": generator, "device": student.device}
        views = sample_projections(student.shape[1], views, sampling=sampling, **where)
    points = [features.flatten(2).transpose(1, 2) for features in (student, teacher)]
    return project_and_sort_values(points[0], views, "views"), project_and_sort_values(points[1], views, "views")


def multi_view_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    views: int | Tensor = 12,
    bins: int | None = None,
    p: float = 2,
    gamma: float = 100.0,
    eta: float = 50.0,
    margin: float = 0.012,
    slicing: str = "grid",
    coordinates: str = "index",
    distance: str = "bins",
    pairs: str = "all",
    sampling: str = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Multi-view attention distillation loss (Le & Woo 2022), averaged over the views:

    ``gamma · mean_b D(a_S, a_T) + eta · (con(a_S, a_T) + con(a_T, a_S))``, where ``con(x, y)`` is the mean of
    ``D(x_i, y_j)`` over same-label pairs plus the mean of ``max(0, margin - D(x_i, y_j))`` over different-label pairs.
    A pair ``(i, i)`` counts as same-label. A batch of one class keeps the terms that exist; an empty batch gives 0.

    Args:
        student, teacher: ``(B, C, H, W)``; with ``slicing="grid"`` C, H and W may differ between the two.
        labels: ``(B,)``, integer or boolean, on the features' device; None drops the contrastive term.
        views: how many to draw anew, or the views themselves: ``(K, 3)`` unit vectors, or for ``slicing="points"``
            ``(C, K)`` projections with unit columns.
        bins: M; default ``gcd(C_S, C_T) // 2``, at least 1. Only for ``slicing="grid"``.
        p: power of the distance, >= 1.
        gamma, eta, margin: weights of the two terms, and the contrastive margin, all >= 0.
        slicing: ``"grid"`` bins the mass of the map over its own indices; ``"points"`` sorts projections of the H·W
            pixels in channel space (teacher and student of equal shape).
        coordinates: ``"index"`` or ``"unit"``, see :func:`multi_view_attention`.
        distance: ``"bins"`` is ``D = Σ_j |x_j - y_j|^p``; ``"wasserstein"`` the exact ``W_p^p`` between the two
            histograms over a line of length 1 (bin width 1/M), for ``slicing="grid"``. With ``p != 1`` and
            ``pairs="all"`` it holds ``K·B²·2M`` numbers at once.
        pairs: ``"all"`` pairs of the batch, or one positive and one negative ``"sampled"`` per sample, as published.
        sampling: how views are drawn: ``"uniform"``, ``"orthogonal"`` or ``"quasi"``, see :func:`sample_projections`;
            ``"quasi"`` goes with three dimensions, that is ``slicing="grid"``, or points of three channels.
        generator: source of the views and of the sampled pairs.

    Returns:
        A scalar, float32 or the wider input dtype.

    Raises:
        TypeError: a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: wrong shapes, devices, bounds or words.
    """
    floating("student", student, "B C H W")
    floating("teacher", teacher, "B C H W")
    batch = student.shape[0]
    if teacher.shape[0] != batch:
        raise ValueError(f"teacher: expected the student's batch size {batch}, got {teacher.shape[0]}")
    same_device("teacher", teacher, "student", student)
    if labels is not None:
        _check_labels(labels, student)
    _check_options(views, bins, p, gamma, eta, margin, slicing, coordinates, distance, pairs, sampling)
    if slicing == "grid":
        slices = _grid_slices(student, teacher, views, bins, coordinates, sampling, generator)
    else:
        slices = _point_slices(student, teacher, views, sampling, generator)
    attract = gamma / (max(batch, 1) * slices[0].shape[1])
    if labels is None or batch == 0:
        return matching(*slices, p, distance).sum() * attract
    labels = labels.long()  # few operations know all integers
    if pairs == "all":
        return all_pairs(*slices, labels, p, distance, gamma, eta, margin)
    attraction = matching(*slices, p, distance).sum() * attract
    return attraction + eta * sampled_pairs(*slices, labels, p, distance, margin, generator)


def _check_options(
    views: int | Tensor,
    bins: int | None,
    p: float,
    gamma: float,
    eta: float,
    margin: float,
    slicing: str,
    coordinates: str,
    distance: str,
    pairs: str,
    sampling: str,
) -> None:
    if not isinstance(views, Tensor):
        count("views", views)
    if bins is not None:
        count("bins", bins)
    number("p", p, at_least=1)
    number("gamma", gamma, at_least=0)
    number("eta", eta, at_least=0)
    number("margin", margin, at_least=0)
    one_of("slicing", slicing, SLICINGS)
    one_of("coordinates", coordinates, COORDINATES)
    one_of("distance", distance, DISTANCES)
    one_of("pairs", pairs, PAIRS)
    one_of("sampling", sampling, SAMPLINGS)
    if slicing == "points" and bins is not None:
        raise ValueError(f"bins: expected None with slicing='points', which has no bins, got {bins}")
    if slicing == "points" and distance == "wasserstein":
        raise ValueError("distance: expected 'bins' with slicing='points', which has no histograms, got 'wasserstein'")


class MultiViewLoss(FunctionModule):
    """:func:`multi_view_loss` as a module: same options, ``forward(student, teacher, labels=None)``.

    A tensor of ``views`` becomes a buffer, saved in the ``state_dict``; its dtype stays when the module's changes.
    """

    def __init__(
        self,
        *,
        views: int | Tensor = 12,
        bins: int | None = None,
        p: float = 2,
        gamma: float = 100.0,
        eta: float = 50.0,
        margin: float = 0.012,
        slicing: str = "grid",
        coordinates: str = "index",
        distance: str = "bins",
        pairs: str = "all",
        sampling: str = "uniform",
        generator: torch.Generator | None = None,
    ) -> None:
        _check_options(views, bins, p, gamma, eta, margin, slicing, coordinates, distance, pairs, sampling)
        if isinstance(views, Tensor):
            _check_views(views) if slicing == "grid" else check_projections("views", views)
        super().__init__(
            views=views,
            bins=bins,
            p=p,
            gamma=gamma,
            eta=eta,
            margin=margin,
            slicing=slicing,
            coordinates=coordinates,
            distance=distance,
            pairs=pairs,
            sampling=sampling,
            generator=generator,
        )

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return multi_view_loss(student, teacher, labels, **self.options)


_dispatch.load("cpp", "add_ops.multi_view.cpp_kernels")
_dispatch.load("triton", "add_ops.multi_view.triton_kernels")
