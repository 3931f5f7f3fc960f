"""The equations of the multi-view slices in plain PyTorch: the oracle, and the backend that answers everywhere.

Le & Woo, AAAI 2022, "Multi-view attention distillation". A feature map is a mass distribution over the grid of its own
indices n = (c, h, w), P[n] = x[n]^2 / sum x^2. Every view (a direction) projects the grid onto a line, which is cut
into bins of equal width; the mass of each bin is the view's attention vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import accumulation

LARGEST = 1e280
"""What a view holds at most, so that no sum of its steps leaves float64."""
_SCALE = 2**30


def view_bins(shape: tuple[int, int, int], views: Tensor, bins: int, coordinates: str) -> Tensor:
    """Bin of every position of a (C, H, W) grid under every view: (K, 3) -> (K, C*H*W), int64.

    The rule is in integers, so that every backend gets the same bin, bit for bit: floats would move positions that lie
    on an edge. Only the direction of a view counts, not its length.
    """
    if views.device.type == "cpu" and not bool((views.double().abs() <= LARGEST).all()):  # elsewhere it would wait
        raise ValueError(f"views: expected finite numbers of at most {LARGEST}")
    last = [size - 1 for size in shape]
    steps = list(views.double().unbind(1))
    if coordinates == "unit":
        steps = [2 * step / end if end else torch.zeros_like(step) for step, end in zip(steps, last, strict=True)]
    extent = steps[0].abs() * last[0] + steps[1].abs() * last[1] + steps[2].abs() * last[2]
    position, top = 0, 0
    for axis, (step, end) in enumerate(zip(steps, last, strict=True)):
        quantised = (step / extent * _SCALE).nan_to_num(0, 0, 0).round().long()[:, None]
        along = quantised * torch.arange(end + 1, device=views.device) - quantised.clamp(max=0) * end
        position = position + along.reshape(-1, *(end + 1 if axis == i else 1 for i in range(3)))
        top = top + quantised.abs() * end
    return position.flatten(1) * bins // (top + 1)


def _power_of_two(peak: Tensor) -> Tensor:
    """The largest one that is not above ``peak``; 1 for 0, infinity and NaN."""
    mantissa, _ = torch.frexp(peak)
    return torch.where((peak > 0) & peak.isfinite(), peak / (2 * mantissa), 1)


def view_histogram(features: Tensor, views: Tensor, bins: int, coordinates: str) -> tuple[Tensor, Tensor]:
    """Attention vectors (B, K, M) of (B, C, H, W) features under (K, 3) views, and the float64 energy (B,) = sum x^2.

    Sums run in float64 and are scaled: no value overflows or underflows when squared there. Where an element is
    infinite or NaN, all vectors of the sample are NaN.
    """
    index = view_bins(features.shape[1:], views, bins, coordinates)
    wide = features.double().flatten(1)
    scale = _power_of_two(wide.abs().amax(1))
    square = (wide / scale[:, None]).square()  # in range, whatever the features
    energy = square.sum(1)
    mass = torch.stack([square.new_zeros(len(square), bins).index_add_(1, row, square) for row in index], 1)
    divisor = torch.where(energy == 0, 1, torch.where(energy.isfinite(), energy, math.nan))
    return (mass / divisor[:, None, None]).to(accumulation(features)), energy * scale * scale


def view_histogram_backward(
    grad: Tensor, features: Tensor, views: Tensor, attention: Tensor, energy: Tensor, coordinates: str
) -> Tensor:
    """Gradient (2 x / energy) * sum_k (g[k, bin_k] - <g[k], a[k]>), in the features' dtype and layout."""
    index = view_bins(features.shape[1:], views, attention.shape[2], coordinates)
    grad = grad.to(attention.dtype)
    centred = grad - (grad * attention).sum(2, keepdim=True)
    total = sum(centred[:, view].index_select(1, row) for view, row in enumerate(index))
    scale = torch.where(energy > 0, 2 / energy, 0)[:, None, None, None]
    gradient = (features * scale).to(attention.dtype) * total.reshape(features.shape)
    return torch.empty_like(features).copy_(gradient)


def _lengths(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Of the differences of all pairs of rows, in the norm p: two (K, B, M) -> (K, B, B)."""
    # The mm form of cdist loses the small distances that the margin is about.
    return torch.cdist(x, y, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def _pair_weights(labels: Tensor, every: Tensor, gamma: float, eta: float) -> tuple[Tensor, Tensor]:
    """Which pairs have equal labels, and the weights of all in the sum: two (B, B)."""
    same = labels[:, None] == labels
    equal = same.sum(dtype=every.dtype)
    views = max(len(every), 1)
    weights = (2 * eta / views) / torch.where(same, equal, same.numel() - equal)
    weights.diagonal().add_(gamma / (views * max(len(labels), 1)))
    return same, weights


def reduce_pairs(every: Tensor, labels: Tensor, gamma: float, eta: float, margin: float) -> Tensor:
    """The contrastive loss of the distances of all pairs, per view: (K, B, B) and (B,) -> ().

    A sum over all pairs of samples: (i, i) are those that attract. D is symmetric, so that both directions of the
    contrast are the same sum: equal labels attract, others repel up to the margin, each by the mean of its pairs.
    """
    same, weights = _pair_weights(labels, every, gamma, eta)
    return (torch.where(same, every, (margin - every).clamp(min=0)) * weights).sum()


def contrastive_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, p: float, gamma: float, eta: float, margin: float
) -> Tensor:
    """:func:`reduce_pairs` of the distances ``D = Σ_m |s_m - t_m|^p`` of rows, two (B, K, M) -> ()."""
    lengths = _lengths(*(x.transpose(0, 1).contiguous() for x in (student, teacher)), p)
    every = lengths if p == 1 else lengths.square() if p == 2 else lengths.pow(p)
    return reduce_pairs(every, labels, gamma, eta, margin)


def contrastive_loss_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    p: float,
    gamma: float,
    eta: float,
    margin: float,
) -> Tensor:
    """Gradient for ``student``, (B, K, M); for ``teacher``, swap the two: the distances are symmetric."""
    x, y = (x.transpose(0, 1).contiguous() for x in (student, teacher))
    lengths = _lengths(x, y, p)
    same, weights = _pair_weights(labels, lengths, gamma, eta)
    slope = torch.where(same, weights, torch.where(lengths.pow(p) > margin, 0, -weights))
    slope = grad * slope * p * torch.where(lengths.isnan(), lengths, lengths.pow(p - 1))
    return torch.ops.aten._cdist_backward(slope, x, y, p, lengths).transpose(0, 1).contiguous()
