"""Calls the C++ kernels of ``csrc/view_histogram.cpp`` and ``csrc/contrastive_loss.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import accumulation
from .._cpp import kernels, not_on_cpu, threads, view
from . import reference


def view_histogram(features: Tensor, views: Tensor, bins: int, coordinates: str) -> tuple[Tensor, Tensor]:
    batch = features.shape[0]
    attention = features.new_empty((batch, views.shape[0], bins), dtype=accumulation(features))
    energy = features.new_empty((batch,), dtype=torch.float64)
    unit, workers = coordinates == "unit", threads(features.numel() * views.shape[0])
    directions = view(views.double().contiguous())
    kernels.view_histogram(view(features), directions, bins, unit, view(attention), view(energy), workers)
    return attention, energy


def view_histogram_backward(
    grad: Tensor, features: Tensor, views: Tensor, attention: Tensor, energy: Tensor, coordinates: str
) -> Tensor:
    out = torch.empty_like(features)
    grad, unit = grad.to(attention.dtype).contiguous(), coordinates == "unit"
    workers = threads(features.numel() * views.shape[0])
    directions = view(views.double().contiguous())
    attention, energy = view(attention.contiguous()), view(energy.contiguous())
    kernels.view_histogram_backward(view(grad), view(features), directions, attention, energy, unit, view(out), workers)
    return out


def contrastive_loss(student: Tensor, teacher: Tensor, labels: Tensor, p: float, *weights: float) -> Tensor:
    if p not in (1, 2):
        return reference.contrastive_loss(student, teacher, labels, p, *weights)
    out, workers = student.new_empty(()), threads(student.shape[0] * student.numel())
    rows = (view(tensor.contiguous()) for tensor in (student, teacher, labels))
    kernels.contrastive_loss(*rows, p, *weights, view(out), workers)
    return out


def contrastive_loss_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, labels: Tensor, p: float, *weights: float
) -> Tensor:
    if p not in (1, 2):
        return reference.contrastive_loss_backward(grad, student, teacher, labels, p, *weights)
    out, workers = student.new_empty(student.shape), threads(student.shape[0] * student.numel())
    rows = (view(tensor.contiguous()) for tensor in (student, teacher, labels))
    kernels.contrastive_loss_backward(view(grad), *rows, p, *weights, view(out), workers)
    return out


def _unsupported(features: Tensor, views: Tensor, bins: int, coordinates: str) -> str | None:
    most = 2**20
    return not_on_cpu(features, views) or (f"it takes at most {most} bins, not {bins}" if bins > most else None)


def _unsupported_backward(
    grad: Tensor, features: Tensor, views: Tensor, attention: Tensor, energy: Tensor, coordinates: str
) -> str | None:
    return _unsupported(features, views, attention.shape[2], coordinates)


_dispatch.implement("contrastive_loss", "cpp", contrastive_loss, not_on_cpu)
_dispatch.implement("contrastive_loss_backward", "cpp", contrastive_loss_backward, not_on_cpu)
_dispatch.implement("view_histogram", "cpp", view_histogram, _unsupported)
_dispatch.implement("view_histogram_backward", "cpp", view_histogram_backward, _unsupported_backward)
