"""What every kind of source shares: a video in all its qualities, and the one way to list a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...files import CONTROLS, LONGEST, shown
from .. import images, video
from ..tables import plain_path
from ..video import Clip

SPLITS = ("train", "val", "test")
REAL = "real"  # the manipulation of real videos
LEVEL = re.compile(r"raw|c[0-9]+")
RAW_LEVELS = ("raw", "c0")
DEEPEST = 2000  # bytes of a whole name: systems take 4096, and the folder it lies in comes before
LEFT_BY_SYSTEMS = {
    "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "system volume information",
    "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip


@dataclass(frozen=True)
class Video:
    """One video in all the qualities that exist.

    Attributes:
        dataset, manipulation, video_id: the identity; the manipulation of real videos is ``real``.
        label: 1 = fake.
        split: train, val or test; empty until it is drawn.
        reference: ``raw``, or ``source`` where the best that exists is compressed already.
        files: by level; the one named like ``reference`` is what crops and boxes are taken from.
        twin: what a real video and the fakes made from it share.
        people: whose face it shows or was made of; None where it is not known.
        root: the folder that paths of the source are relative to.
    """

    dataset: str
    manipulation: str
    video_id: str
    label: int
    split: str
    reference: str
    files: dict[str, Clip]
    twin: str
    people: tuple[str, ...] | None = None
    root: Path | None = None

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.manipulation}/{self.video_id}"

    @property
    def path(self) -> Path:
        """The file or, of extracted frames, the folder that it is named by."""
        return place(self.files[self.reference])

    @property
    def names(self) -> tuple[str, ...]:
        """What :func:`.tables.read_boxes` may call it: path (below the source if there), key, id, whole path."""
        path = self.path
        below = self.root is not None and path.is_relative_to(self.root)
        names = path.relative_to(self.root) if below else path, self.key, self.video_id, path
        return tuple(plain_path(str(name)) for name in names)


@dataclass
class Found:
    """The videos of a source, in a fixed order.

    Attributes:
        remarks: for the user, on what was left out.
        refused: file and reason of each video whose name cannot be used.
    """

    videos: list[Video]
    remarks: list[str] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- folders


@dataclass
class Listing:
    """What lies in a folder and below it.

    Attributes:
        videos: video files and animations.
        frames: the pictures of each folder that has some, the folder itself included.
        skipped: how many files of each ending, hidden files and so on are left out.
        unreadable: folders that cannot be listed, with the reason.
    """

    folder: Path
    videos: list[Path] = field(default_factory=list)
    frames: dict[Path, tuple[Path, ...]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def clips(self, stills: bool = False) -> dict[str, Clip]:
        """Every clip by its path below the folder, as it is on disk: ``a.mp4``, ``b/c`` for the pictures in it.

        Args:
            stills: each picture is a clip of one frame; else only those that lie in the folder itself.
        """
        found: dict[str, Clip] = {path.relative_to(self.folder).as_posix(): path for path in self.videos}
        for folder, pictures in self.frames.items():
            alone = stills or folder == self.folder
            for clip in ((picture,) for picture in pictures) if alone else (pictures,):
                found[(clip[0] if alone else folder).relative_to(self.folder).as_posix()] = clip
        return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def listing(folder: Path, deep: bool = True) -> Listing:
    """List a folder in natural order of names.

    Links are followed, but not into a folder that they lie in. Hidden files and folders and what systems leave beside
    clips are left out. A folder that cannot be read is noted and does not stop the others.

    Args:
        deep: with everything below it.
    """
    found = Listing(folder)
    _walk(folder, found, deep, ())
    return found


def _walk(folder: Path, found: Listing, deep: bool, above: tuple[str, ...]) -> None:
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: natural(entry.name))
    except OSError as error:
        found.unreadable.append(f"{shown(folder)}: {error.strerror or error}")
        return
    above += (os.path.realpath(folder),)
    pictures: list[Path] = []
    for entry in entries:
        path = folder / entry.name
        ending = path.suffix.lower()
        if is_hidden(entry.name):
            found.skipped["hidden"] += 1
        elif os.path.isdir(path) if entry.is_symlink() else entry.is_dir():  # of a link, entry.is_dir() may raise
            if entry.is_symlink() and os.path.realpath(path) in above:
                found.skipped["looping links"] += 1
            elif deep:
                _walk(path, found, deep, above)
        elif not (os.path.isfile(path) if entry.is_symlink() else entry.is_file()):
            found.skipped["broken links or devices"] += 1
        elif ending in video.ENDINGS or (
            # To open all frames of a set takes long, and animated PNG is rare: none is looked for beside a still.
            ending in images.ANIMATIONS and not (ending == ".png" and pictures) and images.is_animation(path)
        ):
            found.videos.append(path)
        elif ending in images.ENDINGS:
            pictures.append(path)
        else:
            found.skipped[shown(ending) or "without ending"] += 1
    if pictures:
        found.frames[folder] = tuple(pictures)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out: hidden, or left by a system beside a user's files."""
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def clip_at(path: Path) -> Clip | None:
    """What a user names as a clip: a video file or animation, a picture, the pictures of a folder; else None."""
    ending = path.suffix.lower()
    if os.path.isdir(path):
        return listing(path, deep=False).frames.get(path)
    if not os.path.isfile(path) or ending not in video.ENDINGS | images.ENDINGS:
        return None
    return path if ending in video.ENDINGS or images.is_animation(path) else (path,)


def left_out(listings: Iterable[Listing]) -> list[str]:
    """Remarks on what listings skipped and could not read."""
    listings = list(listings)
    skipped = sum((found.skipped for found in listings), Counter())
    counts = ", ".join(f"{count} {what}" for what, count in sorted(skipped.items(), key=lambda i: (-i[1], i[0])))
    unreadable = [f"cannot be read: {reason}" for found in listings for reason in found.unreadable]
    return ([f"left out: {counts}"] if counts else []) + unreadable


def clips_of_level(folder: Path) -> Listing:
    """The clips of a folder that keeps them in ``videos/``, itself, ``images/<name>/`` or ``frames/<name>/``."""
    for name, deep in (("videos", True), ("", False), ("images", True), ("frames", True), ("", True)):
        inner = subfolder(folder, name) if name else folder
        if inner.is_dir() and ((found := listing(inner, deep)).videos or (deep and found.frames)):
            return found
    return listing(folder)


def by_stem(clips: dict[str, Clip], source: object) -> dict[str, Clip]:
    """Clips by the last part of their name without the ending.

    Raises:
        ValueError: two are called alike.
    """
    found: dict[str, Clip] = {}
    for name, clip in clips.items():
        other = found.setdefault(stem(name).rpartition("/")[2], clip)
        if other is not clip:
            raise ValueError(f"source {source}: '{shown(place(other))}' and '{shown(place(clip))}' are the same video")
    return found


def subfolder(folder: Path, name: str) -> Path:
    """The folder of a name, in capital or small letters; where there is none, what it would be.

    Raises:
        ValueError: there are several.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.name.lower() == name.lower() and path.is_dir())
    except OSError:
        found = []
    if len(found) > 1:
        raise ValueError(f"source {folder}: expected one folder '{name}', got {[path.name for path in found]}")
    return found[0] if found else folder / name


# --------------------------------------------------------------------------------------------------------------- names


def natural(name: str) -> tuple[list[str | int], str]:
    """To sort by: numbers within names by their value, ``2.png`` before ``10.png``."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))], name


def stem(name: str) -> str:
    """A name without the ending of a video or picture; other endings (``take.2``) belong to the name."""
    bare, dot, ending = name.rpartition(".")
    return bare if bare and dot + ending.lower() in video.ENDINGS | images.ENDINGS else name


def place(clip: Clip) -> Path:
    """The file or, of several frames, their folder."""
    if isinstance(clip, tuple):
        return clip[0].parent if len(clip) > 1 else clip[0]
    return clip


def twin_and_people(name: str) -> tuple[str, tuple[str, ...]] | None:
    """What the names of DeepFakeDetection and Celeb-DF tell: the real video behind it, and whose faces these are.

    ``01_02__walking__ABC`` is made of ``01__walking``, ``id0_id1_0002`` of ``id0_0002``. None for other names.
    """
    if match := re.fullmatch(r"(\d\d)(?:_(\d\d))?__(.+?)(?:__[A-Z0-9]+)?", name):
        twin = f"{match[1]}__{match[3]}"
    elif match := re.fullmatch(r"(id\d+)(?:_(id\d+))?_(\d+)", name):
        twin = f"{match[1]}_{match[3]}"
    else:
        return None
    return twin, (match[1], match[2]) if match[2] else (match[1],)


def by_last_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of real videos, paths without endings, by their last part, for :func:`originals`."""
    found: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        found.setdefault(name.rpartition("/")[2], []).append(name)
    return found


def originals(fake: str, reals: Mapping[str, list[str]]) -> list[str]:
    """The real videos that a fake is named after, in the order of its name: ``000_003`` of ``000`` and ``003``.

    Args:
        fake: path without ending.
        reals: of :func:`by_last_part`; a last part that several share counts only in the fake's own sub-folder.
    """
    parent, _, last = fake.rpartition("/")
    if fake in reals.get(last, ()):
        return [fake]
    words = last.split("_")
    found = []
    for start in range(len(words)):
        for end in range(len(words), start, -1):
            candidates = reals.get(name := "_".join(words[start:end]), [])
            beside = f"{parent}/{name}" if parent else name
            found += [beside] if beside in candidates else candidates if len(candidates) == 1 else []
    return list(dict.fromkeys(found))


def usable(videos: Iterable[Video]) -> tuple[list[Video], list[tuple[Path, str]]]:
    """Part the videos whose names can be folders below ``out`` from the others, which get a reason each."""
    kept, refused = [], []
    for item in videos:
        if reason := _refusal(item.key):
            refused.append((item.path, reason))
        else:
            kept.append(item)
    return kept, refused


def _refusal(key: str) -> str | None:
    parts = key.split("/")
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return "its name is no UTF-8"
    if re.search(CONTROLS, key):
        return f"its name {key!r} has a control character"
    if not {"", ".", ".."}.isdisjoint(parts):
        return f"its name '{key}' leads outside of a folder"
    if longest > LONGEST:
        return f"its name has a part of {longest} bytes, expected at most {LONGEST}"
    if (total := len(key.encode())) > DEEPEST:
        return f"its name has {total} bytes, expected at most {DEEPEST}"
    return None


# ----------------------------------------------------------------------------------------------------------- qualities


def qualities(files: dict[str, Clip]) -> tuple[str, dict[str, Clip], int]:
    """The reference, the clips by level, and how many frames are lost because a level does not have them.

    ``c0`` is ``raw``; without either the best level is the ``source``. Frames that are files are matched by name, so
    that one missing in one level is taken from no level; where no name is shared, they are left as they are.
    """
    levels = {"raw" if level in RAW_LEVELS else level: files[level] for level in sorted(files, reverse=True)}
    reference = "raw"
    if "raw" not in levels:
        reference = "source"
        best = min(levels, key=lambda level: int(level[1:]))
        levels = {"source": levels.pop(best)} | levels
    by_level = {level: {stem(p.name): p for p in clip} for level, clip in levels.items() if isinstance(clip, tuple)}
    if len(by_level) < 2 or any(len(frames) < len(levels[level]) for level, frames in by_level.items()):
        return reference, levels, 0
    shared = set.intersection(*map(set, by_level.values()))
    if not shared:
        return reference, levels, 0
    for level, frames in by_level.items():
        levels[level] = tuple(path for name, path in frames.items() if name in shared)
    return reference, levels, len(set.union(*map(set, by_level.values()))) - len(shared)


def lost_frames(lost: int) -> list[str]:
    """The remark on frames that :func:`qualities` lost."""
    return [f"{lost} frames are missing in some quality and are taken from none"] if lost else []
