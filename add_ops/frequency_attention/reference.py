"""The equations of frequency attention in plain PyTorch: the oracle, and the backend that answers everywhere.

Le & Woo, AAAI 2022, "Frequency attention distillation". With F = fft2 over (H, W) and D = F(student) - F(teacher), the
distance of each channel and frequency is

    l2        |D|^2
    cosine    1 - Re(F_S conj F_T) / (|F_S| |F_T|), and 1 where either coefficient is 0
    gaussian  1 - exp(-|D|^2 / (2 sigma^2))

Gradients use the convention G = dL/dRe(F_S) + i dL/dIm(F_S), so that dL/dstudent = Re(F^H G).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation

# ifft2 under this norm is the adjoint F^H of fft2 under the other.
ADJOINT_NORM = {"forward": "backward", "backward": "forward", "ortho": "ortho"}


def _power(spectrum: Tensor) -> Tensor:
    return spectrum.real.square() + spectrum.imag.square()


def _cosine(direction_s: Tensor, direction_t: Tensor) -> Tensor:
    # Not (s * t.conj()).real: a lazy conj() is lost inside an operator that torch.compile calls (torch 2.14).
    return direction_s.real * direction_t.real + direction_s.imag * direction_t.imag


def spectral_distance(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> Tensor:
    """Channel mean of the spectral distance: two (B, C, H, W) -> (B, H, W)."""
    dtype = accumulation(student, teacher)
    if student.shape[0] == 0:
        return student.new_zeros((0, *student.shape[2:]), dtype=dtype)
    if distance == "cosine":
        # torch.sgn is z / |z|, and 0 at 0: the product neither underflows nor divides by zero.
        direction_s, direction_t = (torch.fft.fft2(x.to(dtype), norm=norm).sgn() for x in (student, teacher))
        return (1 - _cosine(direction_s, direction_t)).mean(1)
    power = _power(torch.fft.fft2(student.to(dtype) - teacher.to(dtype), norm=norm))
    return (power if distance == "l2" else -torch.expm1(-power / (2 * sigma**2))).mean(1)


def spectral_distance_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str
) -> Tensor:
    """Gradient for ``student``, in its dtype and layout; for ``teacher``, swap the two: the distances are symmetric."""
    out = torch.empty_like(student)
    if student.shape[0] == 0:
        return out
    dtype = accumulation(student, teacher)
    grad = grad.to(dtype)[:, None] / student.shape[1]  # dL/dd, the same for every channel
    if distance == "cosine":
        spectrum, spectrum_t = (torch.fft.fft2(x.to(dtype), norm=norm) for x in (student, teacher))
        direction_s, direction_t = spectrum.sgn(), spectrum_t.sgn()
        length = spectrum.abs()
        scale = torch.where((length > 0) & (direction_t != 0), -grad / length, 0)
        gradient = scale * (direction_t - _cosine(direction_s, direction_t) * direction_s)
    else:
        gradient = torch.fft.fft2(student.to(dtype) - teacher.to(dtype), norm=norm)
        if distance == "l2":
            gradient *= 2 * grad
        else:
            gradient *= grad * torch.exp(-_power(gradient) / (2 * sigma**2)) / sigma**2
    return out.copy_(torch.fft.ifft2(gradient, norm=ADJOINT_NORM[norm]).real)
