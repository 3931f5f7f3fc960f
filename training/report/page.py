"""The report of a run: results.json, figures/*.png, and report.html, which holds everything in one file."""

from __future__ import annotations

import base64
import html
import json
import math
import platform
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import add_ops

from ..config import Config
from ..data.embedded import PHOTOGRAPHS
from ..data.loader import PairDataset, Split
from ..files import write_text
from ..models.detector import Detector
from . import figures, intervals, metrics
from .log import read_rows

TITLES = {"none": "CE student", "add": "ADD student"}
NAMES = {
    "accuracy": "Accuracy",
    "auc": "AUC",
    "ap": "AP",
    "eer": "EER",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "ece": "ECE",
    "recall_at_1": "Recall@1",
}
MAIN = ("auc", "accuracy", "eer", "recall_at_1")  # what a terminal is wide enough for
STYLE = Path(__file__).with_name("report.css")
PROBES = 128  # test pairs behind the feature pictures


def title(role: str) -> str:
    """How a model is called in the report."""
    return TITLES.get(role, f"{role} student")


# -------------------------------------------------------------------------------------------------------- measurements


def _radial(power: np.ndarray) -> np.ndarray:
    """Mean of an unshifted spectrum ``(H, W)`` over rings of equal frequency: ``(min(H, W) // 2 + 1,)``."""
    height, width = power.shape
    rings = min(height, width) // 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) * 2 * rings
    ring = np.round(radius).astype(int)
    return np.array([power[ring == r].mean() for r in range(rings + 1)])


def _image_spectrum(images: Tensor) -> np.ndarray:
    window = torch.hann_window(images.shape[1], periodic=False)  # else the borders' jump hides the high frequencies
    spectrum = torch.fft.fft2((images.float() / 127.5 - 1).mean(3) * window * window[:, None], norm="ortho")
    return _radial(spectrum.abs().square().mean(0).numpy())


@torch.no_grad()
def probe(
    config: Config, split: Split, teacher: Detector, models: dict[str, Detector]
) -> tuple[dict[str, np.ndarray], dict, dict, list[dict[str, np.ndarray]], np.ndarray, int]:
    """Compare features with the teacher's on test pairs.

    Returns:
        Radial image spectra; relative feature gap ``{layer: {model: (R,)}}``; mean frequency attention map
        ``{layer: {model: (H, W)}}``; attention vectors ``[{model: (M,)}]`` per view; the views ``(K, 3)``; their layer.
    """
    device = next(teacher.parameters()).device
    dataset = PairDataset(split, config.image_size)
    chosen = np.random.default_rng(0).choice(len(split), min(PROBES, len(split)), replace=False)
    pairs = [dataset[0, int(index)] for index in chosen]
    raw, compressed = (torch.stack([pair[kind] for pair in pairs]) for kind in ("raw", "compressed"))
    targets = teacher(teacher.pixels(raw))[0]
    features = {name: model(model.pixels(compressed))[0] for name, model in models.items()}
    gaps: dict[int, dict[str, np.ndarray]] = {}
    maps: dict[int, dict[str, np.ndarray]] = {}
    for layer, target in enumerate(targets, start=1):
        comparable = {
            name: maps_[layer - 1] for name, maps_ in features.items() if maps_[layer - 1].shape == target.shape
        }
        if min(target.shape[2:]) < 4 or not comparable:
            continue  # too few frequencies to draw, or no common shape without an adapter
        own = add_ops.spectral_distance(torch.zeros_like(target), target).mean(0).cpu().numpy()
        for name, feature in comparable.items():
            gap = add_ops.spectral_distance(feature, target).mean(0).cpu().numpy()
            gaps.setdefault(layer, {})[name] = _radial(gap) / np.maximum(_radial(own), 1e-12)
            if config.frequency_weights[layer - 1] > 0:
                weights = add_ops.frequency_attention_map(
                    feature, target, gamma=config.frequency_gamma, distance=config.distance
                )
                maps.setdefault(layer, {})[name] = weights.mean(0).cpu().numpy()
    weights = config.multi_view_weights
    layer = max(range(4), key=lambda i: weights[i]) + 1
    directions = torch.nn.functional.normalize(torch.tensor([[0.8, 0.6, 0.0], [0.2, -0.5, 0.85]]), dim=1).to(device)
    seen = {"teacher": targets} | features
    bins = config.bins or max(1, math.gcd(*(tapped[layer - 1].shape[1] for tapped in seen.values())) // 2)
    vectors: list[dict[str, np.ndarray]] = [{} for _ in directions]
    for name, tapped in seen.items():
        attention = add_ops.multi_view_attention(
            tapped[layer - 1].float(), directions, bins, coordinates=config.coordinates
        ).mean(0)
        for view, vector in enumerate(attention.cpu().numpy()):
            vectors[view][name] = vector
    image = {"raw": _image_spectrum(raw), "compressed": _image_spectrum(compressed)}
    return image, gaps, maps, vectors, directions.cpu().numpy(), layer


def _sample_pairs(split: Split, size: int, count: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reals and fakes by turns, twins beside each other: images ``(count, H, W, 3)`` twice and labels ``(count,)``."""
    order = np.lexsort((split.labels, split.twins))
    real = np.flatnonzero((np.diff(split.twins[order]) == 0) & (np.diff(split.labels[order]) == 1))
    if len(real):
        starts = real[np.linspace(0, len(real) - 1, count // 2).astype(int)]
        chosen = order[np.stack([starts, starts + 1], axis=1).ravel()]
    else:
        chosen = np.unique(np.linspace(0, len(split) - 1, count).astype(int))
    items = [PairDataset(split, size)[0, int(index)] for index in chosen]
    raw, compressed = (np.stack([item[kind].numpy() for item in items]) for kind in ("raw", "compressed"))
    return raw, compressed, split.labels[chosen]


# ----------------------------------------------------------------------------------------------------------- the pages


def number(value: float, *, signed: bool = False) -> str:
    """Three decimals; "undefined" for NaN."""
    return "undefined" if math.isnan(value) else f"{value:{'+' if signed else ''}.3f}"


def bounds(cell: dict[str, float], between: str, *, signed: bool = False) -> str:
    """The ends of the interval of ``{"value", "low", "high"}``, or "–" where there is none."""
    if math.isnan(cell["low"]):
        return "–"
    return between.join(number(cell[end], signed=signed) for end in ("low", "high"))


def span(cell: dict[str, float], *, signed: bool = False) -> str:
    """``value [low, high]`` for a terminal or Markdown; "undefined" for NaN."""
    value = number(cell["value"], signed=signed)
    return value if math.isnan(cell["value"]) else f"{value} [{bounds(cell, ', ', signed=signed)}]"


def text_table(rows: list[dict[str, str | dict[str, float]]]) -> str:
    """A table for a terminal: a row's keys name the columns, a cell with an interval is written by :func:`span`."""
    lines = [list(rows[0])] + [[cell if isinstance(cell, str) else span(cell) for cell in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def verdict(first: str, second: str, cell: dict[str, float], comparisons: int) -> str:
    """One sentence about a difference of AUC, no stronger than its interval and its p-value.

    Args:
        cell: ``first − second`` as of :func:`.intervals.compare`.
        comparisons: how many the p-value was corrected for.
    """
    name, value = f"{first} − {second}", number(cell["value"], signed=True)
    if math.isnan(cell["value"]):
        return f"{name}: AUC is undefined on this test split, so they cannot be compared by it."
    if math.isnan(cell["low"]):
        return f"{name} is {value} in AUC, the same for every source: no interval, no verdict."
    said = f"by {value} in AUC (95 % interval {bounds(cell, ' … ', signed=True)}"
    if comparisons > 1:
        p = "p < 0.001" if cell["p"] < 0.001 else f"p = {cell['p']:.3g}"
        said += f"; {p} after Holm’s correction for {comparisons} comparisons"
    found = intervals.direction(cell)
    if found:
        beats, side = ("beats", "above") if found > 0 else ("loses to", "below")
        return f"{first} {beats} {second} {said}): the interval lies {side} zero."
    return f"{first} and {second} differ {said}): this test split cannot tell them apart."


def verdicts(differences: dict[tuple[str, str], dict], outcome: metrics.Outcome) -> list[str]:
    """What may be said of every comparison of :func:`.intervals.compare`; nothing, and why, with too few sources.

    Args:
        outcome: of any of the models.
    """
    shortage = intervals.shortage(outcome)
    why = [f"The test split {shortage}."] if shortage else []
    if min(intervals.sources(outcome)) < intervals.FEWEST:
        return why
    tested = sum(not math.isnan(cells["auc"]["p"]) for cells in differences.values())
    return [verdict(*pair, cells["auc"], tested) for pair, cells in differences.items()] + why


def _cell(metric: str, cell: dict[str, float], *, signed: bool = False) -> str:
    if math.isnan(cell["value"]):
        return '<td class="none">undefined</td>'
    better = -1 if metric in metrics.LOWER_IS_BETTER else 1
    tone = {1: " good", -1: " bad"}.get(better * intervals.direction(cell), "") if signed else ""
    value, ends = number(cell["value"], signed=signed), bounds(cell, " … ", signed=signed)
    return f'<td class="value{tone}">{value}<small>{ends}</small></td>'


def _table(summary: dict, differences: dict[str, dict]) -> str:
    head = "".join(f"<th>{NAMES[m]}{' ↓' if m in metrics.LOWER_IS_BETTER else ''}</th>" for m in metrics.METRICS)
    rows = []
    for index, (model, values) in enumerate(summary.items()):
        cells = "".join(_cell(metric, values[metric]) for metric in metrics.METRICS)
        rows.append(f'<tr><th scope="row"><i class="c{index}"></i>{html.escape(model)}</th>{cells}</tr>')
    for name, values in differences.items():
        cells = "".join(_cell(metric, values[metric], signed=True) for metric in metrics.METRICS)
        rows.append(f'<tr class="difference"><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def _figure(pictures: dict[str, bytes], heading: str, caption: str) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(pictures[theme]).decode()}" for theme in ("light", "dark"))
    return (
        f'<figure><h2>{heading}</h2><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{html.escape(heading)}"></picture><figcaption>{caption}</figcaption></figure>'
    )


def _facts(seconds: dict[str, float], splits: dict[str, Split]) -> dict[str, str]:
    import timm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    times = " · ".join(f"{name} {int(value) // 60}:{int(value) % 60:02d}" for name, value in seconds.items())
    sizes = " · ".join(f"{name} {len(split):,}" for name, split in splits.items())
    versions = (
        f"add_ops {add_ops.__version__} · torch {torch.__version__} · timm {timm.__version__} · "
        f"Python {platform.python_version()}"
    )
    return {
        "Finished": f"{datetime.now():%Y-%m-%d %H:%M}",
        "Time taken (min:s)": times,
        "Pairs": sizes,
        "Device": device,
        "Versions": versions,
    }


def write(
    config: Config,
    splits: dict[str, Split],
    teacher: Detector,
    models: dict[str, Detector],
    outcomes: dict[str, metrics.Outcome],
    seconds: dict[str, float],
) -> str:
    """Write results.json, figures and report.html into the run's folder.

    Args:
        models: ``start`` (a student before training) and the trained students by distiller.
        outcomes: what each model of the table said about the test split.
        seconds: time taken, by part.

    Returns:
        The main results as a table for the terminal.
    """
    folder = config.folder
    summary = intervals.summary(outcomes, config.bootstrap)
    pairs = [(title(name), title(config.students[0])) for name in config.students[1:]]
    compared = intervals.compare(outcomes, pairs, config.bootstrap)
    said = verdicts(compared, next(iter(outcomes.values())))
    if config.manifest is None:
        said.append(f"All test clips are of {len(PHOTOGRAPHS['test'])} photographs: what is said here holds for these.")
    differences = {" − ".join(pair): cells for pair, cells in compared.items()}
    facts = _facts(seconds, splits)
    results = {"models": summary, "differences": differences, "verdicts": said, "seconds": seconds, "facts": facts}
    write_text(folder / "results.json", json.dumps(without_nan(results), indent=1, ensure_ascii=False))

    rows = read_rows(folder / "metrics.jsonl")
    titles = {role: title(role) for role in config.students} | {"teacher": "teacher on raw", "start": "before training"}
    shades = list(outcomes)
    image, gaps, maps, vectors, directions, layer = probe(config, splits["test"], teacher, models)
    examples = _sample_pairs(splits["test"], config.image_size)
    drawings = {
        "samples": lambda theme: figures.samples(theme, *examples),
        "roc": lambda theme: figures.roc(theme, outcomes, summary),
        "curves": lambda theme: figures.curves(theme, rows, titles),
        "spectrum": lambda theme: figures.spectrum(theme, image, gaps, titles),
        "attention": (lambda theme: figures.attention_maps(theme, maps, titles)) if maps else None,
        "views": lambda theme: figures.views(theme, vectors, directions, layer, titles),
    }
    if not rows:
        drawings.pop("curves")
    (folder / "figures").mkdir(exist_ok=True)
    parts = []
    for name, draw in drawings.items():
        if draw is None:
            continue
        pictures = figures.render(draw, shades)
        for theme, png in pictures.items():
            (folder / "figures" / f"{name}{'' if theme == 'light' else '-dark'}.png").write_bytes(png)
        parts.append(_figure(pictures, *CAPTIONS[name]))
    write_text(folder / "report.html", _page(config, summary, differences, said, parts, facts))
    lines = [{"": name} | {NAMES[m]: values[m] for m in MAIN} for name, values in summary.items()]
    return "\n".join([text_table(lines), *said, f"report: {folder / 'report.html'}"])


def without_nan(value: object) -> object:
    """JSON has no NaN: what is undefined becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


CAPTIONS = {  # heading, how to read the picture
    "samples": (
        "What compression takes away",
        "Test pairs, each the same frame twice: raw, after H.264, and the difference (brighter: larger; one scale for "
        "all). Where a fake was made from a real frame that is also in the split, the two stand side by side. The "
        "student only ever sees the middle row.",
    ),
    "roc": (
        "How well fakes are told from reals",
        "Left: fakes found against reals wrongly called fake, at every threshold; further up and left is better, the "
        "diagonal is guessing, dots mark equal error rates. Right: the area under each curve; bar: 95 % interval.",
    ),
    "curves": (
        "Training",
        "Left: cross-entropy on the training pairs. Middle: AUC on the validation split, from which each model’s best "
        "moment was kept. Right: the weighted distillation terms by layer, on a logarithmic scale.",
    ),
    "spectrum": (
        "Where in the spectrum student and teacher differ",
        "Left: power of the images by frequency, raw and compressed. Others: power of the difference between student "
        "and teacher features relative to the teacher’s own power, per layer; 0 is a perfect copy.",
    ),
    "attention": (
        "Frequency attention: what the loss looks at",
        "Relative weight exp(γ·d) of each frequency, averaged over test pairs, as logarithm; zero frequency in the "
        "middle, high ones at the border, one scale per row. Brighter: the student is further from the teacher.",
    ),
    "views": (
        "Attention vectors under two views",
        "Mass of a feature map along two directions (channel, height, width), averaged over test pairs. Filled: the "
        "teacher on raw frames. The closer a line follows the filled shape, the better the attention was copied.",
    ),
}


def _page(config: Config, summary: dict, differences: dict, said: list[str], parts: list[str], facts: dict) -> str:
    definition = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in said)
    source = html.escape(config.manifest or "the embedded set: real photographs, local forgeries, real H.264")
    searched = f"{config.gallery:,} randomly chosen" if config.gallery else "all"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(config.name)} · ADD distillation</title><style>{STYLE.read_text()}</style></head>
<body><main>
<header><p class="kicker">ADD distillation · report</p><h1>{html.escape(config.name)}</h1>
<p>A teacher that saw raw frames teaches students that see only their compressed twins
({html.escape(config.compression)}). Backbones: {html.escape(config.teacher_model)} →
{html.escape(config.student_model)}. Data: {source}.</p></header>
<section class="verdict">{sentences}</section>
<section><h2>Results on the test split</h2>{_table(summary, differences)}
<p class="note">Small figures: 95 % intervals over sources, a source being a real and everything made from it; that of
AUC from clustered placement values (Obuchowski 1997), the others by bootstrap ({config.bootstrap:,} resamples).
Differences are paired; one training run per model, so that the variation between seeds is in none of them. Green and
orange differences: the interval does not contain 0, in AUC also after Holm’s correction for the number of comparisons,
in the other metrics without a correction. –: too few sources, or no spread. ↓ lower is better. Threshold 0.5; ECE
with {metrics.ECE_BINS} bins;
Recall@1 looks up the nearest neighbour among {searched} training samples. Models were chosen on the validation split;
the test split was opened once.</p></section>
{"".join(parts)}
<section><h2>The run</h2><dl>{definition}</dl>
<details><summary>Configuration</summary><pre>{html.escape(config.to_yaml())}</pre></details></section>
</main></body></html>
"""
