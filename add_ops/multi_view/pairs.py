"""What the multi-view loss makes of the slices of student and teacher: distances of rows, of a sample or of any two."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sliced_wasserstein.reference import power


def _binned_wasserstein(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Exact ``W_p^p`` between histograms on a line of length 1: two (..., M) -> (...).

    The integral over q of |quantile_x(q) - quantile_y(q)|^p, a sum over the merged levels of both cumulative sums.
    """
    bins = x.shape[-1]
    cumulative_x, cumulative_y = x.cumsum(-1), y.cumsum(-1)
    if p == 1:
        return (cumulative_x - cumulative_y)[..., :-1].abs().sum(-1) / bins
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


def _every(x: Tensor, y: Tensor, p: float, distance: str) -> Tensor:
    """Distance of every row of x to every row of y, per view: two (B, K, M) -> (K, B, B)."""
    x, y = x.transpose(0, 1), y.transpose(0, 1)
    if distance == "wasserstein" and p != 1:
        batch = x.shape[1]
        x, y = x[:, :, None].expand(-1, -1, batch, -1), y[:, None].expand(-1, batch, -1, -1)
        return _binned_wasserstein(x, y, p)
    scale = 1 / x.shape[-1]
    if distance == "wasserstein":
        x, y = x.cumsum(-1)[..., :-1], y.cumsum(-1)[..., :-1]
    # The mm form of cdist loses the small distances that the margin is about.
    exact = "donot_use_mm_for_euclid_dist"
    lengths = torch.cdist(x.contiguous(), y.contiguous(), p=float(p), compute_mode=exact)
    powers = lengths if p == 1 else lengths.square() if p == 2 else lengths.pow(p)
    return powers * scale if distance == "wasserstein" else powers


def all_pairs(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    p: float,
    distance: str,
    attract: float,
    contrast: float,
    margin: float,
) -> Tensor:
    """``attract · Σ_bk D(s_bk, t_bk) + contrast · (con(s, t) + con(t, s))``, the latter averaged over the views.

    A sum over all pairs of samples: (i, i) are those of the first term. D is symmetric, so that both directions of the
    contrast are the same sum: equal labels attract, others repel up to the margin, each by the mean of its pairs.
    """
    every = _every(student, teacher, p, distance)
    same = labels[:, None] == labels
    equal = same.sum(dtype=every.dtype)
    weights = (2 * contrast / len(every)) / torch.where(same, equal, same.numel() - equal)
    weights.diagonal().add_(attract)
    return (torch.where(same, every, (margin - every).clamp(min=0)) * weights).sum()


def draw(mask: Tensor, generator: torch.Generator | None) -> Tensor:
    """A uniformly drawn true column of every row: (B, B) -> (B,); any column where a row has none."""
    device = generator.device if generator is not None else mask.device
    chance = torch.rand(mask.shape, generator=generator, device=device, dtype=torch.float32).to(mask.device)
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
