"""The report's pictures, each drawn for a light and for a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from ..files import shown
from .log import term_names
from .results import ALL, ON_RAW, Row

# Okabe & Ito's colours, told apart by colour-blind readers; the dark page gets their lighter relatives.
LIGHT = {
    "text": "#1f2430",
    "muted": "#667085",
    "grid": "#e4e7ec",
    "page": "#ffffff",
    "map": "cividis",
    "colors": ["#009e73", "#c98500", "#0072b2", "#d55e00", "#8f4f80", "#4d4d4d"],
}
DARK = {
    "text": "#e6e9ef",
    "muted": "#98a2b3",
    "grid": "#323846",
    "page": "#171a21",
    "map": "cividis",
    "colors": ["#2cc79b", "#e6b034", "#56b4e9", "#ff8c4d", "#d79bc4", "#b0b0b0"],
}
THEMES = {"light": LIGHT, "dark": DARK}
MOST = 200  # characters of a name: a text is drawn whole, however long
FONTS = ["Inter", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"]


@dataclass
class Theme:
    """Colours of one drawing; ``color`` gives a model the same colour in every picture."""

    values: dict
    models: list[str]

    def color(self, model: str) -> str:
        return self.values["colors"][self.models.index(model) % len(self.values["colors"])]


@contextmanager
def _style(theme: dict) -> Iterator[None]:
    with plt.rc_context(
        {
            "font.family": "sans-serif",
            "font.sans-serif": FONTS,
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 9,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.linewidth": 0.8,
            "lines.linewidth": 1.9,
            "legend.fontsize": 9,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "figure.facecolor": theme["page"],
            "axes.facecolor": theme["page"],
            "savefig.facecolor": theme["page"],
            "text.color": theme["text"],
            "axes.labelcolor": theme["muted"],
            "xtick.color": theme["muted"],
            "ytick.color": theme["muted"],
            "axes.edgecolor": theme["grid"],
            "grid.color": theme["grid"],
            "axes.titlecolor": theme["text"],
            "figure.dpi": 150,
            "savefig.dpi": "figure",
            "figure.constrained_layout.use": True,
        }
    ):
        yield


def render(draw: Callable[[Theme], Figure], models: list[str]) -> dict[str, bytes]:
    """Draw a picture for every theme: ``{"light": png, "dark": png}``."""
    result, places = {}, []
    for name, values in THEMES.items():
        with _style(values):
            figure = draw(Theme(values, models))
            if not places:  # to find them takes as long as to draw, and saving by itself does both twice
                figure.get_layout_engine().execute(figure)
                places = [axis.get_position(original=True) for axis in figure.axes]
            figure.set_layout_engine("none")
            for axis, place in zip(figure.axes, places, strict=True):
                axis.set_position(place)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            plt.close(figure)
            result[name] = buffer.getvalue()
    return result


def plain(name: object) -> str:
    """A name as a text of Matplotlib, which it neither reads as mathematics nor leaves out of a legend."""
    text = shown(name)
    text = text if len(text) <= MOST else f"{text[: MOST - 1]}…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def samples(theme: Theme, images: dict[str, np.ndarray], labels: np.ndarray) -> Figure:
    """Frames before and after compression, and the difference of the first and the last row.

    Args:
        images: ``(N, H, W, 3)`` uint8 by the name of a row.
        labels: ``(N,)``, 1 = fake.
    """
    count, shown = len(labels), list(images.values())
    figure, axes = plt.subplots(
        len(shown) + 1, count, figsize=(10, 10 / count * (len(shown) + 1) + 0.45), squeeze=False
    )
    difference = np.abs(shown[0].astype(int) - shown[-1]).mean(-1)
    top = max(np.percentile(difference, 99.5), 1)
    for column, label in enumerate(labels):
        for axis, frames in zip(axes[:-1, column], shown, strict=True):
            axis.imshow(frames[column], interpolation="nearest")
        axes[-1, column].imshow(difference[column], cmap=theme.values["map"], vmin=0, vmax=top)
        axes[0, column].set_title(
            "fake" if label else "real", color=theme.values["colors"][3 if label else 2], loc="center"
        )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for row, name in enumerate([*images, "difference"]):
        axes[row, 0].set_ylabel(plain(name), color=theme.values["text"])
    return figure


def curves(theme: Theme, rows: list[dict], titles: dict[str, str]) -> Figure:
    """Cross-entropy, validation AUC and distillation terms, from the rows of metrics.jsonl."""
    roles = list(dict.fromkeys(row["model"] for row in rows))
    distilled = [role for role in roles if term_names([row for row in rows if row["model"] == role])]
    figure, axes = plt.subplots(1, 2 + bool(distilled), figsize=(10, 3.3))
    for role in roles:
        color = theme.color(titles[role])
        for axis, key, marker in ((axes[0], "cross_entropy", None), (axes[1], "val_auc", "o")):
            points = [(row["epoch"], row[key]) for row in rows if row["model"] == role and key in row]
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4.5, label=titles[role])
    axes[0].set(title="Cross-entropy in training", xlabel="epoch", ylim=(0, None))
    axes[1].set(title="AUC on the validation split", xlabel="epoch")
    axes[1].legend(handlelength=1.2)
    if distilled:
        last = [row for row in rows if row["model"] == distilled[-1]]
        names = term_names(last)
        kinds = list(dict.fromkeys(name.partition("/")[0] for name in names))
        for name in names:
            points = [(row["epoch"], row[name]) for row in last if name in row]
            kind, _, layer = name.partition("/layer")
            color = theme.values["colors"][(int(layer or 1) - 1) % 6]
            style = "-" if kind == kinds[0] else (0, (2, 1.2))
            axes[2].plot(*zip(*points, strict=True), color=color, linestyle=style, label=name.replace("_", "-"))
        axes[2].set(title=f"Terms of the {titles[distilled[-1]]}", xlabel="epoch", yscale="log")
        low, high = axes[2].get_ylim()
        axes[2].set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
        axes[2].legend(fontsize=7.5, ncols=2, handlelength=1.6, columnspacing=1)
    return figure


def roc(theme: Theme, rows: list[Row], summary: dict) -> Figure:
    """ROC curves with their equal-error points, and AUC with its interval where there is one.

    Of several qualities the curves are those of all together, beside the teacher on raw images; AUC is that of each.
    """
    several = any(row.quality == ALL for row in rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, max(4.1, 0.42 * len(rows) + 0.6)), width_ratios=[1, 1.15])
    left.plot([0, 1], [0, 1], color=theme.values["grid"], linewidth=1.2)
    left.plot([0, 1], [1, 0], color=theme.values["grid"], linewidth=1, linestyle=":")
    places, y = [], 0.0
    for before, row in zip([rows[0], *rows], rows, strict=False):
        y -= 1.35 if several and row.quality != before.quality else 1  # qualities stand apart
        places.append(y)
        color, auc = theme.color(row.model), summary[row.name]["auc"]
        if np.isnan(auc["value"]):
            continue
        if not several or row.quality == ALL or row.model == ON_RAW:
            left.plot(*roc_curve(row.outcome.labels, row.outcome.scores)[:2], color=color, label=plain(row.name))
            error = summary[row.name]["eer"]["value"]
            left.plot(error, 1 - error, "o", color=color, markersize=5)
        right.plot([auc["low"], auc["high"]], [y, y], color=color, linewidth=5, alpha=0.45, solid_capstyle="round")
        right.plot(auc["value"], y, "o", color=color, markersize=9 - 2 * several)
        right.annotate(
            f"{auc['value']:.3f}",
            (auc["value"], y),
            xytext=(0, 9 - 3 * several),
            textcoords="offset points",
            ha="center",
            fontsize=10 - 1.5 * several,
            fontweight="bold",
        )
    left.set(
        title=f"ROC on the test split{', all qualities' * several}",
        xlabel="reals called fake",
        ylabel="fakes found",
        xlim=(-0.01, 1),
        ylim=(0, 1.01),
    )
    left.set_aspect("equal", anchor="N")
    if left.get_legend_handles_labels()[0]:
        left.legend(loc="lower right", handlelength=1.2)
    right.set(title="AUC, bar: 95 % interval", yticks=places, yticklabels=[plain(row.name) for row in rows])
    right.set_ylim(y - 0.5, places[0] + 0.6)
    right.tick_params(axis="y", length=0, labelcolor=theme.values["text"])
    right.grid(False, axis="y")
    return figure


def spectrum(
    theme: Theme, image: dict[str, np.ndarray], gaps: dict[int, dict[str, np.ndarray]], titles: dict[str, str]
) -> Figure:
    """Radial spectra of the images ``{"raw", "compressed"}``, and the feature gap by layer and model, all ``(R,)``."""
    figure, axes = plt.subplots(1, 1 + len(gaps), figsize=(10, 3.2), squeeze=False)
    for name, color, style in (("raw", 0, "-"), ("compressed", 1, "-")):
        power = image[name]
        axes[0, 0].semilogy(
            np.linspace(0, 1, len(power)), power, style, color=theme.values["colors"][color], label=name
        )
    axes[0, 0].set(title="Images: power spectrum", xlabel="frequency / Nyquist")
    axes[0, 0].legend(handlelength=1.2)
    for axis, (layer, models) in zip(axes[0, 1:], gaps.items(), strict=True):
        for name, values in models.items():
            style = (
                {"color": theme.values["muted"], "linestyle": (0, (4, 2))}
                if name == "start"
                else {"color": theme.color(titles[name])}
            )
            axis.plot(np.linspace(0, 1, len(values)), values, marker="o", markersize=3.5, label=titles[name], **style)
        axis.set(title=f"Layer {layer}: relative gap", xlabel="frequency / Nyquist", ylim=(0, None))
    if gaps:
        axes[0, 1].legend(handlelength=1.6)
    return figure


def attention_maps(theme: Theme, maps: dict[int, dict[str, np.ndarray]], titles: dict[str, str]) -> Figure:
    """Logarithm of mean attention maps ``(H, W)`` by layer (rows) and model (columns), zero frequency in the middle."""
    names = list(next(iter(maps.values())))
    figure, axes = plt.subplots(len(maps), len(names), figsize=(10, 1.9 * len(maps) + 0.4), squeeze=False)
    for row, (layer, by_model) in enumerate(maps.items()):
        by_model = {name: np.log(values) for name, values in by_model.items()}
        low, high = min(m.min() for m in by_model.values()), max(m.max() for m in by_model.values())
        for column, name in enumerate(names):
            axis, values = axes[row, column], np.fft.fftshift(by_model[name])
            picture = axis.imshow(values, cmap=theme.values["map"], vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(titles[name], loc="center")
        axes[row, 0].set_ylabel(f"layer {layer}", color=theme.values["text"])
        bar = figure.colorbar(picture, ax=axes[row, :], shrink=0.85, aspect=16, pad=0.02)
        bar.outline.set_visible(False)
    return figure


def views(
    theme: Theme, vectors: list[dict[str, np.ndarray]], directions: np.ndarray, layer: int, titles: dict[str, str]
) -> Figure:
    """Attention vectors ``(M,)`` of the models under each of a few views ``(K, 3)``."""
    figure, axes = plt.subplots(1, len(vectors), figsize=(10, 3.2), sharey=True, squeeze=False)
    for axis, by_model, view in zip(axes[0], vectors, directions, strict=True):
        for name, values in by_model.items():
            edges = np.linspace(0, 1, len(values) + 1)
            if name == "teacher":
                axis.stairs(
                    values, edges, fill=True, color=theme.color(titles[name]), alpha=0.28, label=f"{titles[name]}"
                )
                continue
            style = (
                {"color": theme.values["muted"], "linestyle": (0, (4, 2))}
                if name == "start"
                else {"color": theme.color(titles[name])}
            )
            axis.stairs(values, edges, linewidth=1.5, label=titles[name], **style)
        channel, height, width = view
        axis.set(
            title=f"Layer {layer}, view ({channel:+.2f}, {height:+.2f}, {width:+.2f})", xlim=(0, 1), ylim=(0, None)
        )
        axis.set_xlabel("position along the view")
    axes[0, 0].set_ylabel("mass")
    axes[0, -1].legend(handlelength=1.6)
    return figure


def compression_gap(theme: Theme, rows: list[dict]) -> Figure:
    """AUC by quality, a line per model: a column per set, a row for frames and, where they are not the same, videos."""
    rows = [row for row in rows if row["manipulation"] == "all"]
    sets = list(dict.fromkeys(row["dataset"] for row in rows))
    single = all(row["videos"] == row["reals"] + row["fakes"] for row in rows)
    levels = ["frame"] if single else ["frame", "video"]
    figure, axes = plt.subplots(
        len(levels), len(sets), figsize=(max(7, 4.6 * len(sets)), 3.8 * len(levels)), squeeze=False, sharey="row"
    )
    for level, across in zip(levels, axes, strict=True):
        for dataset, axis in zip(sets, across, strict=True):
            here = [row for row in rows if row["dataset"] == dataset]
            qualities = list(dict.fromkeys(row["compression"] for row in here))
            for index, name in enumerate(theme.models):
                cells = {row["compression"]: row[level]["auc"] for row in here if row["model"] == name}
                shift = 0.16 * (index / max(len(theme.models) - 1, 1) - 0.5)  # else the intervals hide each other
                x = np.array([qualities.index(quality) + shift for quality in cells])
                value, low, high = (
                    np.array([cell[key] for cell in cells.values()]) for key in ("value", "low", "high")
                )
                known = np.isfinite(low)
                axis.vlines(x[known], low[known], high[known], color=theme.color(name), linewidth=4, alpha=0.35)
                axis.plot(x, value, color=theme.color(name), marker="o", markersize=5.5, label=plain(name))
            axis.axhline(0.5, color=theme.values["muted"], linewidth=1, linestyle=":")
            axis.set(title=f"{plain(dataset)}: AUC of {level}s", xticks=range(len(qualities)))
            axis.set_xticklabels([plain(quality) for quality in qualities])
            axis.set_xlim(-0.3, len(qualities) - 0.7)
            axis.grid(False, axis="x")
        across[0].set_ylabel("AUC, bar: 95 % interval")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), handlelength=1.4)
    return figure


def cross_compression(theme: Theme, rows: list[dict]) -> Figure:
    """AUC of frames as a matrix per set: a row per model and what it was trained on, a column per quality tested on."""
    rows = [row for row in rows if row["manipulation"] == "all"]
    sets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, axes = plt.subplots(
        1, len(sets), figsize=(3.2 + 3.4 * len(sets), 1.3 + 0.5 * len(theme.models)), squeeze=False, sharey=True
    )
    trained = {row["model"]: row["trained_on"] for row in rows}
    labels = [n if "trained on" in n else f"{n}, trained on {trained[n]}" for n in theme.models]
    for dataset, axis in zip(sets, axes[0], strict=True):
        here = [row for row in rows if row["dataset"] == dataset]
        qualities = list(dict.fromkeys(row["compression"] for row in here))
        matrix = np.full((len(theme.models), len(qualities)), np.nan)
        for row in here:
            matrix[theme.models.index(row["model"]), qualities.index(row["compression"])] = row["frame"]["auc"]["value"]
        picture = axis.imshow(matrix, cmap=theme.values["map"], vmin=0.5, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            text = "–" if np.isnan(value) else f"{value:.3f}"
            ink = theme.values["text"] if np.isnan(value) else LIGHT["text"] if value > 0.75 else DARK["text"]
            matched = trained[theme.models[i]] == qualities[j]
            axis.text(j, i, text, ha="center", va="center", color=ink, fontweight="bold" if matched else None)
        axis.set(title=plain(dataset), xticks=range(len(qualities)), xlabel="tested on")
        axis.set_xticklabels([plain(quality) for quality in qualities])
        axis.set_yticks(range(len(labels)), [plain(label) for label in labels])
        axis.tick_params(length=0, labelcolor=theme.values["text"])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, shrink=0.9, aspect=16, pad=0.02, label="AUC of frames")
    bar.outline.set_visible(False)
    return figure


def prediction(
    theme: Theme, frame: np.ndarray, box: tuple[int, int, int, int], score: float, crop: np.ndarray, heat: np.ndarray
) -> Figure:
    """A frame ``(H, W, 3)`` with its face box, the crop ``(S, S, 3)`` that the model sees, and its Grad-CAM ``(S, S)``.

    Args:
        box: left, top, right, bottom in pixels of the frame.
        score: the probability of fake.
    """
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), width_ratios=[max(1, frame.shape[1] / frame.shape[0]), 1, 1])
    figure.get_layout_engine().set(h_pad=0.12)
    color = theme.values["colors"][3 if score >= 0.5 else 2]
    left, top, right, bottom = box
    axes[0].imshow(frame)
    axes[0].add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=2.5))
    axes[0].set_title(f"{'fake' if score >= 0.5 else 'real'}: {score:.3f}", color=color, loc="center")
    axes[1].imshow(crop)
    axes[1].set_title("as the model sees it", loc="center")
    axes[2].imshow(crop.mean(2), cmap="gray", vmin=0, vmax=255)
    axes[2].imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6)
    axes[2].set_title("where it looks fake (Grad-CAM)", loc="center")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return figure
