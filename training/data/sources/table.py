"""A table of one's own: whatever set there is comes in through it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from ...files import shown
from .. import tables
from ..tables import Problems, quoted
from .common import LEVEL, RAW_LEVELS, REAL, Found, Video, clip_at, lost_frames, qualities, stem, usable
from .splits import Draw, complete

IDENTITY = ["dataset", "manipulation", "video_id"]


def table(path: Path, draw: Draw) -> Found:
    """A CSV or parquet file with the columns path and label and, if they apply, those of :func:`_rows`.

    Splits are drawn by groups where there is no column ``split`` or nothing in it.

    Raises:
        ValueError: what is wrong with its cells, with their rows.
    """
    problems = Problems(f"source {shown(path)}")
    rows = _rows(path, problems)
    problems.check()
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for row in rows.itertuples(index=False):
        groups.setdefault((row.dataset, row.manipulation, row.video_id), []).append(row)
    videos, lost = [], 0
    for (dataset, manipulation, video_id), group in groups.items():
        first, by_level = group[0], {row.level: row.clip for row in group}
        reference, levels, missing = qualities(by_level) if first.level else ("source", {"source": by_level[""]}, 0)
        lost += missing
        people = tuple(filter(None, map(str.strip, re.split("[;,|]", first.person)))) or None
        label, split, twin = int(first.label), first.split, first.twin or stem(video_id)
        videos.append(
            Video(dataset, manipulation, video_id, label, split, reference, levels, twin, people, path.parent)
        )
    videos, refused = usable(videos)
    videos, remarks = complete(videos, draw)
    return Found(videos, lost_frames(lost) + remarks, refused)


def _rows(path: Path, problems: Problems) -> pandas.DataFrame:
    """The rows in order, as text but for ``label`` (int64) and ``clip``; what is wrong is added to the problems.

    Columns: path (below the table's folder, or absolute: a video, a picture, a folder of frames), label, split,
    dataset (else the table's name), manipulation (else ``fake``; of reals always ``real``), video_id (else the path),
    twin (what a real video and the fakes made from it share, else the id), compression (raw, c0 or c and a number: the
    rows of one video are its qualities), person (whose faces they are, with ``;``, ``,`` or ``|`` between several). The
    words None, nan and null are no twin and no person.
    """
    given = tables.read(path, "source")
    tables.require(given, ("path", "label"), problems)
    problems.check()
    names = ("path", "split", *IDENTITY, "twin", "compression", "person")
    empty = pandas.Series("", index=given.index)
    rows = pandas.DataFrame({name: tables.text(given[name]) if name in given else empty for name in names})
    for name in {"twin", "person"} & set(given):
        rows[name] = tables.names(given[name])
    rows["label"] = tables.labels(given["label"], problems)
    if (rows["split"] != "").any():
        rows["split"] = tables.splits(given["split"], problems)

    places = [_place(path.parent, text) for text in rows["path"]]
    clips = pandas.Series([clip_at(place) if text else None for place, text in zip(places, rows["path"], strict=True)])
    rows["clip"] = clips = clips.astype(object)
    problems.add("path", rows["path"] == "", "empty")
    missing = clips.isna() & (rows["path"] != "")
    problems.add(
        "path", missing, f"expected a video, a picture or a folder of pictures, got {quoted(rows['path'][missing])}"
    )
    again = pandas.Series([os.path.normpath(place) for place in places]).duplicated() & (rows["path"] != "")
    problems.add("path", again, f"expected each once, got {quoted(rows['path'][again].unique())} again")

    fake = rows["label"] == 1
    wrong = fake & (rows["manipulation"].str.lower() == REAL)
    problems.add("manipulation", wrong, "expected another name than 'real' of a fake")
    rows["manipulation"] = rows["manipulation"].where(rows["manipulation"] != "", "fake").where(fake, REAL)
    rows["dataset"] = rows["dataset"].where(rows["dataset"] != "", path.stem)
    ids = pandas.Series([_name(path.parent, place) for place in places])
    rows["video_id"] = rows["video_id"].where(rows["video_id"] != "", ids)

    rows["level"] = level = rows["compression"].str.lower()
    wrong = (level != "") & ~level.map(lambda text: bool(LEVEL.fullmatch(text)))
    problems.add("compression", wrong, f"expected raw, c0, c23, c40 …, got {quoted(level[wrong].unique())}")
    if level.nunique() > 1 and "video_id" not in given:
        problems.add("video_id", None, "expected beside compression: it says which rows are one video")
    same = rows.assign(level=level.where(~level.isin(RAW_LEVELS), "raw"), none=level == "")
    again = same.duplicated([*IDENTITY, "level"])
    problems.add("compression", again, "expected each quality of a video once, got it again")
    first = same.groupby(IDENTITY)[["split", "twin", "person", "none"]].transform("first")
    problems.add("compression", same["none"] != first["none"], "expected for all rows of a video or for none")
    for column in ("split", "twin", "person"):
        problems.add(column, np.array(rows[column] != first[column]), "expected the same for all rows of a video")
    return rows


def _place(root: Path, text: str) -> Path:
    """Where a cell points: in the first of its :func:`.tables.spellings` that leads somewhere, else as written."""
    places = [root / spelling for spelling in tables.spellings(text)]
    return next((place for place in places if os.path.exists(place)), places[0])


def _name(root: Path, place: Path) -> str:
    """A path as a video id: below the table's folder, or from the file system's root."""
    place, root = Path(os.path.abspath(place)), Path(os.path.abspath(root))
    return (place.relative_to(root) if place.is_relative_to(root) else place.relative_to(place.anchor)).as_posix()
