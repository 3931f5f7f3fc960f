"""Evaluate trained models on sets they may never have seen: one row per (set, manipulation, compression).

    python training/evaluate.py runs/embedded                          a run, on the set it was trained on
    python training/evaluate.py runs/c23 runs/c40 --manifest pairs/ffpp pairs/celebdf
    python training/evaluate.py xception_best.pth --model legacy_xception --manifest ffpp.csv --fake_class 0

The row of a manipulation is its fakes against the reals of the same set and compression; the row "all" is every fake
against them. Everything is said about frames and about videos; a video's score is the mean over its frames, and a
video is (dataset, manipulation, video id), for the same id exists once per manipulation. Written to --out:
results.json and results.csv, as the rows come; then compression-gap.png, cross-compression.png (and -dark). Exit
status: 0 all well, 1 some frames could not be read and were listed, 2 wrong usage or data, 130 interrupted.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not take the cores of a shared machine
if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from training.interrupts import prepare_imports

    prepare_imports()

import numpy as np
import pandas
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.config import Config
from training.data import embedded
from training.data.frames import Frames, Stills, embedded_spec, read_embedded, read_manifest
from training.files import cell, reachable, readable, shown, shown_lines, write_bytes, write_text
from training.models.checkpoints import Foreign, Trained, find_trained
from training.models.detector import Detector
from training.options import POSITIONAL, run
from training.report import figures, intervals, metrics, page, sentences

ALL = "all"
LEVELS = ("frame", "video")


@dataclass(kw_only=True)
class Options(Foreign):
    """Evaluate trained models on sets they may never have seen: one row per (set, manipulation, compression)."""

    checkpoint: list[str] = field(default_factory=list, metadata=POSITIONAL)
    """Runs (every model of them), folders of one model, files of weights, hf://user/name; may come first, bare."""
    manifest: list[str] = field(default_factory=list)
    """Sets of pairs, each a folder that prepare.py wrote or a table (see train.py --help); several. Without: the set
    each run was trained on."""
    outside: bool = False
    """Read also what lies elsewhere: pictures that a set's table leads to outside of its own folder, by paths or links,
    and the set and the teacher that a run's configuration names outside of the run and of the current folder."""
    cache: str | None = None
    """Where the embedded set is kept; null: where the run has it, if it is there, else runs/.cache."""
    split: str = "test"
    """Split to evaluate."""
    gallery: int = 0
    """Training frames that recall@1 searches; 0: all."""
    bootstrap: int = 1000
    """Resamples of sources behind the 95 % intervals, except that of AUC."""
    seed: int = 0
    """Seed of the gallery's draw."""
    batch_size: int = 128
    """Images per batch."""
    workers: int = 0
    """Processes that load images; 0: the main process."""
    out: str = "runs/evaluation"
    """Folder of the results; earlier ones are replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("gallery", 0), ("bootstrap", 1), ("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not self.checkpoint:
            raise ValueError("checkpoint: expected a run, the folder of a model or a file of weights; --help explains")


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass
class Scored:
    """What a model said about frames.

    Attributes:
        scores: ``(N,)`` float64, the probability of fake.
        features: ``(N, D)`` float32, penultimate.
        table: a row per frame that could be read.
        unread: why the others could not.
    """

    scores: np.ndarray
    features: np.ndarray
    table: pandas.DataFrame
    unread: list[str]


@torch.inference_mode()
def score(model: Detector, frames: Stills, options: Options, what: str) -> Scored:
    """What a model says about frames; ``what`` names them on the progress bar."""
    scores, features, reasons = [], [], []
    loader = DataLoader(frames, options.batch_size, num_workers=options.workers)
    for images, broken in tqdm(loader, desc=shown(what), leave=False, disable=not sys.stderr.isatty()):
        _, penultimate, logits = model(model.pixels(images))
        scores.append(logits.double().softmax(1)[:, 1].cpu())
        features.append(penultimate.float().cpu())
        reasons += broken
    read = np.array([not reason for reason in reasons])
    if not read.any():
        raise ValueError(f"none of the {len(frames)} frames of {what} can be read; the first: {reasons[0]}")
    if not (finite := torch.cat(scores).isfinite().numpy() | ~read).all():
        raise ValueError(f"{what}: the model gives scores that are not finite for {(~finite).sum()} of the frames")
    found, table = (torch.cat(part).numpy()[read] for part in (scores, features)), frames.table[read]
    return Scored(*found, table.reset_index(drop=True), [reason for reason in reasons if reason])


def by_video(scores: np.ndarray, table: pandas.DataFrame) -> metrics.Outcome:
    """One sample per video: the mean score of its frames."""
    videos = (
        table.assign(score=scores)
        .groupby("video")
        .agg(score=("score", "mean"), label=("label", "first"), group=("group", "first"))
    )
    return metrics.Outcome(*(videos[column].to_numpy() for column in ("score", "label", "group")))


def cells(table: pandas.DataFrame) -> Iterable[tuple[str, str, np.ndarray]]:
    """``(dataset, manipulation or "all", which frames)``: fakes of a manipulation and the reals of the same set."""
    fake = table["label"] == 1
    for dataset in table["dataset"].unique():
        here = table["dataset"] == dataset
        yield dataset, ALL, here.to_numpy()
        for manipulation in sorted(table.loc[here & fake, "manipulation"].unique()):
            yield dataset, manipulation, (here & (~fake | (table["manipulation"] == manipulation))).to_numpy()


def evaluate(
    model: Detector, splits: dict[str, Frames], size: int, options: Options, said: dict[str, list[str]]
) -> Iterator[list[dict]]:
    """The rows of one model on one set, quality by quality.

    Args:
        said: what could not be computed is added to its ``notes``, frames that could not be read to its ``unread``.
    """
    for quality in splits[options.split].qualities:
        found = score(model, splits[options.split].of(quality, size), options, quality)
        said["unread"] += found.unread
        hits = None
        if options.split != "train" and "train" in splits and quality in splits["train"].qualities:
            gallery = splits["train"].of(quality, size)
            if 0 < options.gallery < len(gallery):
                drawn = np.random.default_rng(options.seed).choice(len(gallery), options.gallery, replace=False)
                gallery = gallery.take(np.sort(drawn))
            known = score(model, gallery, options, f"gallery {quality}")
            said["unread"] += known.unread
            labels, known_labels = (scored.table["label"].to_numpy() for scored in (found, known))
            hits = metrics.nearest_neighbour_hits(found.features, labels, known.features, known_labels)
        else:
            said["notes"].append(f"{found.table['dataset'].iloc[0]}, {quality}: no train split as gallery, no recall@1")
        rows = []
        for dataset, manipulation, chosen in cells(found.table):
            part, found_hits = found.table[chosen], None if hits is None else hits[chosen]
            columns = (part[column].to_numpy() for column in ("label", "group"))
            outcomes = {
                "frame": metrics.Outcome(found.scores[chosen], *columns, hits=found_hits),
                "video": by_video(found.scores[chosen], part),
            }
            fakes, count = int(part["label"].sum()), len(part)
            if fakes in (0, count):
                kind = "fakes" if fakes else "reals"
                where = f"{dataset}, {manipulation}, {quality}"
                said["notes"].append(f"{where}: {kind} only, so AUC, AP and EER are undefined there")
            elif shortage := intervals.shortage(outcomes["frame"]):
                said["notes"].append(f"{dataset}, {manipulation}, {quality} {shortage}")
            counts = {"reals": count - fakes, "fakes": fakes, "videos": part["video"].nunique()}
            where = {"dataset": dataset, "manipulation": manipulation, "compression": quality}
            rows.append(where | counts | intervals.summary(outcomes, options.bootstrap))
        yield rows


def embedded_set(config: Config, cache: str | None) -> dict[str, Frames]:
    """The embedded set of a run; where ``cache`` is None, from the run's own if it is there: it makes no folder."""
    there = embedded.file_of(embedded_spec(config), config.cache).is_file()
    return read_embedded(replace(config, cache=cache or (config.cache if there else Config.cache)))


def own_manifest(trained: Trained, *, outside: bool) -> str | None:
    """The table that a run was trained on; None for the embedded set.

    Raises:
        ValueError: it lies neither in the run, which may come from a stranger, nor in the current folder.
    """
    run, where = trained.path.absolute().parents[1], trained.config.manifest
    if where and not (outside or all(reachable(part.strip(), run) for part in where.split(","))):
        where = shown(where)
        raise ValueError(
            f"manifest: that of the run {shown(run)} lies neither in it nor in the current folder; if it is yours:"
            f" manifest={where}"
        )
    return where


# ------------------------------------------------------------------------------------------------------------- results


def names(models: Sequence[Trained]) -> list[str]:
    """What to call each model: its title, with as much added as tells it from the others."""

    def shown(model: Trained, detail: int) -> str:
        title = "teacher" if model.role == "teacher" else page.title(model.role) if model.config else model.role
        run = model.config.name if model.config else str(model.path.parent)
        return ", ".join([title, f"trained on {model.trained_on}", run, str(model.path)][: detail + 1])

    result = [shown(model, 0) for model in models]
    for detail in (1, 2, 3):
        again = {name for name, count in Counter(result).items() if count > 1}
        result = [shown(m, detail) if name in again else name for m, name in zip(models, result, strict=True)]
    return result


def flat(rows: Sequence[dict]) -> pandas.DataFrame:
    """One line per row; the columns ``{frame|video}_{metric}`` and the same with ``_low`` and ``_high``."""
    lines = []
    for row in rows:
        line = {key: value for key, value in row.items() if key not in LEVELS}
        for level in LEVELS:
            for metric, values in row[level].items():
                line |= {f"{level}_{metric}{'' if k == 'value' else f'_{k}'}": value for k, value in values.items()}
        lines.append(line)
    return pandas.DataFrame(lines).drop(columns=[f"video_recall_at_1{k}" for k in ("", "_low", "_high")])


def text_table(rows: Sequence[dict]) -> str:
    """The results for a terminal: AUC of frames and of videos with their intervals, accuracy, equal error rate."""
    return sentences.text_table(
        [
            {
                "model": row["model"],
                "set": row["dataset"],
                "manipulation": row["manipulation"],
                "quality": row["compression"],
                "videos": str(row["videos"]),
                "AUC (frames)": row["frame"]["auc"],
                "AUC (videos)": row["video"]["auc"],
                "accuracy": sentences.number(row["frame"]["accuracy"]["value"]),
                "EER": sentences.number(row["frame"]["eer"]["value"]),
            }
            for row in rows
        ]
    )


def write(rows: list[dict], said: dict[str, list[str]], options: Options) -> None:
    """results.json and results.csv, whole each time."""
    folder = Path(options.out)
    settings = {key: getattr(options, key) for key in ("checkpoint", "manifest", "split", "gallery", "bootstrap")}
    results = {"settings": settings, **said, "rows": [page.without_nan(row) for row in rows]}
    write_text(folder / "results.json", json.dumps(results, indent=1))
    table = flat(rows).map(cell) if rows else pandas.DataFrame()
    text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC) if rows else ""
    write_text(folder / "results.csv", text)


def draw(rows: list[dict], folder: Path) -> None:
    """The two pictures, light and dark."""
    shades = list(dict.fromkeys(row["model"] for row in rows))
    drawings = {
        "compression-gap": lambda theme: figures.compression_gap(theme, rows),
        "cross-compression": lambda theme: figures.cross_compression(theme, rows),
    }
    for name, drawing in drawings.items():
        for theme, png in figures.render(drawing, shades).items():
            path = folder / f"{name}{'' if theme == 'light' else '-dark'}.png"
            write_bytes(path, png)


# ------------------------------------------------------------------------------------------------------------- command


def work(options: Options) -> int:
    models = [model for path in options.checkpoint for model in find_trained(path, options, outside=options.outside)]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    rows: list[dict] = []
    said: dict[str, list[str]] = {"notes": [], "unread": []}
    write(rows, said, options)  # a folder that cannot be written is found before the work,
    for trained in models:  # and a damaged model before others have been asked
        trained.load(device)
    sets: dict[object, dict[str, Frames]] = {}
    for name, trained in zip(names(models), models, strict=True):
        config = trained.config
        manifests = options.manifest or [config and own_manifest(trained, outside=options.outside)]
        if config is None and not options.manifest:
            raise ValueError(f"checkpoint {trained.path}: from elsewhere; a set is needed: --manifest")
        model = trained.load(device)
        said["notes"] += trained.assumptions(model)
        if config and not (trained.path.parent / "done.json").exists():
            said["notes"].append(f"{name}: its training has not ended ({trained.path.parent} has no done.json)")
        for manifest in manifests:
            key = manifest or embedded_spec(config)
            if key not in sets:
                sets[key] = (
                    read_manifest(manifest, outside=options.outside)
                    if manifest
                    else embedded_set(config, options.cache)
                )
            if options.split not in sets[key]:
                where = f"manifest {manifest}" if manifest else "the embedded set"
                raise ValueError(f"split: {where} has {sorted(sets[key])}, got '{options.split}'")
            about = {"model": name, "role": trained.role, "trained_on": trained.trained_on, "path": str(trained.path)}
            about["manifest"] = manifest or "embedded"
            about = {key: readable(value) for key, value in about.items()}  # else pandas takes none of them
            for found in evaluate(model, sets[key], model.image_size, options, said):
                rows += [about | row for row in found]
                said |= {kind: list(dict.fromkeys(lines)) for kind, lines in said.items()}
                write(rows, said, options)
    draw(rows, Path(options.out))
    print(text_table(rows))
    print(*(shown_lines(f"note: {note}") for note in said["notes"]), f"results: {shown(options.out)}", sep="\n")
    for reason in said["unread"]:
        print(shown(f"failed: {reason}"), file=sys.stderr)
    return 1 if said["unread"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        work, Options, "evaluate.py", argv, after_interrupt="the rows so far stand in results.json and results.csv"
    )


if __name__ == "__main__":
    sys.exit(main())
