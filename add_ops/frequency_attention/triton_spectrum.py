"""What the kernels are made of: a tile, its spectrum and back, and distances. For the words, see the README here."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .. import _triton


class Tile(NamedTuple):
    """The constants of maps of one size; Triton 3.6 wants constexprs."""

    HEIGHT: tl.constexpr
    WIDTH: tl.constexpr
    BLOCK_C: tl.constexpr  # channels
    BLOCK_H: tl.constexpr  # padded rows; 1 of a whole map
    BLOCK_W: tl.constexpr  # padded columns; padded pixels of a whole map
    V: tl.constexpr  # pairs of the width; of a whole map 1
    U: tl.constexpr  # pairs of the height; of a whole map all
    REAL: tl.constexpr  # of a whole map: the first pairs, which hold two frequencies
    COEFFICIENTS: tl.constexpr  # of a pair of the width and one of the height 4, of a whole map's pair 2


@triton.jit
def _pixels(STRIDES: tl.constexpr, TILE: tl.constexpr):
    """Offsets (H·C, W) of a tile; (C, H·W) of whole maps."""
    row, column = tl.arange(0, TILE.BLOCK_H * TILE.BLOCK_C)[:, None], tl.arange(0, TILE.BLOCK_W)[None, :]
    channel = row % TILE.BLOCK_C * STRIDES[0]
    if TILE.BLOCK_H > 1:
        return channel + row // TILE.BLOCK_C * STRIDES[1] + column * STRIDES[2]
    elif STRIDES[1] == TILE.WIDTH * STRIDES[2]:  # without the division the compiler sees which pixels lie side by side
        return channel + column * STRIDES[2]
    else:
        return channel + column // TILE.WIDTH * STRIDES[1] + column % TILE.WIDTH * STRIDES[2]


@triton.jit
def _inside(left, TILE: tl.constexpr):
    """Which pixels of a tile exist, ``left`` channels being left."""
    row, column = tl.arange(0, TILE.BLOCK_H * TILE.BLOCK_C)[:, None], tl.arange(0, TILE.BLOCK_W)[None, :]
    COLUMNS: tl.constexpr = TILE.WIDTH if TILE.BLOCK_H > 1 else TILE.HEIGHT * TILE.WIDTH
    return (row % TILE.BLOCK_C < left) & (row // TILE.BLOCK_C < TILE.HEIGHT) & (column < COLUMNS)


@triton.jit
def _factor(basis_ptr, SIDE: tl.constexpr):  # (SIDE, 2·SIDE) -> (SIDE, SIDE) and (SIDE, 2·SIDE)
    """A basis as ``_dot`` wants it: its high halves, and high and low ones side by side."""
    basis_ptr += tl.arange(0, SIDE)[:, None] * (2 * SIDE)
    return tl.load(basis_ptr + tl.arange(0, SIDE)[None, :]), tl.load(basis_ptr + tl.arange(0, 2 * SIDE)[None, :])


@triton.jit
def _dot(x, factor):  # (M, K), (K, N) and (K, 2·N) -> (M, N)
    """``x @ factor`` as high·high + high·low + low·high of tf32 halves; exact to about 2⁻²¹.

    The low half of x comes last: then the compiler sees that both halves can be made where the tensor cores want x.
    """
    factor_high, factor_both = factor
    high, low = _triton.split(x)
    products = tl.reshape(tl.dot(high, factor_both, input_precision="tf32"), (x.shape[0], 2, factor_high.shape[1]))
    large, small = tl.split(tl.permute(products, (0, 2, 1)))
    return tl.dot(low, factor_high, large + small, input_precision="tf32")


@triton.jit
def _apart_both(x):  # (2·M, 2·N) -> four (M, N): cos·cos, cos·sin, sin·cos and sin·sin of height·width
    """Rows: eight cosines, eight sines, …, columns: one and one. So all four are in one thread of tensor cores."""
    M: tl.constexpr = x.shape[0] // 2
    N: tl.constexpr = x.shape[1] // 2
    x = tl.reshape(x, (M // 8, 2, 8, N, 2))
    cos, sin = tl.split(tl.permute(x, (0, 2, 3, 4, 1)))  # of the width
    cc, sc = tl.split(cos)
    cs, ss = tl.split(sin)
    return tl.reshape(cc, (M, N)), tl.reshape(cs, (M, N)), tl.reshape(sc, (M, N)), tl.reshape(ss, (M, N))


@triton.jit
def _together(even, odd):  # twice (M, N) -> (M, 2·N): four even columns, four odd ones, …
    """In this order a thread of tensor cores has what it takes as a factor."""
    x = tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] // 4, 4, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2)), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _together_both(cc, cs, sc, ss):  # ``_apart_both`` backwards, columns as in ``_together``
    x = tl.reshape(tl.join(tl.join(cc, sc), tl.join(cs, ss)), (cc.shape[0] // 8, 8, cc.shape[1] // 4, 4, 2, 2))
    return tl.reshape(tl.permute(x, (0, 5, 1, 2, 4, 3)), (2 * cc.shape[0], 2 * cc.shape[1]))


@triton.jit
def _sines(TILE: tl.constexpr):
    """As 1 or 0, which pairs (C·V, U) hold a sine of the height, and which of the width: all of a side but the first.

    The others hold two frequencies, zero and half the side. A whole map's pairs stand in the place of the width's.
    """
    v, u = tl.arange(0, TILE.BLOCK_C * TILE.V)[:, None] % TILE.V, tl.arange(0, TILE.U)[None, :]
    if TILE.BLOCK_H > 1:
        return (u > 0).to(tl.float32), (v > 0).to(tl.float32)
    else:
        return (u < 0).to(tl.float32), (u >= TILE.REAL).to(tl.float32)


@triton.jit
def _spectrum(x, basis_h, basis_w, TILE: tl.constexpr):  # (H·C, W), of a whole map (C, H·W) -> eight (C·V, U)
    """Real and imaginary parts of the coefficients 0, 1, 2 and 3 of every pair; 1 and 2 are real.

    With c, s the cosine and sine of the height's frequency u and the width's v, F = Σ x·exp(-i(u·h + v·w)) gives

        F(u, v) = (cc - ss) - i (cs + sc)        F(u, -v) = (cc + ss) + i (cs - sc)

    These are coefficients 0 and 3 where both pairs hold a sine; signs of i that student and teacher share do not
    matter. Where one of them has none, it holds two frequencies: F is then cc - i cs for the first u and sc - i ss for
    the second (a sine of the width), or cc - i sc and cs - i ss (of the height). Where neither has, the four numbers
    are real coefficients of four frequencies: cc, cs, sc, ss are the numbers 0, 1, 2, 3.
    """
    if TILE.BLOCK_H > 1:
        rows = tl.reshape(_dot(x, basis_w), (TILE.BLOCK_H, TILE.BLOCK_C * TILE.BLOCK_W))  # H, C·(cosines, sines)
        cc, cs, sc, ss = _apart_both(_dot(tl.trans(rows), basis_h))
    else:
        cc, cs = tl.split(tl.reshape(_dot(x, basis_w), (TILE.BLOCK_C, TILE.U, 2)))
        sc, ss = tl.zeros_like(cc), tl.zeros_like(cc)
    sine_h, sine_w = _sines(TILE)
    both, zero = sine_h * sine_w, tl.zeros_like(cc)
    return cc - both * ss, sine_w * cs + sine_h * sc, cs, zero, sc, zero, ss + both * cc, sine_w * sc - sine_h * cs


@triton.jit
def _spectrum_adjoint(gradients, basis_h, basis_w, TILE: tl.constexpr):  # eight (C·V, U) -> (H·C, W) or (C, H·W)
    """``_spectrum`` backwards, from gradients to gradients; the bases are the transposed ones."""
    re0, im0, cs, _, sc, _, re3, im3 = gradients
    sine_h, sine_w = _sines(TILE)
    both = sine_h * sine_w
    cc, ss = re0 + both * re3, re3 - both * re0
    cs, sc = cs + sine_w * im0 - sine_h * im3, sc + sine_h * im0 + sine_w * im3
    if TILE.BLOCK_H > 1:
        rows = tl.trans(_dot(_together_both(cc, cs, sc, ss), basis_h))
        return _dot(tl.reshape(rows, (TILE.BLOCK_H * TILE.BLOCK_C, TILE.BLOCK_W)), basis_w)
    else:
        return _dot(_together(cc, cs), basis_w)


@triton.jit
def _spectra(
    student_ptr, teacher_ptr, left, basis_h, basis_w,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, DISTANCE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``_spectrum`` of a student's and a teacher's tile; but for "cosine", twice that of their difference."""
    inside = _inside(left, TILE)
    student = tl.load(student_ptr + _pixels(STUDENT, TILE), inside, 0).to(tl.float32)
    teacher = tl.load(teacher_ptr + _pixels(TEACHER, TILE), inside, 0).to(tl.float32)
    if DISTANCE == "cosine":
        return _spectrum(student, basis_h, basis_w, TILE), _spectrum(teacher, basis_h, basis_w, TILE)
    else:
        spectrum = _spectrum(student - teacher, basis_h, basis_w, TILE)
        return spectrum, spectrum


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
    elif DISTANCE == "l2":
        return re_s * re_s + im_s * im_s
    else:  # 1 - exp(-x), for small x by its series, which loses no digits
        x = rate * (re_s * re_s + im_s * im_s)
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
