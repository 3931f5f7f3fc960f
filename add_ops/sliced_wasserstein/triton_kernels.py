"""Projecting and sorting on the GPU: the only file of the room that needs Triton.

One kernel projects. Up to ``SORTED`` points another one sorts every row in the registers of its program; longer rows
are left to torch, a few samples at a time, which are projected and sorted while they lie in the second-level cache.
A float64 key leaves no room for its index: the reference answers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _triton
from .._checks import accumulation
from . import reference

SORTED = 1024
"""Points that a row of the sorting kernel has at most, and the keys that one of its programs holds, 8 in a thread."""
CHUNK = 2**21
"""Keys sorted at once above that: 4 + 4 + 8 bytes each (projected, sorted, torch's order) fit the cache from 40 MB."""
SCATTERED = 1024
"""Elements that one program puts back into place."""


@triton.jit
def sliced_project_kernel(
    matrix_ptr,  # (I, L), any strides, float32 or half precision
    x_ptr,  # (B, L, J), any strides, float32 or half precision
    out_ptr,  # (B, I, J), any strides, float32
    matrix_stride_i, matrix_stride_l,
    x_stride_b, x_stride_l, x_stride_j,
    out_stride_b, out_stride_i, out_stride_j,
    rows, columns,
    LENGTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr,
) -> None:  # fmt: skip
    """``out[b] = matrix @ x[b]``; a tile of ``x`` is read by neighbouring programs.

    Float32 by three products of tf32 halves, high·high + high·low + low·high, exact to about 2⁻²⁰. The small products
    have a sum of their own, which is left out where it is not a number: infinity has no low half. A float16 or a
    bfloat16 is a tf32 number as it stands: no low half either, and a product less.
    """
    tiles_i, tiles_j = tl.cdiv(rows, BLOCK_I), tl.cdiv(columns, BLOCK_J)
    program = tl.program_id(0)
    batch = (program // (tiles_i * tiles_j)).to(tl.int64)
    first_row, first_column = program % tiles_i * BLOCK_I, program // tiles_i % tiles_j * BLOCK_J
    i, j, step = tl.arange(0, BLOCK_I)[:, None], tl.arange(0, BLOCK_J)[None, :], tl.arange(0, BLOCK_L)
    in_rows, in_columns = i < rows - first_row, j < columns - first_column
    row, column = first_row.to(tl.int64) + i, first_column.to(tl.int64) + j  # (I, 1), (1, J)
    matrix = matrix_ptr + row * matrix_stride_i + step[None, :].to(tl.int64) * matrix_stride_l  # (I, L)
    x = x_ptr + batch * x_stride_b + step[:, None].to(tl.int64) * x_stride_l + column * x_stride_j  # (L, J)
    values = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    small = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for start in range(0, LENGTH, BLOCK_L):
        left = tl.load(matrix, in_rows & (step[None, :] < LENGTH - start), 0)
        right = tl.load(x, (step[:, None] < LENGTH - start) & in_columns, 0)
        left_high, right_high = left.to(tl.float32), right.to(tl.float32)
        if left.dtype == tl.float32:
            left_high, left_low = _triton.split(left)
        if right.dtype == tl.float32:
            right_high, right_low = _triton.split(right)
            small = tl.dot(left_high, right_low, small, input_precision="tf32")
        if left.dtype == tl.float32:
            small = tl.dot(left_low, right_high, small, input_precision="tf32")
        values = tl.dot(left_high, right_high, values, input_precision="tf32")
        matrix += BLOCK_L * matrix_stride_l
        x += BLOCK_L * x_stride_l
    values += tl.where(small == small, small, 0)
    out = batch * out_stride_b + row * out_stride_i + column * out_stride_j
    tl.store(out_ptr + out, values, in_rows & in_columns)


@triton.jit
def _upper(axis: tl.constexpr, axes: tl.constexpr):
    """Whether an element lies in the upper half along the axis-th innermost of ``axes`` axes of length 2."""
    return tl.reshape(tl.arange(0, 2), [1] * (axes - axis - 1) + [2] + [1] * axis) != 0


@triton.jit
def sliced_sort_kernel(
    values_ptr,  # (R, N) contiguous, float32: each row is sorted in place
    order_ptr,  # (R, N) contiguous, an integer: the column that every value came from
    rows, columns,
    LOG_R: tl.constexpr, LOG_N: tl.constexpr,
) -> None:  # fmt: skip
    """A row sorts as 64-bit integers ``key << 32 | column``: flipping the lower bits of a negative float makes its
    pattern ascend as a signed integer does, equal values keep their order by the column, and no two are equal, so
    that the network need not be stable.

    It is bitonic (Batcher 1968), on a cube that has an axis per bit of an element's place: the runs of 2, 4, 8 …
    elements are merged pairwise, ascending and descending by turns. ``tl.sort`` does the same in a fifth more
    instructions, since it takes the direction for a number. Up to 256 aligned columns a row lies in one warp.
    """
    row = tl.program_id(0).to(tl.int64) * 2**LOG_R + tl.arange(0, 2**LOG_R)[:, None]  # (R, 1)
    column = tl.arange(0, 2**LOG_N)[None, :]  # (1, N)
    mask = (row < rows) & (column < columns)
    place = row * columns + column
    values = tl.load(values_ptr + place, mask, 0)
    bits = values.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(values == 0, 0, key)  # both zeros are equal
    key = tl.where(values != values, 0x7FC00000, key)  # every NaN comes after infinity
    key = tl.where(column < columns, key, 0x7FFFFFFF)
    packed = (key.to(tl.int64) << 32) | column

    cube = tl.reshape(packed, [2] * (LOG_R + LOG_N))
    for run in tl.static_range(1, LOG_N + 1):
        for step in tl.static_range(run):
            other = tl.sum(cube, LOG_R + LOG_N - run + step, keep_dims=True) - cube  # exact: integers wrap around
            larger = _upper(run - 1 - step, LOG_R + LOG_N)
            if run < LOG_N:
                larger = larger != _upper(run, LOG_R + LOG_N)
            cube = tl.where((cube > other) != larger, other, cube)
    packed = tl.reshape(cube, packed.shape)

    key = (packed >> 32).to(tl.int32)
    values = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(values_ptr + place, values, mask)
    tl.store(order_ptr + place, packed & 0xFFFFFFFF, mask)


@triton.jit
def sliced_scatter_kernel(
    values_ptr,  # (R, N) contiguous, float32
    order_ptr,  # (R, N) contiguous, a permutation of 0 … N-1 in each row; a value whose place is outside is left out
    out_ptr,  # (R, N) contiguous, float32
    rows, columns,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """``out[r, order[r, n]] = values[r, n]``: every element is written once, so the result is deterministic."""
    tiles = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]  # (R, 1)
    column = (program % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    mask = (row < rows) & (column < columns)
    first = row * columns
    order = tl.load(order_ptr + first + column, mask, 0).to(tl.int64)
    values = tl.load(values_ptr + first + column, mask, 0)
    tl.store(out_ptr + first + order, values, mask & (order >= 0) & (order < columns))


def _project(matrix: Tensor, x: Tensor, out: Tensor) -> None:
    """Fill ``out (B, I, J) = matrix (I, L) @ x (B, L, J)``."""
    if out.numel() == 0:
        return
    batch, length, columns = x.shape
    rows = matrix.shape[0]
    block_l = min(32, max(16, triton.next_power_of_2(length)))
    blocks = {"BLOCK_I": 64, "BLOCK_J": 64, "BLOCK_L": block_l}
    grid = (batch * triton.cdiv(rows, 64) * triton.cdiv(columns, 64),)
    strides = *matrix.stride(), *x.stride(), *out.stride()
    # Without a limit the assembler aims at 96 registers on sm_100, and spills some of them.
    options = {"num_warps": 4, "maxnreg": 255}
    _triton.launch(
        sliced_project_kernel, grid, matrix, x, out, *strides, rows, columns, LENGTH=length, **blocks, **options
    )


def _sort(values: Tensor, order: Tensor) -> None:
    """Sort the rows of ``values (B, K, N)`` in place, N ≤ SORTED, and fill ``order`` of the same shape."""
    if values.numel() == 0:
        return
    columns = values.shape[2]
    rows = values.numel() // columns
    log_n = (columns - 1).bit_length()
    log_r = SORTED.bit_length() - 1 - log_n
    grid = (triton.cdiv(rows, 2**log_r),)
    _triton.launch(sliced_sort_kernel, grid, values, order, rows, columns, LOG_R=log_r, LOG_N=log_n, num_warps=4)


def project_and_sort(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.project_and_sort``."""
    if accumulation(points, projections) == torch.float64:
        return reference.project_and_sort(points, projections)
    matrix, points = projections.t(), points.mT
    batch, _, number_of_points = points.shape
    values = points.new_empty((batch, matrix.shape[0], number_of_points), dtype=torch.float32)
    order = torch.empty_like(values, dtype=reference.permutation_dtype(number_of_points))
    if number_of_points <= SORTED:
        _project(matrix, points, values)
        _sort(values, order)
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
        _triton.launch(
            sliced_scatter_kernel, grid, grad, permutation, unsorted, batch * rows, columns, **blocks, num_warps=4
        )
    _project(projections, unsorted, gradient.mT)
    return gradient


_dispatch.implement("project_and_sort", "triton", project_and_sort, _triton.not_on_gpu)
_dispatch.implement("project_and_sort_backward", "triton", project_and_sort_backward, _triton.not_on_gpu)
for _name in ("quantile_distance", "quantile_distance_backward"):  # sorts and searches that torch has on the GPU
    _dispatch.implement(_name, "triton", getattr(reference, _name), _triton.not_on_gpu)
