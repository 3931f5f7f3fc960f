"""What the Triton kernels know of a map before they see one: real Fourier bases, and which frequency is where.

The words are those of the README in this directory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

WHOLE = 64
"""Pixels up to which one product with the basis of the whole map costs no more than two with padded sides."""
EXPONENT = {"forward": -1.0, "ortho": -0.5, "backward": 0.0}


class Tables(NamedTuple):
    """For maps of one size; float32 bases as ``[tf32 numbers | the rest]``. Of a whole map, ``_h`` repeats ``_w``."""

    analysis_h: Tensor  # (BLOCK_H, 2·BLOCK_H): from pixels, in rows, to cosines and sines, in columns
    analysis_w: Tensor  # (BLOCK_W, 2·BLOCK_W)
    synthesis_h: Tensor  # (BLOCK_H, 2·BLOCK_H): transposed
    synthesis_w: Tensor  # (BLOCK_W, 2·BLOCK_W)
    frequencies: Tensor  # (2, COEFFICIENTS, V, U) int32: a coefficient's frequency u·W + v, and its mirror; -1 for none


def padded(length: int) -> int:
    """What a product of tensor cores can take: a power of two, at least 16."""
    return max(16, 1 << (length - 1).bit_length())


def _mirror(frequency: np.ndarray, height: int, width: int) -> np.ndarray:
    """The frequency u·W + v whose coefficient is the conjugate."""
    return -(frequency // width) % height * width + -(frequency % width) % width


def _basis(height: int, width: int, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """The real Fourier basis of a map, or of a side: a row per pixel, two columns per pair, padded by zeros; float64.

    A pair is the cosine and the sine of one frequency or, of the first ones, the cosines of two that are their own
    mirrors. Also returns the pairs' frequencies ``(N // 2, 2)``: one and its mirror, or two; -1 where there is none.
    """
    size, pixel = padded(height * width), np.arange(height * width)
    mirror = _mirror(pixel, height, width)
    own = pixel[pixel == mirror]
    own = np.append(own, [-1] * (len(own) % 2)).reshape(-1, 2)
    pairs = np.concatenate((own, np.stack((pixel, mirror), 1)[pixel < mirror]))
    pairs = np.pad(pairs, ((0, size // 2 - len(pairs)), (0, 0)), constant_values=-1)
    h, w = (axis[:, None, None] for axis in np.divmod(pixel, width))
    turns = h * (pairs // width) % height * width + w * (pairs % width) % width * height  # in units of 1/(H·W)
    angle = 2 * np.pi / (height * width) * turns
    columns = np.cos(angle)
    columns[:, len(own) :, 1] = np.sin(angle[:, len(own) :, 0])
    basis = np.zeros((size, size))
    basis[: len(pixel)] = np.where(pairs < 0, 0, columns).reshape(len(pixel), size)
    return basis * (height * width) ** EXPONENT[norm], pairs


def _grouped(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows of cosines and sines in turn, as ``count`` cosines, ``count`` sines, …"""
    return rows.reshape(-1, count, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _halves(basis: np.ndarray) -> np.ndarray:
    """(K, N) float64 -> (K, 2·N) float32: the nearest numbers of 10 bits of mantissa, and what is left."""
    high = ((basis.astype(np.float32, order="C").view(np.int32) + 2**12) & -(2**13)).view(np.float32)
    return np.ascontiguousarray(np.concatenate((high, (basis - high).astype(np.float32)), 1))


def _arrays(height: int, width: int, norm: str) -> list[np.ndarray]:
    """``Tables`` as arrays. The order of rows and columns is that of ``_apart_both`` and ``_together``."""
    if height * width <= WHOLE:
        basis, pairs = _basis(height, width, norm)
        bases = [basis, basis, _grouped(basis.T, 4), _grouped(basis.T, 4)]
        real = pairs[:, 0] == _mirror(pairs[:, 0], height, width)
        first = np.stack((pairs[:, 0], np.where(real, pairs[:, 1], -1)))[:, None]
    else:
        (basis_h, pairs_h), (basis_w, pairs_w) = _basis(1, height, norm), _basis(1, width, norm)
        transposed_w = _grouped(basis_w.T, 8)
        bases = [basis_h, transposed_w.T, _grouped(basis_h.T, 4), transposed_w]
        u, v = pairs_h.T[:, None, :], pairs_w.T[:, :, None]  # (2, 1, U), (2, V, 1)
        sine_h, sine_w = 2 * u[0] % height != 0, 2 * v[0] % width != 0
        # Frequencies of (u₀, v₀), (u₀, v₁), (u₁, v₀) and (u₁, v₁); whose coefficients these are, ``_spectrum`` says.
        a, b, c, d = (np.where((u[i] >= 0) & (v[j] >= 0), u[i] * width + v[j], -1) for i in (0, 1) for j in (0, 1))
        corner = ~(sine_h | sine_w)
        first = np.stack(
            (a, np.where(corner, b, -1), np.where(corner, c, -1), np.where(sine_h, b, np.where(sine_w, c, d)))
        )
    mirror = _mirror(first, height, width)
    frequencies = np.stack((first, np.where((first >= 0) & (mirror != first), mirror, -1)))
    return [*(_halves(basis) for basis in bases), frequencies.astype(np.int32)]


_built: dict[tuple[Any, ...], Tables] = {}  # never emptied: a captured CUDA graph goes on reading its tables
_lock = Lock()


def _build(*key: Any) -> Tables:
    with _lock:
        if key not in _built:
            _built[key] = Tables(*(torch.from_numpy(array).to(key[-1]) for array in _arrays(*key[:-1])))
    return _built[key]


def tables(height: int, width: int, norm: str, device: torch.device) -> Tables:
    """The tables for maps of one size, built once, which every caller shares.

    Raises:
        RuntimeError: they are not built yet, and a CUDA graph is being captured.
    """
    key = (height, width, norm, device)
    if key in _built:
        return _built[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"spectral_distance: the first call for maps of {height}×{width} copies tables to the GPU, and cannot while"
            " a CUDA graph is captured; call it once before the capture"
        )
    with ThreadPoolExecutor(1) as pool:  # where the caller's default device, modes and memory pools do not reach
        return pool.submit(_build, *key).result()
