"""Projecting and sorting on the GPU: the only file of the room that needs Triton.

Up to ``FUSED`` points one kernel projects and sorts a tile of directions without leaving the chip. Above, it does not
pay to read the points again for every few rows that fit: project a few samples, sort them while they lie in the
second-level cache, go on. A float64 key leaves no room for its index: the reference answers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _triton
from .._checks import accumulation
from . import reference

FUSED = 256
"""Points that are sorted inside the projecting kernel; for longer rows the sort spills and takes minutes to compile."""
CHUNK = 2**21
"""Keys sorted at once above that: 4 + 4 + 8 bytes each (projected, sorted, torch's order) fit the cache from 40 MB."""
SCATTERED = 1024
"""Elements that one program puts back into place."""


@triton.jit
def _project_kernel(
    matrix_ptr,  # (I, L), any strides
    x_ptr,  # (B, L, J), any strides
    out_ptr,  # (B, I, J), any strides, float32
    order_ptr,  # (B, I, J) of the same strides, an integer; None: do not sort
    matrix_stride_i, matrix_stride_l,
    x_stride_b, x_stride_l, x_stride_j,
    out_stride_b, out_stride_i, out_stride_j,
    rows, columns,
    LENGTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``out[b] = matrix @ x[b]``; with ``order``, each row sorted, and the column that every value came from.

    Float32 by three products of tf32 halves (hi·hi + hi·lo + lo·hi), exact to about 2⁻²²; a tile of ``x`` is read by
    neighbouring programs. A row sorts as 64-bit integers ``key << 32 | column``: flipping the lower bits of a negative
    float makes its pattern ascend as a signed integer does, equal values keep their order by the column, and no two
    are equal, so that the sorting network need not be stable.
    """
    tiles_i, tiles_j = tl.cdiv(rows, BLOCK_I), tl.cdiv(columns, BLOCK_J)
    program = tl.program_id(0)
    batch = (program // (tiles_i * tiles_j)).to(tl.int64)
    row = (program % tiles_i).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)[:, None]  # (I, 1)
    column = (program // tiles_i % tiles_j).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]  # (1, J)
    step = tl.arange(0, BLOCK_L).to(tl.int64)
    matrix = matrix_ptr + row * matrix_stride_i + step[None, :] * matrix_stride_l  # (I, L)
    x = x_ptr + batch * x_stride_b + step[:, None] * x_stride_l + column * x_stride_j  # (L, J)
    values = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for start in range(0, LENGTH, BLOCK_L):
        left = tl.load(matrix, (row < rows) & (start + step[None, :] < LENGTH), 0).to(tl.float32)
        right = tl.load(x, (start + step[:, None] < LENGTH) & (column < columns), 0).to(tl.float32)
        values = tl.dot(left, right, values, input_precision="tf32x3")
        matrix += BLOCK_L * matrix_stride_l
        x += BLOCK_L * x_stride_l
    if order_ptr is not None:
        bits = values.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = tl.where(values == 0, 0, key)  # both zeros are equal
        key = tl.where(values != values, 0x7FC00000, key)  # every NaN comes after infinity
        key = tl.where(column < columns, key, 0x7FFFFFFF)
        packed = tl.sort((key.to(tl.int64) << 32) | column)
        key = (packed >> 32).to(tl.int32)
        values = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    out = batch * out_stride_b + row * out_stride_i + column * out_stride_j
    mask = (row < rows) & (column < columns)
    tl.store(out_ptr + out, values, mask)
    if order_ptr is not None:
        tl.store(order_ptr + out, packed & 0xFFFFFFFF, mask)


@triton.jit
def _scatter_kernel(
    values_ptr,  # (R, N) contiguous, float32
    order_ptr,  # (R, N) contiguous, a permutation of 0 … N-1 in each row
    out_ptr,  # (R, N) contiguous, float32
    rows, columns,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out[r, order[r, n]] = values[r, n]``: every element is written once, so the result is deterministic."""
    tiles = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]  # (R, 1)
    column = (program % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    mask = (row < rows) & (column < columns)
    first = row * columns
    order = tl.load(order_ptr + first + column, mask, 0).to(tl.int64)
    tl.store(out_ptr + first + order, tl.load(values_ptr + first + column, mask, 0), mask)


def _project(matrix: Tensor, x: Tensor, out: Tensor, order: Tensor | None = None) -> None:
    """Fill ``out (B, I, J) = matrix (I, L) @ x (B, L, J)``; with ``order (B, I, J)``, each row sorted."""
    if out.numel() == 0:
        return
    batch, length, columns = x.shape
    rows = matrix.shape[0]
    block_i, block_j = (64, 64) if order is None else (16, max(16, triton.next_power_of_2(columns)))
    block_l = min(32, max(16, triton.next_power_of_2(length)))
    grid = (batch * triton.cdiv(rows, block_i) * triton.cdiv(columns, block_j),)
    strides = *matrix.stride(), *x.stride(), *out.stride()
    blocks = {"BLOCK_I": block_i, "BLOCK_J": block_j, "BLOCK_L": block_l}
    warps = max(4, block_j // 32)
    _triton.launch(
        _project_kernel, grid, matrix, x, out, order, *strides, rows, columns, LENGTH=length, **blocks, num_warps=warps
    )


def project_and_sort(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.project_and_sort``."""
    if accumulation(points, projections) == torch.float64:
        return reference.project_and_sort(points, projections)
    matrix, points = projections.t(), points.mT
    batch, _, number_of_points = points.shape
    values = points.new_empty((batch, matrix.shape[0], number_of_points), dtype=torch.float32)
    order = torch.empty_like(values, dtype=reference.permutation_dtype(number_of_points))
    if number_of_points <= FUSED:
        _project(matrix, points, values, order)
        return values, order
    samples = max(1, CHUNK // (matrix.shape[0] * number_of_points))
    for some, target, narrow in zip(*(x.split(samples) for x in (points, values, order)), strict=True):
        projected, wide = torch.empty_like(target), torch.empty_like(target, dtype=torch.int64)
        _project(matrix, some, projected)
        torch.sort(projected, dim=2, stable=True, out=(target, wide))
        narrow.copy_(wide)
    return values, order


def project_and_sort_backward(grad: Tensor, permutation: Tensor, projections: Tensor) -> Tensor:
    """See ``reference.project_and_sort_backward``."""
    if accumulation(grad, projections) == torch.float64:
        return reference.project_and_sort_backward(grad, permutation, projections)
    grad, permutation = grad.contiguous(), permutation.contiguous()
    batch, rows, columns = grad.shape
    unsorted = torch.empty_like(grad)
    gradient = grad.new_empty((batch, columns, projections.shape[0]))
    if grad.numel():
        block_n = min(SCATTERED, triton.next_power_of_2(columns))
        block_r = SCATTERED // block_n
        grid = (triton.cdiv(batch * rows, block_r) * triton.cdiv(columns, block_n),)
        blocks = {"BLOCK_R": block_r, "BLOCK_N": block_n}
        _triton.launch(_scatter_kernel, grid, grad, permutation, unsorted, batch * rows, columns, **blocks, num_warps=4)
    _project(projections, unsorted, gradient.mT)
    return gradient


_dispatch.implement("project_and_sort", "triton", project_and_sort, _triton.not_on_gpu)
_dispatch.implement("project_and_sort_backward", "triton", project_and_sort_backward, _triton.not_on_gpu)
