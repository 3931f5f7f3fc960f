"""The authors' formulas as they wrote them out, with the ordering of the views corrected; autograd does the rest.

Both spectra in full; every view sorts all positions by their projection, sums the mass along that order and reads the
sums at the edges of the bins. The edges follow the package's integer rule, so that the results can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plain import contrastive_loss


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    difference = torch.fft.fft2(student, norm="forward") - torch.fft.fft2(teacher, norm="forward")
    return difference.real**2 + difference.imag**2


def spectral_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Two (B, C, H, W) -> (B, H, W)."""
    return _distance(student, teacher).mean(1)


def frequency_attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Two (B, C, H, W) -> scalar."""
    distance = _distance(student, teacher)
    weight = distance.detach().mean(1, keepdim=True).clamp(max=80).exp()
    return (weight * distance).sum((1, 2, 3)).mean()


def view_histogram(features: Tensor, views: Tensor, bins: int) -> Tensor:
    """(B, C, H, W) and (K, 3) views -> (B, K, M)."""
    shape = features.shape[1:]
    mass = features.flatten(1) ** 2
    mass = mass / mass.sum(1, keepdim=True)
    axes = [torch.arange(size, device=features.device) for size in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    last = torch.tensor(shape, device=features.device) - 1
    attention = []
    for view in views.double():
        channel, row, column = view.abs() * last
        steps = (view / (channel + row + column) * 2**30).round().long()
        position = (grid * steps).sum(1) - (steps.clamp(max=0) * last).sum()
        ordered, order = position.sort()
        length = (steps.abs() * last).sum() + 1
        edges = (torch.arange(1, bins + 1, device=features.device) * length + bins - 1) // bins
        ends = torch.searchsorted(ordered, edges)
        cumulative = mass[:, order].cumsum(1)
        below = torch.where(ends > 0, cumulative[:, (ends - 1).clamp(min=0)], 0)
        attention.append(torch.diff(below, dim=1, prepend=torch.zeros_like(below[:, :1])))
    return torch.stack(attention, 1)


def multi_view_loss(student: Tensor, teacher: Tensor, labels: Tensor, views: Tensor) -> Tensor:
    """Two (B, C, H, W), (B,) labels, (K, 3) views -> scalar; all pairs, where the authors draw some."""
    bins = max(student.shape[1] // 2, 1)
    return contrastive_loss(view_histogram(student, views, bins), view_histogram(teacher, views, bins), labels)
