"""The equations of frequency attention in plain PyTorch: the oracle, and the backend that answers everywhere.

Le & Woo, AAAI 2022, "Frequency attention distillation". With F = fft2 over (H, W) and D = F(student) - F(teacher), the
distance of each channel and frequency is

    l2        |D|^2
    cosine    1 - Re(F_S conj F_T) / (|F_S| |F_T|), and 1 where either coefficient is 0
    gaussian  1 - exp(-|D|^2 / (2 sigma^2))

The map of a sample with an infinite or NaN pixel is NaN, whatever the distance.

Gradients use the convention G = dL/dRe(F_S) + i dL/dIm(F_S), so that dL/dstudent = Re(F^H G). Real images need half of
their spectra, v <= W/2: the other half is its conjugate, and has the same distances.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import accumulation

# irfft2 under this norm is the adjoint F^H of fft2 under the other, for a G of real images.
ADJOINT_NORM = {"forward": "backward", "backward": "forward", "ortho": "ortho"}


def _power(spectrum: Tensor) -> Tensor:
    return spectrum.real.square() + spectrum.imag.square()


def _cosine(direction_s: Tensor, direction_t: Tensor) -> Tensor:
    # Not (s * t.conj()).real: a lazy conj() is lost inside an operator that torch.compile calls (torch 2.14).
    return direction_s.real * direction_t.real + direction_s.imag * direction_t.imag


def spectral_distance(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> Tensor:
    """Channel mean of the spectral distance: two (B, C, H, W) -> (B, H, W)."""
    dtype, width = accumulation(student, teacher), student.shape[3]
    if student.shape[0] == 0:
        return student.new_zeros((0, *student.shape[2:]), dtype=dtype)
    if distance == "cosine":
        # torch.sgn is z / |z|, and 0 at 0: the product neither underflows nor divides by zero.
        spectrum, spectrum_t = (torch.fft.rfft2(x.to(dtype), norm=norm) for x in (student, teacher))
        half = (1 - _cosine(spectrum.sgn(), spectrum_t.sgn())).mean(1)
        constant = spectrum[..., 0, 0] + 0 * spectrum_t[..., 0, 0]
    else:
        spectrum = torch.fft.rfft2(student.to(dtype) - teacher.to(dtype), norm=norm)
        constant = spectrum[..., 0, 0]
        if distance == "l2":
            half = torch.view_as_real(spectrum).square().mean(1).sum(3)
        else:
            half = -torch.expm1(-_power(spectrum / (math.sqrt(2) * sigma))).mean(1)
    # The constant coefficients have every pixel in them: where one is not finite, nothing is known of the sample.
    half = torch.where(constant.isfinite().all(1)[:, None, None], half, math.nan)
    mirrored = half[:, :, 1 : width - width // 2].flip(1, 2).roll(1, 1)  # d(-u, -v) = d(u, v)
    return torch.cat((half, mirrored), 2)


def spectral_distance_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str
) -> Tensor:
    """Gradient for ``student``, in its dtype and layout; for ``teacher``, swap the two: the distances are symmetric."""
    out = torch.empty_like(student)
    if student.shape[0] == 0:
        return out
    dtype = accumulation(student, teacher)
    # dL/dd of half the spectrum, the same for every channel: made symmetric, it gives a G of real images.
    grad = grad.to(dtype)
    grad = (grad + grad.flip(1, 2).roll((1, 1), (1, 2)))[:, None, :, : student.shape[3] // 2 + 1]
    grad = grad / (2 * student.shape[1])
    if distance == "cosine":
        spectrum, spectrum_t = (torch.fft.rfft2(x.to(dtype), norm=norm) for x in (student, teacher))
        direction_s, direction_t = spectrum.sgn(), spectrum_t.sgn()
        length = spectrum.abs()
        scale = torch.where((length > 0) & (direction_t != 0), -grad / length, 0)
        gradient = scale * (direction_t - _cosine(direction_s, direction_t) * direction_s)
    else:
        gradient = torch.fft.rfft2(student.to(dtype) - teacher.to(dtype), norm=norm)
        if distance == "l2":
            gradient *= 2 * grad
        else:
            gradient /= sigma
            gradient *= grad * torch.exp(-_power(gradient) / 2) / sigma
    return out.copy_(torch.fft.irfft2(gradient, s=student.shape[2:], norm=ADJOINT_NORM[norm]))


LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}
"""Of the attention; exp stays finite up to 88 and 709."""


def attention(mean_distance: Tensor, gamma: float) -> Tensor:
    """Of every frequency, ``exp(gamma · d)``, without gradient."""
    return (mean_distance.detach() * gamma).clamp_(max=LARGEST_EXPONENT[mean_distance.dtype]).exp_()


def sum_limits(distance: Tensor, channels: int, reduction: str) -> tuple[float, float]:
    """What a weighted mean distance counts in the loss, and the most that a sample does: their sum is then finite."""
    samples = 1 if reduction == "none" else max(len(distance), 1)
    pixels = distance.shape[1] * distance.shape[2]
    scale = 1 / max(pixels, 1) if reduction == "mean" else channels
    return scale / samples, torch.finfo(distance.dtype).max / 2 / samples


def attention_sum(distance: Tensor, gamma: float, channels: int, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss of mean distances (B, H, W), () or (B,) for the reduction "none", and its derivative by them.

    ``Σ scale · exp(gamma · d) · d`` with the attention ``exp(gamma · d)`` constant in the derivative. A sample above
    the most of :func:`sum_limits` is that, with derivative 0.
    """
    scale, most = sum_limits(distance, channels, reduction)
    distance = distance.contiguous()
    slope = attention(distance, gamma).mul_(scale)
    loss = (slope * distance).sum((1, 2))
    slope.masked_fill_((loss > most)[:, None, None], 0)
    loss.clamp_(max=most)
    return loss if reduction == "none" else loss.sum(), slope
