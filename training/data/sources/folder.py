"""Any folder with ``real/`` and ``fake/``, with or without folders for the splits above or below them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from ..tables import SPLITS, quoted
from ..video import Clip
from .common import (
    REAL,
    Found,
    Listing,
    Video,
    by_last_part,
    left_out,
    listing,
    originals,
    stem,
    subfolder,
    twin_and_people,
    usable,
)
from .splits import Draw, complete

CONTAINERS = {"videos", "frames", "images"}  # folders that say what is in them and not which video


def folder(root: Path, draw: Draw) -> Found:
    """Videos and pictures below ``real/`` and ``fake/``: pictures beside each other in a sub-folder are one clip.

    Folders ``train/``, ``val/``, ``test/`` with ``real/`` and ``fake/`` in them, or in these with everything in them,
    are the splits, and stay as they are even where a remark says that they share originals or people. Folders
    ``videos/``, ``frames/`` and ``images/`` are no part of a name, and a video that lies there as a file and as its
    frames is taken once, as the file.

    A fake belongs to the real video that :func:`.common.twin_and_people` tells, else to that of the same name, endings
    aside, and those whose names it is put together from; of its own split only, where the splits are given. Splits are
    drawn so that what belongs together stays together.

    Raises:
        ValueError: ``real/`` or ``fake/`` exists twice, in capital and small letters.
    """
    dataset = root.resolve().name or "folder"
    listings: list[Listing] = []
    videos: list[Video] = []
    twice = 0
    for above in split_folders(root) or [root]:
        for label, manipulation in enumerate((REAL, "fake")):
            if not (place := subfolder(above, manipulation)).is_dir():
                continue
            listings.append(found := listing(place))
            stills = draw.images == "stills"
            clips, doubled = _once(found.clips(stills), stills)
            twice += doubled
            for name, clip in clips.items():
                name = name if above == root else f"{above.name}/{name}"
                videos.append(Video(dataset, manipulation, name, label, "", "source", {"source": clip}, "", root=root))
    parts = [video.video_id.partition("/") for video in videos]
    given = [SPLITS.get(first.lower(), "") if rest else "" for first, _, rest in parts]
    remarks = []
    if all(given):
        videos = [replace(video, split=split) for video, split in zip(videos, given, strict=True)]
    elif any(given):
        named = sorted({first for (first, *_), split in zip(parts, given, strict=True) if split})
        remarks.append(f"folders {quoted(named)} are not taken as splits, for other clips lie beside them")
    if twice:
        remarks.append(f"{twice} clips exist as a file and as frames, or as frames twice, and are taken once")
    videos, more, tied = _tied(videos)
    videos, refused = usable(videos)
    videos, drawn = complete(videos, draw, more)
    return Found(videos, remarks + drawn + tied + left_out(listings), refused)


def split_folders(root: Path) -> list[Path]:
    """The folders called like a split with ``real/`` or ``fake/`` in them; none where the root itself has these."""

    def has(folder: Path) -> bool:
        return any(subfolder(folder, name).is_dir() for name in (REAL, "fake"))

    try:
        named = sorted(path for path in root.iterdir() if path.name.lower() in SPLITS)
    except OSError:
        named = []
    return [] if has(root) else [path for path in named if has(path)]


def _once(clips: dict[str, Clip], stills: bool) -> tuple[dict[str, Clip], int]:
    """Clips by their names without containers, each once, and how many were left out because they are there already."""
    short = {name: _without_containers(name, stills or not isinstance(clip, tuple)) for name, clip in clips.items()}
    files = {stem(short[name]) for name, clip in clips.items() if not isinstance(clip, tuple)}
    kept: dict[str, str] = {}
    for name in sorted(clips, key=lambda name: isinstance(clips[name], tuple)):
        frames_of = {stem(short[name]), short[name].rpartition("/")[0] if stills else ""}
        if not isinstance(clips[name], tuple) or files.isdisjoint(frames_of):
            kept.setdefault(short[name], name)
    return {short[name]: clip for name, clip in clips.items() if kept.get(short[name]) == name}, len(clips) - len(kept)


def _without_containers(name: str, is_file: bool) -> str:
    """``a/frames/b`` is ``a/b``; and the pictures in ``a/frames`` are ``a``."""
    *folders, last = name.split("/")
    if not is_file and last.lower() in CONTAINERS and folders:
        *folders, last = folders
    return "/".join([*(part for part in folders if part.lower() not in CONTAINERS), last])


def _tied(videos: list[Video]) -> tuple[list[Video], dict[str, tuple[str, ...]], list[str]]:
    """The videos with their twins and people, the other twins of each by its key, and remarks."""
    tied: list[Video] = []
    for video in videos:
        name = stem(video.video_id)
        twin, people = twin_and_people(name.rpartition("/")[2]) or ("", None)
        # A name that tells them is one video wherever it lies; others may be numbered anew in each given split.
        twin = f"{video.split}/{twin}" if twin and video.split else twin or ("" if video.label else name)
        tied.append(replace(video, twin=twin, people=people))
    reals = {split: by_last_part(video.twin for video in tied if not video.label and video.split == split)
             for split in {video.split for video in tied}}  # fmt: skip
    more: dict[str, tuple[str, ...]] = {}
    splits_of: dict[str, set[str]] = defaultdict(set)  # by person
    matched = elsewhere = 0
    for i, video in enumerate(tied):
        name = stem(video.video_id)
        found = originals(video.twin or name, reals[video.split]) if video.label else [video.twin]
        matched += video.label and bool(found)
        elsewhere += not found and any(originals(video.twin or name, others) for others in reals.values())
        twin, *others = found or [video.twin or f"{video.manipulation}/{name}"]
        more[video.key] = tuple(others)
        for person in video.people or ():
            splits_of[person].add(video.split)
        # Given splits stay as they are, as a remark says; what is drawn from the training videos goes by people.
        tied[i] = replace(video, twin=twin, people=video.people if video.split in ("", "train") else None)
    fakes = sum(video.label for video in tied)
    remarks = [f"{matched} of {fakes} fakes belong to a real video by name and are in its split"]
    if elsewhere:
        remarks.append(f"{elsewhere} fakes are named after a real video of another of the given splits")
    if both := sum(len(splits) > 1 for splits in splits_of.values()):
        remarks.append(f"{both} of {len(splits_of)} people are in more than one of the given splits")
    return tied, more, remarks
