"""Triton kernels of the view histogram, forward and backward, and their launchers.

Every sum is deterministic: masses are added as 64-bit integers, in any order the same bits, the rest in a fixed order.
Nothing waits for the device; scratch memory is the (K, M, B) masses, or their gradients, and a few numbers per sample.

What was weighed, statically, without a GPU to measure on. *One-hot product* (kept): 16 samples or more share the bins
of a tile, and tensor cores add the squares of 256 positions into 16 neighbouring bins per product. *Gather by bin*:
every view reads each feature again from the cache, K reads instead of one. *Prefix sums and differences*: a sort order
per tile and view, and several vector instructions per position, sample and view. *Float partial sums* per split of the
positions: K·M·B numbers for each split exceed the features themselves where H·W is small, so masses go to 64-bit
integer atomics instead; the peak of each sample, which gives them a common scale, costs one more read of the features.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _triton
from .._checks import accumulation

MOST_BINS, MOST_POSITIONS = 2**20, 2**29
"""Up to here the bins are exact, see ``_bin``."""

PLAN = tl.constexpr(5)  # numbers per view in a plan, see _bin
WINDOW = tl.constexpr(16)  # bins per view and product: the rows of one tensor-core instruction
FULL = tl.constexpr(2.0**15)  # float16 holds numbers below it
SLICES, SLICE_BITS, DIGITS = tl.constexpr(6), tl.constexpr(11), tl.constexpr(2047)  # 11 bits are exact in float16


# --- The plan: the integer rule of ``reference.view_bins``, held in float64, where integers are exact below 2^53.
@triton.jit(do_not_specialize=["C", "H", "W", "M"])
def _plan_kernel(
    views_ptr,  # (K, 3)
    plan_ptr,  # (K, 5) float64, written
    views_stride_k, views_stride_i,
    K, C, H, W, M,
    BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Launched without fused multiply-adds: each operation rounds as the reference's does."""
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    axis = tl.arange(0, 4)[None, :]  # the fourth column is for the origin
    view = views_ptr + k[:, None] * views_stride_k + axis * views_stride_i
    step = tl.load(view, (k < K)[:, None] & (axis < 3), 0).to(tl.float64)  # (K, 4)
    last = tl.where(axis == 0, C, tl.where(axis == 1, H, W)) - 1
    if UNIT:
        step = tl.where(last > 0, 2 * step / tl.maximum(last, 1), 0)
    reach = tl.abs(step) * last
    extent = tl.sum(tl.where(axis < 2, reach, 0), 1) + tl.sum(tl.where(axis == 2, reach, 0), 1)  # c + h, then w
    ratio = step / tl.where(extent > 0, extent, 1)[:, None]
    # 0 where no position moves along the axis, or the view is not finite
    ratio = tl.where((extent > 0)[:, None] & (last > 0) & (tl.abs(ratio) <= 1), ratio, 0)
    magic = 6755399441055744.0  # 1.5 * 2^52: the sum has no room for a fraction and rounds it half to even
    quantised = (ratio * 1073741824.0 + magic) - magic
    origin = -tl.sum(tl.minimum(quantised, 0) * last, 1)
    inverse = 1 / (tl.sum(tl.abs(quantised) * last, 1) + 1)
    plan = plan_ptr + k * PLAN
    tl.store(plan[:, None] + axis, tl.where(axis < 3, quantised, origin[:, None]) * M, (k < K)[:, None])
    tl.store(plan + 4, inverse, k < K)


@triton.jit
def _bin(view, c, h, w):
    """``T·M // D`` for ``D = T_max + 1``, exactly, without a 64-bit division.

    ``(T·M + 0.5) / D`` has the wanted floor and is at least ``0.5/D`` away from every integer. ``T·M + 0.5`` is exact
    with M <= 2^20 and at most 2^29 positions, so ``D <= 2^30 + 2^28 + 1``, fused or not; its product with the rounded
    ``1/D`` has an error below ``2·2^-53·M``, less than ``0.5/D``. A plan holds ``q·M``, ``T·M`` at the origin, ``1/D``.
    """
    scaled = tl.load(view + 3) + tl.load(view) * c + tl.load(view + 1) * h + tl.load(view + 2) * w
    return ((scaled + 0.5) * tl.load(view + 4)).to(tl.int32)


# --- Tiles of a sample: BLOCK_C channels x BLOCK_S pixels, s = h·W + w, in the order of the memory.
@triton.jit
def _positions(tile, HW, CHANNELS_FAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Channel and pixel of each of the BLOCK_C·BLOCK_S positions of a tile."""
    across = (HW + BLOCK_S - 1) // BLOCK_S
    c0, s0 = tile // across * BLOCK_C, tile % across * BLOCK_S
    p = tl.arange(0, BLOCK_C * BLOCK_S)
    if CHANNELS_FAST:
        return c0 + p % BLOCK_C, s0 + p // BLOCK_C
    return c0 + p // BLOCK_S, s0 + p % BLOCK_S


@triton.jit
def _offsets(c, s, b, W, stride_b, stride_c, stride_h, stride_w, FLAT: tl.constexpr):
    """Where the elements lie, (positions, samples); FLAT says that pixels are evenly spaced, ``stride_w`` apart."""
    if FLAT:
        at = c.to(tl.int64) * stride_c + s.to(tl.int64) * stride_w
    else:
        at = c.to(tl.int64) * stride_c + (s // W).to(tl.int64) * stride_h + (s % W).to(tl.int64) * stride_w
    return at[:, None] + b.to(tl.int64)[None, :] * stride_b


@triton.jit
def _scale(peak):
    """``2^-e`` in float64 for the smallest e with ``peak < 2^e``; below float64, at most what float32 can hold."""
    biased = peak.to(tl.float64).to(tl.int64, bitcast=True) >> 52
    if peak.dtype != tl.float64:
        biased = tl.maximum(biased, 1023 - 127)
    return ((2045 - biased) << 52).to(tl.float64, bitcast=True)


# --- Forward. With y = (x / 2^e)² < 1, the mass of bin j under view k is Σ_p [bin_k(p) = j]·y[p], the product of a
# one-hot matrix (bins x positions) and the squares (positions x samples). A tile of near positions meets few bins in a
# view; the matrix has a window of 16 bins per view, moved on until it has passed the last one. y enters as a pair of
# float16, y·2^15 = hi + lo: relative error 2^-23, absolute error 2^-40 of the largest square. float64 enters as fixed
# point, in slices whose sums are exact. The sums leave as integers, in units of ``1 / fine``.
@triton.jit
def _histogram_kernel(
    x_ptr,  # (B, C, H, W)
    plan_ptr,  # (K, 5) float64
    peak_ptr,  # (B,): max |x|
    mass_ptr,  # (K, M, B) int64, zeros; added to
    total_ptr,  # (B,) int64, zeros; added to
    x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    B, C, H, W, M, fine,
    K: tl.constexpr, FLAT: tl.constexpr, CHANNELS_FAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = x_ptr.dtype.element_ty == tl.float64
    c, s = _positions(tl.program_id(0), H * W, CHANNELS_FAST, BLOCK_C, BLOCK_S)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    at = _offsets(c, s, b, W, x_stride_b, x_stride_c, x_stride_h, x_stride_w, FLAT)
    x = tl.load(x_ptr + at, ((c < C) & (s < H * W))[:, None] & (b < B)[None, :], 0)
    scale = _scale(tl.load(peak_ptr + b, b < B, 0))[None, :]
    y = x * scale if WIDE else x.to(tl.float32) * scale.to(tl.float32)
    y *= y
    fixed = (y * fine + 0.5).to(tl.int64)
    high = (y * FULL).to(tl.float16)
    low = (y * FULL - high.to(y.dtype)).to(tl.float16)
    tl.atomic_add(total_ptr + b, tl.sum(fixed, 0), b < B, sem="relaxed")

    c, s = tl.minimum(c, C - 1)[None, :], tl.minimum(s, H * W - 1)[None, :]  # beyond the edge x is 0: in any bin
    row = tl.arange(0, WINDOW)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        view = plan_ptr + tl.minimum(k, K - 1) * PLAN
        index = _bin(view[:, None], c, s // W, s % W)  # (views, positions)
        first, last = tl.min(index, 1), tl.max(index, 1)
        ahead = tl.max(last - first, 0)
        while ahead >= 0:
            bins = first[:, None] + row[None, :]  # (views, 16)
            one_hot = (index[:, None, :] == bins[:, :, None]).to(tl.float16)
            one_hot = tl.reshape(one_hot, (BLOCK_K * WINDOW, BLOCK_C * BLOCK_S))
            if WIDE:
                mass = tl.full((BLOCK_K * WINDOW, BLOCK_B), 0, tl.int64)
                for i in tl.static_range(SLICES):
                    digits = (fixed >> (i * SLICE_BITS)) & DIGITS
                    mass += tl.dot(one_hot, digits.to(tl.float16)).to(tl.int64) << (i * SLICE_BITS)
            else:
                mass = (tl.dot(one_hot, low, tl.dot(one_hot, high)) * (fine / FULL)).to(tl.int64)
            target = tl.reshape((k.to(tl.int64)[:, None] * M + bins) * B, (BLOCK_K * WINDOW,))
            met = tl.reshape((bins <= last[:, None]) & (k < K)[:, None], (BLOCK_K * WINDOW,))
            tl.atomic_add(mass_ptr + target[:, None] + b[None, :], mass, met[:, None] & (b < B)[None, :], sem="relaxed")
            first += WINDOW
            ahead -= WINDOW


@triton.jit
def _finish_kernel(
    mass_ptr,  # (K * M, B) int64
    total_ptr,  # (B,) int64
    peak_ptr,  # (B,)
    attention_ptr,  # (B, K * M), written
    energy_ptr,  # (B,) float64, written
    B, rows, fine,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.load(total_ptr + b, b < B, 0).to(tl.float64)
    peak = tl.load(peak_ptr + b, b < B, 0)
    scale, square = _scale(peak), peak.to(tl.float64) * peak.to(tl.float64)
    energy = tl.where(square < float("inf"), total / fine / scale / scale, square)  # NaN and overflow stay visible
    if tl.program_id(0) == 0:
        tl.store(energy_ptr + b, energy, b < B)
    inside = (b < B)[:, None] & (m < rows)[None, :]
    mass = tl.load(mass_ptr + m[None, :] * B + b[:, None], inside, 0).to(tl.float64)
    share = tl.where((energy > 0)[:, None], mass / tl.maximum(total, 1)[:, None], 0)
    share = tl.where((energy < float("inf"))[:, None], share, float("nan"))
    attention = attention_ptr + b.to(tl.int64)[:, None] * rows + m[None, :]
    tl.store(attention, share.to(attention_ptr.dtype.element_ty), inside)


# --- Backward: dL/dx[p] = (2 x[p] / energy) · Σ_k t[k, bin_k(p)], where t[k, j] = g[k, j] - Σ_i g[k, i]·a[k, i].
@triton.jit
def _gradient_kernel(
    x_ptr,  # (B, C, H, W)
    plan_ptr,  # (K, 5) float64
    table_ptr,  # (K, M, B): samples side by side
    energy_ptr,  # (B,) float64
    out_ptr,  # (B, C, H, W), written
    x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    out_stride_b, out_stride_c, out_stride_h, out_stride_w,
    table_stride_k, energy_stride_b,
    B, C, H, W,
    K: tl.constexpr, FLAT: tl.constexpr, OUT_FLAT: tl.constexpr, CHANNELS_FAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    c, s = _positions(tl.program_id(0), H * W, CHANNELS_FAST, BLOCK_C, BLOCK_S)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = ((c < C) & (s < H * W))[:, None] & (b < B)[None, :]
    total = tl.full((BLOCK_C * BLOCK_S, BLOCK_B), 0, table_ptr.dtype.element_ty)
    for _ in range(K):
        index = _bin(plan_ptr, c, s // W, s % W).to(tl.int64)
        total += tl.load(table_ptr + (index * B)[:, None] + b[None, :], inside, 0)
        plan_ptr += PLAN
        table_ptr += table_stride_k
    at = _offsets(c, s, b, W, x_stride_b, x_stride_c, x_stride_h, x_stride_w, FLAT)
    energy = tl.load(energy_ptr + b.to(tl.int64) * energy_stride_b, b < B, 0)
    scale = tl.where(energy == 0, 0, 2 / tl.where(energy == 0, 1, energy))[None, :]
    scaled = tl.load(x_ptr + at, inside, 0).to(tl.float64) * scale
    at = _offsets(c, s, b, W, out_stride_b, out_stride_c, out_stride_h, out_stride_w, OUT_FLAT)
    tl.store(out_ptr + at, (scaled.to(total.dtype) * total).to(out_ptr.dtype.element_ty), inside)


def _plan(views: Tensor, grid: torch.Size, bins: int, coordinates: str) -> Tensor:
    """Of every view, (K, 5) float64."""
    plan = views.new_empty((len(views), PLAN.value), dtype=torch.float64)
    _triton.launch(
        _plan_kernel, (triton.cdiv(len(views), 16),), views, plan, *views.stride(), len(views), *grid, bins,
        BLOCK_K=16, UNIT=coordinates == "unit", enable_fp_fusion=False,
    )  # fmt: skip
    return plan


def _strides(features: Tensor) -> tuple[tuple[int, int, int, int], bool]:
    """Strides (B, C, H, W), and whether pixels are evenly spaced; then the last one is their distance."""
    (_, _, height, width), (b, c, h, w) = features.shape, features.stride()
    if width == 1:
        return (b, c, h, h), True
    return (b, c, h, w), height == 1 or h == width * w


def _tiles(features: Tensor, positions: int, samples: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The launch grid and the tile: near 16 channels x 16 pixels, which meet few bins in any view."""
    batch, channels, pixels = *features.shape[:2], features.shape[2] * features.shape[3]
    side = 16 if pixels >= 64 or pixels % 16 == 0 else 8  # 7x7 fits eights better
    block_c = min(triton.next_power_of_2(channels), positions // min(triton.next_power_of_2(pixels), side))
    block_s, block_b = positions // block_c, min(max(triton.next_power_of_2(batch), 16), samples)
    (_, stride_c, _, stride_w), flat = _strides(features)
    tile = {"BLOCK_C": block_c, "BLOCK_S": block_s, "BLOCK_B": block_b}
    grid = triton.cdiv(channels, block_c) * triton.cdiv(pixels, block_s), triton.cdiv(batch, block_b)
    return grid, tile | {"FLAT": flat, "CHANNELS_FAST": stride_c < stride_w}


def view_histogram(features: Tensor, views: Tensor, bins: int, coordinates: str) -> tuple[Tensor, Tensor]:
    batch, count = len(features), len(views)
    attention = features.new_empty((batch, count, bins), dtype=accumulation(features))
    energy = features.new_empty((batch,), dtype=torch.float64)
    if batch == 0:
        return attention, energy
    plan = _plan(views, features.shape[1:], bins, coordinates)
    peak = torch.linalg.vector_norm(features, torch.inf, (1, 2, 3))
    sums = torch.zeros((count * bins + 1, batch), dtype=torch.int64, device=features.device)
    mass, total = sums[:-1], sums[-1]
    fine = 2.0 ** (62 - features[0].numel().bit_length())  # all squares of a sample together stay below 2^62
    wide = features.dtype == torch.float64
    grid, tile = _tiles(features, positions=64 if wide else 256, samples=16 if wide else 64)
    _triton.launch(
        _histogram_kernel, grid, features, plan, peak, mass, total, *_strides(features)[0], *features.shape, bins, fine,
        K=count, BLOCK_K=4, num_warps=8, **tile,
    )  # fmt: skip
    _triton.launch(
        _finish_kernel, (triton.cdiv(count * bins, 64), triton.cdiv(batch, 32)), mass, total, peak, attention, energy,
        batch, count * bins, fine, BLOCK_M=64, BLOCK_B=32,
    )  # fmt: skip
    return attention, energy


def view_histogram_backward(
    grad: Tensor, features: Tensor, views: Tensor, attention: Tensor, energy: Tensor, coordinates: str
) -> Tensor:
    out = torch.empty_like(features)
    batch, count, bins = attention.shape
    if batch == 0:
        return out
    plan = _plan(views, features.shape[1:], bins, coordinates)
    mean = (grad * attention).sum(2).mT[:, None]  # (K, 1, B)
    table = torch.sub(grad.permute(1, 2, 0), mean, out=attention.new_empty((count, bins, batch)))
    out_strides, out_flat = _strides(out)
    grid, tile = _tiles(features, positions=128, samples=32)
    _triton.launch(
        _gradient_kernel, grid, features, plan, table, energy, out, *_strides(features)[0], *out_strides,
        table.stride(0), energy.stride(0), *features.shape, K=count, OUT_FLAT=out_flat, num_warps=8, **tile,
    )  # fmt: skip
    return out


def _unsupported(features: Tensor, views: Tensor, bins: int, coordinates: str) -> str | None:
    if reason := _triton.not_on_gpu(features, views):
        return reason
    if bins > MOST_BINS:
        return f"it takes at most {MOST_BINS} bins, not {bins}"
    positions = features.shape[1:].numel()
    return f"it takes at most {MOST_POSITIONS} positions, not {positions}" if positions > MOST_POSITIONS else None


def _unsupported_backward(
    grad: Tensor, features: Tensor, views: Tensor, attention: Tensor, energy: Tensor, coordinates: str
) -> str | None:
    return _unsupported(features, views, attention.shape[2], coordinates)


_dispatch.implement("view_histogram", "triton", view_histogram, _unsupported)
_dispatch.implement("view_histogram_backward", "triton", view_histogram_backward, _unsupported_backward)
