"""The tables of a report as HTML."""

from __future__ import annotations

import base64
import html
import io
import math
from itertools import groupby

from PIL import Image

from . import intervals, metrics
from .figures import LIGHT
from .results import ALL, Comparison, Row
from .sentences import bounds, number, term

NAMES = {  # what verdicts are about first
    "auc": "AUC",
    "accuracy": "Accuracy",
    "ap": "AP",
    "eer": "EER",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "ece": "ECE",
    "recall_at_1": "Recall@1",
}


def _cell(metric: str, cell: dict[str, float], *, signed: bool = False) -> str:
    if math.isnan(cell["value"]):
        return '<td class="none">undefined</td>'
    better = -1 if metric in metrics.LOWER_IS_BETTER else 1
    tone = {1: " good", -1: " bad"}.get(better * intervals.direction(cell), "") if signed else ""
    value, ends = number(cell["value"], signed=signed), bounds(cell, " … ", signed=signed)
    return f'<td class="value{tone}">{value}<small>{ends}</small></td>'


def _table(head: list[str], lines: list[str], kind: str = "") -> str:
    columns = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{body}</table></div>'


def models(rows: list[Row], summary: dict, compared: list[Comparison], shades: list[str]) -> str:
    """The results: a line per model, those of one quality together, followed by their differences.

    Args:
        summary: of :func:`.intervals.summary`, by the rows' names.
        shades: the models in the order of their colours.
    """
    lines = []
    for quality, found in groupby(rows, key=lambda row: row.quality):
        begins = ' class="quality"' if lines else ""
        for row in found:
            cells = "".join(_cell(metric, summary[row.name][metric]) for metric in NAMES)
            color = f'<i class="c{shades.index(row.model) % len(LIGHT["colors"])}"></i>'
            lines.append(f'<tr{begins}><th scope="row">{color}{html.escape(row.name)}</th>{cells}</tr>')
            begins = ""
        for comparison in compared:
            if comparison.first.quality == quality:
                cells = "".join(_cell(metric, comparison.cells[metric], signed=True) for metric in NAMES)
                lines.append(f'<tr class="difference"><th scope="row">{html.escape(comparison.name)}</th>{cells}</tr>')
    head = [f"{NAMES[metric]}{' ↓' if metric in metrics.LOWER_IS_BETTER else ''}" for metric in NAMES]
    return _table(["", *head], lines, "grouped" if any(row.quality == ALL for row in rows) else "")


def photographs(lines: list[dict], pictures: dict[str, Image.Image]) -> str:
    """AUC by photograph.

    Args:
        lines: of :func:`.results.by_photograph`.
        pictures: the photographs by name.
    """
    body = []
    for line in lines:
        small = pictures[line["photograph"]].copy()
        small.thumbnail((160, 160))
        small.save(buffer := io.BytesIO(), "JPEG", quality=80)
        source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        name = f'<th scope="row"><img src="{source}" alt="">{html.escape(line["photograph"])}</th>'
        counts = f"<td>{line['reals']:,}</td><td>{line['fakes']:,}</td>"
        values = "".join(f"<td>{number(value)}</td>" for value in line["auc"].values())
        values += "".join(f"<td>{number(value, signed=True)}</td>" for value in line["differences"].values())
        body.append(f"<tr>{name}{counts}{values}</tr>")
    return _table(["", "reals", "fakes", *lines[0]["auc"], *lines[0]["differences"]], body, "photographs")


def terms(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Distillation terms by student, as of :func:`.results.terms`, with a line per term."""
    lines = []
    for model, by_term in found.items():
        for name, cells in by_term.items():
            kept = f"{cells['end'] / cells['start']:.2f}" if cells["start"] else "–"
            shown = [f"{cells[end]:.3g}" for end in ("start", "end")] + [kept]
            shown += [f"{cells[f'{end}_share']:.3g}" for end in ("start", "end")]
            owner = f"{html.escape(model)}: " if len(found) > 1 else ""
            values = "".join(f"<td>{value}</td>" for value in shown)
            lines.append(f'<tr><th scope="row">{owner}{html.escape(term(name))}</th>{values}</tr>')
    return _table(["", "start", "end", "end ÷ start", "÷ cross-entropy, start", "÷ cross-entropy, end"], lines, "terms")
