"""The spectral distance on the GPU, by matrix products that tensor cores take: kernels, and their launchers.

No spectrum is stored, and no complex arithmetic is needed: ``triton_plan.py`` says what slots and classes are,
``triton_spectrum.py`` how they are computed. The slots are computed in *chunks* whose factors fit the registers.

Work per pixel of a folded map, P the padded half of a side of N: 4·P·(P/N)²·4 flop forward in one chunk per class,
three times that in tf32 halves, and twice again backward. At 56 (P = 32) that is 501 and 1003 flop; dense products take
1003 and 2006. A thread of sm_90 takes 18 instructions per pixel forward and 34 backward at 32². (Counted, the
latter in the machine code of "l2" in float32; no GPU has run this yet.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _triton
from .._checks import accumulation
from . import reference
from .triton_plan import JOINT, Plan, plan
from .triton_spectrum import (
    Tile,
    _adjoint,
    _chunk,
    _distance,
    _held,
    _inside,
    _mirrored,
    _pixels,
    _quadrant,
    _sign,
    _slope,
    _spectra,
    _spectrum_adjoint,
)

LONGEST = 128
"""The longest side of larger maps: above, the gradient of one channel does not fit the registers of one program."""
PROGRAMS = 1024
"""Programs to aim at: several for each multiprocessor of the largest GPUs, so that the last ones finish together."""
SPLITS, GATHERED = 64, 64
"""The most programs that share one sample, and the numbers that one program of the small kernels writes."""


@triton.jit
def _forward_kernel(
    student_ptr,  # (B, C, H, W), any strides
    teacher_ptr,  # (B, C, H, W), any strides
    basis_h_ptr, basis_w_ptr,  # as in the plan
    partial_ptr,  # (B, SPLITS, FOLD_H, FOLD_W, KINDS, V, U): sums over the channels of one program
    rate, channels, student_stride_b, teacher_stride_b,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr,  # strides (C, H, W)
    DISTANCE: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program sums the distances of STEPS·BLOCK_C channels of one sample in one group of chunks, in a fixed order.

    The programs of one sample's groups are neighbours: the tiles that they share come from the cache.
    """
    GROUPS: tl.constexpr = TILE.CHUNKS // TILE.GROUP
    part, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    sample, first = (part // SPLITS).to(tl.int64), part % SPLITS * (STEPS * TILE.BLOCK_C)
    student = student_ptr + sample * student_stride_b + first.to(tl.int64) * STUDENT[0]
    teacher = teacher_ptr + sample * teacher_stride_b + first.to(tl.int64) * TEACHER[0]
    zero = tl.zeros((TILE.BLOCK_C * TILE.BLOCK_V, TILE.BLOCK_U), tl.float32)
    left = channels - first
    analysis = basis_h_ptr, basis_w_ptr
    if TILE.HELD:
        analysis = _held(basis_h_ptr, basis_w_ptr, False, TILE)
    sums = ()
    for _ in tl.static_range(TILE.GROUP * TILE.KINDS):
        sums = sums + (zero,)
    for _ in range(STEPS):
        exists = (tl.arange(0, TILE.BLOCK_C * TILE.BLOCK_V) // TILE.BLOCK_V < left)[:, None]
        total = ()
        for i in tl.static_range(TILE.GROUP):
            a, b, v, u = _chunk(group * TILE.GROUP + i, TILE)
            if TILE.GROUP > 1:  # a class is a chunk, and a group both classes of the width
                a, b, v, u = group, i, 0, 0
            tall, wide = _mirrored(a, b, v, u, TILE)
            s, t = _spectra(
                student, teacher, left, analysis, (a, b, v, u), tall, wide, STUDENT, TEACHER, DISTANCE, TILE
            )
            for kind in tl.static_range(TILE.KINDS):
                d = _distance(s[2 * kind], s[2 * kind + 1], t[2 * kind], t[2 * kind + 1], rate, DISTANCE)
                if DISTANCE == "cosine":  # whose distance of 0 and 0 is 1
                    d = tl.where(exists, d, 0)
                total = total + (sums[i * TILE.KINDS + kind] + d,)
        sums = total
        student += TILE.BLOCK_C * STUDENT[0]
        teacher += TILE.BLOCK_C * TEACHER[0]
        left -= TILE.BLOCK_C
    SLOTS: tl.constexpr = TILE.V * TILE.U
    slot = tl.arange(0, TILE.BLOCK_V * TILE.BLOCK_U)
    slot = slot // TILE.BLOCK_U * TILE.U + slot % TILE.BLOCK_U
    partial = partial_ptr + part.to(tl.int64) * (TILE.FOLD_H * TILE.FOLD_W * TILE.KINDS * SLOTS)
    for i in tl.static_range(TILE.GROUP):
        a, b, v, u = _chunk(group * TILE.GROUP + i, TILE)
        for kind in tl.static_range(TILE.KINDS):
            total = tl.sum(tl.reshape(sums[i * TILE.KINDS + kind], (TILE.BLOCK_C, TILE.BLOCK_V * TILE.BLOCK_U)), 0)
            first = ((a * TILE.FOLD_W + b) * TILE.KINDS + kind) * SLOTS + v * TILE.U + u
            tl.store(partial + first + slot, total)


@triton.jit
def _gather_kernel(
    partial_ptr,  # (B, SPLITS, SLOTS)
    slots_ptr,  # (H·W,) int32: where in SLOTS a frequency lies
    out_ptr,  # (B, H, W), contiguous
    channels,
    FREQUENCIES: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The mean over the channels, at every frequency."""
    program, blocks = tl.program_id(0), tl.cdiv(FREQUENCIES, BLOCK_F)
    sample, split = (program // blocks).to(tl.int64), tl.arange(0, BLOCK_S)[:, None]
    frequency = program % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = frequency < FREQUENCIES
    slot = tl.load(slots_ptr + frequency, inside, 0)[None, :]
    partial = partial_ptr + sample * (SPLITS * SLOTS) + split * SLOTS + slot  # (S, F)
    total = tl.sum(tl.load(partial, (split < SPLITS) & inside[None, :], 0), 0)
    tl.store(out_ptr + sample * FREQUENCIES + frequency, total / channels, inside)


@triton.jit
def _weigh_kernel(
    grad_ptr,  # (B, H, W), any strides
    frequencies_ptr,  # (2, SLOTS) int32: the frequencies of one coefficient of every slot, -1 where there is none
    weight_ptr,  # (B, SLOTS): dL/dd of one coefficient, which a frequency, its mirror and every channel share
    channels, grad_stride_b, grad_stride_h, grad_stride_w,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0), tl.cdiv(SLOTS, BLOCK)
    sample, slot = (program // blocks).to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(2):
        frequency = tl.load(frequencies_ptr + i * SLOTS + slot, slot < SLOTS, -1).to(tl.int64)
        grad = (
            grad_ptr + sample * grad_stride_b + frequency // WIDTH * grad_stride_h + frequency % WIDTH * grad_stride_w
        )
        total += tl.load(grad, frequency >= 0, 0).to(total.dtype)
    tl.store(weight_ptr + sample * SLOTS + slot, total / channels, slot < SLOTS)


@triton.jit
def _weights(weight_ptr, TILE: tl.constexpr):
    """Of a chunk's slots in every channel, (C·V, U) for each kind."""
    slot = tl.arange(0, TILE.BLOCK_C * TILE.BLOCK_V)[:, None] % TILE.BLOCK_V * TILE.U
    slot = slot + tl.arange(0, TILE.BLOCK_U)[None, :]
    weights = ()
    for kind in tl.static_range(TILE.KINDS):
        weights = weights + (tl.load(weight_ptr + kind * (TILE.V * TILE.U) + slot),)
    return weights


@triton.jit
def _backward_kernel(
    student_ptr,  # (B, C, H, W), any strides
    teacher_ptr,  # (B, C, H, W), any strides
    out_ptr,  # (B, C, H, W), any strides: the gradient of the student
    basis_h_ptr, basis_w_ptr,  # as in the plan
    weight_ptr,  # (B, FOLD_H, FOLD_W, KINDS, V, U)
    rate, channels, student_stride_b, teacher_stride_b, out_stride_b,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, OUT: tl.constexpr,  # strides (C, H, W)
    DISTANCE: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The spectra once more, the derivative of the distance in each slot, and the transposed bases back.

    The basis is a real linear map: no convention of complex gradients, and no symmetry of ``grad``, is needed.
    """
    SLOTS: tl.constexpr = TILE.V * TILE.U
    BLOCKS: tl.constexpr = TILE.BLOCK_W // TILE.BLOCK_K
    part, column = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * TILE.BLOCK_K
    sample, first = (part // SPLITS).to(tl.int64), part % SPLITS * (STEPS * TILE.BLOCK_C)
    student = student_ptr + sample * student_stride_b + first.to(tl.int64) * STUDENT[0]
    teacher = teacher_ptr + sample * teacher_stride_b + first.to(tl.int64) * TEACHER[0]
    out = out_ptr + sample * out_stride_b + first.to(tl.int64) * OUT[0]
    weight = weight_ptr + sample * (TILE.FOLD_H * TILE.FOLD_W * TILE.KINDS * SLOTS)
    analysis = basis_h_ptr, basis_w_ptr
    synthesis = basis_h_ptr, basis_w_ptr
    if TILE.HELD:  # before the loop: the compiler moves no load past the stores in it
        analysis = _held(basis_h_ptr, basis_w_ptr, False, TILE)
        synthesis = _held(basis_h_ptr, basis_w_ptr, True, TILE)
        held = _weights(weight, TILE)
    left = channels - first
    for _ in range(STEPS):
        nothing = tl.zeros((TILE.BLOCK_H * TILE.BLOCK_C, TILE.BLOCK_K), tl.float32)
        gradients = ()  # by quadrant
        for _ in tl.static_range(TILE.FOLD_H * TILE.FOLD_W):
            gradients = gradients + (nothing,)
        for i in range(TILE.CHUNKS):
            a, b, v, u = _chunk(tl.full((), 0, tl.int32) + i, TILE)  # the interpreter's i is an int
            tall, wide = _mirrored(a, b, v, u, TILE)
            s, t = _spectra(
                student, teacher, left, analysis, (a, b, v, u), tall, wide, STUDENT, TEACHER, DISTANCE, TILE
            )
            if TILE.HELD:
                w = held
            else:
                w = _weights(weight + (a * TILE.FOLD_W + b) * (TILE.KINDS * SLOTS) + v * TILE.U + u, TILE)
            slopes = ()
            for kind in tl.static_range(4):
                if kind < TILE.KINDS:
                    s_re, s_im, t_re, t_im = s[2 * kind], s[2 * kind + 1], t[2 * kind], t[2 * kind + 1]
                    re, im = _slope(s_re, s_im, t_re, t_im, w[kind], rate, DISTANCE)
                else:
                    re, im = s[3], s[3]  # zeros
                slopes = slopes + (re, im)
            cc, cs, sc, ss = _spectrum_adjoint(slopes, tall, wide)
            gradient = _adjoint(cc, cs, sc, ss, synthesis, (a, b, v, u), column, TILE)
            total = ()
            for i in tl.static_range(TILE.FOLD_H):
                for j in tl.static_range(TILE.FOLD_W):
                    total = total + (gradients[i * TILE.FOLD_W + j] + gradient * _sign(i, j, a, b),)
            gradients = total
        inside = _inside(left, 0, column, TILE, TILE.BLOCK_H, TILE.BLOCK_K)
        for i in tl.static_range(TILE.FOLD_H):
            for j in tl.static_range(TILE.FOLD_W):
                start = _quadrant(i, j, OUT, TILE) + column * OUT[2]
                pixels = out + start + _pixels(OUT, TILE, TILE.BLOCK_H, TILE.BLOCK_K)
                tl.store(pixels, gradients[i * TILE.FOLD_W + j].to(out_ptr.dtype.element_ty), inside)
        student += TILE.BLOCK_C * STUDENT[0]
        teacher += TILE.BLOCK_C * TEACHER[0]
        out += TILE.BLOCK_C * OUT[0]
        left -= TILE.BLOCK_C


def _configuration(batch: int, channels: int, tables: Plan, distance: str, backward: bool) -> dict[str, Any]:
    """How a sample's channels, its slots and sums over pixels are shared out: a kernel's constants, and its warps.

    A warp group of sm_90 multiplies at least 64 rows. Maps of one chunk are loaded a step ahead; larger ones meet what
    they load again in the first-level cache, which loads ahead go around. Smaller blocks and more warps are for what
    spills otherwise: gradients of large maps, the two spectra of "cosine", other architectures.
    """
    shape, capability = tables.shape, _triton.capability(tables.slots.device)
    hopper = capability == 90
    fold_h, fold_w, height, width = (shape[name] for name in ("FOLD_H", "FOLD_W", "BLOCK_H", "BLOCK_W"))
    whole, light = height == 1, distance != "cosine"
    small = whole or (fold_h * fold_w == 1 and max(height, width) <= 32)
    rows, columns = min(32, height), width if whole else min(32 if light else 16, width)
    block_v, block_u = min(16, shape["V"]), shape["U"] if whole else min(16, shape["U"])
    if whole:
        block_c = max(64 if hopper or not backward else 32, 2048 // width) if light else max(16, 1024 // width)
    else:
        block_c = 128 // rows if light and (small or not (backward or hopper)) else 64 // rows
    if backward and not whole:
        block_v, block_u = block_v if light else min(8, block_v), min(block_u, 1024 // height if light else 8)
        block_c = 1 if height > 32 else block_c
    block_c = min(block_c, max(16 if whole else 1, triton.next_power_of_2(channels)))
    chunks = fold_h * fold_w * (shape["V"] // block_v) * (shape["U"] // block_u)
    shared = not backward and light and fold_w == 2 and chunks == fold_h * fold_w and capability < 100
    blocks = triton.cdiv(channels, block_c)
    steps = triton.cdiv(blocks, max(1, min(SPLITS, triton.cdiv(PROGRAMS, batch))))
    constants = shape | {
        "BLOCK_C": block_c,
        "BLOCK_R": rows,
        "BLOCK_K": columns,
        "BLOCK_V": block_v,
        "BLOCK_U": block_u,
        "CHUNKS": chunks,
        "GROUP": 2 if shared else 1,
        "HELD": chunks == 1 and (rows, columns) == (height, width),
    }
    largest = whole and width == JOINT
    few = block_c * height * width <= 2048 if small and not largest else hopper and not backward
    return {
        "SPLITS": triton.cdiv(blocks, steps),
        "STEPS": steps,
        "TILE": Tile(**{name: tl.constexpr(value) for name, value in constants.items()}),
        "num_warps": 4 if light and few else 8,
        "num_stages": 2 if light and small and (hopper or not largest) else 1,
        "maxnreg": None if hopper else 255,  # unsaid, ptxas keeps to 128 in some kernels, and spills
    }


def spectral_distance(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> Tensor:
    """See ``reference.spectral_distance``."""
    if accumulation(student, teacher) == torch.float64:
        return reference.spectral_distance(student, teacher, distance, sigma, norm)
    batch, channels, height, width = student.shape
    tables = plan(height, width, norm, student.device)
    out = student.new_empty((batch, height, width), dtype=torch.float32)
    if batch == 0:
        return out
    options = _configuration(batch, channels, tables, distance, backward=False)
    splits, slots = options["SPLITS"], tables.frequencies[0].numel()
    groups = options["TILE"].CHUNKS.value // options["TILE"].GROUP.value
    partial = out.new_empty((batch, splits, slots))
    _triton.launch(
        _forward_kernel, (batch * splits * groups,), student, teacher, tables.basis_h, tables.basis_w, partial,
        0.5 / sigma**2, channels, student.stride(0), teacher.stride(0),
        STUDENT=student.stride()[1:], TEACHER=teacher.stride()[1:], DISTANCE=distance, **options,
    )  # fmt: skip
    _triton.launch(
        _gather_kernel, (batch * triton.cdiv(height * width, GATHERED),), partial, tables.slots, out, channels,
        FREQUENCIES=height * width, SPLITS=splits, SLOTS=slots,
        BLOCK_S=triton.next_power_of_2(splits), BLOCK_F=GATHERED,
    )  # fmt: skip
    return out


def spectral_distance_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str
) -> Tensor:
    """See ``reference.spectral_distance_backward``."""
    if accumulation(student, teacher) == torch.float64:
        return reference.spectral_distance_backward(grad, student, teacher, distance, sigma, norm)
    batch, channels, height, width = student.shape
    out = torch.empty_like(student)
    if batch == 0:
        return out
    tables = plan(height, width, norm, student.device)
    options = _configuration(batch, channels, tables, distance, backward=True)
    slots = tables.frequencies[0].numel()
    weight = tables.basis_w.new_empty((batch, slots))
    _triton.launch(
        _weigh_kernel, (batch * triton.cdiv(slots, GATHERED),), grad, tables.frequencies, weight, channels,
        *grad.stride(), WIDTH=width, SLOTS=slots, BLOCK=GATHERED,
    )  # fmt: skip
    _triton.launch(
        _backward_kernel, (batch * options["SPLITS"] * (tables.shape["BLOCK_W"] // options["TILE"].BLOCK_K.value),),
        student, teacher, out, tables.basis_h, tables.basis_w, weight,
        0.5 / sigma**2, channels, student.stride(0), teacher.stride(0), out.stride(0),
        STUDENT=student.stride()[1:], TEACHER=teacher.stride()[1:], OUT=out.stride()[1:],
        DISTANCE=distance, **options,
    )  # fmt: skip
    return out


def _unsupported(*args: Any) -> str | None:
    if reason := _triton.not_on_gpu(*args):
        return reason
    student, teacher = [argument for argument in args if isinstance(argument, Tensor)][-2:]
    height, width = student.shape[2:]
    if height * width > JOINT and max(height, width) > LONGEST:
        return f"a side of {height}×{width} is longer than {LONGEST}"
    reach = max(
        sum(n * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in (student, teacher)
    )
    return "a sample reaches beyond 2³¹ elements" if max(reach, math.prod(student.shape[1:])) >= 2**31 else None


_dispatch.implement("spectral_distance", "triton", spectral_distance, _unsupported)
_dispatch.implement("spectral_distance_backward", "triton", spectral_distance_backward, _unsupported)
