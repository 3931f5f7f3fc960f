"""Random directions: independent, orthogonal, or evenly spread; each by itself is uniform on the sphere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .._checks import count, one_of

SAMPLINGS = ("uniform", "orthogonal", "quasi")
FEW = 16
"""Vectors up to which Gram-Schmidt takes the place of QR, whose library wakes its threads, or waits for a GPU."""


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows (G, S, D), S <= D, made orthonormal one after the other, as QR does with a positive diagonal of R."""
    if rows.shape[1] > FEW:
        q, r = torch.linalg.qr(rows.mT)
        return (q * torch.ones_like(q[:, 0]).copysign(r.diagonal(dim1=1, dim2=2))[:, None]).mT
    basis = rows[:, :0]
    for row in rows.split(1, dim=1):
        for _ in range(2):  # the second time takes away what rounding left
            row = normalize(row - ((row * basis).sum(2, keepdim=True) * basis).sum(1, keepdim=True), dim=2)
        basis = torch.cat([basis, row], 1)
    return basis


def _orthogonal(number_of: int, dim: int, **where: Any) -> Tensor:
    """Rows of Haar-distributed orthogonal matrices, which Gaussian ones become when they are made orthonormal."""
    size = min(number_of, dim)
    blocks = -(-number_of // size)
    gaussians = torch.randn(blocks * size, dim, dtype=torch.float32, **where).double()
    return _orthonormal(gaussians.view(blocks, size, dim)).reshape(-1, dim)[:number_of]


def _spiral(number_of: int, **where: Any) -> Tensor:
    """Generalised spiral points (Rakhmanov, Saff & Zhou 1994) under one rotation, uniform in SO(3)."""
    first, second = _orthogonal(2, 3, **where)
    rotation = torch.stack([first, second, torch.linalg.cross(first, second)])
    height = 1 - (2 * torch.arange(number_of, dtype=torch.float64, device=first.device) + 1) / number_of
    azimuth = 1.8 * math.sqrt(number_of) * height.acos()
    radius = (1 - height.square()).sqrt()
    return torch.stack([radius * azimuth.cos(), radius * azimuth.sin(), height], 1) @ rotation


def source(generator: torch.Generator | None, device: torch.device | str | None) -> dict[str, Any]:
    """Where numbers are drawn, as torch's functions take it. Compiled ones of symbolic sizes know no generator."""
    return {"device": device} if generator is None else {"generator": generator, "device": generator.device}


def random_directions(
    number_of: int,
    dim: int,
    sampling: str,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    """Unit rows ``(number_of, dim)``, float32, drawn where the generator lives."""
    one_of("sampling", sampling, SAMPLINGS)
    if sampling == "quasi" and dim != 3:
        raise ValueError(f"sampling: expected 'uniform' or 'orthogonal' unless D = 3, got 'quasi' for D = {dim}")
    where = source(generator, device)
    if sampling == "uniform":
        directions = torch.randn(number_of, dim, dtype=torch.float32, **where)
        directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True).clamp_(min=1e-12)  # normalize, in place
    else:
        directions = _spiral(number_of, **where) if sampling == "quasi" else _orthogonal(number_of, dim, **where)
    return directions.to(device if device is not None else directions.device, torch.float32)


def sample_projections(
    dim: int,
    num_projections: int,
    *,
    sampling: str = "uniform",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw unit columns, each of them uniform on the sphere of ``dim`` dimensions.

    Whatever the sampling, the mean of a sliced distance over such directions is an unbiased estimate.

    Args:
        dim: D >= 1, the dimension of the points. num_projections: K >= 1.
        sampling: ``"uniform"``: independent, normalised Gaussians. ``"orthogonal"``: blocks of D orthogonal ones, the
            blocks independent (Rowland et al., AISTATS 2019); best where D is large. ``"quasi"``: a spiral that covers
            the sphere evenly, under one random rotation (Nguyen, Bariletto & Ho, ICLR 2024); only D = 3, best there.
        generator: source of the numbers; the draw happens on its device.
        device: where the result lies; default the generator's device, else torch's default device.

    Returns:
        ``(dim, num_projections)``, float32 whatever torch's default dtype.

    Raises:
        TypeError, ValueError: a number is not an integer >= 1, an unknown word, or ``"quasi"`` with D other than 3.
    """
    count("dim", dim)
    return (
        random_directions(count("num_projections", num_projections), dim, sampling, generator, device).t().contiguous()
    )
