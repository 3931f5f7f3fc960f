"""Calls the C++ kernels of ``csrc/spectral_distance.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import accumulation
from .._cpp import kernels, not_on_cpu, view

DISTANCES = {"l2": 0, "cosine": 1, "gaussian": 2}


def _one_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


def _scale(features: Tensor, norm: str) -> float:
    """The factor of the DFT under torch.fft's ``norm``."""
    return (features.shape[2] * features.shape[3]) ** {"forward": -1.0, "ortho": -0.5, "backward": 0.0}[norm]


def spectral_distance(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> Tensor:
    student, teacher = _one_dtype(student, teacher)
    out = student.new_empty((student.shape[0], *student.shape[2:]), dtype=accumulation(student))
    code, scale, threads = DISTANCES[distance], _scale(student, norm), torch.get_num_threads()
    kernels.spectral_distance(view(student), view(teacher), code, sigma, scale, view(out), threads)
    return out


def spectral_distance_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str
) -> Tensor:
    out = torch.empty_like(student)
    student, teacher = _one_dtype(student, teacher)
    result = out if out.dtype == student.dtype else torch.empty_like(student)
    grad = grad.to(accumulation(student)).contiguous()
    code, scale, threads = DISTANCES[distance], _scale(student, norm), torch.get_num_threads()
    kernels.spectral_distance_backward(
        view(grad), view(student), view(teacher), code, sigma, scale, view(result), threads
    )
    return out if result is out else out.copy_(result)


_dispatch.implement("spectral_distance", "cpp", spectral_distance, not_on_cpu)
_dispatch.implement("spectral_distance_backward", "cpp", spectral_distance_backward, not_on_cpu)
