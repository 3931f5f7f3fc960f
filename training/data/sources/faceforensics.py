"""FaceForensics++, with the official splits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ...files import read_json, shown
from ..video import Clip
from .common import (
    LEVEL,
    REAL,
    SPLITS,
    Found,
    Listing,
    Video,
    by_stem,
    clips_of_level,
    left_out,
    lost_frames,
    qualities,
    subfolder,
    twin_and_people,
    usable,
)
from .splits import Draw, complete

ACTED = ("actors", "deepfakedetection")
FORGERIES = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter", "DeepFakeDetection")

FAMILY = re.compile(r"faceforensics|ff\+\+|ffpp|ff-|faceshifter", re.IGNORECASE)  # what its parts are called


def people_of(dataset: str, video_id: str) -> tuple[str, ...]:
    """The ids in the name of a FaceForensics++ video, ``000`` or ``000_003``; () for another name or data set."""
    name = re.fullmatch(r"(?:.*/)?(\d{3})(?:_(\d{3}))?(?:\.\w+)?", video_id)
    return tuple(filter(None, name.groups())) if name and FAMILY.match(dataset) else ()


def faceforensics(root: Path, draw: Draw) -> Found:
    """``{original,manipulated}_sequences/<name>/<level>``, each level with videos or frames of videos.

    Or ``original/``, ``Deepfakes/`` and so on with the videos of one level in them, which is the source: which level it
    is, the folders do not say.

    Without ``splits/`` whole id pairs are drawn if ``draw.draw_splits``. Videos of actors (DeepFakeDetection) have no
    official split and are for testing only.

    Raises:
        ValueError: a split file is missing or malformed, or two files are the same video.
    """
    given = subfolder(root, "splits").is_dir()
    drawn = draw.draw_splits and not given
    official = {} if drawn else _official_splits(root)
    videos: list[Video] = []
    listings: list[Listing] = []
    unlisted = lost = 0
    for folder, label, level_folders in _folders(root):
        by_name: dict[str, dict[str, Clip]] = {}
        for level, place in level_folders.items():
            listings.append(found := clips_of_level(place))
            for name, clip in by_stem(found.clips(), root).items():
                by_name.setdefault(name, {})[level] = clip
        acted = folder.name.lower() in ACTED
        for name, files in by_name.items():
            target, _, source = name.partition("_") if label else (name, "", "")
            twin, people = target, (target, source) if source else (target,)
            split = official.get(target, ("", ""))[0]
            if acted:
                split = "test"
                twin, people = twin_and_people(name) or (name, None)
            elif not drawn and (not split or (label and source != official[target][1])):
                unlisted += 1
                continue
            reference, levels, missing = qualities(files)
            lost += missing
            dataset = "DeepFakeDetection" if acted else "FaceForensics++"
            manipulation = folder.name if label else REAL
            videos.append(Video(dataset, manipulation, name, label, split, reference, levels, twin, people, root))
    videos, refused = usable(videos)
    remarks = lost_frames(lost)
    if draw.draw_splits and given:
        remarks.append("draw_splits: the tree has official splits, and these are used")
    if drawn:
        acting = [video for video in videos if video.dataset == "DeepFakeDetection"]
        videos, more = complete([video for video in videos if not video.split], draw)
        videos, remarks = videos + acting, [*remarks, *more, "splits are drawn, they are not the official ones"]
    if unlisted:
        remarks.append(f"{unlisted} videos are in no official split and are left out")
    originals = sum(video.label == 0 and video.dataset == "FaceForensics++" for video in videos)
    if official and (missing := len(official) - originals):
        remarks.append(f"{missing} of the {len(official)} original videos that the splits name are not in the tree")
    return Found(videos, remarks + left_out(listings), refused)


def is_flat(root: Path) -> bool:
    """Whether a folder is the tree of one level, without the folders of levels: ``original/``, ``Deepfakes/`` …"""
    return subfolder(root, "original").is_dir() and any(subfolder(root, name).is_dir() for name in FORGERIES)


def _folders(root: Path) -> Iterator[tuple[Path, int, dict[str, Path]]]:
    """Every folder of a method, its label, and its folders by level."""
    if is_flat(root) and not subfolder(root, "original_sequences").is_dir():
        for name in ("original", *FORGERIES):
            if (folder := subfolder(root, name)).is_dir():
                yield folder, int(name != "original"), {"c23": folder}  # as the one level it is called the source
        return
    for kind, label in (("original_sequences", 0), ("manipulated_sequences", 1)):
        for folder in sorted(path for path in subfolder(root, kind).glob("*") if path.is_dir()):
            levels = sorted(path for path in folder.iterdir() if LEVEL.fullmatch(path.name.lower()))
            yield folder, label, {path.name.lower(): path for path in levels}


def _official_splits(root: Path) -> dict[str, tuple[str, str]]:
    """From a video id to its split and its partner."""
    found: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        path = subfolder(root, "splits") / f"{split}.json"
        if not path.is_file():
            raise ValueError(
                f"source {root}: the split file '{path}' is missing; the lists are in dataset/splits of the repository "
                "ondyari/FaceForensics on GitHub; without a folder 'splits', draw_splits=true draws whole id pairs"
            )
        try:
            pairs = [(str(a), str(b)) for a, b in read_json(path)]
        except (ValueError, TypeError) as error:
            raise ValueError(f"source {root}: expected pairs of ids in '{path}': {error}") from error
        for one, other in [*pairs, *((b, a) for a, b in pairs)]:
            if one in found:
                raise ValueError(
                    f"source {root}: the identity '{shown(one)}' is in the splits {found[one][0]} and {split}"
                )
            found[one] = split, other
    return found
