"""The spectral distance on the GPU, by matrix products that tensor cores take; the only file of the room with Triton.

A real H×W map has H·W real Fourier coefficients. A *slot* holds two of them: cosine and sine of one frequency, whose
mirror has the same power, or the cosines of two frequencies that are their own mirrors. Up to ``JOINT`` pixels one
product with the basis of the whole map gives every slot; above, each side has its own basis (see ``_spectrum``). The
slots are computed in chunks whose factors fit the registers: nothing spills at any shape in reach.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _triton
from .._checks import accumulation
from . import reference

JOINT = 64
"""Pixels up to which one product with the basis of the whole map costs no more than two with padded sides."""
LONGEST = 64
"""The longest side of larger maps: above, the basis of the height does not fit the registers of one program."""
TILE, BLOCK_V = 2048, 8
"""Padded elements of a tile where a channel is not larger, and slots of the width in a chunk: so nothing spills."""
PROGRAMS = 1024
"""Programs to aim at: several for each multiprocessor of the largest GPUs, so that the last ones finish together."""
HEAVY = 32 * 64
"""Padded elements of a channel above which the reference answers for float64 and for the gradient of "cosine"."""
SPLITS, GATHERED = 64, 64
"""The most programs that share one sample, and the numbers that one program of the small kernels writes."""
EXPONENT = {"forward": -1.0, "ortho": -0.5, "backward": 0.0}


@triton.jit
def _pixels(
    STRIDES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Offsets (H·C, W) of a tile; (C, H·W) where BLOCK_H is 1."""
    row, column = tl.arange(0, BLOCK_H * BLOCK_C)[:, None], tl.arange(0, BLOCK_W)[None, :]
    channel = row % BLOCK_C * STRIDES[0]
    if BLOCK_H > 1:
        return channel + row // BLOCK_C * STRIDES[1] + column * STRIDES[2]
    elif STRIDES[1] == WIDTH * STRIDES[2]:  # without the division the compiler sees which pixels lie side by side
        return channel + column * STRIDES[2]
    else:
        return channel + column // WIDTH * STRIDES[1] + column % WIDTH * STRIDES[2]


@triton.jit
def _inside(
    channels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile exist, ``channels`` from its first one on being left."""
    row, column = tl.arange(0, BLOCK_H * BLOCK_C)[:, None], tl.arange(0, BLOCK_W)[None, :]
    if BLOCK_H > 1:
        return (row % BLOCK_C < channels) & (row // BLOCK_C < HEIGHT) & (column < WIDTH)
    else:
        return (row < channels) & (column < HEIGHT * WIDTH)


@triton.jit
def _columns(basis_ptr, first, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a basis (ROWS, COLUMNS): BLOCK columns from ``first`` on."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    return tl.load(basis_ptr + row * COLUMNS + first + column)


@triton.jit
def _chunk(
    chunk, basis_h_ptr, basis_w_ptr, REALS: tl.constexpr, V: tl.constexpr, U: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of one chunk of the slots: both bases, numbers (C·V, U) of its slots, and which of them hold one frequency and
    its mirror, along the height and along the width.

    A side has one slot of two frequencies, the first. A whole map has REALS of them, in the place of the width's.
    """
    v = chunk * BLOCK_V + tl.arange(0, BLOCK_C * BLOCK_V)[:, None] % BLOCK_V
    u = tl.arange(0, U)[None, :]
    if BLOCK_H > 1:
        basis_h = _columns(basis_h_ptr, 0, BLOCK_H, BLOCK_H, 2 * U)
        basis_w = _columns(basis_w_ptr, 2 * chunk * BLOCK_V, BLOCK_W, BLOCK_W, 2 * BLOCK_V)
        return basis_h, basis_w, v * U + u, (v >= 0) & (u > 0), (v > 0) & (u >= 0)
    else:
        basis = _columns(basis_w_ptr, 0, BLOCK_W, BLOCK_W, 2 * U)
        return basis, basis, v * U + u, (v < 0) & (u < 0), (v >= 0) & (u >= REALS)


@triton.jit
def _dot(x, y):  # (M, K), (K, N) -> (M, N)
    """In the dtype of both; float32 as hi·hi + hi·lo + lo·hi of tf32 halves, exact to about 2⁻²²."""
    if x.dtype == tl.float64:
        return tl.dot(x, y, input_precision="ieee", out_dtype=tl.float64)
    else:
        return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def _apart(x):  # (M, 2·N) -> twice (M, N): the even and the odd columns
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _together(even, odd):  # twice (M, N) -> (M, 2·N)
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _coefficients(x, basis_h, basis_w, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):
    """Of a tile (H·C, W): the real coefficients (C·V, U) cos·cos, cos·sin, sin·cos, sin·sin of height·width.

    Where BLOCK_H is 1, the tile is (C, H·W), the result (C, U), and there are no sines of the height.
    """
    cos, sin = _apart(_dot(x, basis_w))
    if BLOCK_H > 1:
        cc, sc = _apart(_dot(tl.trans(tl.reshape(cos, (BLOCK_H, BLOCK_C * cos.shape[1]))), basis_h))
        cs, ss = _apart(_dot(tl.trans(tl.reshape(sin, (BLOCK_H, BLOCK_C * sin.shape[1]))), basis_h))
        return cc, cs, sc, ss
    else:
        return cos, sin, tl.zeros_like(cos), tl.zeros_like(cos)


@triton.jit
def _adjoint(cc, cs, sc, ss, basis_h, basis_w, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):
    """``_coefficients`` backwards: from the gradients of its results to that of the tile."""
    if BLOCK_H > 1:
        back = tl.trans(basis_h)
        shape: tl.constexpr = (BLOCK_H * BLOCK_C, basis_w.shape[1] // 2)
        cos = tl.reshape(tl.trans(_dot(_together(cc, sc), back)), shape)
        sin = tl.reshape(tl.trans(_dot(_together(cs, ss), back)), shape)
    else:
        cos, sin = cc, cs
    return _dot(_together(cos, sin), tl.trans(basis_w))


@triton.jit
def _spectrum(cc, cs, sc, ss, tall, wide):
    """The complex coefficients (re, im, 0), (re, im, 3) and the real ones 1 and 2 of every slot.

    With c, s the cosine and sine of the height's frequency u and the width's v, F = Σ x·exp(-i(u·h + v·w)) gives

        F(u, v) = (cc - ss) - i (cs + sc)        F(u, -v) = (cc + ss) + i (cs - sc)

    These are coefficients 0 and 3 where both u and v have a mirror (``tall`` and ``wide``); signs of i that student and
    teacher share do not matter. Where one of them has none, its slot holds two real rows: F is then cc - i cs for the
    first u and sc - i ss for the second (``wide``), or cc - i sc and cs - i ss (``tall``). Where neither has, the four
    numbers are real coefficients of four frequencies: cc, cs, sc, ss are the numbers 0, 1, 2, 3.
    """
    both = tall & wide
    re0, im0 = cc - tl.where(both, ss, 0), tl.where(wide, cs, 0) + tl.where(tall, sc, 0)
    re3, im3 = ss + tl.where(both, cc, 0), tl.where(wide, sc, 0) - tl.where(tall, cs, 0)
    return re0, im0, cs, sc, re3, im3


@triton.jit
def _spectrum_adjoint(re0, im0, cs, sc, re3, im3, tall, wide):
    """``_spectrum`` backwards, from gradients to gradients."""
    both = tall & wide
    return (
        re0 + tl.where(both, re3, 0),
        cs + tl.where(wide, im0, 0) - tl.where(tall, im3, 0),
        sc + tl.where(tall, im0, 0) + tl.where(wide, im3, 0),
        re3 - tl.where(both, re0, 0),
    )


@triton.jit
def _direction(re, im):
    """The unit vector and the length of complex numbers; zeros for 0. Nothing overflows or underflows on the way."""
    largest = tl.maximum(tl.abs(re), tl.abs(im))
    divisor = tl.where(largest > 0, largest, 1)
    re, im = re / divisor, im / divisor
    length = tl.where(largest > 0, tl.sqrt(re * re + im * im), 1)
    return re / length, im / length, largest * length


@triton.jit
def _distance(re_s, im_s, re_t, im_t, rate, DISTANCE: tl.constexpr):
    """Distance of two coefficients; "l2" and "gaussian" get the coefficient of the difference as the first."""
    if DISTANCE == "cosine":
        re_s, im_s, _ = _direction(re_s, im_s)
        re_t, im_t, _ = _direction(re_t, im_t)
        return 1 - (re_s * re_t + im_s * im_t)
    else:
        power = re_s * re_s + im_s * im_s
        if DISTANCE == "l2":
            return power
        else:  # 1 - exp(-x), for small x by its series, which loses no digits
            x = rate * power
            series = tl.full(x.shape, 1, x.dtype)
            for i in tl.static_range(12, 1, -1):
                series = 1 - x * series / i
            return tl.where(x < 0.25, x * series, 1 - tl.exp(-x))


@triton.jit
def _slope(re_s, im_s, re_t, im_t, weight, rate, DISTANCE: tl.constexpr):
    """``weight`` times the derivative of ``_distance`` by its first coefficient."""
    if DISTANCE == "cosine":
        re_s, im_s, length = _direction(re_s, im_s)
        re_t, im_t, other = _direction(re_t, im_t)
        nonzero = (length > 0) & (other > 0)
        weight = tl.where(nonzero, -weight / tl.where(nonzero, length, 1), 0)
        cosine = re_s * re_t + im_s * im_t
        return weight * (re_t - cosine * re_s), weight * (im_t - cosine * im_s)
    else:
        weight = 2 * weight
        if DISTANCE == "gaussian":
            x = rate * (re_s * re_s + im_s * im_s)
            weight = weight * rate * tl.exp(-x)
        return weight * re_s, weight * im_s


@triton.jit
def _spectra(x, y, basis_h, basis_w, tall, wide, DISTANCE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):
    """The coefficients of a student's and a teacher's tile; but for "cosine", twice those of the difference."""
    if DISTANCE == "cosine":
        cc, cs, sc, ss = _coefficients(x, basis_h, basis_w, BLOCK_C, BLOCK_H)
        s = _spectrum(cc, cs, sc, ss, tall, wide)
        cc, cs, sc, ss = _coefficients(y, basis_h, basis_w, BLOCK_C, BLOCK_H)
        return s, _spectrum(cc, cs, sc, ss, tall, wide)
    else:
        cc, cs, sc, ss = _coefficients(x - y, basis_h, basis_w, BLOCK_C, BLOCK_H)
        s = _spectrum(cc, cs, sc, ss, tall, wide)
        return s, s


@triton.jit
def _forward_kernel(
    student_ptr,  # (B, C, H, W), any strides
    teacher_ptr,  # (B, C, H, W), any strides
    basis_h_ptr,  # (H, 2·U), padded; unused where BLOCK_H is 1
    basis_w_ptr,  # (W, 2·V), padded; where BLOCK_H is 1, (H·W, 2·U) of the whole map
    partial_ptr,  # (B, SPLITS, KINDS, V, U): sums over the channels of one program, by coefficient and slot
    rate: tl.float64, channels, student_stride_b, teacher_stride_b,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr,  # strides (C, H, W)
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, REALS: tl.constexpr, DISTANCE: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, KINDS: tl.constexpr, V: tl.constexpr, U: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program sums the distances of STEPS·BLOCK_C channels of one sample in one chunk of slots, in a fixed order.

    The programs of one sample's chunks are neighbours: the tile that they share comes from the cache.
    """
    DTYPE: tl.constexpr = basis_w_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = V // BLOCK_V
    part, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    sample, first = (part // SPLITS).to(tl.int64), part % SPLITS * (STEPS * BLOCK_C)
    student = student_ptr + sample * student_stride_b + first.to(tl.int64) * STUDENT[0]
    teacher = teacher_ptr + sample * teacher_stride_b + first.to(tl.int64) * TEACHER[0]
    student_pixels = _pixels(STUDENT, WIDTH, BLOCK_C, BLOCK_H, BLOCK_W)
    teacher_pixels = _pixels(TEACHER, WIDTH, BLOCK_C, BLOCK_H, BLOCK_W)
    basis_h, basis_w, _, tall, wide = _chunk(
        chunk, basis_h_ptr, basis_w_ptr, REALS, V, U, BLOCK_C, BLOCK_H, BLOCK_W, BLOCK_V
    )
    rate, zero = tl.full((1, 1), rate, DTYPE), tl.zeros((BLOCK_C * BLOCK_V, U), DTYPE)
    sum0, sum1, sum2, sum3 = zero, zero, zero, zero
    left = channels - first
    for _ in range(STEPS):
        inside = _inside(left, HEIGHT, WIDTH, BLOCK_C, BLOCK_H, BLOCK_W)
        x = tl.load(student + student_pixels, inside, 0).to(DTYPE)
        y = tl.load(teacher + teacher_pixels, inside, 0).to(DTYPE)
        s, t = _spectra(x, y, basis_h, basis_w, tall, wide, DISTANCE, BLOCK_C, BLOCK_H)
        exists = (tl.arange(0, BLOCK_C * BLOCK_V) // BLOCK_V < left)[:, None]  # the distance of 0 and 0 may be 1
        sum0 += tl.where(exists, _distance(s[0], s[1], t[0], t[1], rate, DISTANCE), 0)
        sum1 += tl.where(exists, _distance(s[2], zero, t[2], zero, rate, DISTANCE), 0)
        if BLOCK_H > 1:
            sum2 += tl.where(exists, _distance(s[3], zero, t[3], zero, rate, DISTANCE), 0)
            sum3 += tl.where(exists, _distance(s[4], s[5], t[4], t[5], rate, DISTANCE), 0)
        student += BLOCK_C * STUDENT[0]
        teacher += BLOCK_C * TEACHER[0]
        left -= BLOCK_C
    slot = chunk * (BLOCK_V * U) + tl.arange(0, BLOCK_V * U)
    partial = partial_ptr + part.to(tl.int64) * (KINDS * V * U) + slot
    shape: tl.constexpr = (BLOCK_C, BLOCK_V * U)
    tl.store(partial, tl.sum(tl.reshape(sum0, shape), 0))
    tl.store(partial + V * U, tl.sum(tl.reshape(sum1, shape), 0))
    if BLOCK_H > 1:
        tl.store(partial + 2 * V * U, tl.sum(tl.reshape(sum2, shape), 0))
        tl.store(partial + 3 * V * U, tl.sum(tl.reshape(sum3, shape), 0))


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
    total = tl.zeros((BLOCK,), weight_ptr.dtype.element_ty)
    for i in tl.static_range(2):
        frequency = tl.load(frequencies_ptr + i * SLOTS + slot, slot < SLOTS, -1).to(tl.int64)
        grad = (
            grad_ptr + sample * grad_stride_b + frequency // WIDTH * grad_stride_h + frequency % WIDTH * grad_stride_w
        )
        total += tl.load(grad, frequency >= 0, 0).to(total.dtype)
    tl.store(weight_ptr + sample * SLOTS + slot, total / channels, slot < SLOTS)


@triton.jit
def _backward_kernel(
    student_ptr,  # (B, C, H, W), any strides
    teacher_ptr,  # (B, C, H, W), any strides
    out_ptr,  # (B, C, H, W), any strides: the gradient of the student
    basis_h_ptr, basis_w_ptr,  # as in the forward kernel
    weight_ptr,  # (B, KINDS, V, U)
    rate: tl.float64, channels, student_stride_b, teacher_stride_b, out_stride_b,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, OUT: tl.constexpr,  # strides (C, H, W)
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, REALS: tl.constexpr, DISTANCE: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, KINDS: tl.constexpr, V: tl.constexpr, U: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The spectra once more, the derivative of the distance in each slot, and the transposed bases back.

    The basis is a real linear map: no convention of complex gradients, and no symmetry of ``grad``, is needed.
    """
    DTYPE: tl.constexpr = basis_w_ptr.dtype.element_ty
    part = tl.program_id(0)
    sample, first = (part // SPLITS).to(tl.int64), part % SPLITS * (STEPS * BLOCK_C)
    student = student_ptr + sample * student_stride_b + first.to(tl.int64) * STUDENT[0]
    teacher = teacher_ptr + sample * teacher_stride_b + first.to(tl.int64) * TEACHER[0]
    out = out_ptr + sample * out_stride_b + first.to(tl.int64) * OUT[0]
    student_pixels = _pixels(STUDENT, WIDTH, BLOCK_C, BLOCK_H, BLOCK_W)
    teacher_pixels = _pixels(TEACHER, WIDTH, BLOCK_C, BLOCK_H, BLOCK_W)
    rate, zero = tl.full((1, 1), rate, DTYPE), tl.zeros((BLOCK_C * BLOCK_V, U), DTYPE)
    left = channels - first
    for _ in range(STEPS):
        inside = _inside(left, HEIGHT, WIDTH, BLOCK_C, BLOCK_H, BLOCK_W)
        gradient = tl.zeros((BLOCK_H * BLOCK_C, BLOCK_W), DTYPE)
        for chunk in range(V // BLOCK_V):
            x = tl.load(student + student_pixels, inside, 0).to(DTYPE)
            y = tl.load(teacher + teacher_pixels, inside, 0).to(DTYPE)
            basis_h, basis_w, slot, tall, wide = _chunk(
                chunk, basis_h_ptr, basis_w_ptr, REALS, V, U, BLOCK_C, BLOCK_H, BLOCK_W, BLOCK_V
            )
            s, t = _spectra(x, y, basis_h, basis_w, tall, wide, DISTANCE, BLOCK_C, BLOCK_H)
            weight = weight_ptr + sample * (KINDS * V * U) + slot
            re0, im0 = _slope(s[0], s[1], t[0], t[1], tl.load(weight), rate, DISTANCE)
            re1 = _slope(s[2], zero, t[2], zero, tl.load(weight + V * U), rate, DISTANCE)[0]
            re2, re3, im3 = zero, zero, zero
            if BLOCK_H > 1:
                re2 = _slope(s[3], zero, t[3], zero, tl.load(weight + 2 * V * U), rate, DISTANCE)[0]
                re3, im3 = _slope(s[4], s[5], t[4], t[5], tl.load(weight + 3 * V * U), rate, DISTANCE)
            cc, cs, sc, ss = _spectrum_adjoint(re0, im0, re1, re2, re3, im3, tall, wide)
            gradient += _adjoint(cc, cs, sc, ss, basis_h, basis_w, BLOCK_C, BLOCK_H)
        tl.store(out + _pixels(OUT, WIDTH, BLOCK_C, BLOCK_H, BLOCK_W), gradient.to(out_ptr.dtype.element_ty), inside)
        student += BLOCK_C * STUDENT[0]
        teacher += BLOCK_C * TEACHER[0]
        out += BLOCK_C * OUT[0]
        left -= BLOCK_C


def _padded(side: int) -> int:
    return max(16, triton.next_power_of_2(side))


def _basis(height: int, width: int, exponent: float, block: int) -> tuple[Tensor, Tensor, int]:
    """The real Fourier basis of an image, scaled by ``(height·width)**exponent``.

    Returns:
        ``(block, block)`` float64, a row per pixel, two columns per slot, padded with zeros; the two frequencies of
        every slot, ``(block // 2, 2)``, padded with -1; and the number of slots with two self-mirrored frequencies.
    """
    index = torch.arange(height * width)
    mirror = -(index // width) % height * width + -(index % width) % width
    own = index[index == mirror]
    own = torch.nn.functional.pad(own, (0, len(own) % 2), value=-1).view(-1, 2)
    pairs = torch.stack((index, mirror), 1)[index < mirror]
    slots = torch.cat((own, pairs, own.new_full((block // 2 - len(own) - len(pairs), 2), -1)))
    h, w = index[:, None, None] // width, index[:, None, None] % width
    turns = h * (slots // width) % height * width + w * (slots % width) % width * height  # in units of 1/(H·W)
    angle = 2 * math.pi / len(index) * turns.double()
    columns = angle.cos()
    columns[:, len(own) :, 1] = angle[:, len(own) :, 0].sin()
    basis = torch.zeros(block, block, dtype=torch.float64)
    basis[: len(index)] = torch.where(slots >= 0, columns, 0).flatten(1) * len(index) ** exponent
    return basis, slots, len(own)


class _Plan(NamedTuple):
    basis_h: Tensor  # (BLOCK_H, BLOCK_H)
    basis_w: Tensor  # (BLOCK_W, BLOCK_W)
    slots: Tensor  # (H·W,) int32: in which coefficient of which slot a frequency lies
    frequencies: Tensor  # (2, 2 or 4, V, U) int32: and back, a frequency and its mirror, -1 where there is none
    shape: dict[str, int]  # the constants of the kernels that depend on the map alone


@cache  # never emptied: a captured CUDA graph goes on reading the tables of its warm-up
def _plan(height: int, width: int, norm: str, dtype: torch.dtype, device: torch.device) -> _Plan:
    exponent, pixels = EXPONENT[norm], height * width
    if pixels <= JOINT:
        block_h, block_w = 1, _padded(pixels)
        basis_w, slots, reals = _basis(height, width, exponent, block_w)
        basis_h = basis_w
        real = torch.arange(len(slots)) < reals
        first = torch.stack((slots[:, 0], torch.where(real, slots[:, 1], -1)))[:, None]
    else:
        block_h, block_w = _padded(height), _padded(width)
        basis_h, u, reals = _basis(height, 1, exponent, block_h)
        basis_w, slots, _ = _basis(1, width, exponent, block_w)
        v = slots[:, None]  # (V, 1, 2)
        tall, wide = torch.arange(len(u)) > 0, torch.arange(len(v))[:, None] > 0

        def at(i: int, j: int) -> Tensor:
            return torch.where((u[:, i] >= 0) & (v[..., j] >= 0), u[:, i] * width + v[..., j], -1)

        last = torch.where(tall, at(0, 1), torch.where(wide, at(1, 0), at(1, 1)))
        corner = [torch.where(tall | wide, -1, at(*place)) for place in ((0, 1), (1, 0))]
        first = torch.stack((at(0, 0), *corner, last))
    mirror = -(first // width) % height * width + -(first % width) % width
    frequencies = torch.stack((first, torch.where((first >= 0) & (mirror != first), mirror, -1)))
    slots = torch.empty(pixels, dtype=torch.int32)
    for row in frequencies.flatten(1):
        slots[row[row >= 0]] = (row >= 0).nonzero()[:, 0].int()
    tables = basis_h.to(dtype), basis_w.to(dtype), slots, frequencies.int()
    kinds, v, u = first.shape
    shape = {"HEIGHT": height, "WIDTH": width, "REALS": reals, "KINDS": kinds, "V": v, "U": u}
    shape |= {"BLOCK_H": block_h, "BLOCK_W": block_w}
    return _Plan(*(table.to(device) for table in tables), shape)


def _configuration(batch: int, channels: int, plan: _Plan, distance: str) -> dict[str, Any]:
    """How the channels of a sample are shared out, and the slots: the constants of both kernels, and their warps."""
    joint, padded = plan.shape["BLOCK_H"] == 1, plan.shape["BLOCK_H"] * plan.shape["BLOCK_W"]
    block_c = max(16 if joint else 1, min(TILE // padded, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, block_c)
    steps = triton.cdiv(blocks, max(1, min(SPLITS, triton.cdiv(PROGRAMS, batch))))
    return plan.shape | {
        "DISTANCE": distance,
        "SPLITS": triton.cdiv(blocks, steps),
        "STEPS": steps,
        "BLOCK_C": block_c,
        "BLOCK_V": min(BLOCK_V, plan.shape["V"]),
        "num_warps": 8,
        "num_stages": 1,
    }


def _heavy(student: Tensor, teacher: Tensor, light: bool) -> bool:
    height, width = student.shape[2:]
    large = height * width > JOINT and _padded(height) * _padded(width) > HEAVY
    return large and not (light and accumulation(student, teacher) == torch.float32)


def spectral_distance(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> Tensor:
    """See ``reference.spectral_distance``."""
    if _heavy(student, teacher, light=True):
        return reference.spectral_distance(student, teacher, distance, sigma, norm)
    batch, channels, height, width = student.shape
    plan = _plan(height, width, norm, accumulation(student, teacher), student.device)
    out = student.new_empty((batch, height, width), dtype=plan.basis_w.dtype)
    if batch == 0:
        return out
    options = _configuration(batch, channels, plan, distance)
    splits, slots = options["SPLITS"], plan.frequencies[0].numel()
    chunks = options["V"] // options["BLOCK_V"]
    partial = out.new_empty((batch, splits, slots))
    _triton.launch(
        _forward_kernel, (batch * splits * chunks,), student, teacher, plan.basis_h, plan.basis_w, partial,
        0.5 / sigma**2, channels, student.stride(0), teacher.stride(0),
        STUDENT=student.stride()[1:], TEACHER=teacher.stride()[1:], **options,
    )  # fmt: skip
    _triton.launch(
        _gather_kernel, (batch * triton.cdiv(height * width, GATHERED),), partial, plan.slots, out, channels,
        FREQUENCIES=height * width, SPLITS=splits, SLOTS=slots,
        BLOCK_S=triton.next_power_of_2(splits), BLOCK_F=GATHERED,
    )  # fmt: skip
    return out


def spectral_distance_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str
) -> Tensor:
    """See ``reference.spectral_distance_backward``."""
    if _heavy(student, teacher, light=distance != "cosine"):
        return reference.spectral_distance_backward(grad, student, teacher, distance, sigma, norm)
    batch, channels, height, width = student.shape
    out = torch.empty_like(student)
    if batch == 0:
        return out
    plan = _plan(height, width, norm, accumulation(student, teacher), student.device)
    options = _configuration(batch, channels, plan, distance)
    slots = plan.frequencies[0].numel()
    weight = plan.basis_w.new_empty((batch, slots))
    _triton.launch(
        _weigh_kernel, (batch * triton.cdiv(slots, GATHERED),), grad, plan.frequencies, weight, channels,
        *grad.stride(), WIDTH=width, SLOTS=slots, BLOCK=GATHERED,
    )  # fmt: skip
    _triton.launch(
        _backward_kernel, (batch * options["SPLITS"],), student, teacher, out, plan.basis_h, plan.basis_w, weight,
        0.5 / sigma**2, channels, student.stride(0), teacher.stride(0), out.stride(0),
        STUDENT=student.stride()[1:], TEACHER=teacher.stride()[1:], OUT=out.stride()[1:], **options,
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
