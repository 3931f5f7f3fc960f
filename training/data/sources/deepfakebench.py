"""DeepfakeBench's JSON manifests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ...files import read_json, shown
from ..tables import SPLITS, quoted
from ..video import Clip
from .common import (
    LEVEL,
    REAL,
    Found,
    Video,
    by_last_part,
    lost_frames,
    natural,
    originals,
    qualities,
    twin_and_people,
    usable,
)
from .splits import Draw, complete

LEVELS = 4  # folders above a manifest, in which frames are looked for; DeepfakeBench itself needs three
Names = tuple[str, str, str, str, str]  # dataset, label, split, level or "", video


def deepfakebench(path: Path, draw: Draw) -> Found:
    """``{dataset: {label: {split: {[compression]: {video: {"label", "frames"}}}}}}``, frames below a folder above.

    Frames that are not on disk are dropped, videos without any are left out, both with a remark.

    Raises:
        ValueError: it is no such manifest (naming the entry), or none of its frames is found.
    """
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"source '{path}': not JSON: {error}") from error
    entries = {names: _frames(entry, names, path) for names, entry in _entries(content, path)}
    root = _root_of(path, [frames[0] for frames in entries.values() if frames])

    @cache
    def on_disk(folder: Path) -> set[str]:
        try:
            return set(os.listdir(folder))
        except (OSError, ValueError):  # also of names that no file can have
            return set()

    files: dict[Names, dict[str, Clip]] = {}  # by all names but the level
    named = gone = lost = 0
    for (dataset, label, split, level, name), frames in entries.items():
        there = [root / frame for frame in frames if (root / frame).name in on_disk((root / frame).parent)]
        named, gone = named + len(frames), gone + len(frames) - len(there)
        by_level = files.setdefault((dataset, label, split, "", name), {})
        if there:
            by_level[level] = tuple(sorted(there, key=lambda frame: natural(frame.name)))
    videos: list[Video] = []
    more: dict[str, tuple[str, ...]] = {}
    names_of: dict[tuple[str, str], list[str]] = {}  # of real videos, by data set and split
    for dataset, label, split, _, name in files:
        if _is_real(label):
            names_of.setdefault((dataset, split), []).append(name)
    reals = {key: by_last_part(names) for key, names in names_of.items()}
    for (dataset, label, split, _, name), by_level in files.items():
        if not by_level:
            continue
        reference, levels = "source", {"source": by_level[""]} if "" in by_level else {}
        if not levels:
            reference, levels, missing = qualities(by_level)
            lost += missing
        fake = int(not _is_real(label))
        twins, people = _behind(label, name, reals.get((dataset, split), {}))
        manipulation = label if fake else REAL
        videos.append(Video(dataset, manipulation, name, fake, split, reference, levels, twins[0], people, root))
        more[videos[-1].key] = tuple(twins[1:])
    remarks = [f"{gone} of {named} frames are not on disk and are left out"] if gone else []
    if empty := len(files) - len(videos):
        remarks.append(f"{empty} of {len(files)} videos have no frame on disk and are left out")
    videos, refused = usable(videos)
    videos, drawn = complete(videos, draw, more)
    return Found(videos, remarks + lost_frames(lost) + drawn, refused)


def _entries(content: object, path: Path) -> Iterator[tuple[Names, object]]:
    """Every video's names and what the manifest says of it."""

    def inside(value: object, *names: str) -> dict:
        if not isinstance(value, dict):
            where = quoted(["/".join(names)]) if names else "the whole"
            raise ValueError(
                f"source '{path}': not a DeepfakeBench manifest: expected {{…}} for {where}, got {type(value).__name__}"
            )
        return value

    for dataset, labels in inside(content).items():
        for label, splits in inside(labels, dataset).items():
            for word, inner in inside(splits, dataset, label).items():
                split = SPLITS.get(word.strip().lower())
                if split is None:
                    raise ValueError(
                        f"source '{path}': expected train, val or test, got {quoted([f'{dataset}/{label}/{word}'])}"
                    )
                inside(inner, dataset, label, word)
                levels = inner if inner and all(map(LEVEL.fullmatch, inner)) else {"": inner}
                for level, videos in levels.items():
                    for name, entry in inside(videos, dataset, label, word, level).items():
                        yield (dataset, label, split, level, name), entry


def _frames(entry: object, names: Names, path: Path) -> list[Path]:
    """The frames of an entry, relative or absolute; Windows' separators are taken."""
    where = f"source '{path}': the video {quoted(['/'.join(filter(None, names))])}"
    frames = entry.get("frames") if isinstance(entry, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
        raise ValueError(f'{where}: expected {{"label": …, "frames": [paths]}}, got {shown(str(entry)[:80])}')
    label = entry.get("label", names[1])
    if not isinstance(label, str) or _is_real(label) != _is_real(names[1]):
        raise ValueError(
            f"{where}: expected a label like that of its group, {quoted([names[1]])}, got {quoted([label])}"
        )
    return [Path(frame.replace("\\", "/")) for frame in frames]


def _is_real(label: str) -> bool:
    return "real" in label.lower()


def _behind(label: str, name: str, reals: dict[str, list[str]]) -> tuple[list[str], tuple[str, ...] | None]:
    """Twins and people, where names tell; ``reals`` of the data set and split are what a fake may be named after."""
    if label.startswith("FF-"):
        target, _, source = name.partition("_")
        return [target], (target, source) if source else (target,)
    if told := twin_and_people(name):
        return [told[0]], told[1]
    if _is_real(label):
        return [name], None
    return originals(name, reals) or [f"{label}/{name}"], None


def _root_of(path: Path, frames: list[Path]) -> Path:
    """The folder that frames are relative to: the first in which one of them lies."""
    above = [folder for folder in path.resolve().parents if folder != folder.parent]  # not the root of all files
    folders = [
        root
        for folder in above[:LEVELS]
        for root in (folder, folder / "datasets" / "rgb", folder / "datasets", folder / "rgb")
        if root.is_dir()
    ]
    for frame in frames:
        for root in folders:
            if (root / frame).is_file():
                return root
    if not frames:
        raise ValueError(f"source '{path}': expected videos with frames, got none")
    raise ValueError(
        f"source '{path}': its first frame {quoted([frames[0]])} and all others lie below none of the folders above"
    )
