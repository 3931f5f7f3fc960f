"""Which positions the kernels of the view histogram take together; no Triton here."""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

BLOCK_P = 32
"""Positions that a program holds in registers at once."""


def memory_order(features: Tensor) -> tuple[int, int, int]:
    """The axes of a sample in the order in which they lie in memory, slow to fast."""
    (_, channels, *pixels), (_, stride, *strides) = features.shape, features.stride()
    between = min((step for size, step in zip(pixels, strides, strict=True) if size > 1), default=0)
    return (2, 3, 1) if channels > 1 and stride < between else (1, 2, 3)


@lru_cache(maxsize=4096)
def box_extents(
    sizes: tuple[int, int, int], axes: tuple[int, int, int], bins: int, most_positions: int
) -> tuple[int, int, int]:
    """How many channels, rows and columns of a (C, H, W) sample a box spans, in the order of ``axes``.

    They grow alike, channels twice as far, to 12 bins along a diagonal view. Beyond 256 positions no map is padded
    further for it. At most BLOCK_P positions share the slow coordinate.
    """
    size, extent = (1, *sizes), [1, 1, 1, 1]
    diagonal, larger = max(sum(size[1:]) - 3, 1), extent
    while larger:
        extent, larger = larger, None
        for axis in sorted((3, 2, 1), key=lambda i: extent[i] / (2 if i == 1 else 1)):
            double = [2 * e if i == axis else e for i, e in enumerate(extent)]
            before, after = (-(-size[axis] // e[axis]) * e[axis] for e in (extent, double))
            near = math.prod(double) <= most_positions and (sum(double) - 4) * bins <= 12 * diagonal
            together = double[axes[1]] * double[axes[2]] <= BLOCK_P
            if extent[axis] < size[axis] and near and together and (math.prod(double) <= 256 or after <= 1.1 * before):
                larger = double
                break
    slow, middle, fast = (extent[axis] for axis in axes)
    return max(slow, BLOCK_P // (middle * fast)), middle, fast
