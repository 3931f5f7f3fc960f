"""Triton kernels of the view histogram, forward and backward, and their launchers.

Every sum is deterministic: masses are added as 64-bit integers, in any order the same bits, the rest in a fixed order.
Nothing waits for the device; scratch memory is the (K, M, B) masses, or their gradients, and a few numbers per sample.

Designs were compared by counting, for sm_90 and twelve random views, at 256x32x32 and at 2048x4x4; no GPU has measured
one. *One-hot product over flat tiles*, 16 channels x 16 pixels: 147 and 201 instructions per feature, 0.70 and 0.91
atomic additions. *One-hot product over boxes* (kept): 68 and 113, 0.29 and 0.91; boxes meet fewer bins, and the one-hot
matrix is made in registers. *Gather by bin* (reasoned, not compiled): each view reads each feature again from the
cache, 48 bytes and at least 24 instructions per feature, and sorts the positions first. *Float partial sums* instead of
atomics need no peak, one more read of the features, but only the views decide how many windows a box has to hold.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _triton
from . import reference
from .triton_boxes import BLOCK_P, box_extents, memory_order

MOST_BINS, MOST_POSITIONS = 2**20, 2**29
"""Up to here the bins are exact, see ``_bin``."""

PLAN = tl.constexpr(5)  # numbers per view in a plan, see _bin
ROUND = tl.constexpr(1.5 * 2.0**52)  # added to a number, it leaves no room for a fraction: half to even
WINDOW, SLOTS = tl.constexpr(8), tl.constexpr(16)  # bins in a window; windows in a product, for their one-hot rows
ROOT = tl.constexpr(2.0**7)  # (2^7)² is below the largest float16


# --- The plan: the integer rule of ``reference.view_bins``, held in float64, where integers are exact below 2^53.
@triton.jit(do_not_specialize=["C", "H", "W", "M"])
def view_histogram_plan_kernel(
    views_ptr,  # (K, 3)
    plan_ptr,  # (K, 5) float64, written
    views_stride_k, views_stride_i,
    K, C, H, W, M,
    BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
) -> None:  # fmt: skip
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
    quantised = (ratio * 1073741824.0 + ROUND) - ROUND
    origin = -tl.sum(tl.minimum(quantised, 0) * last, 1)
    intervals = tl.sum(tl.abs(quantised) * last, 1) + 1
    plan = plan_ptr + k * PLAN
    tl.store(plan[:, None] + axis, quantised * M, (k < K)[:, None] & (axis < 3))
    tl.store(plan + 3, origin * M + (0.5 - 0.5 * intervals), k < K)
    tl.store(plan + 4, 1 / intervals, k < K)


@triton.jit
def _bin(scaled, inverse):
    """``T·M // D`` for ``D = T_max + 1``, exactly, without a division, of ``scaled = T·M + 0.5 - D/2``.

    ``(T·M + 0.5) / D - 0.5`` is nearest to the wanted floor, by at least ``0.5/D``. ``scaled`` is exact with M <= 2^20
    and at most 2^29 positions, so ``D <= 2^30 + 2^28 + 1``; its product with the rounded ``1/D``, fused with the sum or
    not, has an error below ``2·2^-53·M``, less than ``0.5/D``. A plan holds the three ``q·M``, ``scaled`` at the
    origin, ``1/D``. The sum with ``ROUND`` has the bin in its lowest bits.
    """
    return (scaled * inverse + ROUND).to(tl.int64, bitcast=True).to(tl.int32)


# --- Boxes of a sample: BOX_S x BOX_V x BOX_F near positions, which meet few bins in a view. The axes are taken as they
# lie in memory, slow, middle, fast: (c, h, w), or (h, w, c) where channels are fast.
@triton.jit
def _corner(box, V, F, BOX_S: tl.constexpr, BOX_V: tl.constexpr, BOX_F: tl.constexpr):
    across_f, across_v = (F + BOX_F - 1) // BOX_F, (V + BOX_V - 1) // BOX_V
    return box // across_f // across_v * BOX_S, box // across_f % across_v * BOX_V, box % across_f * BOX_F


@triton.jit
def _view(plan, CHANNELS_FAST: tl.constexpr):
    """Of the views with these plans: the steps along the three axes, the origin and the inverse."""
    c, h, w = tl.load(plan), tl.load(plan + 1), tl.load(plan + 2)
    if CHANNELS_FAST:
        return h, w, c, tl.load(plan + 3), tl.load(plan + 4)
    return c, h, w, tl.load(plan + 3), tl.load(plan + 4)


@triton.jit
def _reach(plan, s0, v0, f0, s1, v1, f1, CHANNELS_FAST: tl.constexpr):
    """The first and the last bin of a box in each view, from its corners, which it includes."""
    step_s, step_v, step_f, scaled, inverse = _view(plan, CHANNELS_FAST)
    scaled += step_s * s0 + step_v * v0 + step_f * f0
    step_s, step_v, step_f = step_s * (s1 - s0), step_v * (v1 - v0), step_f * (f1 - f0)
    bottom = scaled + tl.minimum(step_s, 0) + tl.minimum(step_v, 0) + tl.minimum(step_f, 0)
    top = scaled + tl.maximum(step_s, 0) + tl.maximum(step_v, 0) + tl.maximum(step_f, 0)
    return _bin(bottom, inverse), _bin(top, inverse)


@triton.jit
def _scale(peak):
    """``2^-e`` in float64 for the smallest e with ``peak < 2^e``; at most what float32 can hold."""
    biased = tl.maximum(peak.to(tl.float64).to(tl.int64, bitcast=True) >> 52, 1023 - 120)
    return ((2045 - biased) << 52).to(tl.float64, bitcast=True)


# --- Forward. With y = (x / 2^e)² < 1, the mass of bin j under view k is Σ_p [bin_k(p) = j]·y[p], the product of a
# one-hot matrix (bins x positions) and the squares (positions x samples). A box meets few bins in a view: they are cut
# into windows of 8, the windows of all views are numbered, and the rows of the matrix are 2·16 of these. It is made in
# the layout of the product's accumulator, which is the one of the next product's first factor: a product with the
# matrix that picks a row's window gives d = bin - window's first, and max(0, 1 - (d - row)²) is 1 or 0. y enters as a
# pair of float16, y·2^14 = hi + lo: relative error 2^-23, absolute error 2^-39 of the largest square. The sums leave as
# integers, in units of ``1 / fine``.
@triton.jit
def _window(slot, ends, first, last, BLOCK_K: tl.constexpr):
    """View, first bin and number of bins of the windows so numbered, where those of view k end at ``ends[k]``."""
    k = tl.arange(0, BLOCK_K)[None, :]
    passed = ends[None, :] <= slot[:, None]  # (slots, views)
    view = tl.sum(passed.to(tl.int32), 1)
    start = tl.max(tl.where(passed, ends[None, :], 0), 1)
    own = k == view[:, None]
    bins = tl.sum(tl.where(own, first[None, :], 0), 1) + (slot - start) * WINDOW
    size = tl.sum(tl.where(own, last[None, :] + 1, 0), 1) - bins
    return view, tl.where(view < BLOCK_K, bins, 1 << 30), size  # beyond the last window: no position's bin


@triton.jit
def _add_shares(mass, index, first, high, low):
    """``mass`` (rows, samples) with the squares of these positions, whose bins are ``index`` (slots, positions)."""
    r = tl.arange(0, SLOTS * WINDOW)[:, None]
    pick = (r // WINDOW == tl.arange(0, SLOTS)[None, :]).to(tl.float16)
    near = tl.minimum((index - first[:, None]).to(tl.uint32, bitcast=True), 2 * WINDOW).to(tl.float16)
    apart = tl.dot(pick, near).to(tl.float16) - (r % WINDOW).to(tl.float16)
    apart = 1 - apart * apart
    one_hot = tl.maximum(apart, tl.zeros_like(apart))
    return tl.dot(one_hot, low, tl.dot(one_hot, high, mass))


@triton.jit
def _halves(x):
    """The left and the right half of the columns, both in the registers where they are."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _add_masses(mass_ptr, mass, view, first, size, b0, B, M, fine, BLOCK_B: tl.constexpr):
    """Add (rows, samples) to the masses of their bins, a quarter at a time: fewer addresses to hold."""
    row = tl.arange(0, WINDOW)[None, :]
    at = ((view.to(tl.int64) * M + first) * B)[:, None] + row.to(tl.int64) * B  # (slots, bins)
    at = tl.reshape(tl.where(row < size[:, None], at, -1), (SLOTS * WINDOW,))
    halves = _halves(mass)
    for i in tl.static_range(8):
        part = _halves(_halves(halves[i // 4])[i // 2 % 2])[i % 2]
        part = (part * (fine / (ROOT * ROOT))).to(tl.int64)
        b = b0 + i * (BLOCK_B // 8) + tl.arange(0, BLOCK_B // 8)
        tl.atomic_add(mass_ptr + at[:, None] + b[None, :], part, (at >= 0)[:, None] & (b < B)[None, :], sem="relaxed")


@triton.jit
def view_histogram_forward_kernel(
    x_ptr,  # (B, S, V, F)
    plan_ptr,  # (K, 5) float64
    peak_ptr,  # (B,): max |x|
    mass_ptr,  # (K, M, B) int64, zeros; added to
    x_stride_b, x_stride_s, x_stride_v, x_stride_f,
    B, S, V, F, M, fine,
    K: tl.constexpr, CHANNELS_FAST: tl.constexpr, VECTOR: tl.constexpr,
    BOX_S: tl.constexpr, BOX_V: tl.constexpr, BOX_F: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    SLAB: tl.constexpr = BLOCK_P // (BOX_V * BOX_F)  # the box is passed through in slabs of so many slow ones
    F = F // VECTOR * VECTOR  # no change: the launcher checks, and the compiler sees
    x_stride_s, x_stride_v = x_stride_s // VECTOR * VECTOR, x_stride_v // VECTOR * VECTOR
    s0, v0, f0 = _corner(tl.program_id(0), V, F, BOX_S, BOX_V, BOX_F)
    ends_s, ends_v, ends_f = tl.minimum(s0 + BOX_S, S) - 1, tl.minimum(v0 + BOX_V, V) - 1, tl.minimum(f0 + BOX_F, F) - 1
    k = tl.arange(0, BLOCK_K)
    bottom, top = _reach(plan_ptr + tl.minimum(k, K - 1) * PLAN, s0, v0, f0, ends_s, ends_v, ends_f, CHANNELS_FAST)
    ends = tl.cumsum(tl.where(k < K, (top - bottom) // WINDOW + 1, 0), 0)
    windows = tl.max(ends, 0)

    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    p = tl.arange(0, BLOCK_P)
    s, v, f = s0 + p // (BOX_V * BOX_F), v0 + p // BOX_F % BOX_V, f0 + p % BOX_F
    at = s.to(tl.int64) * x_stride_s + v.to(tl.int64) * x_stride_v + f.to(tl.int64) * x_stride_f
    at = at[:, None] + b.to(tl.int64)[None, :] * x_stride_b
    inside = ((v < V) & (f < F))[:, None] & (b < B)[None, :]
    scale = _scale(tl.load(peak_ptr + b, b < B, 0)).to(tl.float32)[None, :] * ROOT
    slot = tl.arange(0, SLOTS)
    while windows > 0:
        view, first, size = _window(slot, ends, bottom, top, BLOCK_K)
        step_s, step_v, step_f, scaled, inverse = _view(plan_ptr + tl.minimum(view, K - 1) * PLAN, CHANNELS_FAST)
        scaled = scaled[:, None] + step_s[:, None] * s + step_v[:, None] * v + step_f[:, None] * f
        mass = tl.zeros((SLOTS * WINDOW, BLOCK_B), tl.float32)
        for i in range(BOX_S // SLAB):
            left = S - i * SLAB
            x = tl.load(x_ptr + i * (SLAB * x_stride_s.to(tl.int64)) + at, inside & (s < left)[:, None], 0)
            y = x.to(tl.float32) * scale
            y *= y
            high = y.to(tl.float16)
            low = (y - high.to(tl.float32)).to(tl.float16)
            index = _bin(scaled, inverse[:, None])
            mass = _add_shares(mass, index, first, high, low)
            scaled += (step_s * SLAB)[:, None]
        _add_masses(mass_ptr, mass, view, first, size, tl.program_id(1) * BLOCK_B, B, M, fine, BLOCK_B)
        slot += SLOTS
        windows -= SLOTS


@triton.jit
def view_histogram_normalise_kernel(
    mass_ptr,  # (K, M, B) int64
    peak_ptr,  # (B,)
    attention_ptr,  # (B, K, M), written
    energy_ptr,  # (B,) float64, written
    B, K, M, fine,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
) -> None:  # fmt: skip
    """Each row by its own sum."""
    k = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mass_ptr += k * M * B
    total = tl.zeros((BLOCK_M, BLOCK_B), tl.int64)
    begin = 0
    while begin < M:
        m = begin + tl.arange(0, BLOCK_M)
        total += tl.load(mass_ptr + m.to(tl.int64)[:, None] * B + b[None, :], (m < M)[:, None] & (b < B)[None, :], 0)
        begin += BLOCK_M
    total = tl.sum(total, 0).to(tl.float64)
    peak = tl.load(peak_ptr + b, b < B, 0)
    scale, square = _scale(peak), peak.to(tl.float64) * peak.to(tl.float64)
    energy = tl.where(square < float("inf"), total / fine / scale / scale, square)  # NaN and overflow stay visible
    if k == 0:
        tl.store(energy_ptr + b, energy, b < B)
    share = tl.where(energy > 0, 1 / tl.maximum(total, 1), 0)
    share = tl.where(energy < float("inf"), share, float("nan"))
    attention_ptr += (b.to(tl.int64) * K + k)[:, None] * M
    begin = 0
    while begin < M:
        m = begin + tl.arange(0, BLOCK_M)
        inside = (b < B)[:, None] & (m < M)[None, :]
        mass = tl.load(mass_ptr + m.to(tl.int64)[None, :] * B + b[:, None], inside, 0).to(tl.float64)
        tl.store(attention_ptr + m[None, :], (mass * share[:, None]).to(attention_ptr.dtype.element_ty), inside)
        begin += BLOCK_M


# --- Backward: dL/dx[p] = (2 x[p] / energy) · Σ_k t[k, bin_k(p)], where t[k, j] = g[k, j] - Σ_i g[k, i]·a[k, i].
@triton.jit
def view_histogram_backward_kernel(
    x_ptr,  # (B, S, V, F)
    plan_ptr,  # (K, 5) float64
    table_ptr,  # (K, M, B): samples side by side
    energy_ptr,  # (B,) float64
    out_ptr,  # (B, S, V, F), written
    x_stride_b, x_stride_s, x_stride_v, x_stride_f,
    out_stride_b, out_stride_s, out_stride_v, out_stride_f,
    table_stride_k, energy_stride_b,
    B, S, V, F,
    K: tl.constexpr, CHANNELS_FAST: tl.constexpr, VECTOR: tl.constexpr,
    BOX_S: tl.constexpr, BOX_V: tl.constexpr, BOX_F: tl.constexpr, BLOCK_B: tl.constexpr,
) -> None:  # fmt: skip
    F = F // VECTOR * VECTOR
    x_stride_s, x_stride_v = x_stride_s // VECTOR * VECTOR, x_stride_v // VECTOR * VECTOR
    out_stride_s, out_stride_v = out_stride_s // VECTOR * VECTOR, out_stride_v // VECTOR * VECTOR
    s, v, f = _corner(tl.program_id(0), V, F, BOX_S, BOX_V, BOX_F)
    p = tl.arange(0, BOX_S * BOX_V * BOX_F)
    s, v, f = s + p // (BOX_V * BOX_F), v + p // BOX_F % BOX_V, f + p % BOX_F
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = ((s < S) & (v < V) & (f < F))[:, None] & (b < B)[None, :]
    total = tl.full((BOX_S * BOX_V * BOX_F, BLOCK_B), 0, table_ptr.dtype.element_ty)
    for _ in range(K):
        step_s, step_v, step_f, origin, inverse = _view(plan_ptr, CHANNELS_FAST)
        index = _bin(origin + step_s * s + step_v * v + step_f * f, inverse).to(tl.int64)
        total += tl.load(table_ptr + (index * B)[:, None] + b[None, :], inside, 0)
        plan_ptr += PLAN
        table_ptr += table_stride_k
    s, v, f, n = s.to(tl.int64), v.to(tl.int64), f.to(tl.int64), b.to(tl.int64)
    at = (s * x_stride_s + v * x_stride_v + f * x_stride_f)[:, None] + (n * x_stride_b)[None, :]
    energy = tl.load(energy_ptr + n * energy_stride_b, b < B, 0)
    scale = tl.where(energy == 0, 0, 2 / tl.where(energy == 0, 1, energy))[None, :]
    scaled = tl.load(x_ptr + at, inside, 0).to(tl.float64) * scale
    at = (s * out_stride_s + v * out_stride_v + f * out_stride_f)[:, None] + (n * out_stride_b)[None, :]
    tl.store(out_ptr + at, (scaled.to(total.dtype) * total).to(out_ptr.dtype.element_ty), inside)


def _plan(views: Tensor, grid: torch.Size, bins: int, coordinates: str) -> Tensor:
    """Of every view, (K, 5) float64."""
    plan = views.new_empty((len(views), PLAN.value), dtype=torch.float64)
    _triton.launch(
        view_histogram_plan_kernel, (triton.cdiv(len(views), 16),),
        views, plan, *views.stride(), len(views), *grid, bins,
        BLOCK_K=16, UNIT=coordinates == "unit", enable_fp_fusion=False,
    )  # fmt: skip
    return plan


def _tiles(
    features: Tensor, bins: int, most_positions: int, samples: int, *others: Tensor
) -> tuple[tuple[int, int], list[int], dict[str, Any]]:
    """The launch grid, strides and sizes in the order of the kernels' arguments, and the constants of a box."""
    batch, axes = len(features), memory_order(features)
    box = box_extents(tuple(features.shape[1:]), axes, bins, most_positions)
    sizes = [features.shape[axis] for axis in axes]
    strides = [[x.stride(0), *(x.stride(axis) for axis in axes)] for x in (features, *others)]
    vector = 16 // features.element_size()
    aligned = [sizes[2], *(step for x in strides for step in x[1:3])]
    vector = math.gcd(vector, *aligned) if all(x[3] == 1 for x in strides) else 1
    block_b = min(max(triton.next_power_of_2(batch), 16), samples)
    grid = math.prod(triton.cdiv(size, extent) for size, extent in zip(sizes, box, strict=True))
    constants = {"CHANNELS_FAST": axes[2] == 1, "VECTOR": vector, "BLOCK_B": block_b}
    constants |= dict(zip(("BOX_S", "BOX_V", "BOX_F"), box, strict=True))
    return (grid, triton.cdiv(batch, block_b)), [*(step for x in strides for step in x), batch, *sizes], constants


def view_histogram(features: Tensor, views: Tensor, bins: int, coordinates: str) -> tuple[Tensor, Tensor]:
    """See ``reference.view_histogram``."""
    if features.dtype == torch.float64:
        return reference.view_histogram(features, views, bins, coordinates)
    batch, count = len(features), len(views)
    attention = features.new_empty((batch, count, bins), dtype=torch.float32)
    energy = features.new_empty((batch,), dtype=torch.float64)
    if batch == 0:
        return attention, energy
    plan = _plan(views, features.shape[1:], bins, coordinates)
    peak = torch.linalg.vector_norm(features, torch.inf, (1, 2, 3))
    mass = torch.zeros((count, bins, batch), dtype=torch.int64, device=features.device)
    fine = 2.0 ** (62 - features[0].numel().bit_length())  # all squares of a sample together stay below 2^62
    grid, layout, constants = _tiles(features, bins, 1024, 64)
    _triton.launch(
        view_histogram_forward_kernel, grid, features, plan, peak, mass, *layout, bins, fine,
        K=count, BLOCK_K=triton.next_power_of_2(count), BLOCK_P=BLOCK_P, num_warps=8, num_stages=2,
        **constants,
    )  # fmt: skip
    _triton.launch(
        view_histogram_normalise_kernel, (count, triton.cdiv(batch, 8)),
        mass, peak, attention, energy, batch, count, bins, fine,
        BLOCK_M=min(triton.next_power_of_2(bins), 256), BLOCK_B=8, num_warps=8,
    )  # fmt: skip
    return attention, energy


def view_histogram_backward(
    grad: Tensor, features: Tensor, views: Tensor, attention: Tensor, energy: Tensor, coordinates: str
) -> Tensor:
    """See ``reference.view_histogram_backward``."""
    if features.dtype == torch.float64:
        return reference.view_histogram_backward(grad, features, views, attention, energy, coordinates)
    out = torch.empty_like(features)
    batch, count, bins = attention.shape
    if batch == 0:
        return out
    plan = _plan(views, features.shape[1:], bins, coordinates)
    mean = (grad * attention).sum(2).mT[:, None]  # (K, 1, B)
    table = torch.sub(grad.permute(1, 2, 0), mean, out=attention.new_empty((count, bins, batch)))
    grid, layout, constants = _tiles(features, bins, 128, 32, out)
    strides, sizes = layout[:8], layout[8:]
    _triton.launch(
        view_histogram_backward_kernel, grid,
        features, plan, table, energy, out, *strides, table.stride(0), energy.stride(0),
        *sizes, K=count, num_warps=8, **constants,
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
for _name in ("contrastive_loss", "contrastive_loss_backward"):  # a small part of the work, and torch has it on the GPU
    _dispatch.implement(_name, "triton", getattr(reference, _name), _triton.not_on_gpu)
