"""What the multi-view loss makes of the slices of student and teacher: distances of rows, of a sample or of any two.

The operator ``add_ops::contrastive_loss`` is the loss of all pairs, without holding a number for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import WIDE_FLOATS, number, operand, shaped
from ..sliced_wasserstein.directions import source
from ..sliced_wasserstein.reference import power
from . import reference


def _fake(student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(())


def _fake_backward(grad: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


def _check(student: Tensor, teacher: Tensor, labels: Tensor, p: float, gamma: float, eta: float, margin: float) -> None:
    operand("student", student, "B K M", WIDE_FLOATS)
    shaped("teacher", teacher, student.shape, (student.dtype,))
    shaped("labels", labels, student.shape[:1], (torch.int64,))
    number("p", p, at_least=1)
    number("gamma", gamma, at_least=0)
    number("eta", eta, at_least=0)
    number("margin", margin, at_least=0)


def _check_backward(grad: Tensor, student: Tensor, *rest: Any) -> None:
    _check(student, *rest)
    shaped("grad", grad, (), (student.dtype,))


_PAIRS = "Tensor student, Tensor teacher, Tensor labels, float p, float gamma, float eta, float margin"
_dispatch.define(f"contrastive_loss({_PAIRS}) -> Tensor", reference.contrastive_loss, _fake, _check)
_dispatch.define(
    f"contrastive_loss_backward(Tensor grad, {_PAIRS}) -> Tensor",
    reference.contrastive_loss_backward,
    _fake_backward,
    _check_backward,
)
_dispatch.refuse_double_backward("contrastive_loss_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, labels, *ctx.options = inputs
    ctx.save_for_backward(student, teacher, labels.clone())  # they may be of inference mode, or of a buffer in use


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher, labels = ctx.saved_tensors
    needs_student, needs_teacher = ctx.needs_input_grad[:2]
    name, rest = "contrastive_loss_backward", (labels, *ctx.options)
    grad_student = _dispatch.call(name, grad, student, teacher, *rest) if needs_student else None
    grad_teacher = _dispatch.call(name, grad, teacher, student, *rest) if needs_teacher else None
    return grad_student, grad_teacher, None, None, None, None, None


_dispatch.differentiate("contrastive_loss", _backward, _setup_context)


def _binned_wasserstein(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Exact ``W_p^p`` between histograms on a line of length 1: two (..., M), broadcast -> (...).

    The integral over q of |quantile_x(q) - quantile_y(q)|^p, a sum over the merged levels of both cumulative sums.
    """
    bins = x.shape[-1]
    cumulative_x, cumulative_y = x.cumsum(-1), y.cumsum(-1)
    if p == 1:
        return (cumulative_x - cumulative_y)[..., :-1].abs().sum(-1) / bins
    cumulative_x, cumulative_y = torch.broadcast_tensors(cumulative_x, cumulative_y)
    levels = torch.cat([cumulative_x, cumulative_y], -1).sort(-1).values
    quantile_x, quantile_y = (
        torch.searchsorted(cumulative.detach().contiguous(), levels.detach()).clamp(max=bins - 1)
        for cumulative in (cumulative_x, cumulative_y)
    )
    width = torch.diff(levels, prepend=torch.zeros_like(levels[..., :1]))
    return (width * ((quantile_x - quantile_y).abs().to(width.dtype) / bins).pow(p)).sum(-1)


def matching(x: Tensor, y: Tensor, p: float, distance: str) -> Tensor:
    """Distance of every row of x to the same row of y: two (..., M) -> (...)."""
    return _binned_wasserstein(x, y, p) if distance == "wasserstein" else power(x - y, p).sum(-1)


def all_pairs(
    student: Tensor, teacher: Tensor, labels: Tensor, p: float, distance: str, gamma: float, eta: float, margin: float
) -> Tensor:
    """``gamma · mean_bk D(s_bk, t_bk) + eta · (con(s, t) + con(t, s))``, the latter averaged over the views."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    x, y = student.to(dtype), teacher.to(dtype)
    if distance == "wasserstein" and p != 1:
        every = _binned_wasserstein(x.transpose(0, 1)[:, :, None], y.transpose(0, 1)[:, None], p)
        return reference.reduce_pairs(every, labels, gamma, eta, margin)
    if distance == "wasserstein":
        x, y = (z.cumsum(-1)[..., :-1] / z.shape[-1] for z in (x, y))
    return _dispatch.call("contrastive_loss", x, y, labels, float(p), float(gamma), float(eta), float(margin))


def draw(mask: Tensor, generator: torch.Generator | None) -> Tensor:
    """A uniformly drawn true column of every row: (B, B) -> (B,); any column where a row has none."""
    chance = torch.rand(mask.shape, dtype=torch.float32, **source(generator, mask.device)).to(mask.device)
    return torch.where(mask, chance, -1.0).argmax(1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the views and the true samples, 0 where there is none: (B, K) and (B,) -> ()."""
    return torch.where(mask[:, None], values, 0).mean(1).sum() / mask.sum().clamp(min=1)


def sampled_pairs(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    p: float,
    distance: str,
    margin: float,
    generator: torch.Generator | None,
) -> Tensor:
    """``con(s, t) + con(t, s)``, averaged over the views, from one pair of each kind per sample."""
    same = labels[:, None] == labels
    total = student.new_zeros(())
    for x, y in ((student, teacher), (teacher, student)):
        near, far = (matching(x, y[draw(mask, generator)], p, distance) for mask in (same, ~same))
        repelled = _masked_mean((margin - far).clamp(min=0), (~same).any(1))
        total = total + _masked_mean(near, same.any(1)) + repelled
    return total
