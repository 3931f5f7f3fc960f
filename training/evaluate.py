"""Evaluate trained models on sets they may never have seen: one row per (set, manipulation, compression).

    python training/evaluate.py --checkpoint runs/embedded                          a run, on the set it was trained on
    python training/evaluate.py --checkpoint runs/c23 runs/c40 --manifest pairs/ffpp pairs/celebdf
    python training/evaluate.py --checkpoint xception_best.pth --model legacy_xception --manifest ffpp.csv

The row of a manipulation is its fakes against the reals of the same set and compression; the row "all" is every fake
against them. Everything is said about frames and about videos; a video's score is the mean over its frames, and a
video is (dataset, manipulation, video id), for the same id exists once per manipulation. Written to --out:
results.json, results.csv, compression-gap.png, cross-compression.png (and -dark).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import figures, metrics, report, synthetic
from training.config import Config
from training.data import MANIFEST_COLUMNS, embedded_spec, pixels, read_table
from training.models import Detector, Trained, find_trained

ALL = "all"
RAW = "raw"
IDENTITY = ["dataset", "manipulation", "video_id"]
LEVELS = ("frame", "video")

# ---------------------------------------------------------------------------------------------------------------- sets


@dataclass
class Frames(Dataset):
    """Frames of one quality.

    Attributes:
        images: arrays ``(N, H, W, 3)`` uint8, or N paths.
        table: for each frame its label, dataset, manipulation, ``video`` (number of its identity) and ``group`` (what
            the bootstrap draws).
        size: side in pixels to which a frame is resized.
    """

    images: np.ndarray | list[Path]
    table: pandas.DataFrame
    size: int

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(load_image(self.images[index], self.size))

    def take(self, chosen: np.ndarray) -> Frames:
        """Some of the frames, by position."""
        images = [self.images[i] for i in chosen] if isinstance(self.images, list) else self.images[chosen]
        return Frames(images, self.table.iloc[chosen].reset_index(drop=True), self.size)


def load_image(source: np.ndarray | Path, size: int) -> np.ndarray:
    """``(size, size, 3)`` uint8 RGB, resized as in training, from a file or an array ``(H, W, 3)``."""
    try:
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source).convert("RGB")
    except OSError as error:
        raise OSError(f"cannot read the image {source}: {error}") from error
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image)


def read_manifest(path: str, size: int) -> dict[str, dict[str, Frames]]:
    """The frames of a table of pairs: ``{split: {quality: frames}}``.

    The first quality is called as the column ``reference`` says, else ``raw``; then comes each compression.

    Args:
        path: as :func:`training.data.read_table` takes it.

    Raises:
        ValueError: no such file, missing columns, labels other than 0 and 1, or a video in more than one split.
    """
    table = read_table(path)
    if missing := [column for column in MANIFEST_COLUMNS if column not in table]:
        raise ValueError(f"manifest {path}: expected the columns {list(MANIFEST_COLUMNS)}, missing {missing}")
    if not table["label"].isin([0, 1]).all():
        raise ValueError(f"manifest {path}: expected labels 0 and 1, got {sorted(set(table['label'].tolist()))}")
    fallback = {
        "dataset": Path(path).stem,
        "manipulation": np.where(table["label"] == 1, "fake", "real"),
        "video_id": table["path_raw"],
        "compression": "compressed",
        "reference": RAW,
    }
    table = table.assign(**{name: value for name, value in fallback.items() if name not in table})
    table = table.astype(dict.fromkeys([*IDENTITY, "compression", "reference"], str))
    table["video"] = table["group"] = table.groupby(IDENTITY, sort=False).ngroup()
    crossing = table.groupby("video")["split"].nunique().pipe(lambda count: count.index[count > 1])
    if len(crossing):
        names = table[table["video"].isin(crossing[:3])][IDENTITY].drop_duplicates().agg("/".join, axis=1)
        raise ValueError(f"manifest {path}: videos in more than one split: {', '.join(names)}")

    def frames(rows: pandas.DataFrame, column: str) -> Frames:
        return Frames([Path(name) for name in rows[column]], rows.reset_index(drop=True), size)

    return {
        split: {
            reference: frames(part, "path_raw")
            for reference, part in rows.drop_duplicates("path_raw").groupby("reference")
        }
        | {quality: frames(part, "path_compressed") for quality, part in rows.groupby("compression")}
        for split, rows in table.groupby("split")
    }


def embedded(config: Config, size: int) -> dict[str, dict[str, Frames]]:
    """The embedded set of a run, in the form of :func:`read_manifest`; the bootstrap draws real and forged twins."""
    splits: dict[str, dict[str, Frames]] = {}
    with np.load(synthetic.build(spec := embedded_spec(config), config.cache)) as arrays:
        for split in synthetic.SPLITS:
            label, source = arrays[f"{split}_label"], arrays[f"{split}_source"]
            table = pandas.DataFrame({"label": label, "dataset": "embedded", "group": source})
            table["manipulation"] = np.where(label == 1, "forged", "real")
            table["video"] = 2 * source + label
            qualities = [RAW, *(f"c{crf}" for crf in spec.crfs)]
            splits[split] = {name: Frames(arrays[f"{split}_{name}"], table, size) for name in qualities}
    return splits


# ------------------------------------------------------------------------------------------------------------- scoring


@torch.inference_mode()
def score(model: Detector, batches: Iterable[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """What a model says about images.

    Args:
        batches: images ``(B, size, size, 3)`` uint8.

    Returns:
        The probability of fake ``(N,)`` float64 and the penultimate features ``(N, D)`` float32.
    """
    device = next(model.parameters()).device
    scores, embeddings = [], []
    for batch in batches:
        _, penultimate, logits = model(pixels(batch, device))
        scores.append(logits.double().softmax(1)[:, 1].cpu())
        embeddings.append(penultimate.float().cpu())
    return torch.cat(scores).numpy(), torch.cat(embeddings).numpy()


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


def evaluate(model: Detector, splits: dict[str, dict[str, Frames]], options: Namespace, notes: list[str]) -> list[dict]:
    """The rows of one model on one set; what could not be computed is added to ``notes``."""
    rows = []
    for quality, frames in splits[options.split].items():
        scores, embeddings = score(model, _batches(frames, options, quality))
        hits = None
        gallery = splits.get("train", {}).get(quality)
        if gallery is not None and options.split != "train":
            if 0 < options.gallery < len(gallery):
                drawn = np.random.default_rng(options.seed).choice(len(gallery), options.gallery, replace=False)
                gallery = gallery.take(np.sort(drawn))
            known = score(model, _batches(gallery, options, f"gallery {quality}"))[1]
            labels, known_labels = frames.table["label"].to_numpy(), gallery.table["label"].to_numpy()
            hits = metrics.nearest_neighbour_hits(embeddings, labels, known, known_labels)
        else:
            notes.append(f"{frames.table['dataset'].iloc[0]}, {quality}: no train split as gallery, no recall@1")
        for dataset, manipulation, chosen in cells(frames.table):
            part, found = frames.table[chosen], None if hits is None else hits[chosen]
            columns = (part[column].to_numpy() for column in ("label", "group"))
            outcomes = {
                "frame": metrics.Outcome(scores[chosen], *columns, hits=found),
                "video": by_video(scores[chosen], part),
            }
            fakes, count = int(part["label"].sum()), len(part)
            if fakes in (0, count):
                kind = "fakes" if fakes else "reals"
                notes.append(
                    f"{dataset}, {manipulation}, {quality}: {kind} only, so AUC, AP and EER are undefined there"
                )
            counts = {"reals": count - fakes, "fakes": fakes, "videos": part["video"].nunique()}
            where = {"dataset": dataset, "manipulation": manipulation, "compression": quality}
            rows.append(where | counts | metrics.summary(outcomes, options.bootstrap))
    return rows


def _batches(frames: Frames, options: Namespace, what: str) -> Iterable[Tensor]:
    loader = DataLoader(frames, options.batch_size, num_workers=options.workers)
    return tqdm(loader, desc=what, leave=False, disable=not sys.stderr.isatty())


# ------------------------------------------------------------------------------------------------------------- results


def names(models: Sequence[Trained]) -> list[str]:
    """What to call each model: its title, with as much added as tells it from the others."""

    def shown(model: Trained, detail: int) -> str:
        title = "teacher" if model.role == "teacher" else report.title(model.role) if model.config else model.role
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
            for metric, cell in row[level].items():
                line |= {f"{level}_{metric}{'' if k == 'value' else f'_{k}'}": value for k, value in cell.items()}
        lines.append(line)
    return pandas.DataFrame(lines).drop(columns=[f"video_recall_at_1{k}" for k in ("", "_low", "_high")])


def text_table(rows: Sequence[dict]) -> str:
    """The results for a terminal: AUC of frames and of videos with their intervals, accuracy, equal error rate."""

    def span(cell: dict[str, float]) -> str:
        return f"{report.number(cell['value'])} [{report.number(cell['low'])}, {report.number(cell['high'])}]"

    lines = [["model", "set", "manipulation", "quality", "videos", "AUC (frames)", "AUC (videos)", "accuracy", "EER"]]
    for row in rows:
        frame, video = row["frame"], row["video"]
        where = [row[key] for key in ("model", "dataset", "manipulation", "compression")]
        rates = [report.number(frame[metric]["value"]) for metric in ("accuracy", "eer")]
        lines.append([*where, str(row["videos"]), span(frame["auc"]), span(video["auc"]), *rates])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write(rows: list[dict], notes: list[str], options: Namespace) -> None:
    """results.json, results.csv and the two pictures."""
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(options, key) for key in ("checkpoint", "manifest", "split", "gallery", "bootstrap")}
    results = {"settings": settings, "notes": notes, "rows": [report._without_nan(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    flat(rows).to_csv(folder / "results.csv", index=False)
    shades = list(dict.fromkeys(row["model"] for row in rows))
    drawings = {
        "compression-gap": lambda theme: figures.compression_gap(theme, rows),
        "cross-compression": lambda theme: figures.cross_compression(theme, rows),
    }
    for name, draw in drawings.items():
        for theme, png in figures.render(draw, shades).items():
            (folder / f"{name}{'' if theme == 'light' else '-dark'}.png").write_bytes(png)


# -------------------------------------------------------------------------------------------------------- command line


def parser() -> ArgumentParser:
    result = ArgumentParser(
        prog="python training/evaluate.py", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = result.add_argument
    add("--config", action="config", help="YAML file of these options; later arguments override it.")
    kinds = "A run (every model of it), the folder of one model, or a file of weights; several."
    add("--checkpoint", type=str, nargs="+", required=True, help=kinds)
    tables = "Sets of pairs, each a folder that prepare.py wrote or a table (see train.py --help); several. Without: "
    add("--manifest", type=str, nargs="+", default=[], help=f"{tables}the set each run was trained on.")
    add("--model", type=str | None, default=None, help="timm model of files that come from elsewhere.")
    add("--image_size", type=PositiveInt | None, default=None, help="Side in pixels; without: as the run was trained.")
    add("--split", type=str, default="test", help="Split to evaluate.")
    add("--gallery", type=NonNegativeInt, default=0, help="Training frames that recall@1 searches; 0: all.")
    add("--bootstrap", type=PositiveInt, default=1000, help="Resamples (of videos) behind the 95 % intervals.")
    add("--seed", type=int, default=0, help="Seed of the gallery's draw.")
    add("--batch_size", type=PositiveInt, default=128, help="Images per batch.")
    add("--workers", type=NonNegativeInt, default=0, help="Processes that load images; 0: the main process.")
    add("--out", type=str, default="runs/evaluation", help="Folder of the results; earlier ones are replaced.")
    return result


def run(options: Namespace) -> tuple[list[dict], list[str]]:
    """Everything the command does; returns the rows and what is to be said about them."""
    models = [model for path in options.checkpoint for model in find_trained(path, options.model)]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    rows, notes = [], []
    sets: dict[object, dict[str, dict[str, Frames]]] = {}
    for name, trained in zip(names(models), models, strict=True):
        config = trained.config
        size = trained.image_size(options.image_size)
        manifests = options.manifest or [config and config.manifest]
        if config is None and not options.manifest:
            raise ValueError(f"checkpoint {trained.path}: from elsewhere; a set is needed: --manifest")
        model = trained.load(device)
        if model.fit:
            notes.append(str(model.fit))
        if config and not (trained.path.parent / "done.json").exists():
            notes.append(f"{name}: its training has not ended ({trained.path.parent} has no done.json)")
        for manifest in manifests:
            key = (manifest, size) if manifest else (embedded_spec(config), size)
            if key not in sets:
                sets[key] = read_manifest(manifest, size) if manifest else embedded(config, size)
            if options.split not in sets[key]:
                raise ValueError(f"split: manifest {manifest} has {sorted(sets[key])}, got '{options.split}'")
            about = {"model": name, "role": trained.role, "trained_on": trained.trained_on, "path": str(trained.path)}
            about["manifest"] = manifest or "embedded"
            rows += [about | row for row in evaluate(model, sets[key], options, notes)]
    notes = list(dict.fromkeys(notes))
    write(rows, notes, options)
    return rows, notes


def main(argv: list[str] | None = None) -> None:
    parse = parser()
    options = parse.parse_args(argv)
    try:
        rows, notes = run(options)
    except (ValueError, OSError) as error:
        parse.exit(2, f"error: {error}\n")
    print(text_table(rows))
    print(*(f"note: {note}" for note in notes), f"results: {options.out}", sep="\n")


if __name__ == "__main__":
    main()
