"""Calls the C++ kernels of ``csrc/spectral_distance.cpp`` and ``csrc/attention_sum.cpp``."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import accumulation
from .._cpp import kernels, not_on_cpu, threads, view
from . import reference

MOST_PIXELS, LARGEST_PRIME = 2**24, 256
"""What the kernels' transforms take: tables index pixels, and a prime takes the square of its time and memory."""
DISTANCES = {"l2": 0, "cosine": 1, "gaussian": 2}


def _one_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dtype == teacher.dtype:
        return student, teacher
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


def _scale(features: Tensor, norm: str) -> float:
    """The factor of the DFT under torch.fft's ``norm``."""
    return (features.shape[2] * features.shape[3]) ** {"forward": -1.0, "ortho": -0.5, "backward": 0.0}[norm]


def _in_range(student: Tensor, teacher: Tensor, distance: str, sigma: float, scale: float) -> bool:
    """Whether the kernels keep every digit: they square coefficients unscaled, and transform two channels as one.

    Of such a pair the smaller channel, or the one that is not there, has the rounding of the larger one. In l2 that is
    lost in the sum; a narrow gaussian and the cosine magnify it.
    """
    if distance == "l2" or student.numel() == 0:
        return True
    wide = student.dtype == torch.float64
    if distance == "gaussian":
        exponent = scale / sigma * (scale / sigma)
        peak = sum(max(-float(low), float(high)) for low, high in (student.aminmax(), teacher.aminmax()))
        rounding = 4 * torch.finfo(accumulation(student)).eps * math.sqrt(student.shape[2] * student.shape[3]) * peak
        return 1e-30 < exponent < 1e15 and rounding * rounding * exponent < (1e-13 if wide else 1e-7)
    peaks = torch.stack([x.abs().amax((2, 3)).double() for x in (student, teacher)])
    least, most = torch.where(peaks > 0, peaks, math.inf).amin(2), peaks.amax(2)
    return bool(((most <= (1e3 if wide else 1e8) * least) & (least > 1e-140) & (most < 1e140)).all())


def spectral_distance(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> Tensor:
    student, teacher = _one_dtype(student, teacher)
    out = student.new_empty((student.shape[0], *student.shape[2:]), dtype=accumulation(student))
    code, scale, workers = DISTANCES[distance], _scale(student, norm), threads(student.numel())
    inside = _in_range(student, teacher, distance, sigma, scale)
    if inside and kernels.spectral_distance(view(student), view(teacher), code, sigma, scale, view(out), workers):
        return out
    return reference.spectral_distance(student, teacher, distance, sigma, norm)


def spectral_distance_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str
) -> Tensor:
    out = torch.empty_like(student)
    student, teacher = _one_dtype(student, teacher)
    result = out if out.dtype == student.dtype else torch.empty_like(student)
    grad = grad.to(accumulation(student)).contiguous()
    code, scale, workers = DISTANCES[distance], _scale(student, norm), threads(student.numel())
    if not _in_range(student, teacher, distance, sigma, scale):
        return out.copy_(reference.spectral_distance_backward(grad, student, teacher, distance, sigma, norm))
    kernels.spectral_distance_backward(
        view(grad), view(student), view(teacher), code, sigma, scale, view(result), workers
    )
    return out if result is out else out.copy_(result)


def attention_sum(distance: Tensor, gamma: float, channels: int, reduction: str) -> tuple[Tensor, Tensor]:
    distance, (scale, most) = distance.contiguous(), reference.sum_limits(distance, channels, reduction)
    loss, slope = distance.new_empty(distance.shape[0]), torch.empty_like(distance)
    limit, workers = reference.LARGEST_EXPONENT[distance.dtype], threads(distance.numel())
    kernels.attention_sum(view(distance), gamma, limit, scale, most, view(loss), view(slope), workers)
    return loss if reduction == "none" else loss.sum(), slope


@lru_cache(maxsize=4096)
def _no_transform(height: int, width: int) -> str | None:
    if height * width > MOST_PIXELS:
        return f"it takes at most {MOST_PIXELS} pixels, not {height}×{width}"
    for side in (height, width):
        rest, prime = side, 2
        while prime * prime <= rest:
            if rest % prime:
                prime += 1
            else:
                rest //= prime
        if rest > LARGEST_PRIME:
            return f"it takes prime factors up to {LARGEST_PRIME}, and a side of {side} has {rest}"
    return None


def _unsupported(*args: Any) -> str | None:
    *_, student, _, _, _, _ = args
    return not_on_cpu(*args) or _no_transform(*student.shape[2:])


_dispatch.implement("spectral_distance", "cpp", spectral_distance, _unsupported)
_dispatch.implement("spectral_distance_backward", "cpp", spectral_distance_backward, _unsupported)
_dispatch.implement("attention_sum", "cpp", attention_sum, not_on_cpu)
