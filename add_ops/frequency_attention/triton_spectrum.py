"""What the Triton kernels of the spectral distance are made of: tiles, products with the bases, spectra, distances.

A program takes some channels of one sample. Its tile is folded for a class of the slots (see ``triton_plan.py``) while
it is loaded, and multiplied by blocks of rows and columns; no side need fit the registers whole.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


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
    BLOCK_K: tl.constexpr  # columns that one product along the width sums over
    BLOCK_O: tl.constexpr  # columns of the gradient that one program writes
    BLOCK_V: tl.constexpr  # slots of the width in a chunk
    BLOCK_U: tl.constexpr  # slots of the height in a chunk
    CHUNKS: tl.constexpr  # of all classes
    GROUP: tl.constexpr  # chunks that share what is loaded


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
def _folded(
    x_ptr, y_ptr, channels, a, b, top, left, X: tl.constexpr, Y: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr
):
    """Of x, or of x - y where y is not None: rows and columns from ``top`` and ``left`` on, folded for class (a, b)."""
    inside = _inside(channels, top, left, TILE, TILE.BLOCK_R, TILE.BLOCK_K)
    total = None
    for i in tl.static_range(TILE.FOLD_H):
        for j in tl.static_range(TILE.FOLD_W):
            start = top * X[1] + left * X[2] + _quadrant(i, j, X, TILE)
            x = tl.load(x_ptr + start + _pixels(X, TILE, TILE.BLOCK_R, TILE.BLOCK_K), inside, 0).to(DTYPE)
            if y_ptr is not None:
                start = top * Y[1] + left * Y[2] + _quadrant(i, j, Y, TILE)
                x -= tl.load(y_ptr + start + _pixels(Y, TILE, TILE.BLOCK_R, TILE.BLOCK_K), inside, 0).to(DTYPE)
            total = x if i + j == 0 else total + x * _sign(i, j, a, b)
    return total


@triton.jit
def _block(basis_ptr, row, column, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) of a basis with so many COLUMNS, from ``row`` and ``column`` on."""
    rows, columns = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, BLOCK)[None, :]
    return tl.load(basis_ptr + rows * COLUMNS + columns)


@triton.jit
def _transposed(basis_ptr, row, column, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``_block`` as (BLOCK, ROWS), loaded for itself: both at once would not fit the registers."""
    rows, columns = row + tl.arange(0, ROWS)[None, :], column + tl.arange(0, BLOCK)[:, None]
    return tl.load(basis_ptr + rows * COLUMNS + columns)


@triton.jit
def _chunk(chunk, TILE: tl.constexpr):
    """The class (a, b) of a chunk, and its first slots of the width and of the height."""
    u, rest = chunk % (TILE.U // TILE.BLOCK_U) * TILE.BLOCK_U, chunk // (TILE.U // TILE.BLOCK_U)
    v, rest = rest % (TILE.V // TILE.BLOCK_V) * TILE.BLOCK_V, rest // (TILE.V // TILE.BLOCK_V)
    return rest // TILE.FOLD_W, rest % TILE.FOLD_W, v, u


@triton.jit
def _mirrored(a, b, v, u, TILE: tl.constexpr):
    """Which slots (V, U) hold one frequency and its mirror along the height, and which along the width.

    A side has at most one slot of two frequencies, the first; the odd class of an even M has none. A whole map has
    REALS of them, in the place of the width's.
    """
    v = v + tl.arange(0, TILE.BLOCK_C * TILE.BLOCK_V)[:, None] % TILE.BLOCK_V
    u = u + tl.arange(0, TILE.BLOCK_U)[None, :]
    if TILE.BLOCK_H > 1:
        own_h, own_w = 1 - a * (1 - TILE.HEIGHT // 2 % 2), 1 - b * (1 - TILE.WIDTH // 2 % 2)
        return (v >= 0) & (u >= own_h), (v >= own_w) & (u >= 0)
    else:
        return (v < 0) & (u < 0), (v >= 0) & (u >= TILE.REALS)


@triton.jit
def _dot(x, y, total=None):  # (M, K), (K, N) -> (M, N)
    """In the dtype of both; float32 as hi·hi + hi·lo + lo·hi of tf32 halves, exact to about 2⁻²²."""
    if x.dtype == tl.float64:
        return tl.dot(x, y, total, input_precision="ieee", out_dtype=tl.float64)
    else:
        return tl.dot(x, y, total, input_precision="tf32x3")


@triton.jit
def _apart(x):  # (M, 2·N) -> twice (M, N): the even and the odd columns
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _apart_both(x):  # (2·M, 2·N) -> (M, N) of even rows and columns, then odd rows, odd columns, both odd
    x = tl.permute(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1] // 2, 2)), (0, 2, 1, 3))
    even, odd = tl.split(x)
    cc, cs = tl.split(even)
    sc, ss = tl.split(odd)
    return cc, cs, sc, ss


@triton.jit
def _together_both(cc, cs, sc, ss):  # and back
    x = tl.join(tl.join(cc, cs), tl.join(sc, ss))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (2 * cc.shape[0], 2 * cc.shape[1]))


@triton.jit
def _together(even, odd):  # twice (M, N) -> (M, 2·N)
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _coefficients(
    x_ptr, y_ptr, channels, basis_h_ptr, basis_w_ptr, place, X: tl.constexpr, Y: tl.constexpr, TILE: tl.constexpr
):
    """Of a tile's chunk at ``place`` (see ``_chunk``): the real coefficients (C·V, U) of its slots, cos·cos, cos·sin,
    sin·cos, sin·sin of height·width.

    A whole map has no sines of the height.
    """
    DTYPE: tl.constexpr = basis_w_ptr.dtype.element_ty
    a, b, v, u = place
    if TILE.BLOCK_H > 1:
        total = tl.zeros((2 * TILE.BLOCK_C * TILE.BLOCK_V, 2 * TILE.BLOCK_U), DTYPE)
        for top in range(0, TILE.BLOCK_H, TILE.BLOCK_R):
            rows = tl.zeros((TILE.BLOCK_R * TILE.BLOCK_C, 2 * TILE.BLOCK_V), DTYPE)
            for left in range(0, TILE.BLOCK_W, TILE.BLOCK_K):
                x = _folded(x_ptr, y_ptr, channels, a, b, top, left, X, Y, DTYPE, TILE)
                start = b * TILE.BLOCK_W + left
                basis = _block(basis_w_ptr, start, 2 * v, TILE.BLOCK_W, TILE.BLOCK_K, 2 * TILE.BLOCK_V)
                rows = _dot(x, basis, rows)
            start = a * TILE.BLOCK_H + top
            basis = _block(basis_h_ptr, start, 2 * u, TILE.BLOCK_H, TILE.BLOCK_R, 2 * TILE.BLOCK_U)
            total = _dot(tl.trans(tl.reshape(rows, (TILE.BLOCK_R, 2 * TILE.BLOCK_C * TILE.BLOCK_V))), basis, total)
        return _apart_both(total)
    else:
        x = _folded(x_ptr, y_ptr, channels, a, b, 0, 0, X, Y, DTYPE, TILE)
        cos, sin = _apart(_dot(x, _block(basis_w_ptr, 0, 0, TILE.BLOCK_W, TILE.BLOCK_W, 2 * TILE.U)))
        zero = tl.zeros_like(cos)
        return cos, sin, zero, zero


@triton.jit
def _adjoint(cc, cs, sc, ss, basis_h_ptr, basis_w_ptr, place, left, TILE: tl.constexpr):
    """``_coefficients`` backwards: from its results' gradients to the folded tile's, columns from ``left`` on."""
    a, b, v, u = place
    if TILE.BLOCK_H > 1:
        total = _together_both(cc, cs, sc, ss)
        if TILE.BLOCK_H > 32 and total.dtype == tl.float32:  # transposed, a warp of sm_80 would hold all columns
            basis = _block(basis_h_ptr, a * TILE.BLOCK_H, 2 * u, TILE.BLOCK_H, TILE.BLOCK_H, 2 * TILE.BLOCK_U)
            total = _dot(basis, tl.trans(total))
        else:
            basis = _transposed(basis_h_ptr, a * TILE.BLOCK_H, 2 * u, TILE.BLOCK_H, TILE.BLOCK_H, 2 * TILE.BLOCK_U)
            total = tl.trans(_dot(total, basis))
        total = tl.reshape(total, (TILE.BLOCK_H * TILE.BLOCK_C, 2 * TILE.BLOCK_V))
        basis = _transposed(basis_w_ptr, b * TILE.BLOCK_W + left, 2 * v, TILE.BLOCK_W, TILE.BLOCK_O, 2 * TILE.BLOCK_V)
        return _dot(total, basis)
    else:
        basis = _transposed(basis_w_ptr, 0, 0, TILE.BLOCK_W, TILE.BLOCK_W, 2 * TILE.U)
        return _dot(_together(cc, cs), basis)


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
    both = tall & wide
    re0, im0 = cc - tl.where(both, ss, 0), tl.where(wide, cs, 0) + tl.where(tall, sc, 0)
    re3, im3 = ss + tl.where(both, cc, 0), tl.where(wide, sc, 0) - tl.where(tall, cs, 0)
    zero = tl.zeros_like(cc)
    return re0, im0, cs, zero, sc, zero, re3, im3


@triton.jit
def _spectrum_adjoint(gradients, tall, wide):
    """``_spectrum`` backwards, from gradients to gradients."""
    re0, im0, cs, _, sc, _, re3, im3 = gradients
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
def _spectra(
    x_ptr, y_ptr, channels, basis_h_ptr, basis_w_ptr, place, tall, wide,
    X: tl.constexpr, Y: tl.constexpr, DISTANCE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One chunk's coefficients of a student's and a teacher's tile; but for "cosine", twice those of the difference."""
    if DISTANCE == "cosine":
        cc, cs, sc, ss = _coefficients(x_ptr, None, channels, basis_h_ptr, basis_w_ptr, place, X, Y, TILE)
        s = _spectrum(cc, cs, sc, ss, tall, wide)
        cc, cs, sc, ss = _coefficients(y_ptr, None, channels, basis_h_ptr, basis_w_ptr, place, Y, Y, TILE)
        return s, _spectrum(cc, cs, sc, ss, tall, wide)
    else:
        cc, cs, sc, ss = _coefficients(x_ptr, y_ptr, channels, basis_h_ptr, basis_w_ptr, place, X, Y, TILE)
        s = _spectrum(cc, cs, sc, ss, tall, wide)
        return s, s
