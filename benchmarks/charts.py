"""One chart per primitive, legible on a light and on a dark page."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .measure import Row

COLOURS = {
    "cpp": "#e8590c",
    "triton": "#e8590c",
    "plain": "#1c9bd6",
    "compile": "#9c6ade",
    "reference": "#2f9e69",
    "released": "#868e96",
}
INK = "#808890"  # contrast of about 4 with white and with GitHub's dark page


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Time of forward + backward by shape and provider, p20 to p80 around the median, logarithmic."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    for name in [name for name in COLOURS if any(row.provider == name and row.timing for row in rows)]:
        timed = [row for row in rows if row.provider == name and row.timing]
        median = [row.timing.p50 for row in timed]
        spread = [
            [row.timing.p50 - row.timing.p20 for row in timed],
            [row.timing.p80 - row.timing.p50 for row in timed],
        ]
        axes.errorbar(
            [shapes.index(row.shape) for row in timed], median, yerr=spread,
            fmt="o", markersize=9, elinewidth=2, capsize=4, color=COLOURS[name], label=name,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    axes.set_ylabel("ms, forward + backward", color=INK, fontsize=13)
    names = [shape.replace(", ", "\n").replace("×", "×\n", 1) for shape in shapes]
    axes.set_xticks(range(len(shapes)), names)
    axes.set_title(title, color=INK, fontsize=13)
    axes.tick_params(colors=INK, which="both", labelsize=12)
    axes.grid(axis="y", color=INK, alpha=0.3)
    axes.spines[:].set_color(INK)
    axes.legend(labelcolor=INK, frameon=False, fontsize=12, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.savefig(path, dpi=120, transparent=True)
    plt.close(figure)
