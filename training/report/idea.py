"""The picture a report opens with: a frame, what compression took from it, what the loss looks at, what changed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .figures import Theme
from .probe import power


def share_taken(raw: np.ndarray, compressed: np.ndarray) -> np.ndarray:
    """Share of the power of ``(N, S, S, 3)`` uint8 frames that compression took, by frequency: ``(S, S)``, unshifted.

    1 where nothing is left, 0 where as much is there as before, or more.
    """
    before, after = (power(torch.from_numpy(frames)).numpy() for frames in (raw, compressed))
    return np.clip(1 - after / np.maximum(before, np.finfo(before.dtype).tiny), 0, 1)


def most_changed_fake(raw: np.ndarray, compressed: np.ndarray, labels: np.ndarray) -> int:
    """The place of the fake that compression changes most, of all frames where there is no fake."""
    change = np.abs(raw.astype(np.float32) - compressed).mean((1, 2, 3))
    return int(np.argmax(np.where(labels == 1, change, -1) if labels.any() else change))


def draw(
    theme: Theme,
    frames: tuple[np.ndarray, np.ndarray],
    taken: np.ndarray,
    attention: dict[str, np.ndarray],
    gaps: dict[str, np.ndarray],
    after: str,
    titles: dict[str, str],
) -> Figure:
    """Six panels in the order of the argument.

    Args:
        frames: one frame ``(S, S, 3)`` uint8 raw and compressed.
        taken: of :func:`share_taken`.
        attention: mean attention map ``(H, W)`` of a layer by model, among them ``start`` and ``after``.
        gaps: relative feature gap ``(R,)`` of the same layer by model.
    """
    figure, axes = plt.subplots(1, 6, figsize=(11, 2.35), width_ratios=[1, 1, 1, 1, 1, 1.45])
    colour_map = theme.values["map"]
    exponents = [np.fft.fftshift(np.log(attention[name])) for name in ("start", after)]
    top = max(exponent.max() for exponent in exponents)
    before, left = (np.maximum(exponent, 1e-4 * top + 1e-30) for exponent in exponents)
    scale = {"cmap": colour_map, "norm": LogNorm(min(before.min(), left.min()), max(before.max(), left.max()))}
    panels = [
        ("the teacher sees\nthe raw frame", frames[0], {}),
        ("the student, the\ncompressed one", frames[1], {}),
        ("what compression\ntook, by frequency", np.fft.fftshift(taken), {"cmap": colour_map, "vmin": 0, "vmax": 1}),
        ("the loss looks here\nbefore training …", before, scale),
        ("… and after: what\nis left to learn", left, scale),
    ]
    for axis, (title, image, how) in zip(axes, panels, strict=False):
        axis.imshow(image, interpolation="nearest", **how)
        axis.set_title(title, loc="left", fontsize=9.5)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for name, values in gaps.items():
        color = theme.values["muted"] if name == "start" else theme.color(titles[name])
        axes[-1].plot(np.linspace(0, 1, len(values)), values, "o-", color=color, markersize=3, label=titles[name])
    axes[-1].set(xlabel="frequency / Nyquist", ylim=(0, 1.45 * max(values.max() for values in gaps.values())))
    axes[-1].set_title("how far student and\nteacher are apart", loc="left", fontsize=9.5)
    axes[-1].legend(loc="upper left", fontsize=7.5, handlelength=1.2, labelspacing=0.2, borderpad=0)
    return figure
