"""The report of a run: results.json, figures/*.png, and report.html, which holds everything in one file."""

from __future__ import annotations

import base64
import html
import json
import math
import platform
from datetime import datetime
from pathlib import Path

import torch

import add_ops

from ..config import Config
from ..data.embedded import load_photograph
from ..data.frames import RAW, Split, embedded_spec
from ..files import read_json, write_bytes, write_text
from ..models.detector import Detector
from . import figures, idea, intervals, metrics, probe, results, sentences, tables
from .log import read_rows
from .results import ON_RAW, TEACHER, Row
from .sentences import text_table
from .tables import NAMES

TITLES = {"none": "CE student", "add": "ADD student"}
MAIN = ("auc", "accuracy", "eer", "recall_at_1")  # what a terminal is wide enough for
ORDER = ("samples", "roc", "photographs", "curves", "terms", "spectrum", "attention", "views")
PROBED = ("idea", "samples", "spectrum", "attention", "views")
STYLE = Path(__file__).with_name("report.css")


def title(role: str) -> str:
    """How a model is called in the report."""
    return TITLES.get(role, f"{role} student")


def captioned(pictures: dict[str, bytes], heading: str, caption: str) -> str:
    """A section of HTML: a heading, which is HTML, a PNG for ``light`` and ``dark``, and a caption, a text."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(pictures[theme]).decode()}" for theme in ("light", "dark"))
    return (
        f'<figure><h2>{heading}</h2><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{html.escape(heading)}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
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


def _opened(folder: Path) -> int:
    """How often the test split was opened for this folder's report, this time included."""
    try:
        earlier = read_json(folder / "results.json").get("opened", 1)
        return earlier + 1 if isinstance(earlier, int) else 2
    except FileNotFoundError:
        return 1
    except (ValueError, AttributeError):  # damaged, but it was there
        return 2


def write(
    config: Config,
    splits: dict[str, Split],
    teacher: Detector | None,
    models: dict[str, Detector],
    outcomes: dict[str, dict[str, metrics.Outcome]],
    seconds: dict[str, float],
) -> str:
    """Write results.json, figures and report.html into the run's folder.

    Args:
        teacher: None where nothing raw was there to teach it.
        models: ``start`` (a student before training) and the trained students by distiller.
        outcomes: what each model of the table, ``teacher`` and the students by title, said about the test split, by
            quality: ``raw`` (the teacher) and the learnt ones.
        seconds: time taken, by part.

    Returns:
        The main results as a table for the terminal.
    """
    folder, test = config.folder, splits["test"]
    students = [title(name) for name in config.students]
    rows = results.rows(outcomes, test)
    learnt = list(outcomes[students[0]])
    summary = intervals.summary({row.name: row.outcome for row in rows}, config.bootstrap)
    first, *others = students
    others.sort(key=lambda name: name != TITLES["add"])  # what the report is about comes first
    compared = results.comparisons(rows, [first, *others], config.bootstrap)
    photographs, pictures = [], {}
    if test.photographs is not None:
        pictures = {Path(path).stem: load_photograph(path) for path in embedded_spec(config).photographs("test")}
        photographs = results.by_photograph(rows, compared, test, list(pictures))
    said = sentences.verdicts(rows, compared, photographs)
    if photographs:
        said.insert(1, sentences.of_photographs(photographs))  # it limits the first
    facts, opened = _facts(seconds, splits), _opened(folder)
    logged = [row for row in read_rows(folder / "metrics.jsonl") if row["model"] in ("teacher", *config.students)]
    terms = {title(role): results.terms(logged, role) for role in config.students}
    terms = {model: found for model, found in terms.items() if found}
    values = {"models": summary, "differences": {c.name: c.cells for c in compared}, "verdicts": said}
    values |= {"photographs": photographs, "terms": terms, "opened": opened, "seconds": seconds, "facts": facts}
    write_text(folder / "results.json", json.dumps(without_nan(values), indent=1, ensure_ascii=False))

    shades = [ON_RAW, TEACHER, *students]
    parts = _figures(config, test, teacher, models, learnt, rows, summary, shades, logged)
    if photographs:
        note = "On all learnt qualities together. " * (len(learnt) > 1)
        note += "Clips of one photograph say little of another, so this table gives no intervals. "
        note += "AUC on all clips compares those of different photographs, too, and may lie outside of the range here."
        parts["photographs"] = _section("AUC by photograph", tables.photographs(photographs, pictures), [note])
    if terms:
        notes = [
            sentences.of_terms(title(role), terms[title(role)], results.factors(logged, role))
            for role in config.students
            if title(role) in terms
        ]
        notes.append(f"As the loss adds them up, means over {config.log_every} steps: the first logged and the last.")
        parts["terms"] = _section("What each term did", tables.terms(terms), notes)
    table = tables.models(rows, summary, compared, shades)
    opening, ordered = parts.pop("idea", ""), [parts[name] for name in ORDER if name in parts]
    write_text(
        folder / "report.html",
        _page(config, table, said, opened, teacher is not None, bool(photographs), opening, ordered, facts),
    )
    lines = [{"": row.name} | {NAMES[m]: summary[row.name][m] for m in MAIN} for row in rows]
    return "\n".join([text_table(lines), *said, f"report: {folder / 'report.html'}"])


def _figures(
    config: Config,
    split: Split,
    teacher: Detector | None,
    models: dict[str, Detector],
    learnt: list[str],
    rows: list[Row],
    summary: dict,
    shades: list[str],
    logged: list[dict],
) -> dict[str, str]:
    """Draw, save and caption the pictures, by name; those of pairs only where there are pairs."""
    drawings = {"roc": lambda theme: figures.roc(theme, rows, summary)}
    titles = {role: title(role) for role in config.students} | {"teacher": ON_RAW, "start": "before training"}
    if logged:
        drawings["curves"] = lambda theme: figures.curves(theme, logged, titles)
    lossy = [quality for quality in learnt if quality != RAW] or learnt
    if len(probe.paired(split, [RAW, lossy[-1]])):
        shown = [RAW, *lossy] if len(probe.paired(split, [RAW, *lossy])) else [RAW, lossy[-1]]
        images, labels = probe.examples(split, shown, config.image_size)
        if len(lossy) == 1:
            images = dict(zip((RAW, "compressed"), images.values(), strict=False))
        drawings["samples"] = lambda theme: figures.samples(theme, images, labels)
    if teacher is not None and len(probe.paired(split, [RAW, lossy[-1]])):
        image, gaps, maps, vectors, directions, layer = probe.features(config, split, lossy[-1], teacher, models)
        drawings["spectrum"] = lambda theme: figures.spectrum(theme, image, gaps, titles)
        if maps:
            drawings["attention"] = lambda theme: figures.attention_maps(theme, maps, titles)
        drawings["views"] = lambda theme: figures.views(theme, vectors, directions, layer, titles)
        after = "add" if "add" in models else config.students[-1]
        if shown_layer := next((i for i, found in maps.items() if {"start", after} <= found.keys()), None):
            known = probe.paired(split, [RAW, lossy[-1]])[: probe.PROBES]
            before, lost = (probe.frames(split, quality, known, config.image_size) for quality in (RAW, lossy[-1]))
            number = idea.most_changed_fake(before, lost, split.labels[known])
            drawings["idea"] = lambda theme: idea.draw(
                theme,
                (before[number], lost[number]),
                idea.share_taken(before, lost),
                maps[shown_layer],
                gaps[shown_layer],
                after,
                titles,
            )
    folder = config.folder / "figures"
    parts = {}
    for name, draw in drawings.items():
        drawn = figures.render(draw, shades)
        for theme, png in drawn.items():
            path = folder / f"{name}{'' if theme == 'light' else '-dark'}.png"
            write_bytes(path, png)
        heading, caption = CAPTIONS[name]
        if name == "views" and config.slicing == "points":
            caption += " The run compared sorted projections of points instead."
        if name in PROBED and len(learnt) > 1:
            caption += f" Compressed is {lossy[-1]} here."
        elif name == "samples":
            caption += " The student only ever sees the middle row."
        parts[name] = captioned(drawn, heading, caption)
    return parts


def without_nan(value: object) -> object:
    """JSON has no NaN: what is undefined becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


CAPTIONS = {  # heading, how to read the picture
    "idea": (
        "The idea, on these frames",
        "The teacher is shown the raw frame, the student its compressed twin. Compression takes power mostly from the "
        "middle and high frequencies (zero frequency is in the middle, high ones at the border; brighter: more taken). "
        "The loss weighs each frequency of the feature maps by how far the student is from the teacher there, here on "
        "one logarithmic scale before and after training. Right: the same distance by frequency, relative to the "
        "teacher’s own power.",
    ),
    "samples": (
        "What compression takes away",
        "Test frames raw, compressed, and the difference (brighter: larger; one scale for all). Where a fake was made "
        "from a real frame that is also in the split, the two stand side by side.",
    ),
    "roc": (
        "How well fakes are told from reals",
        "Left: fakes found against reals wrongly called fake, at every threshold; further up and left is better, the "
        "diagonal is guessing, dots mark equal error rates. Right: the area under the curves; bar: 95 % interval.",
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


def _section(heading: str, table: str, notes: list[str]) -> str:
    said = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    return f"<section><h2>{heading}</h2>{table}{said}</section>"


def _page(
    config: Config,
    table: str,
    said: list[str],
    opened: int,
    taught: bool,
    clips: bool,
    picture: str,
    parts: list[str],
    facts: dict,
) -> str:
    definition = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    opening = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in said)
    source = html.escape(config.manifest or "the embedded set: real photographs, local forgeries, real H.264")
    searched = f"{config.gallery:,} randomly chosen" if config.gallery else "all"
    qualities, several = html.escape(", ".join(config.learnt)), len(config.learnt) > 1
    seen = (
        f"see them in several qualities ({qualities})" if several else f"see only their compressed twins ({qualities})"
    )
    who = "A teacher that saw raw frames teaches students that" if taught else "Students without a teacher"
    times = {1: "once", 2: "twice"}.get(opened, f"{opened} times")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(config.name)} · ADD distillation</title><style>{STYLE.read_text(encoding="utf-8")}</style></head>
<body><main>
<header><p class="kicker">ADD distillation · report</p><h1>{html.escape(config.name)}</h1>
<p>{who} {seen}.
Backbones: {html.escape(config.teacher_model)} → {html.escape(config.student_model)}. Data: {source}.</p></header>
<section class="verdict">{opening}</section>
{picture}
<section><h2>Results on the test split</h2>{table}
<p class="note">Small figures: 95 % intervals over sources, a source being a real and everything made from it{
        ", here a clip and its forged twin; they know nothing of other photographs" * clips
    }; that of
AUC from clustered placement values (Obuchowski 1997), the others by bootstrap ({config.bootstrap:,} resamples).
Differences are paired; one training run per model, so that the variation between seeds is in none of them. Green and
orange differences: the interval does not contain 0, in AUC also after Holm’s correction for the number of comparisons,
in the other metrics without a correction. –: too few sources, or no spread. ↓ lower is better.{
        " All: the samples of all learnt qualities together." * several
    } Threshold 0.5; ECE with {metrics.ECE_BINS} bins; Recall@1 looks up the nearest neighbour among {searched} training
samples. Models were chosen on the validation split; the test split was opened {times}.</p></section>
{"".join(parts)}
<section><h2>The run</h2><dl>{definition}</dl>
<details><summary>Configuration</summary><pre>{html.escape(config.to_yaml())}</pre></details></section>
</main></body></html>
"""
