"""The spectral distance on the GPU: kernels, and their launchers. The README here derives it and has the words."""

from __future__ import annotations

import math
from functools import lru_cache
from operator import mul
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _triton
from .._checks import accumulation
from . import reference
from .real_basis import WHOLE, Tables, padded, tables
from .triton_spectrum import Tile, _distance, _factor, _inside, _pixels, _slope, _spectra, _spectrum_adjoint

PROGRAMS, SPLITS, SUMMED = 1024, 64, 64
"""Programs to aim at, several for each multiprocessor of the largest GPUs, so that the last ones finish together; the
most that share one sample; and the coefficients that one of the sum takes."""
LAUNCH = (
    # longest padded side (of whole maps, pixels), whole?, cosine?, rows of the larger product of a tile
    (64, True, False, 64),  # what one warp group multiplies
    (16, True, True, 64),
    (64, True, True, 16),  # two spectra: 64 rows spill
    (32, False, False, 128),  # two warp groups: of channels_last a program reads twice as much of a line
    (32, False, True, 64),
    (64, False, False, 64),  # 128 rows spill, and two spectra do at any number
)
"""How a kernel is launched: the first row that holds its maps. Compiled and counted; no GPU has run it yet."""


@triton.jit(do_not_specialize=["splits", "steps"])
def spectral_distance_forward_kernel(
    student_ptr, teacher_ptr,  # (B, C, H, W), any strides
    basis_h_ptr, basis_w_ptr,  # analysis_h and analysis_w of the tables
    partial_ptr,  # (B, splits, COEFFICIENTS, V, U): sums over the channels of one program
    rate, channels, splits, steps, student_stride_b, teacher_stride_b,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr,  # strides (C, H, W)
    DISTANCE: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One program sums the distances of steps·BLOCK_C channels of one sample, in a fixed order."""
    program = tl.program_id(0)
    sample, first = (program // splits).to(tl.int64), program % splits * steps * TILE.BLOCK_C
    student_ptr += sample * student_stride_b + first.to(tl.int64) * STUDENT[0]
    teacher_ptr += sample * teacher_stride_b + first.to(tl.int64) * TEACHER[0]
    basis_h, basis_w = _factor(basis_h_ptr, 2 * TILE.U), _factor(basis_w_ptr, TILE.BLOCK_W)
    left = channels - first
    sums = ()
    for _ in tl.static_range(TILE.COEFFICIENTS):
        sums = sums + (tl.zeros((TILE.BLOCK_C * TILE.V, TILE.U), tl.float32),)
    for _ in range(steps):
        s, t = _spectra(student_ptr, teacher_ptr, left, basis_h, basis_w, STUDENT, TEACHER, DISTANCE, TILE)
        exists = (tl.arange(0, TILE.BLOCK_C * TILE.V) // TILE.V < left)[:, None]
        total = ()
        for i in tl.static_range(TILE.COEFFICIENTS):
            d = _distance(s[2 * i], s[2 * i + 1], t[2 * i], t[2 * i + 1], rate, DISTANCE)
            if DISTANCE == "cosine":  # whose distance of 0 and 0 is 1
                d = tl.where(exists, d, 0)
            total = total + (sums[i] + d,)
        sums = total
        student_ptr += TILE.BLOCK_C * STUDENT[0]
        teacher_ptr += TILE.BLOCK_C * TEACHER[0]
        left -= TILE.BLOCK_C
    PAIRS: tl.constexpr = TILE.V * TILE.U
    partial_ptr += program.to(tl.int64) * (TILE.COEFFICIENTS * PAIRS)
    for i in tl.static_range(TILE.COEFFICIENTS):
        total = tl.sum(tl.reshape(sums[i], (TILE.BLOCK_C, PAIRS)), 0)
        tl.store(partial_ptr + i * PAIRS + tl.arange(0, PAIRS), total)


@triton.jit(do_not_specialize=["splits"])
def spectral_distance_sum_kernel(
    partial_ptr,  # (B, splits, SIZE)
    frequencies_ptr,  # (2, SIZE), of the tables
    out_ptr,  # (B, H, W), contiguous
    channels, splits,
    PIXELS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
) -> None:  # fmt: skip
    """The mean over the channels, at every frequency and its mirror."""
    first, split = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, MOST)[:, None]
    sample, coefficient = first // SIZE, first % SIZE + tl.arange(0, BLOCK)
    partial_ptr += sample * splits * SIZE
    total = tl.sum(tl.load(partial_ptr + split * SIZE + coefficient[None, :], split < splits, 0), 0) / channels
    for i in tl.static_range(2):
        frequency = tl.load(frequencies_ptr + i * SIZE + coefficient)
        tl.store(out_ptr + sample * PIXELS + frequency, total, frequency >= 0)


@triton.jit
def _weights(grad_ptr, frequencies_ptr, channels, TILE: tl.constexpr):
    """dL/dd of every coefficient, (C·V, U) each: a frequency, its mirror and all channels share it."""
    PAIRS: tl.constexpr = TILE.V * TILE.U
    pair = tl.arange(0, TILE.BLOCK_C * TILE.V)[:, None] % TILE.V * TILE.U + tl.arange(0, TILE.U)[None, :]
    weights = ()
    for i in tl.static_range(TILE.COEFFICIENTS):
        total = tl.zeros((TILE.BLOCK_C * TILE.V, TILE.U), tl.float32)
        for j in tl.static_range(2):
            frequency = tl.load(frequencies_ptr + (j * TILE.COEFFICIENTS + i) * PAIRS + pair)
            total += tl.load(grad_ptr + frequency, frequency >= 0, 0).to(tl.float32)
        weights = weights + (total / channels,)
    return weights


@triton.jit(do_not_specialize=["splits", "steps"])
def spectral_distance_backward_kernel(
    grad_ptr,  # (B, H, W), contiguous
    student_ptr, teacher_ptr,  # (B, C, H, W), any strides
    out_ptr,  # (B, C, H, W), any strides: the gradient of the student
    analysis_h_ptr, analysis_w_ptr, synthesis_h_ptr, synthesis_w_ptr, frequencies_ptr,  # the tables
    rate, channels, splits, steps,
    student_stride_b, teacher_stride_b, out_stride_b,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, OUT: tl.constexpr,  # strides (C, H, W)
    DISTANCE: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The spectra once more, the derivative of the distance at each coefficient, and the transposed bases back."""
    program = tl.program_id(0)
    sample, first = (program // splits).to(tl.int64), program % splits * steps * TILE.BLOCK_C
    student_ptr += sample * student_stride_b + first.to(tl.int64) * STUDENT[0]
    teacher_ptr += sample * teacher_stride_b + first.to(tl.int64) * TEACHER[0]
    out_ptr += sample * out_stride_b + first.to(tl.int64) * OUT[0]
    # Before the loop: the compiler moves no load past the stores in it.
    analysis_h, analysis_w = _factor(analysis_h_ptr, 2 * TILE.U), _factor(analysis_w_ptr, TILE.BLOCK_W)
    synthesis_h, synthesis_w = _factor(synthesis_h_ptr, 2 * TILE.U), _factor(synthesis_w_ptr, TILE.BLOCK_W)
    weights = _weights(grad_ptr + sample * (TILE.HEIGHT * TILE.WIDTH), frequencies_ptr, channels, TILE)
    left = channels - first
    for _ in range(steps):
        s, t = _spectra(student_ptr, teacher_ptr, left, analysis_h, analysis_w, STUDENT, TEACHER, DISTANCE, TILE)
        slopes = ()
        for i in tl.static_range(4):
            if i < TILE.COEFFICIENTS:
                re, im = _slope(s[2 * i], s[2 * i + 1], t[2 * i], t[2 * i + 1], weights[i], rate, DISTANCE)
            else:
                re, im = s[3], s[3]  # zeros
            slopes = slopes + (re, im)
        gradient = _spectrum_adjoint(slopes, synthesis_h, synthesis_w, TILE)
        tl.store(out_ptr + _pixels(OUT, TILE), gradient.to(out_ptr.dtype.element_ty), _inside(left, TILE))
        student_ptr += TILE.BLOCK_C * STUDENT[0]
        teacher_ptr += TILE.BLOCK_C * TEACHER[0]
        out_ptr += TILE.BLOCK_C * OUT[0]
        left -= TILE.BLOCK_C


@lru_cache(maxsize=4096)
def _configuration(height, width, distance, backward, capability, memory) -> dict[str, Any] | str:
    """How to launch a kernel for maps of one size on a device: its options, or why there are none."""
    whole, cosine = height * width <= WHOLE, distance == "cosine"
    block_h, block_w = (1, padded(height * width)) if whole else (padded(height), padded(width))
    rows = [row[3] for row in LAUNCH if max(block_h, block_w) <= row[0] and row[1:3] == (whole, cosine)]
    longest = (32 if cosine else 64) // (1 if capability >= 90 else 2)  # above, registers spill
    if not rows or (not whole and max(height, width) > longest):
        return f"a side of {height}×{width} is longer than {longest}"
    block_c = rows[0] if whole else rows[0] // max(block_h, block_w)
    if capability < 90:  # whose tensor cores take both factors from registers
        block_c = max(1, block_c // 2)
    v, u = (1, block_w // 2) if whole else (block_w // 2, block_h // 2)
    real, coefficients = 2 if height % 2 == width % 2 == 0 else 1, 2 if whole else 4
    sizes = height, width, block_c, block_h, block_w, v, u, real, coefficients
    factors = 12 * (block_w**2 + (0 if whole else block_h**2)) * (2 if backward else 1)
    for stages in (2, 1):  # two: tiles are loaded a step ahead
        shared = factors + (8 * stages + 4 * cosine) * block_c * block_h * block_w
        if shared <= memory:
            break
    else:
        return f"maps of {height}×{width} take {shared} bytes of shared memory, and a program of this GPU has {memory}"
    # More warps than rows / 16 do a product twice; not so on sm_100, where fewer spill.
    warps = max(4, block_c * (1 if whole else min(block_h, block_w)) // 16) if capability < 100 else 8
    # Where maxnreg is unsaid, ptxas keeps some kernels to 128 or 168 registers, and spills.
    return {"TILE": Tile(*map(tl.constexpr, sizes)), "num_warps": warps, "num_stages": stages, "maxnreg": 255}


def _prepared(student: Tensor, distance: str, norm: str, backward: bool) -> tuple[Tables, int, int, dict[str, Any]]:
    """Tables, how many programs share a sample, how many tiles each of them takes, and the options of the launch."""
    batch, channels, height, width = student.shape
    options = _configuration(height, width, distance, backward, *_triton.limits(student.device))
    blocks = triton.cdiv(channels, options["TILE"].BLOCK_C.value)
    steps = triton.cdiv(blocks, max(1, min(SPLITS, triton.cdiv(PROGRAMS, batch))))
    return tables(height, width, norm, student.device), triton.cdiv(blocks, steps), steps, options


def _columns_together(maps: Tensor) -> Tensor:
    """Large maps with their columns side by side, copied where they are not and a mask for each of them would spill."""
    large, masked = max(maps.shape[2:]) > 32, maps.shape[3] % 4 != 0
    return maps.contiguous() if large and masked and maps.stride(3) != 1 else maps


def spectral_distance(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> Tensor:
    """See ``reference.spectral_distance``."""
    if accumulation(student, teacher) == torch.float64:
        return reference.spectral_distance(student, teacher, distance, sigma, norm)
    batch, channels, height, width = student.shape
    out = student.new_empty((batch, height, width), dtype=torch.float32)
    if batch == 0:
        return out
    student, teacher = _columns_together(student), _columns_together(teacher)
    table, splits, steps, options = _prepared(student, distance, norm, backward=False)
    size = table.frequencies[0].numel()
    partial, block = out.new_empty((batch, splits, size)), min(SUMMED, size)
    _triton.launch(
        spectral_distance_forward_kernel, (batch * splits,),
        student, teacher, table.analysis_h, table.analysis_w, partial,
        0.5 / sigma**2, channels, splits, steps, student.stride(0), teacher.stride(0),
        STUDENT=student.stride()[1:], TEACHER=teacher.stride()[1:], DISTANCE=distance, **options,
    )  # fmt: skip
    _triton.launch(
        spectral_distance_sum_kernel, (batch * size // block,), partial, table.frequencies, out, channels, splits,
        PIXELS=height * width, SIZE=size, BLOCK=block, MOST=SPLITS,
    )  # fmt: skip
    return out


def spectral_distance_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str
) -> Tensor:
    """See ``reference.spectral_distance_backward``."""
    if accumulation(student, teacher) == torch.float64:
        return reference.spectral_distance_backward(grad, student, teacher, distance, sigma, norm)
    out = torch.empty_like(student)
    if len(student) == 0:
        return out
    student, teacher = _columns_together(student), _columns_together(teacher)
    table, splits, steps, options = _prepared(student, distance, norm, backward=True)
    _triton.launch(
        spectral_distance_backward_kernel, (len(student) * splits,), grad.contiguous(), student, teacher, out, *table,
        0.5 / sigma**2, student.shape[1], splits, steps, student.stride(0), teacher.stride(0), out.stride(0),
        STUDENT=student.stride()[1:], TEACHER=teacher.stride()[1:], OUT=out.stride()[1:], DISTANCE=distance, **options,
    )  # fmt: skip
    return out


def _unsupported(*args: Any) -> str | None:
    *_, student, teacher, distance, _, _ = args
    if (reason := _triton.not_on_gpu(*args)) or accumulation(student, teacher) == torch.float64:
        return reason  # none for float64, which is the reference's whatever the backend
    options = _configuration(*student.shape[2:], distance, len(args) == 6, *_triton.limits(student.device))
    if isinstance(options, str):
        return options
    reach = [math.prod(student.shape[1:])] + [sum(map(mul, x.shape[1:], x.stride()[1:])) for x in (student, teacher)]
    return "a sample reaches beyond 2³¹ elements" if max(reach) >= 2**31 else None


_dispatch.implement("spectral_distance", "triton", spectral_distance, _unsupported)
_dispatch.implement("spectral_distance_backward", "triton", spectral_distance_backward, _unsupported)
_dispatch.implement("attention_sum", "triton", reference.attention_sum, _triton.not_on_gpu)  # of few numbers
