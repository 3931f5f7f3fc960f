"""What the tables of a report hold: models by quality and by photograph, and what each distillation term did."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.frames import RAW, Split
from . import intervals, metrics
from .log import term_names
from .metrics import Outcome

ALL = "all"
TEACHER, ON_RAW = "teacher", "teacher on raw"


@dataclass(eq=False)
class Row:
    """One line of the results: a model on one quality.

    Attributes:
        name: what it is called, e.g. ``ADD student`` or, where there are several qualities, ``ADD student on c23``.
        model: which model it is; the teacher on raw images is one of its own.
        quality: ``raw``, a learnt quality, or ``all`` for the samples of all learnt qualities together.
        frames: ``(N,)`` int64, the position in the split of each sample.
    """

    name: str
    model: str
    quality: str
    outcome: Outcome
    frames: np.ndarray


def rows(outcomes: dict[str, dict[str, Outcome]], split: Split) -> list[Row]:
    """The lines of the table, one quality after the other, so that models on the same samples stand together.

    The teacher on raw images comes first. Of several learnt qualities all samples together come next, and keep their
    sources, so that a source with samples in every quality is one.

    Args:
        outcomes: by model (``teacher`` first, then the students) and by quality. The students have the learnt
            qualities, the teacher those and ``raw``.
        split: the frames that they speak about.
    """
    learnt = list(list(outcomes.values())[-1])
    teacher = outcomes.get(TEACHER, {})
    several = len(learnt) > 1
    found = []

    def add(model: str, quality: str, outcome: Outcome, frames: np.ndarray) -> None:
        on = quality if several or quality == RAW else "compressed"
        name = f"{model} on {on}" if several or model == TEACHER else model
        found.append(Row(name, ON_RAW if name == ON_RAW else model, quality, outcome, frames))

    if RAW in teacher and RAW not in learnt:
        add(TEACHER, RAW, teacher[RAW], split.where(RAW))
    if several:
        frames = np.concatenate([split.where(quality) for quality in learnt])
        for model, said in outcomes.items():
            add(model, ALL, metrics.pooled([said[quality] for quality in learnt]), frames)
    for quality in learnt:
        for model, said in outcomes.items():
            add(model, quality, said[quality], split.where(quality))
    return found


@dataclass(eq=False)
class Comparison:
    """The difference of two models on the same samples; ``cells`` as of :func:`.intervals.compare`."""

    first: Row
    second: Row
    cells: dict[str, dict[str, float]]
    several: bool

    @property
    def name(self) -> str:
        on = f" on {self.first.quality}" if self.several else ""
        return f"{self.first.model} − {self.second.model}{on}"


def comparisons(rows: list[Row], models: list[str], resamples: int) -> list[Comparison]:
    """Every model after the first of ``models`` against it, on each quality; all of them are one family for Holm."""
    at = {(row.model, row.quality): row for row in rows}
    qualities = list(dict.fromkeys(row.quality for row in rows if row.model == models[0]))
    pairs = [(at[model, quality], at[models[0], quality]) for quality in qualities for model in models[1:]]
    outcomes = {row.name: row.outcome for row in rows}
    compared = intervals.compare(outcomes, [(a.name, b.name) for a, b in pairs], resamples)
    return [Comparison(*pair, cells, len(qualities) > 1) for pair, cells in zip(pairs, compared.values(), strict=True)]


# --------------------------------------------------------------------------------------------------------- photographs


def by_photograph(rows: list[Row], compared: list[Comparison], split: Split, names: list[str]) -> list[dict]:
    """AUC of each model on the clips of each photograph, all learnt qualities together, and the differences.

    Args:
        names: what ``split.photographs`` are called.

    Returns:
        For each photograph with clips its ``photograph`` (the name), ``reals`` and ``fakes`` (frames), ``auc`` by row
        and ``differences`` by comparison; NaN where it has one class only.
    """
    several = any(row.quality == ALL for row in rows)
    shown = [row for row in rows if row.quality == ALL or row.model == ON_RAW or not several]
    shown.sort(key=lambda row: row.model != ON_RAW)
    lines = []
    for number in np.unique(split.photographs):
        here = split.photographs == number
        fakes = int(split.labels[here].sum())
        auc = {row.name: _auc(row, here) for row in shown}
        pairs = {c.name: (c.first.name, c.second.name) for c in compared if c.first in shown}
        differences = {name: auc[first] - auc[second] for name, (first, second) in pairs.items()}
        counts = {"photograph": names[number], "reals": int(here.sum()) - fakes, "fakes": fakes}
        lines.append(counts | {"auc": auc, "differences": differences})
    return lines


def _auc(row: Row, here: np.ndarray) -> float:
    outcome, mine = row.outcome, here[row.frames]
    return metrics.compute(Outcome(outcome.scores[mine], outcome.labels[mine], outcome.groups[mine]))["auc"]


# --------------------------------------------------------------------------------------------------------------- terms


def terms(logged: list[dict], role: str) -> dict[str, dict[str, float]]:
    """How each distillation term of a student began and ended.

    Args:
        logged: the rows of metrics.jsonl, means over ``log_every`` steps.
        role: the student's distiller.

    Returns:
        By term, e.g. ``frequency/layer2``: its weighted value at the ``start`` (the first row that has it) and at the
        ``end`` (the last), and as shares of the cross-entropy of those rows, ``start_share`` and ``end_share``.
    """
    mine = [row for row in logged if row["model"] == role and "cross_entropy" in row]
    found = {}
    for name in term_names(mine):
        ends = {"start": next(r for r in mine if name in r), "end": next(r for r in reversed(mine) if name in r)}
        found[name] = {end: row[name] for end, row in ends.items()}
        found[name] |= {f"{end}_share": _ratio(row[name], row["cross_entropy"]) for end, row in ends.items()}
    return found


def factors(logged: list[dict], role: str) -> dict[str, float]:
    """What ``balance`` multiplied each kind of term by, as it was logged last; empty without it."""
    found = {}
    for row in logged:
        if row["model"] == role:
            found |= {key.removeprefix("factor/"): value for key, value in row.items() if key.startswith("factor/")}
    return found


def _ratio(value: float, by: float) -> float:
    return value / by if by else np.nan
