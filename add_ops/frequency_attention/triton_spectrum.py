"""What the Triton kernels of the spectral distance are made of: tiles, products with the bases, spectra, distances.

A program takes some channels of one sample. Its tile is folded for a class of the slots (see ``triton_plan.py``) while
it is loaded, and multiplied by blocks of rows and columns; no side need fit the registers whole.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .. import _triton


class Tile(NamedTuple):
    """A map's constants (``triton_plan``) and the blocks that a program takes of it; Triton 3.6 wants constexprs."""

    HEIGHT: tl.constexpr
    WIDTH: tl.constexpr
    FOLD_H: tl.constexpr  # 2 of a folded side, else 1; so many classes
    FOLD_W: tl.constexpr
    REALS: tl.constexpr  # of a whole map: its slots of two frequencies
    KINDS: tl.constexpr  # coefficients in a slot, 4; of a whole map 2
    V: tl.constexpr  # slots of the width in a class
    U: tl.constexpr  # slots of the height in a class; of a whole map all
    BLOCK_H: tl.constexpr  # padded rows of a class; 1 of a whole map
    BLOCK_W: tl.constexpr  # padded columns of a class; pixels of a whole map
    BLOCK_C: tl.constexpr  # channels of a tile
    BLOCK_R: tl.constexpr  # rows that one product along the height sums over
    BLOCK_K: tl.constexpr  # columns that one product along the width sums over, or one program writes of the gradient
    BLOCK_V: tl.constexpr  # slots of the width in a chunk
    BLOCK_U: tl.constexpr  # slots of the height in a chunk
    CHUNKS: tl.constexpr  # of all classes
    GROUP: tl.constexpr  # chunks that share what is loaded
    HELD: tl.constexpr  # one chunk is all there is: its factors are loaded once


@triton.jit
def _pixels(STRIDES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets (H·C, W) of a tile's first rows and columns; (C, H·W) of whole maps."""
    row, column = tl.arange(0, ROWS * TILE.BLOCK_C)[:, None], tl.arange(0, COLUMNS)[None, :]
    channel = row % TILE.BLOCK_C * STRIDES[0]
    if TILE.BLOCK_H > 1:
        return channel + row // TILE.BLOCK_C * STRIDES[1] + column * STRIDES[2]
    elif STRIDES[1] == TILE.WIDTH * STRIDES[2]:  # without the division the compiler sees which pixels lie side by side
        return channel + column * STRIDES[2]
    else:
        return channel + column // TILE.WIDTH * STRIDES[1] + column % TILE.WIDTH * STRIDES[2]


@triton.jit
def _inside(channels, top, left, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a quadrant from ``top`` and ``left`` on exist, ``channels`` being left."""
    row, column = tl.arange(0, ROWS * TILE.BLOCK_C)[:, None], tl.arange(0, COLUMNS)[None, :]
    if TILE.BLOCK_H > 1:
        rows = (row % TILE.BLOCK_C < channels) & (top + row // TILE.BLOCK_C < TILE.HEIGHT // TILE.FOLD_H)
        return rows & (left + column < TILE.WIDTH // TILE.FOLD_W)
    else:
        return (row < channels) & (column < TILE.HEIGHT * TILE.WIDTH)


@triton.jit
def _quadrant(i: tl.constexpr, j: tl.constexpr, STRIDES: tl.constexpr, TILE: tl.constexpr):
    """Where a quadrant of the map begins: its halves along each folded side."""
    return i * (TILE.HEIGHT // TILE.FOLD_H) * STRIDES[1] + j * (TILE.WIDTH // TILE.FOLD_W) * STRIDES[2]


@triton.jit
def _sign(i: tl.constexpr, j: tl.constexpr, a, b):
    """With which sign the quadrant (i, j) folds into the class (a, b), and unfolds from it."""
    return (1 - 2 * a * i) * (1 - 2 * b * j)


@triton.jit
def _folded(x_ptr, y_ptr, channels, a, b, top, left, X: tl.constexpr, Y: tl.constexpr, TILE: tl.constexpr):
    """Of x, or of x - y where y is not None: rows and columns from ``top`` and ``left`` on, folded for class (a, b)."""
    inside = _inside(channels, top, left, TILE, TILE.BLOCK_R, TILE.BLOCK_K)
    total = None
    for j in tl.static_range(TILE.FOLD_W):  # the classes of one a share the sums along the height
        column = None
        for i in tl.static_range(TILE.FOLD_H):
            start = top * X[1] + left * X[2] + _quadrant(i, j, X, TILE)
            x = tl.load(x_ptr + start + _pixels(X, TILE, TILE.BLOCK_R, TILE.BLOCK_K), inside, 0).to(tl.float32)
            if y_ptr is not None:
                start = top * Y[1] + left * Y[2] + _quadrant(i, j, Y, TILE)
                x -= tl.load(y_ptr + start + _pixels(Y, TILE, TILE.BLOCK_R, TILE.BLOCK_K), inside, 0).to(tl.float32)
            column = x if i == 0 else column + x * (1 - 2 * a)
        total = column if j == 0 else total + column * (1 - 2 * b)
    return total


@triton.jit
def _factor(
    basis_ptr, part, pixel, slot, TRANSPOSED: tl.constexpr, FOURS: tl.constexpr,
    SIDE: tl.constexpr, FOLD: tl.constexpr, PIXELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """From PIXELS of a side of one class (``part`` of FOLD) to SLOTS of its slots, or transposed, as ``_dot`` wants it:
    the high halves, and high and low ones side by side. With FOURS in the order that ``_together`` makes.
    """
    LOW: tl.constexpr = FOLD * SIDE * SIDE  # how much further on the low halves lie
    K: tl.constexpr = 2 * SLOTS if TRANSPOSED else PIXELS
    N: tl.constexpr = PIXELS if TRANSPOSED else 2 * SLOTS
    k, n = tl.arange(0, K)[:, None], tl.arange(0, N)[None, :]
    both = tl.arange(0, 2 * N)[None, :]
    basis_ptr += (part * SIDE + pixel) * SIDE + 2 * slot
    if FOURS:
        k = k // 8 * 8 + k % 4 * 2 + k // 4 % 2
    if TRANSPOSED:
        return tl.load(basis_ptr + n * SIDE + k), tl.load(basis_ptr + both // N * LOW + both % N * SIDE + k)
    else:
        return tl.load(basis_ptr + k * SIDE + n), tl.load(basis_ptr + both // N * LOW + k * SIDE + both % N)


@triton.jit
def _chunk(chunk, TILE: tl.constexpr):
    """The class (a, b) of a chunk, and its first slots of the width and of the height."""
    u, rest = chunk % (TILE.U // TILE.BLOCK_U) * TILE.BLOCK_U, chunk // (TILE.U // TILE.BLOCK_U)
    v, rest = rest % (TILE.V // TILE.BLOCK_V) * TILE.BLOCK_V, rest // (TILE.V // TILE.BLOCK_V)
    return rest // TILE.FOLD_W, rest % TILE.FOLD_W, v, u


@triton.jit
def _mirrored(a, b, v, u, TILE: tl.constexpr):
    """As 1 or 0, which slots (V, U) hold one frequency and its mirror along the height, and which along the width.

    A side has at most one slot of two frequencies, the first; the odd class of an even M has none. A whole map has
    REALS of them, in the place of the width's.
    """
    v = v + tl.arange(0, TILE.BLOCK_C * TILE.BLOCK_V)[:, None] % TILE.BLOCK_V
    u = u + tl.arange(0, TILE.BLOCK_U)[None, :]
    if TILE.BLOCK_H > 1:
        own_h, own_w = 1 - a * (1 - TILE.HEIGHT // 2 % 2), 1 - b * (1 - TILE.WIDTH // 2 % 2)
        return (u >= own_h).to(tl.float32), (v >= own_w).to(tl.float32)
    else:
        return (u < 0).to(tl.float32), (u >= TILE.REALS).to(tl.float32)


@triton.jit
def _dot(x, factor, total):  # (M, K), (K, N) and (K, 2·N), (M, N) -> (M, N)
    """``total + x @ factor``, as hi·hi + hi·lo + lo·hi of tf32 halves; exact to about 2⁻²¹.

    The low half of x comes last: then the compiler sees that both halves can be made where the tensor cores want x.
    """
    factor_high, factor_both = factor
    M: tl.constexpr = total.shape[0]
    N: tl.constexpr = total.shape[1]
    high, low = _triton.split(x)
    products = tl.reshape(tl.permute(tl.join(total, tl.zeros_like(total)), (0, 2, 1)), (M, 2 * N))
    products = tl.dot(high, factor_both, products, input_precision="tf32")
    large, small = tl.split(tl.permute(tl.reshape(products, (M, 2, N)), (0, 2, 1)))
    return tl.dot(low, factor_high, large + small, input_precision="tf32")


@triton.jit
def _apart(x):  # (M, 2·N) -> twice (M, N): the even and the odd columns
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _apart_both(x):  # (2·M, 2·N) -> (M, N) of cosines of both, cosines and sines, sines and cosines, sines of both
    """Rows: eight cosines, eight sines, …, columns: one and one. So all four are in one thread of tensor cores."""
    x = tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1] // 2, 2))
    cos, sin = tl.split(tl.permute(x, (0, 2, 3, 4, 1)))
    cc, sc = tl.split(cos)
    cs, ss = tl.split(sin)
    M: tl.constexpr = x.shape[0] * 8
    return _flat(cc, M), _flat(cs, M), _flat(sc, M), _flat(ss, M)


@triton.jit
def _flat(x, M: tl.constexpr):
    return tl.reshape(x, (M, x.shape[2]))


@triton.jit
def _together_both(cc, cs, sc, ss):  # and back, columns as in ``_together``
    M: tl.constexpr = cc.shape[0]
    N: tl.constexpr = cc.shape[1]
    x = tl.reshape(tl.join(tl.join(cc, sc), tl.join(cs, ss)), (M // 8, 8, N // 4, 4, 2, 2))
    return tl.reshape(tl.permute(x, (0, 5, 1, 2, 4, 3)), (2 * M, 2 * N))


@triton.jit
def _together(even, odd):  # twice (M, N) -> (M, 2·N)
    """Four even columns, four odd ones, …: in this order a thread of tensor cores has what it takes as a factor."""
    M: tl.constexpr = even.shape[0]
    N: tl.constexpr = even.shape[1]
    return tl.reshape(tl.permute(tl.reshape(tl.join(even, odd), (M, N // 4, 4, 2)), (0, 1, 3, 2)), (M, 2 * N))


@triton.jit
def _factor_w(bases, b, v, left, TRANSPOSED: tl.constexpr, TILE: tl.constexpr):
    """Of the width: from BLOCK_K columns to a chunk's slots or, transposed, from slots to BLOCK_K columns."""
    if TILE.HELD:
        return bases[1]
    else:
        return _factor(bases[1], b, left, v, TRANSPOSED, False, TILE.BLOCK_W, TILE.FOLD_W, TILE.BLOCK_K, TILE.BLOCK_V)


@triton.jit
def _factor_h(bases, a, u, top, TRANSPOSED: tl.constexpr, TILE: tl.constexpr):
    """Of the height: from BLOCK_R rows to a chunk's slots or, transposed, from slots to all rows."""
    if TILE.HELD:
        return bases[0]
    else:
        ROWS: tl.constexpr = TILE.BLOCK_H if TRANSPOSED else TILE.BLOCK_R
        return _factor(bases[0], a, top, u, TRANSPOSED, TRANSPOSED, TILE.BLOCK_H, TILE.FOLD_H, ROWS, TILE.BLOCK_U)


@triton.jit
def _held(basis_h_ptr, basis_w_ptr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr):
    """Both factors of a map of one chunk, for as long as a program runs."""
    W: tl.constexpr = TILE.BLOCK_W
    H: tl.constexpr = TILE.BLOCK_H
    w = _factor(basis_w_ptr, 0, 0, 0, TRANSPOSED, TRANSPOSED and H == 1, W, 1, W, W // 2)
    if H > 1:
        return _factor(basis_h_ptr, 0, 0, 0, TRANSPOSED, TRANSPOSED, H, 1, H, H // 2), w
    else:
        return w, w


@triton.jit
def _coefficients(x_ptr, y_ptr, channels, bases, place, X: tl.constexpr, Y: tl.constexpr, TILE: tl.constexpr):
    """Of a tile's chunk at ``place`` (see ``_chunk``): the real coefficients (C·V, U) of its slots, cos·cos, cos·sin,
    sin·cos, sin·sin of height·width.

    A whole map has no sines of the height.
    """
    a, b, v, u = place
    if TILE.BLOCK_H > 1:
        total = tl.zeros((2 * TILE.BLOCK_C * TILE.BLOCK_V, 2 * TILE.BLOCK_U), tl.float32)
        for top in range(0, TILE.BLOCK_H, TILE.BLOCK_R):
            rows = tl.zeros((TILE.BLOCK_R * TILE.BLOCK_C, 2 * TILE.BLOCK_V), tl.float32)
            for left in range(0, TILE.BLOCK_W, TILE.BLOCK_K):
                x = _folded(x_ptr, y_ptr, channels, a, b, top, left, X, Y, TILE)
                rows = _dot(x, _factor_w(bases, b, v, left, False, TILE), rows)
            rows = tl.trans(tl.reshape(rows, (TILE.BLOCK_R, 2 * TILE.BLOCK_C * TILE.BLOCK_V)))
            total = _dot(rows, _factor_h(bases, a, u, top, False, TILE), total)
        return _apart_both(total)
    else:
        x = _folded(x_ptr, y_ptr, channels, a, b, 0, 0, X, Y, TILE)
        cos, sin = _apart(_dot(x, bases[1], tl.zeros((TILE.BLOCK_C, TILE.BLOCK_W), tl.float32)))
        zero = tl.zeros_like(cos)
        return cos, sin, zero, zero


@triton.jit
def _adjoint(cc, cs, sc, ss, bases, place, left, TILE: tl.constexpr):
    """``_coefficients`` backwards: from its results' gradients to the folded tile's, columns from ``left`` on."""
    a, b, v, u = place
    if TILE.BLOCK_H > 1:
        rows = tl.zeros((2 * TILE.BLOCK_C * TILE.BLOCK_V, TILE.BLOCK_H), tl.float32)
        rows = _dot(_together_both(cc, cs, sc, ss), _factor_h(bases, a, u, 0, True, TILE), rows)
        rows = tl.reshape(tl.trans(rows), (TILE.BLOCK_H * TILE.BLOCK_C, 2 * TILE.BLOCK_V))
        total = tl.zeros((TILE.BLOCK_H * TILE.BLOCK_C, TILE.BLOCK_K), tl.float32)
        return _dot(rows, _factor_w(bases, b, v, left, True, TILE), total)
    else:
        return _dot(_together(cc, cs), bases[1], tl.zeros((TILE.BLOCK_C, TILE.BLOCK_W), tl.float32))


@triton.jit
def _spectrum(cc, cs, sc, ss, tall, wide):
    """Real and imaginary parts of every slot's coefficients 0, 1, 2 and 3; 1 and 2 are real.

    With c, s the cosine and sine of the height's frequency u and the width's v, F = Σ x·exp(-i(u·h + v·w)) gives

        F(u, v) = (cc - ss) - i (cs + sc)        F(u, -v) = (cc + ss) + i (cs - sc)

    These are coefficients 0 and 3 where both u and v have a mirror (``tall`` and ``wide``); signs of i that student and
    teacher share do not matter. Where one of them has none, its slot holds two real rows: F is then cc - i cs for the
    first u and sc - i ss for the second (``wide``), or cc - i sc and cs - i ss (``tall``). Where neither has, the four
    numbers are real coefficients of four frequencies: cc, cs, sc, ss are the numbers 0, 1, 2, 3.
    """
    both = tall * wide
    zero = tl.zeros_like(cc)
    return cc - both * ss, wide * cs + tall * sc, cs, zero, sc, zero, ss + both * cc, wide * sc - tall * cs


@triton.jit
def _spectrum_adjoint(gradients, tall, wide):
    """``_spectrum`` backwards, from gradients to gradients."""
    re0, im0, cs, _, sc, _, re3, im3 = gradients
    both = tall * wide
    return re0 + both * re3, cs + wide * im0 - tall * im3, sc + tall * im0 + wide * im3, re3 - both * re0


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
def _spectra(
    x_ptr, y_ptr, channels, bases, place, tall, wide,
    X: tl.constexpr, Y: tl.constexpr, DISTANCE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One chunk's coefficients of a student's and a teacher's tile; but for "cosine", twice those of the difference."""
    if DISTANCE == "cosine":
        cc, cs, sc, ss = _coefficients(x_ptr, None, channels, bases, place, X, Y, TILE)
        s = _spectrum(cc, cs, sc, ss, tall, wide)
        cc, cs, sc, ss = _coefficients(y_ptr, None, channels, bases, place, Y, Y, TILE)
        return s, _spectrum(cc, cs, sc, ss, tall, wide)
    else:
        cc, cs, sc, ss = _coefficients(x_ptr, y_ptr, channels, bases, place, X, Y, TILE)
        s = _spectrum(cc, cs, sc, ss, tall, wide)
        return s, s
