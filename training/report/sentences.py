"""What a report says in words: numbers, intervals, and sentences that claim no more than these."""

from __future__ import annotations

import math
from itertools import groupby

from ..files import shown
from . import intervals
from .results import ALL, Comparison, Row


def number(value: float, *, signed: bool = False) -> str:
    """Three decimals; "undefined" for NaN."""
    return "undefined" if math.isnan(value) else f"{value:{'+' if signed else ''}z.3f}"


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
    lines = [list(rows[0])]
    lines += [[shown(cell) if isinstance(cell, str) else span(cell) for cell in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def verdict(first: str, second: str, cell: dict[str, float], comparisons: int, where: str = "") -> str:
    """One sentence about a difference of AUC, no stronger than its interval and its p-value.

    Args:
        cell: ``first − second`` as of :func:`.intervals.compare`.
        comparisons: how many the p-value was corrected for.
        where: which samples it is about, as words to stand after the names, e.g. "on c23".
    """
    name, value, where = f"{first} − {second}", number(cell["value"], signed=True), where and f" {where}"
    if math.isnan(cell["value"]):
        return f"{name}{where}: AUC is undefined on this test split, so they cannot be compared by it."
    if math.isnan(cell["low"]):
        return f"{name} is {value} in AUC{where}, the same for every source: no interval, no verdict."
    said = f"by {value} in AUC (95 % interval {bounds(cell, ' … ', signed=True)}"
    if comparisons > 1:
        p = "p < 0.001" if cell["p"] < 0.001 else f"p = {cell['p']:.3g}"
        said += f"; {p} after Holm’s correction for {comparisons} comparisons"
    found = intervals.direction(cell)
    if found:
        beats, side = ("beats", "above") if found > 0 else ("loses to", "below")
        return f"{first} {beats} {second}{where} {said}): the interval lies {side} zero."
    return f"{first} and {second} differ{where} {said}): this test split cannot tell them apart."


def verdicts(rows: list[Row], compared: list[Comparison], photographs: list[dict] = ()) -> list[str]:
    """What may be said of every comparison; with too few sources nothing, and why.

    Args:
        photographs: of :func:`.results.by_photograph`, where the samples are clips of a few photographs.
    """
    short: dict[str, list[str]] = {}
    for quality, found in groupby(rows, key=lambda row: row.quality):
        short.setdefault(intervals.shortage(next(found).outcome), []).append(quality)
    on = {
        reason: f"On {' and '.join(qualities)} the" if len(short) > 1 else "The" for reason, qualities in short.items()
    }
    why = [f"{start} test split {reason}." for reason, start in on.items() if reason]
    tested = sum(not math.isnan(comparison.cells["auc"]["p"]) for comparison in compared)
    said = [
        verdict(c.first.model, c.second.model, c.cells["auc"], tested, _where(c, len(photographs)))
        for c in compared
        if min(intervals.sources(c.first.outcome)) >= intervals.FEWEST
    ]
    return said + why


def _where(comparison: Comparison, photographs: int) -> str:
    quality = comparison.first.quality
    if not photographs:
        return "" if not comparison.several else "on all qualities together" if quality == ALL else f"on {quality}"
    kind = "clips" if not comparison.several else "clips in all qualities" if quality == ALL else f"{quality} clips"
    return f"on {kind} of {_these(photographs)}"


def _these(photographs: int) -> str:
    return f"these {photographs} photographs" if photographs > 1 else "this photograph"


def of_photographs(lines: list[dict]) -> str:
    """How far the photographs agree: the range of the first difference between them, or of the AUC without one.

    Args:
        lines: of :func:`.results.by_photograph`.
    """
    known = "differences" if lines[0]["differences"] else "auc"
    name = next(iter(lines[0][known])) if known == "differences" else list(lines[0][known])[-1]
    values = {line["photograph"]: line[known][name] for line in lines if not math.isnan(line[known][name])}
    limits = f"All test clips are of {_these(len(lines))}, and no interval here reaches beyond them"
    if not values:
        return f"{limits}."
    low, high = (pick(values, key=values.get) for pick in (min, max))
    ends = [f"{number(values[end], signed=known == 'differences')} ({end})" for end in (low, high)]
    return f"{limits}; between them, {name} runs from {ends[0]} to {ends[1]} in AUC."


# --------------------------------------------------------------------------------------------------------------- terms


def term(name: str) -> str:
    """``frequency/layer2`` in words."""
    kind, _, layer = name.partition("/layer")
    return kind.replace("_", "-") + (layer and f", layer {layer}")


def of_terms(model: str, found: dict[str, dict[str, float]], factors: dict[str, float]) -> str:
    """Which distillation terms of a student are large, and which fell.

    Args:
        found: of :func:`.results.terms`.
        factors: of :func:`.results.factors`.
    """
    first, last = (sum(cells[f"{end}_share"] for cells in found.values()) for end in ("start", "end"))
    every = "all terms together" if len(found) > 1 else term(next(iter(found)))
    said = f"{model}: {every} began at {first:.3g} times the cross-entropy and ended at {last:.3g} times it."
    if len(found) > 1:
        largest = max(found, key=lambda name: found[name]["end"])
        said += f" The largest at the end is {term(largest)}."
    kept = {name: cells["end"] / cells["start"] for name, cells in found.items() if cells["start"]}
    if kept:
        least = min(kept, key=kept.get)
        falls = f"{term(least)} fell most, to {kept[least]:.2g} of its start."
        said += f" {falls[0].upper()}{falls[1:]}" if kept[least] < 1 else " None fell."
    if factors:
        scaled = ", ".join(f"{term(kind)} × {factor:.3g}" for kind, factor in factors.items())
        said += f" The balance, set once at the start: {scaled}."
    return said
