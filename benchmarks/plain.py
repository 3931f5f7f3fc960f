"""The best plain PyTorch found for each primitive and loss: what the kernels have to beat.

Same signatures as the package's functions, in float32 or wider (half precision is converted first, as one does), the
gradient for the first argument only. Where no one way is the best at every shape there are several.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _shifted(height: int, width: int, sign: int, device: torch.device) -> Tensor:
    """Flat index of position ``m + sign·n`` on the torus for all (n, m): (HW, HW)."""
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = (row[None, None, :, None] + sign * row[:, None, None, None]) % height
    columns = (column[None, None, None, :] + sign * column[None, :, None, None]) % width
    return (rows * width + columns).reshape(height * width, height * width)


class _GramSpectrum(torch.autograd.Function):
    """Power spectrum as the transform of the autocorrelation, which is a sum over the Gram matrix; few positions."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        batch, channels, height, width = student.shape
        positions = height * width
        difference = (student - teacher).flatten(2)
        gram = torch.bmm(difference.mT, difference)
        lagged = _shifted(height, width, 1, student.device)  # [lag, position] -> position + lag
        correlation = gram.gather(1, lagged.expand(batch, -1, -1)).sum(2)
        ctx.save_for_backward(difference)
        ctx.shape = student.shape
        return torch.fft.fft2(correlation.view(batch, height, width)).real / (channels * positions**2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        _, channels, height, width = ctx.shape
        kernel = torch.fft.ifft2(grad).real.flatten(1) * (2 / (channels * height * width))
        circulant = kernel[:, _shifted(height, width, -1, grad.device)]
        return torch.bmm(difference, circulant).view(ctx.shape), None


def _mirrored(spectrum: Tensor) -> Tensor:
    """``spectrum[-u, -v]``: (B, H, W) -> (B, H, W)."""
    return spectrum.flip(1, 2).roll((1, 1), (1, 2))


def _mirrored_half(half: Tensor, width: int) -> Tensor:
    """The columns that follow ``half`` (B, H, W // 2 + 1) in a symmetric spectrum."""
    return half[:, :, 1 : width - width // 2].flip(1, 2).roll(1, 1)


class _HalfSpectrum(torch.autograd.Function):
    """Power of the half spectrum of the difference, mirrored; one inverse transform backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        width = student.shape[3]
        spectrum = torch.fft.rfft2(student - teacher, norm="forward")
        half = torch.view_as_real(spectrum).square().sum(4).mean(1)
        ctx.save_for_backward(spectrum)
        ctx.size = student.shape[2:]
        return torch.cat([half, _mirrored_half(half, width)], 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (spectrum,) = ctx.saved_tensors
        symmetric = (grad + _mirrored(grad))[:, None, :, : spectrum.shape[3]] / spectrum.shape[1]
        return torch.fft.irfft2(spectrum * symmetric, s=ctx.size), None


@lru_cache
def _waves(side: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines of the frequencies 0 … count-1, then their sines: (side, 2·count)."""
    place = torch.arange(side, device=device)[:, None] * torch.arange(count, device=device) % side
    angle = place.double() * (2 * torch.pi / side)
    return torch.cat([angle.cos(), angle.sin()], 1).to(dtype)


class _ProductSpectrum(torch.autograd.Function):
    """The half spectrum by two products with matrices of cosines and sines, along the width and along the height."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        batch, channels, height, width = ctx.shape = student.shape
        half = ctx.half = width // 2 + 1
        ctx.waves = [
            _waves(side, count, student.dtype, student.device) for side, count in ((height, height), (width, half))
        ]
        rows = (student - teacher).reshape(-1, width) @ ctx.waves[1]
        both = rows.view(-1, height, 2 * half).mT.reshape(-1, height) @ ctx.waves[0]
        (cc, cs), (sc, ss) = (part.unbind(3) for part in both.view(batch, channels, 2, half, 2, height).unbind(2))
        real, imaginary = cc - ss, cs + sc  # the latter's sign is of no account
        ctx.save_for_backward(real, imaginary)
        power = (real.square() + imaginary.square()).sum(1).mT / (channels * (height * width) ** 2)
        return torch.cat([power, _mirrored_half(power, width)], 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        real, imaginary = ctx.saved_tensors
        _, channels, height, width = ctx.shape
        weight = grad[:, :, : ctx.half].clone()
        weight[:, :, 1 : width - width // 2] += _mirrored(grad)[:, :, 1 : width - width // 2]
        weight = weight.mT[:, None] * (2 / (channels * (height * width) ** 2))
        real, imaginary = real * weight, imaginary * weight
        both = torch.stack([real, imaginary, imaginary, -real], 3)  # (B, C, V, 4, H): cc, cs, sc, ss
        both = both.unflatten(3, (2, 2)).transpose(2, 3)
        rows = both.reshape(-1, 2 * height) @ ctx.waves[0].mT
        return (rows.view(-1, 2 * ctx.half, height).mT.reshape(-1, 2 * ctx.half) @ ctx.waves[1].mT).view(
            ctx.shape
        ), None


def spectral_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Two (B, C, H, W) -> (B, H, W), the l2 distance under ``norm="forward"``."""
    few = student.shape[2] * student.shape[3] <= 64
    return (_GramSpectrum if few else _HalfSpectrum).apply(_wide(student), _wide(teacher))


def spectral_distance_by_products(student: Tensor, teacher: Tensor) -> Tensor:
    """``spectral_distance`` by matrix products: the faster one at sides that no FFT likes."""
    return _ProductSpectrum.apply(_wide(student), _wide(teacher))


def frequency_attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Two (B, C, H, W) -> scalar, gamma 1."""
    power = spectral_distance(student, teacher)
    weight = power.detach().clamp(max=80).exp()
    return student.shape[1] * (weight * power).sum((1, 2)).mean()


def view_bins(shape: tuple[int, ...], views: Tensor, bins: int) -> Tensor:
    """Integer bins of a (C, H, W) grid, (K, C·H·W) int32, by the package's rule.

    In float64, where all of it is exact (numbers below 2^53, and a quotient cannot round up to a whole number), and
    several times faster than 64-bit integer division.
    """
    last = torch.tensor(shape, device=views.device) - 1
    lengths = views.double().abs() * last
    extent = lengths[:, 0] + lengths[:, 1] + lengths[:, 2]
    quantised = (views.double() / extent[:, None] * 2**30).round()
    offset, top = (quantised.clamp(max=0) * last).sum(1), (quantised.abs() * last).sum(1)
    channel, row, column = (
        quantised[:, axis, None] * torch.arange(size, device=views.device) for axis, size in enumerate(shape)
    )
    plane = (row[:, :, None] + column[:, None]).flatten(1) - offset[:, None]
    position = channel[:, :, None] + plane[:, None]
    return position.mul_(bins).div_((top + 1)[:, None, None]).int().flatten(1)


class _BinnedMass(torch.autograd.Function):
    """Rows of all samples are summed by ``embedding_bag``: bins are the bags forward, positions are backward."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, index: Tensor, bins: int) -> Tensor:
        rows = features.flatten(1).t().contiguous()  # (N, B)
        square = rows.square()
        energy = square.sum(0)
        # One view at a time and in the narrowest type: torch's radix sort takes one pass per byte of the key.
        narrow = torch.uint8 if bins <= 256 else torch.int16 if bins < 2**15 else torch.int32
        first = torch.arange(bins, dtype=narrow, device=index.device)
        mass = []
        for view in index.to(narrow):
            ordered, order = view.sort(stable=True)
            mass.append(F.embedding_bag(order, square, torch.searchsorted(ordered, first), mode="sum"))
        attention = (torch.stack(mass) / energy).permute(2, 0, 1).contiguous()
        ctx.save_for_backward(rows, index, attention, energy)
        ctx.shape = features.shape
        return attention

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, index, attention, energy = ctx.saved_tensors
        views, bins = attention.shape[1:]
        centred = (grad - (grad * attention).sum(2, keepdim=True)).flatten(1) * (2 / energy)[:, None]
        bags = (index + bins * torch.arange(views, dtype=index.dtype, device=index.device)[:, None]).t().contiguous()
        total = F.embedding_bag(bags, centred.t().contiguous(), mode="sum")
        return total.mul_(rows).t().reshape(ctx.shape), None, None


def view_histogram(features: Tensor, views: Tensor, bins: int) -> Tensor:
    """(B, C, H, W) and (K, 3) views -> (B, K, M), coordinates "index"."""
    return _BinnedMass.apply(_wide(features), view_bins(tuple(features.shape[1:]), views, bins), bins)


class _PairDistances(torch.autograd.Function):
    """Every pair's distance forward, which is as exact as they are small; two products instead of pairs backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        x, y = student.transpose(0, 1), teacher.transpose(0, 1)
        every = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()
        same = labels[:, None] == labels
        count = same.sum()
        weights = (100 / len(every)) / torch.where(same, count, same.numel() - count)
        weights.diagonal().add_(100 / (len(every) * len(labels)))
        gap = 0.012 - every
        ctx.save_for_backward(x, y, torch.where(same, weights, torch.where(gap < 0, 0, -weights)))
        return torch.where(same, every, gap.clamp_(min=0)).mul_(weights).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, y, slope = ctx.saved_tensors
        return ((slope.sum(2, keepdim=True) * x).baddbmm_(slope, y, alpha=-1) * (2 * grad)).transpose(0, 1), None, None


def contrastive_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The multi-view loss of two (B, K, M) attention vectors: gamma 100, eta 50, margin 0.012, p 2, all pairs."""
    return _PairDistances.apply(student, teacher, labels)


def multi_view_loss(student: Tensor, teacher: Tensor, labels: Tensor, views: Tensor) -> Tensor:
    """Two (B, C, H, W), (B,) labels, (K, 3) views -> scalar. The bins serve both feature maps."""
    bins = max(student.shape[1] // 2, 1)
    index = view_bins(tuple(student.shape[1:]), views, bins)
    return contrastive_loss(*(_BinnedMass.apply(features, index, bins) for features in (student, teacher)), labels)


def project_and_sort(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, D) and (D, K) -> sorted (B, K, N) and the order."""
    return (projections.t() @ _wide(points).mT).sort(dim=2)


class _PackedSort(torch.autograd.Function):
    """float32 and its column as one int64; a negative one's lower bits are flipped: so integers are in its order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        bits = values.view(torch.int32)
        keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
        packed = (keys | torch.arange(values.shape[-1], device=values.device)).sort().values
        keys, order = (packed >> 32).int(), packed & 0xFFFFFFFF
        ctx.save_for_backward(order)
        ctx.mark_non_differentiable(order)
        return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32), order

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> Tensor:
        return torch.empty_like(grad).scatter_(-1, ctx.saved_tensors[0], grad)


def project_and_sort_packed(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """``project_and_sort`` of float32 by integers, whose sort needs no second array and no test for NaN."""
    return _PackedSort.apply((projections.t() @ _wide(points).mT).contiguous())


def sliced_wasserstein(x: Tensor, y: Tensor, projections: Tensor) -> Tensor:
    """Two (B, N, D) and (D, K) -> (B,), p 2."""
    return (project_and_sort(x, projections)[0] - project_and_sort(y, projections)[0]).square().mean((1, 2))


def _levels(weights: Tensor | None, order: Tensor) -> Tensor:
    """Cumulative weights of sorted points: (B, K, N), or (N,) where all are the same."""
    if weights is None:
        return torch.arange(1, order.shape[2] + 1, device=order.device) / order.shape[2]
    return weights[:, None].expand(order.shape).gather(2, order).cumsum(2)


def weighted_sliced_wasserstein(
    x: Tensor, y: Tensor, projections: Tensor, x_weights: Tensor | None, y_weights: Tensor | None
) -> Tensor:
    """(B, N, D), (B, M, D), (D, K), and (B, N) and (B, M) or None twice -> (B,), p 2; the levels in float32."""
    (x_values, x_order), (y_values, y_order) = (project_and_sort(points, projections) for points in (x, y))
    levels = _levels(x_weights, x_order), _levels(y_weights, y_order)
    merged = torch.cat(levels, -1).sort(-1).values
    width = torch.diff(merged, prepend=torch.zeros_like(merged[..., :1]))
    quantiles = []
    for values, own in zip((x_values, y_values), levels, strict=True):
        index = torch.searchsorted(own, merged).clamp(max=values.shape[2] - 1)
        quantiles.append(values[..., index] if index.ndim == 1 else values.gather(2, index))
    return (width * (quantiles[0] - quantiles[1]).square()).sum(2).mean(1)
