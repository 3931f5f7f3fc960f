"""What the Triton kernels of the spectral distance know of a map before they see one: bases, slots and folds.

A real H×W map has H·W real Fourier coefficients. A *slot* holds two of them: cosine and sine of one frequency, whose
mirror has the same power, or the cosines of two frequencies that are their own mirrors. Up to ``JOINT`` pixels one
basis of the whole map gives every slot; above, each side has its own, and a slot of the height and one of the width
hold four coefficients.

A side of N = 2M pixels above ``UNFOLDED`` is *folded*, the first step of a radix-2 transform: exp(-2πik(n+M)/N) is
(-1)^k·exp(-2πikn/N), so its even frequencies are those of x[n] + x[n+M], its odd ones those of x[n] - x[n+M]. Each of
these two *classes* has a basis of M×M, still real: half of the work, and 56 is padded to 2·32 instead of 64.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

JOINT = 64
"""Pixels up to which one product with the basis of the whole map costs no more than two with padded sides."""
UNFOLDED = 32
"""Even sides above are folded."""
EXPONENT = {"forward": -1.0, "ortho": -0.5, "backward": 0.0}


class Plan(NamedTuple):
    basis_h: Tensor  # (2, FOLD_H, BLOCK_H, 2·U): high and low halves, by class
    basis_w: Tensor  # (2, FOLD_W, BLOCK_W, 2·V); (2, 1, BLOCK_W, 2·U) of a whole map, whose pixels are one row
    slots: Tensor  # (H·W,) int32: in which coefficient of which slot a frequency lies
    frequencies: Tensor  # (2, FOLD_H, FOLD_W, 2 or 4, V, U) int32: and back, with its mirror, -1 where there is none
    shape: dict[str, int]  # the constants of the kernels that depend on the map alone


def padded(length: int) -> int:
    """What a product of tensor cores can take: a power of two, at least 16."""
    return max(16, 1 << (length - 1).bit_length())


def _basis(height: int, width: int, exponent: float, block: int, fold: int = 1, rest: int = 0) -> tuple[Tensor, Tensor]:
    """The real Fourier basis of an image, or of a side's frequencies ``rest`` modulo ``fold``, on 1/fold of its pixels.

    Returns:
        ``(block, block)`` float64, a row per pixel, two columns per slot, padded with zeros and scaled by
        ``(height·width)**exponent``; and the two frequencies of every slot, ``(block // 2, 2)``, padded with -1.
    """
    pixels = torch.arange(height * width)
    index = pixels[rest::fold]
    mirror = -(index // width) % height * width + -(index % width) % width
    own = index[index == mirror]
    own = pad(own, (0, len(own) % 2), value=-1).view(-1, 2)
    pairs = torch.stack((index, mirror), 1)[index < mirror]
    slots = torch.cat((own, pairs, own.new_full((block // 2 - len(own) - len(pairs), 2), -1)))
    pixels = pixels[: len(pixels) // fold, None, None]
    h, w = pixels // width, pixels % width
    turns = h * (slots // width) % height * width + w * (slots % width) % width * height  # in units of 1/(H·W)
    angle = 2 * math.pi / (height * width) * turns.double()
    columns = angle.cos()
    columns[:, len(own) :, 1] = angle[:, len(own) :, 0].sin()
    basis = torch.zeros(block, block, dtype=torch.float64)
    basis[: len(pixels)] = torch.where(slots >= 0, columns, 0).flatten(1) * (height * width) ** exponent
    return basis, slots


def _side(length: int, exponent: float) -> tuple[Tensor, Tensor]:
    """The bases of a side's classes (FOLD, BLOCK, BLOCK), and the frequencies of their slots (FOLD, BLOCK // 2, 2)."""
    fold = 2 if length > UNFOLDED and length % 2 == 0 else 1
    classes = [_basis(1, length, exponent, padded(length // fold), fold, rest) for rest in range(fold)]
    bases, slots = zip(*classes, strict=True)
    return torch.stack(bases), torch.stack(slots)


def _halves(basis: Tensor) -> Tensor:
    """(2, …): numbers with the 10 bits of mantissa that a tensor core keeps, and what is left of float32."""
    high = ((basis.float().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)  # to the nearest
    return torch.stack((high, (basis - high).float()))


@cache  # never emptied: a captured CUDA graph goes on reading the tables of its warm-up
def plan(height: int, width: int, norm: str, device: torch.device) -> Plan:
    """The tables for maps of one size; every caller shares them."""
    exponent, pixels = EXPONENT[norm], height * width
    if pixels <= JOINT:
        basis, slots = _basis(height, width, exponent, padded(pixels))
        basis_h = basis_w = basis[None]
        real = slots[:, 0] == -(slots[:, 0] // width) % height * width + -(slots[:, 0] % width) % width
        reals = int(real.sum())
        first = torch.stack((slots[:, 0], torch.where(real, slots[:, 1], -1)))[None, None, :, None]
        block_h = 1
    else:
        (basis_h, u), (basis_w, v) = _side(height, exponent), _side(width, exponent)
        basis_w = basis_w.unflatten(2, (-1, 8, 2)).mT.flatten(2)  # eight cosines, eight sines, …
        u, v = u[:, None, None], v[None, :, :, None]  # (FOLD_H, 1, 1, U, 2), (1, FOLD_W, V, 1, 2)
        tall, wide = 2 * u[..., 0] % height != 0, 2 * v[..., 0] % width != 0
        reals, block_h = 0, basis_h.shape[1]

        def at(i: int, j: int) -> Tensor:
            return torch.where((u[..., i] >= 0) & (v[..., j] >= 0), u[..., i] * width + v[..., j], -1)

        last = torch.where(tall, at(0, 1), torch.where(wide, at(1, 0), at(1, 1)))
        corner = [torch.where(tall | wide, -1, at(*place)) for place in ((0, 1), (1, 0))]
        first = torch.stack((at(0, 0), *corner, last), 2)
    mirror = -(first // width) % height * width + -(first % width) % width
    frequencies = torch.stack((first, torch.where((first >= 0) & (mirror != first), mirror, -1)))
    slots = torch.empty(pixels, dtype=torch.int32)
    for row in frequencies.flatten(1):
        slots[row[row >= 0]] = (row >= 0).nonzero()[:, 0].int()
    tables = *(_halves(basis) for basis in (basis_h, basis_w)), slots, frequencies.int()
    fold_h, fold_w, kinds, v, u = first.shape
    shape = {"HEIGHT": height, "WIDTH": width, "FOLD_H": fold_h, "FOLD_W": fold_w, "REALS": reals}
    shape |= {"KINDS": kinds, "V": v, "U": u, "BLOCK_H": block_h, "BLOCK_W": basis_w.shape[1]}
    return Plan(*(table.to(device) for table in tables), shape)
