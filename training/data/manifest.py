"""The manifest, the table of pairs: written, read and checked here alone, and with it the shards that it came in."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas

from .. import files
from . import tables
from .tables import Problems, quoted, some

if TYPE_CHECKING:
    from .sources import Video

COLUMNS = ("path_raw", "path_compressed", "label", "split")
PATHS, NEEDED = COLUMNS[:2], COLUMNS[1:]
IDENTITY = ("dataset", "manipulation", "video_id")
SHOWN = ("compression", "dataset", "manipulation")  # what results and reports name
UNNAMED = "compressed"  # the compression of a table that does not say
RAW = "raw"

# ------------------------------------------------------------------------------------------------------------- reading


def read(where: str, *, pictures: bool = True, outside: bool = False) -> pandas.DataFrame:
    """The table of pairs, checked.

    Args:
        where: a CSV or parquet file, several with commas between them, or a folder that prepare.py wrote.
        pictures: look whether every picture is there.
        outside: take also what paths and links lead to outside of the folder that the file lies in.

    Returns:
        One row per pair, in the order of the files, equal ones once. ``path_raw`` and ``path_compressed`` lead from the
        working directory; ``path_raw`` is "" where there is no raw twin (a row of compression ``raw`` is its own).
        ``label`` is int64 (1 = fake), ``split`` is train, val or test. Text that is always there and what it is where
        the table has none: compression (``UNNAMED``), dataset (the name of the file), manipulation ("real", "fake"),
        video_id and twin (``path_raw``, else :func:`own_name` of ``path_compressed``; twin is equal for a real frame
        and the fake made of it) and reference ("raw", what path_raw is called; "" where there is none). Other columns
        are as the table has them. ``attrs["where"]`` is ``where``.

    Raises:
        ValueError: there is no such manifest, or it is not whole; or all that is wrong with it, with its rows.
    """
    problems = Problems(f"manifest {files.shown(where)}")
    paths = _files(str(where))
    told = [problems.of(files.shown(path)) if len(paths) > 1 else problems for path in paths]
    parts = [_part(path, of, pictures, outside) for path, of in zip(paths, told, strict=True)]
    if parts := [part for part in parts if part is not None]:
        table = pandas.concat(parts, ignore_index=True)
        _check_agreement(table, problems)
    problems.check()
    known = [*COLUMNS, *IDENTITY, "compression", "reference", "twin"]
    table = table.drop_duplicates(known, ignore_index=True)
    table.attrs["where"] = str(where)
    return table


def check_for_training(
    table: pandas.DataFrame, qualities: Sequence[str], *, option: str = "compression", teacher: bool = True
) -> None:
    """Check that a table of :func:`read` has what a training on some qualities needs.

    Args:
        qualities: that are learnt, ``raw`` or compressions.
        option: that they were said by.
        teacher: one is to be trained, if any training row has a ``path_raw``.

    Raises:
        ValueError: there is no such quality, it has no rows of a split, or one class only in train or val, also among
            the rows that the teacher sees.
    """
    where = f"manifest {files.shown(table.attrs['where'])}"
    paired = table["path_raw"] != ""
    known = [*([RAW] if paired.any() else []), *sorted(set(table["compression"]) - {RAW})]
    if unknown := [quality for quality in qualities if quality not in known]:
        raise ValueError(f"{option}: {where} has {known}, got {quoted(unknown)}")
    problems = Problems(where)
    needed = {f"with compression '{quality}'": table["compression"] == quality for quality in qualities}
    if RAW in qualities:
        needed[f"with compression '{RAW}'"] = paired
    learnt = np.logical_or.reduce(list(needed.values()))
    if teacher and (~paired & learnt).any() and (paired & learnt & (table["split"] == "train")).any():
        needed["with a path_raw, for the teacher"] = paired & learnt
    purposes = {"train": "nothing can be learnt", "val": "its AUC chooses the model", "test": None}
    for what, having in needed.items():
        rows = table[having]
        for split, purpose in purposes.items():
            found = set(rows.loc[rows["split"] == split, "label"])
            if not found and (purpose or "teacher" not in what):
                problems.add("split", None, f"no rows of split '{split}' {what}")
            elif purpose and len(found) == 1:
                absent = "real (label 0)" if found == {1} else "fake (label 1)"
                problems.add("label", None, f"split {split} has no {absent} {what}: {purpose}")
    problems.check()


def _part(path: Path, problems: Problems, pictures: bool, outside: bool) -> pandas.DataFrame | None:
    """One file of a manifest, or None where columns are missing."""
    table = tables.read(path, "manifest")
    tables.require(table, NEEDED, problems)
    if "path_raw" not in table and (near := [name for name in table if "raw" in name and name != "sha256_raw"]):
        said = f"expected 'path_raw', or no column of raw pictures, got {quoted(near)}"
        problems.add("columns", None, said)
    paths = [column for column in PATHS if column in table]
    _make_whole(table, paths, path.parent, problems, pictures, outside)
    for column, understand in (("label", tables.labels), ("split", tables.splits)):
        if column in table:
            table[column] = understand(table[column], problems)
    if not set(NEEDED) <= set(table):
        return None
    given = table["path_raw"] if "path_raw" in table else pandas.Series("", table.index)
    level = tables.text(table["compression"]) if "compression" in table else given
    raw = table["path_raw"] = given.where((given != "") | (level != RAW), table["path_compressed"])
    names = [own_name(*pair) for pair in zip(table["path_compressed"], level, strict=True)]
    own = raw.where(raw != "", pandas.Series(names, table.index))
    defaults = {
        "compression": UNNAMED,
        "dataset": path.stem,
        "manipulation": np.where(table["label"] == 1, "fake", "real"),
        "video_id": own,
        "reference": RAW,
        "twin": own,
    }
    for column, default in defaults.items():
        read_cells = tables.names if column == "twin" else tables.text
        cells = read_cells(table[column]) if column in table else pandas.Series("", table.index)
        empty = cells == ""
        if column != "twin" and not empty.all():  # to have no twin is no fault
            fault = empty & (raw != "") if column == "reference" else empty
            problems.add(column, fault, "empty, though other rows have it")
        table[column] = cells = cells.where(~empty, default)
        if column in SHOWN:
            wrong = cells.str.contains(files.CONTROLS)
            problems.add(column, wrong, f"expected no control characters, got {quoted(cells[wrong].unique())}")
    table["reference"] = table["reference"].where(raw != "", "")
    return table


def own_name(path: str, level: str) -> str:
    """A path without the last folder called like its compression: what the qualities of a picture share, which are one
    source and not several."""
    head, found, tail = f"/{path}".rpartition(f"/{level}/")
    return f"{head}/{tail}"[1:] if level and found else path


def _make_whole(
    table: pandas.DataFrame, columns: list[str], folder: Path, problems: Problems, pictures: bool, outside: bool
) -> None:
    """Make paths whole, in place, and add those that lead to no file, or outside of the folder, to the problems."""

    @cache  # one listing of a folder costs a network disk what one question about a file does
    def listed(head: str) -> tuple[str, dict[str, bool]]:
        """The folder, and whether each of its files is a link."""
        place = os.path.join(folder / head, "").removeprefix(os.path.join(os.curdir, ""))
        try:
            with os.scandir(place or os.curdir) as entries:
                return place, {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
        except (OSError, ValueError):  # it is not there, or nothing could be
            return place, {}

    @cache
    def below(place: str) -> bool:
        return outside or files.inside(place or os.curdir, folder)

    def find(cell: str) -> tuple[str, str | None]:
        """The path, and what is there if it is no file of the folder."""
        if not cell.strip():
            return "", "empty"
        head, tail = os.path.split(cell)
        place, links = listed(head)
        path = place + tail
        if tail not in links and not os.path.isfile(path):  # the system may take other capitals, or forbid to list
            for spelling in tables.spellings(cell)[1:]:
                head, tail = os.path.split(spelling)
                if os.path.isfile(other := listed(head)[0] + tail):
                    path, (place, links) = other, listed(head)
                    break
            else:
                return path, "a folder" if os.path.isdir(path) else "nothing"
        elsewhere = not below(place) or (links.get(tail, True) and not below(path))
        return path, "elsewhere" if elsewhere else None

    for column in columns:
        cells = table[column].astype(str)
        if column == "path_raw":  # to have no raw twin is no fault
            cells = cells.where(tables.names(table[column]) != "", "")
        codes, cells = pandas.factorize(cells)
        paths, faults = (np.array(values, object)[codes] for values in zip(*map(find, cells.tolist()), strict=True))
        table[column] = paths
        problems.add(column, (faults == "empty") & (column != "path_raw"), "empty")
        wrong = faults == "elsewhere"
        got = quoted(dict.fromkeys(paths[wrong]))
        problems.add(column, wrong, f"expected pictures in the folder of the manifest (outside=true: any), got {got}")
        for fault in ("nothing", "a folder") if pictures else ():
            wrong = faults == fault
            problems.add(column, wrong, f"expected a picture, found {fault} at {quoted(dict.fromkeys(paths[wrong]))}")


def _check_agreement(table: pandas.DataFrame, problems: Problems) -> None:
    """Add what lies in several splits and what has two labels to the problems."""
    # Cells that are empty, no split or no label are in the problems already.
    sure = table[table["path_compressed"] != ""]
    sure = sure.assign(split=sure["split"].where(sure["split"] != ""), label=sure["label"].where(sure["label"] >= 0))

    def several(keys: list[str], column: str) -> list[str]:
        counts = sure[(sure[keys] != "").all(axis=1)].groupby(keys, sort=False)[column].nunique()
        names = counts.index[counts > 1]
        return ["/".join(name) for name in names] if len(keys) > 1 else list(names)

    crossing = several(list(IDENTITY), "split")  # of each kind of fault the most general is said, once
    if crossing:
        problems.add("split", None, f"videos in more than one split: {quoted(crossing)}")
    two_labels = False
    for column in PATHS:
        if not crossing and (pictures := several([column], "split")):
            problems.add(column, None, f"pictures in more than one split: {quoted(pictures)}")
            crossing = pictures
        if pictures := several([column], "label"):
            problems.add(column, None, f"pictures with two labels: {quoted(pictures)}")
            two_labels = True
    if not two_labels and (videos := several(list(IDENTITY), "label")):
        said = f"real and fake are called alike, expected another manipulation or video_id: {quoted(videos)}"
        problems.add("/".join(IDENTITY), None, said)
    # The official test list of Celeb-DF is not by original, as the literature uses it.
    sure = sure[~(sure["dataset"].str.startswith("Celeb-DF") & (sure["split"] == "test"))]
    if not crossing and (twins := several(["twin"], "split")):
        problems.add("twin", None, f"a real frame and the fakes made of it in more than one split: {quoted(twins)}")


def _files(where: str) -> list[Path]:
    if os.path.isdir(where):
        return _files_of_set(where)
    names = [name.strip() for name in where.split(",") if name.strip()]
    if os.path.isfile(where) or len(names) < 2:
        return [Path(where)]
    return [path for name in names for path in _files(name)]


# ------------------------------------------------------------------------------------------------- writing, and shards


@dataclass(frozen=True)
class Shard:
    """How far one of the parts is in which a set is prepared.

    Attributes:
        index, count: it is part ``index`` (from 1) of ``count``.
        videos: how many belong to it; None where that was not written down.
        done: how many of them have their pairs.
        failed: why others have none, by path.
        finished: its run has ended.
        of: the :func:`fingerprint` of the source's videos; "" where it was not written down.
        outdated: a shard that was prepared later is one of another list of videos.
    """

    index: int
    count: int
    videos: int | None = None
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    of: str = ""
    outdated: bool = False

    @property
    def whole(self) -> bool:
        """Whether each of its videos is done or failed, its manifest is written, and it fits the other shards."""
        return self.finished and not self.outdated and (self.videos or 0) <= self.done + len(self.failed)

    def __str__(self) -> str:
        state = "whole" if self.whole else "not started" if self.videos is None else "not ended"
        state = "of another list of videos, run it again" if self.outdated else state
        counted = [] if self.videos is None else [f"{self.done} of {self.videos} videos"]
        return f"{self.index}/{self.count}: " + ", ".join(
            [*counted, *([f"{len(self.failed)} failed"] if self.failed else []), state]
        )


def file_of(folder: str | Path, index: int = 1, count: int = 1) -> Path:
    """Where the manifest of a shard lies."""
    return Path(folder) / ("manifest.parquet" if count == 1 else f"manifest-{index}-of-{count}.parquet")


def write(path: Path, rows: list[dict]) -> None:
    """Write rows, a dictionary of cells each, as a parquet file, whole or not at all."""
    files.write_whole(Path(path), lambda target: pandas.DataFrame(rows).to_parquet(target, index=False))


def fingerprint(videos: Iterable[Video]) -> str:
    """What tells apart the lists of videos, with their splits, that shards are parts of: 16 hexadecimal digits."""
    listed = json.dumps(sorted((video.key, video.split) for video in videos))
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def write_shard(
    folder: str | Path,
    index: int,
    count: int,
    videos: int,
    done: int,
    failed: dict[str, str],
    finished: bool,
    of: str = "",
) -> None:
    """Write down how far a shard is, in the words of :class:`Shard`; ``finished`` after its manifest is written."""
    state = {"videos": videos, "done": done, "failed": failed, "finished": finished, "of": of}
    files.write_text(Path(folder) / "shards" / f"{index}-of-{count}.json", json.dumps(state, indent=1))


def status(folder: str | Path) -> list[Shard]:
    """The shards of a set, those included that have not started; of each number of shards it was prepared in.

    Where nothing was written down, as by an older version, a shard is whole if its manifest is there. Where shards are
    of different lists of videos, those that are not of the list of the last are outdated.

    Raises:
        ValueError: there is no set in the folder, or what was written down is damaged.
    """
    shards: dict[tuple[int, int], Shard] = {}
    latest: dict[int, tuple[int, str]] = {}  # when, and of what, by the number of shards
    for path in (*Path(folder).glob("manifest*.parquet"), *Path(folder).glob("shards/*.json")):
        match = re.fullmatch(r"(?:manifest-)?(\d+)-of-(\d+)", "1-of-1" if path.stem == "manifest" else path.stem)
        if match:
            key = int(match[1]), int(match[2])
            try:
                state = files.read_json(path) if path.suffix == ".json" else {"finished": True}
                shards[key] = shard = Shard(*key, **state)
                for name, kinds in (("videos", int | None), ("done", int), ("failed", dict), ("of", str)):
                    if not isinstance(getattr(shard, name), kinds):
                        raise TypeError(f"{name}: {getattr(shard, name)!r}")
                if shards[key].of:
                    when = path.stat().st_mtime_ns, shards[key].of
                    latest[key[1]] = max(latest.get(key[1], when), when)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"manifest: expected the state of a shard in '{files.shown(path)}', got: {error}"
                ) from error
    if not shards:
        raise ValueError(f"manifest: none in '{files.shown(folder)}'")
    for key, shard in shards.items():
        if shard.of and shard.of != latest[shard.count][1]:
            shards[key] = replace(shard, outdated=True)
    counts = sorted({count for _, count in shards})
    return [shards.get((i, count), Shard(i, count)) for count in counts for i in range(1, count + 1)]


def describe_status(folder: str | Path) -> str:
    """What :func:`status` finds, a line for each shard, for ``prepare.py --status``."""
    return "\n".join(map(str, status(folder)))


def _files_of_set(folder: str) -> list[Path]:
    """The manifests of a prepared set, whole in one number of shards; of several numbers the one written last."""
    sets: dict[int, list[Shard]] = {}
    for shard in status(folder):
        sets.setdefault(shard.count, []).append(shard)
    lacking = {count: [shard for shard in shards if not shard.whole] for count, shards in sets.items()}
    name = files.shown(folder)
    if all(lacking.values()):
        shards = min(lacking.values(), key=len)
        if outdated := [f"{shard.index}/{shard.count}" for shard in shards if shard.outdated]:
            newer = [f"{s.index}/{s.count}" for s in sets[shards[0].count] if s.of and not s.outdated]
            raise ValueError(
                f"manifest: '{name}': shards {some(outdated, 5)} and {some(newer, 5)} were made from different lists "
                f"of videos: run shard {some(outdated, 5)} again"
            )
        said = [f"{s.index}/{s.count} has not {'started' if s.videos is None else 'ended'}" for s in shards]
        raise ValueError(
            f"manifest: '{name}' is not complete: shard {some(said, 5)}; prepare.py --status out={name} shows all"
        )
    found = [
        [file_of(folder, s.index, s.count) for s in shards if s.videos is None or s.done]
        for count, shards in sets.items()
        if not lacking[count]
    ]
    latest = max(found, key=lambda paths: max((path.stat().st_mtime for path in paths if path.exists()), default=0.0))
    if not latest:
        raise ValueError(f"manifest: '{name}' has no pairs, for none of its videos could be prepared")
    return latest
