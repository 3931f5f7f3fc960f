"""What folds over photographs show: means over photographs with 95 % intervals, as a table and as a picture.

Every photograph is tested once, by models that have not learnt from it; the photographs of a fold share these models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit, logit
from scipy.stats import t as student_t

from . import figures, intervals
from .sentences import span

Values = dict[tuple[int, str], float]  # by fold and photograph
TEACHER = "teacher"


def photograph_aucs(scores: np.ndarray, labels: np.ndarray, photographs: np.ndarray) -> dict[int, float]:
    """The AUC on the frames of each photograph, its own reals and fakes; all ``(N,)``, ``labels`` 1 = fake."""
    found = {}
    for number in np.unique(photographs):
        here = photographs == number
        found[int(number)] = float(intervals.placements(scores[here], labels[here])[labels[here] == 1].mean())
    return found


def difference(first: Values, second: Values) -> Values:
    """By photograph, for those that both have."""
    return {key: first[key] - second[key] for key in first if key in second}


def estimate(values: Values, *, share: bool = False) -> dict[str, float]:
    """The mean over N photographs in k folds: ``value``, its 95 % interval ``low``, ``high``, and ``p`` of being 0.

    The photographs of a fold share teacher, students and seed. So the variance of the mean is the larger of two: that
    of N independent photographs, and that of k folds as clusters of ``n_f`` photographs each (W. G. Cochran, Sampling
    Techniques, 3rd ed. 1977, chapter 9)

        Σ (v − mean)² / (N (N − 1))        k / (k − 1) · Σ_f (n_f / N · (mean_f − mean))²

    with Student's t of k − 1 degrees of freedom. What it covers is simulated in simulate.py. Training sets overlap, so
    that part of what they do moves all folds alike, which no estimate from folds can show (Y. Bengio and Y. Grandvalet,
    No unbiased estimator of the variance of k-fold cross-validation, JMLR 5, 2004, 1089–1105).

    Args:
        share: the values lie in 0…1: the interval is made on the logit scale.

    Returns:
        NaN but for the value where there are fewer than 10 photographs or 2 folds, or where all values are equal.
    """
    numbers = np.array(list(values.values()))
    mean, count = float(numbers.mean()), len(numbers)
    found = {"value": mean, "low": np.nan, "high": np.nan, "p": np.nan}
    _, place = np.unique([fold for fold, _ in values], return_inverse=True)
    folds = int(place.max()) + 1
    if count < intervals.FEWEST or folds < 2:
        return found
    moved = np.bincount(place, numbers - mean) / count
    error = np.sqrt(max(numbers.var(ddof=1) / count, folds / (folds - 1) * (moved**2).sum()))
    if error < 1e-12 or (share and not 0 < mean < 1):
        return found
    half = student_t.ppf(1 - intervals.ALPHA / 2, folds - 1) * error
    if share:
        half /= mean * (1 - mean)
        return found | {"low": float(expit(logit(mean) - half)), "high": float(expit(logit(mean) + half))}
    p = 2 * student_t.sf(abs(mean) / error, folds - 1)
    return found | {"low": mean - float(half), "high": mean + float(half), "p": float(p)}


# ------------------------------------------------------------------------------------------------------------- results


@dataclass
class Tested:
    """One model of every fold on one quality.

    Attributes:
        learnt: what it learnt from, e.g. ``c36`` or ``raw+c23+c36``.
        method: the distiller, or ``teacher``.
        quality: what it was tested on.
        values: AUC by fold and photograph.
    """

    learnt: str
    method: str
    quality: str
    values: Values


def compare(tested: list[Tested], base: str, singles: dict[str, str]) -> list[dict]:
    """A line for each: what it is, AUC by photograph, and differences paired by photograph.

    The differences are ``base`` (to that method, learnt from the same), ``teacher`` (to the teacher on the same
    quality), ``single`` (of the variants of ADD, to the best single method) and ``own`` (of a student for several
    qualities, to that of the same method for this quality alone). Their ``p`` is corrected for the methods of the same
    training, quality and reference (Holm).

    Args:
        base: the method that all are compared with.
        singles: by training the best of the methods that are neither that nor ADD; chosen on validation.
    """
    at = {(one.learnt, one.method, one.quality): one for one in tested}
    teachers = {one.quality: one for one in tested if one.method == TEACHER}
    lines, families = [], {}
    for one in tested:
        line = {"learnt": one.learnt, "method": one.method, "quality": one.quality}
        line |= {"photographs": {name: value for (_, name), value in one.values.items()}}
        line |= {"auc": estimate(one.values, share=True)}
        references = {}
        if one.method != TEACHER:
            references["base"] = at.get((one.learnt, base, one.quality))
            references["teacher"] = teachers.get(one.quality)
            if one.method.startswith("add"):
                references["single"] = at.get((one.learnt, singles.get(one.learnt), one.quality))
            references["own"] = at.get((one.quality, one.method, one.quality))
        for name, other in references.items():
            if other is not None and other is not one and (paired := difference(one.values, other.values)):
                line[name] = estimate(paired) | {"to": other.method, "photographs": _named(paired)}
                families.setdefault((one.learnt, one.quality, name), []).append(line[name])
        lines.append(line)
    for cells in families.values():
        for cell, p in zip(cells, intervals.holm(np.array([cell["p"] for cell in cells])), strict=True):
            cell["p"] = float(p)
    return lines


def _named(values: Values) -> dict[str, float]:
    return {name: value for (_, name), value in values.items()}


# --------------------------------------------------------------------------------------------------------------- shown


def _cell(cell: dict | None) -> str:
    if cell is None:
        return "–"
    text = span(cell, signed=True)
    return f"**{text}**" if intervals.direction(cell) else text


def by_quality(lines: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """The lines of each quality that students were tested on, the teacher on raw before them."""
    for quality in dict.fromkeys(line["quality"] for line in lines if line["method"] != TEACHER):
        shown = [line for line in lines if line["quality"] == quality]
        raw = [line for line in lines if line["quality"] == "raw" != quality and line["method"] == TEACHER]
        yield quality, raw + shown


def _name(line: dict) -> str:
    return f"{TEACHER} on {line['quality']}" if line["method"] == TEACHER else line["method"]


def table(lines: list[dict], scales: dict[str, dict[str, float]], base: str) -> str:
    """The results in Markdown, a table per quality; bold is what differs from zero after Holm's correction.

    Args:
        lines: of :func:`compare`.
        scales: by training and method the chosen factor.
        base: the method that all are compared with.
    """
    text = []
    several = len({line["learnt"] for line in lines if line["method"] != TEACHER}) > 1
    for quality, shown in by_quality(lines):
        heads = {"base": f"− {base}", "teacher": f"− {TEACHER} on {quality}", "single": "− best single"}
        if any("own" in line for line in shown):
            heads["own"] = f"− learnt from {quality} alone"
        head = [*(["learnt from"] if several else []), "method", "factor", "photographs", f"AUC on {quality}"]
        text += ["| " + " | ".join([*head, *heads.values()]) + " |", "|" + "---|" * (len(head) + len(heads))]
        for line in shown:
            scale = scales.get(line["learnt"], {}).get(line["method"])
            cells = [
                *([line["learnt"]] if several else []),
                _name(line),
                "–" if line["method"] == "none" or scale is None else f"{scale:g}",
            ]
            cells += [str(len(line["photographs"])), span(line["auc"]), *(_cell(line.get(key)) for key in heads)]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def draw(theme: figures.Theme, lines: list[dict], base: str) -> Figure:
    """Left AUC, right the difference to the base, with a mark per photograph; a row of axes per quality."""
    parts = list(by_quality(lines))
    several = len({line["learnt"] for line in lines if line["method"] != TEACHER}) > 1
    heights = [0.34 * len(shown) + 1.0 for _, shown in parts]
    figure, axes = plt.subplots(
        len(parts), 2, figsize=(10.5, sum(heights)), height_ratios=heights, squeeze=False, sharey="row"
    )
    for (quality, shown), (left, right) in zip(parts, axes, strict=True):
        for y, line in enumerate(shown):
            color = theme.color(line["method"] if line["method"] in ("add", base) else "other")
            found = [(left, line["auc"], line["photographs"])]
            if "base" in line:
                found.append((right, line["base"], line["base"]["photographs"]))
            for axis, cell, photographs in found:
                axis.hlines(y, cell["low"], cell["high"], color=color, linewidth=6, alpha=0.3)
                axis.plot(list(photographs.values()), [y] * len(photographs), "|", color=color, markersize=8, alpha=0.8)
                axis.plot(cell["value"], y, "o", color=color, markersize=6)
        left.set(title=f"AUC on {quality}, a mark per photograph", yticks=range(len(shown)))
        left.set_yticklabels(
            [
                f"{line['learnt']}: {line['method']}" if several and line["method"] != TEACHER else _name(line)
                for line in shown
            ]
        )
        left.invert_yaxis()
        right.set(title=f"difference to {base}, and its 95 % interval")
        right.axvline(0, color=theme.values["muted"], linewidth=1)
    return figure


def pictures(lines: list[dict], base: str) -> dict[str, bytes]:
    """:func:`draw` for a light and a dark page, PNG."""
    return figures.render(lambda theme: draw(theme, lines, base), [base, "add", "other"])


def best(validation: dict[str, Sequence[dict[int, float]]]) -> str | None:
    """The method with the best mean AUC on validation over the folds that all of them have; None without any.

    Args:
        validation: by method, AUC by fold.
    """
    common = set.intersection(*map(set, validation.values())) if validation else set()
    if not common:
        return None
    return max(validation, key=lambda method: sum(validation[method][fold] for fold in common))
