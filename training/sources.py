"""What lies in a folder of videos: FaceForensics++, Celeb-DF v2, DeepfakeBench and real/fake trees, as one list."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .synthetic import SPLITS
from .video import Clip

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
IMAGES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN} - VIDEOS
RAW_LEVELS = ("raw", "c0")
REAL = "real"  # the manipulation of real videos
LEVEL = re.compile(r"raw|c\d+")


@dataclass(frozen=True)
class Video:
    """One video in all the qualities that exist.

    Attributes:
        dataset, manipulation, video_id: the identity; the manipulation of real videos is ``real``.
        label: 1 = fake.
        split: train, val or test.
        reference: ``raw``, or ``source`` where the best that exists is compressed already.
        files: by level; the one named like ``reference`` is what crops and boxes are taken from.
        twin: what a real video and the fakes made from it share.
        people: whose identity it is; None where it is not known.
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

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.manipulation}/{self.video_id}"

    @property
    def path(self) -> Path:
        """The file or, of extracted frames, the folder that it is named by."""
        file = self.files[self.reference]
        return (
            file[0].parent
            if isinstance(file, tuple) and len(file) > 1
            else file[0]
            if isinstance(file, tuple)
            else file
        )


@dataclass
class Draw:
    """How splits that a source does not have are drawn.

    Attributes:
        val, test: fractions of the videos.
        again: draw the validation split from the training videos even where the source has one.
        stills: images beside each other are one video each, not the frames of one.
        seed: of the draw.
    """

    val: float = 0.1
    test: float = 0.2
    again: bool = False
    stills: bool = False
    seed: int = 0


@dataclass
class Found:
    """The videos of a source, in a fixed order, and remarks for the user on what was left out."""

    videos: list[Video]
    remarks: list[str] = field(default_factory=list)


def frames_in(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES))


def _levels(files: dict[str, Clip]) -> tuple[str, dict[str, Clip]]:
    """The reference and the files by level: ``c0`` is ``raw``; without either the best level is the ``source``."""
    levels = {"raw" if level in RAW_LEVELS else level: files[level] for level in sorted(files, reverse=True)}
    if "raw" in levels:
        return "raw", levels
    best = min(levels, key=lambda level: int(level[1:]))
    return "source", {"source": levels.pop(best)} | levels


# ------------------------------------------------------------------------------------------------------ FaceForensics++


def _official_splits(root: Path) -> dict[str, tuple[str, str]]:
    """From a video id to its split and its partner.

    Raises:
        ValueError: a split file is missing or malformed, or an id is in two splits.
    """
    found: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        path = root / "splits" / f"{split}.json"
        if not path.is_file():
            raise ValueError(f"source {root}: the split file '{path}' is missing; it comes with FaceForensics++")
        try:
            pairs = [(str(a), str(b)) for a, b in json.loads(path.read_text())]
        except (ValueError, TypeError) as error:
            raise ValueError(f"source {root}: expected pairs of ids in '{path}': {error}") from error
        for one, other in [*pairs, *((b, a) for a, b in pairs)]:
            if one in found:
                raise ValueError(f"source {root}: the identity '{one}' is in the splits {found[one][0]} and {split}")
            found[one] = split, other
    return found


def _clips_by_name(folder: Path) -> dict[str, Clip]:
    """Videos of one level by name: ``videos/*.mp4``, else extracted ``images/<name>/`` or ``frames/<name>/``."""
    if (folder / "videos").is_dir():
        return {path.stem: path for path in (folder / "videos").iterdir() if path.suffix.lower() in VIDEOS}
    for name in ("images", "frames"):
        if (folder / name).is_dir():
            folders = [path for path in (folder / name).iterdir() if path.is_dir()]
            return {path.name: frames for path in folders if (frames := frames_in(path))}
    return {}


def faceforensics(root: Path, draw: Draw) -> Found:
    """The official splits; videos of actors (DeepFakeDetection) have none and are for testing only."""
    del draw  # nothing is drawn
    splits, videos, unlisted = _official_splits(root), [], 0
    for kind, label in (("original_sequences", 0), ("manipulated_sequences", 1)):
        for folder in sorted(path for path in (root / kind).glob("*") if path.is_dir()):
            by_name: dict[str, dict[str, Clip]] = {}
            for level in sorted(path for path in folder.iterdir() if LEVEL.fullmatch(path.name)):
                for name, clip in _clips_by_name(level).items():
                    by_name.setdefault(name, {})[level.name] = clip
            acted = folder.name in ("actors", "DeepFakeDetection")
            dataset = "DeepFakeDetection" if acted else "FaceForensics++"
            for name, files in sorted(by_name.items()):
                target, _, source = name.partition("_")
                split, partner = ("test", source) if acted else splits.get(target, (None, ""))
                if split is None or (label and source != partner):
                    unlisted += 1
                    continue
                people = None if acted else (target, source) if label else (target,)
                manipulation = folder.name if label else REAL
                twin = name if acted else target
                reference, levels = _levels(files)
                videos.append(Video(dataset, manipulation, name, label, split, reference, levels, twin, people))
    remarks = [f"{unlisted} videos are in no official split and are left out"] if unlisted else []
    missing = len(splits) - sum(video.label == 0 and video.dataset == "FaceForensics++" for video in videos)
    if missing:
        remarks.append(f"{missing} of the {len(splits)} original videos that the splits name are not in the tree")
    return Found(videos, remarks)


# ----------------------------------------------------------------------------------------------------------- Celeb-DF


def celeb_df(root: Path, draw: Draw) -> Found:
    """The official test list; a validation split of whole identities is drawn from the rest."""
    path = root / "List_of_testing_videos.txt"
    if not path.is_file():
        raise ValueError(f"source {root}: the split file '{path}' is missing; it comes with Celeb-DF v2")
    testing: dict[str, int] = {}
    for line in path.read_text().split("\n"):
        if words := line.split():
            if len(words) != 2 or words[0] not in "01":
                raise ValueError(f"source {root}: expected '1 folder/video.mp4' (1 = real) in '{path}', got '{line}'")
            testing[words[1]] = 1 - int(words[0])  # its 1 is real
    videos = []
    for folder, label in (("Celeb-real", 0), ("YouTube-real", 0), ("Celeb-synthesis", 1)):
        for file in sorted(p for p in (root / folder).glob("*") if p.suffix.lower() in VIDEOS):
            name = f"{folder}/{file.name}"
            if testing.get(name, label) != label:
                raise ValueError(f"source {root}: '{path}' calls {name} {'fake' if testing[name] else 'real'}")
            parts = file.stem.split("_")
            people = None if folder == "YouTube-real" else tuple(parts[:-1])
            twin = f"{parts[0]}_{parts[-1]}" if people else file.stem
            split, manipulation = "test" if name in testing else "train", folder if label else REAL
            files = {"source": file}
            videos.append(Video("Celeb-DF-v2", manipulation, name, label, split, "source", files, twin, people))
    remarks = [f"{gone} of the {len(testing)} test videos are not in the tree"] if (
        gone := len(testing.keys() - {video.video_id for video in videos})
    ) else []  # fmt: skip
    drawn = _draw_validation(videos, draw)
    if left := len(videos) - len(drawn):
        remarks.append(f"{left} fakes mix a training with a validation identity and are left out")
    return Found(drawn, remarks)


# ------------------------------------------------------------------------------------------------------- DeepfakeBench


def deepfakebench(path: Path, draw: Draw) -> Found:
    """A JSON manifest ``{dataset: {label: {split: {[compression]: {video: {"label", "frames"}}}}}}``."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"source '{path}': not JSON: {error}") from error
    videos, root = [], None
    try:
        for dataset, labels in content.items():
            for label, splits in labels.items():
                for split, inner in splits.items():
                    levels = inner if inner and all(map(LEVEL.fullmatch, inner)) else {"": inner}
                    by_name: dict[str, dict[str, Clip]] = {}
                    for level, entries in levels.items():
                        for name, entry in entries.items():
                            frames = [Path(frame.replace("\\", "/")) for frame in entry["frames"]]
                            if frames:
                                root = root or _root_of(path, frames[0])
                                by_name.setdefault(name, {})[level] = tuple(root / frame for frame in frames)
                    for name, files in sorted(by_name.items()):
                        fake = 0 if "real" in label.lower() else 1
                        reference, by_level = ("source", {"source": files[""]}) if "" in files else _levels(files)
                        target = name.partition("_")[0] if label.startswith("FF-") else f"{label}/{name}"
                        manipulation = label if fake else REAL
                        videos.append(Video(dataset, manipulation, name, fake, split, reference, by_level, target))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"source '{path}': not a DeepfakeBench manifest: {error!r}") from error
    if draw.again:
        videos = [video for video in videos if video.split != "val"]
    return Found(videos if any(v.split == "val" for v in videos) else _draw_validation(videos, draw))


def _root_of(path: Path, frame: Path) -> Path:
    for folder in path.resolve().parents:
        for root in (folder, folder / "datasets" / "rgb", folder / "datasets", folder / "rgb"):
            if (root / frame).is_file():
                return root
    raise ValueError(f"source '{path}': its first frame '{frame}' lies below none of the folders above the manifest")


# -------------------------------------------------------------------------------------------------------- any folder


def folder(root: Path, draw: Draw) -> Found:
    """``real/`` and ``fake/`` holding videos or images: images beside each other in a sub-folder are one clip."""
    videos = []
    for name, label in (("real", 0), ("fake", 1)):
        found: dict[str, Clip] = {}
        for path in sorted((root / name).rglob("*")):
            relative = path.relative_to(root / name).as_posix()
            if path.suffix.lower() in VIDEOS:
                found[relative] = path
            elif draw.stills and path.suffix.lower() in IMAGES:
                found[relative] = (path,)
            elif not draw.stills and path.is_dir() and (frames := frames_in(path)):
                found[relative] = frames
        found |= {path.name: (path,) for path in frames_in(root / name)}
        manipulation = name if label else REAL
        for video_id, clip in sorted(found.items()):
            twin = f"{name}/{video_id}"
            files = {"source": clip}
            videos.append(Video(root.resolve().name, manipulation, video_id, label, "", "source", files, twin))
    rng, drawn = np.random.default_rng(draw.seed), []
    for label in (0, 1):
        members = [video for video in videos if video.label == label]
        counts = {"val": draw.val, "test": draw.test}
        counts = {split: max(1, round(share * len(members))) for split, share in counts.items()}
        names = [split for split, count in counts.items() for _ in range(count)]
        order = rng.permutation(len(members))
        of = dict(zip(order.tolist(), names, strict=False))
        drawn += [replace(video, split=of.get(i, "train")) for i, video in enumerate(members)]
    return Found(drawn)


# ------------------------------------------------------------------------------------------------------------- splits


def _draw_validation(videos: list[Video], draw: Draw) -> list[Video]:
    """Move a part of the training videos to validation: whole people where they are known, else video by video.

    Fakes of one person in either part are left out.
    """
    rng, training = np.random.default_rng(draw.seed), [v for v in videos if v.split == "train"]
    pairs = sorted({video.people for video in training if video.people and video.label})
    everyone = {person for video in training for person in video.people or ()}
    chosen: set[str] = set()
    for index in rng.permutation(len(pairs)):
        if len(chosen) >= draw.val * len(everyone):
            break
        chosen |= set(pairs[index])
    singles: dict[int, list[str]] = {}
    for video in training:
        if video.people is None:
            singles.setdefault(video.label, []).append(video.key)
    alone = {
        keys[i]
        for _, keys in sorted(singles.items())
        for i in rng.permutation(len(keys))[: max(1, round(draw.val * len(keys)))]
    }
    result = []
    for video in videos:
        people = set(video.people or ())
        if video.split != "train" or not (video.key in alone or people & chosen):
            result.append(video)
        elif people <= chosen:
            result.append(replace(video, split="val"))
    return result


def check(videos: Iterable[Video], splits: list[str], source: str) -> None:
    """Refuse what does not add up.

    Raises:
        ValueError: an identity in two splits, a split without one of the classes, no video.
    """
    seen: dict[str, str] = {}
    counts: Counter[tuple[str, int]] = Counter()
    for video in videos:
        # Known people may be in the official test list of Celeb-DF as well: that split is not ours to change.
        for name in {video.key, *(f"{video.dataset}/{p}" for p in video.people or () if video.split != "test")}:
            if (other := seen.setdefault(name, video.split)) != video.split:
                hint = "; draw_val=true draws a validation split instead" if "val" in (other, video.split) else ""
                raise ValueError(f"source {source}: '{name}' is in the splits {other} and {video.split}{hint}")
        counts[video.split, video.label] += 1
    for split in splits:
        for label, name in enumerate(("real", "fake")):
            if not counts[split, label]:
                raise ValueError(f"source {source}: the split {split} has no {name} videos")


KINDS: dict[str, Callable[[Path, Draw], Found]] = {
    "faceforensics": faceforensics,
    "celeb_df": celeb_df,
    "deepfakebench": deepfakebench,
    "folder": folder,
}


def recognise(path: Path) -> str:
    """Which of :data:`KINDS` a path is."""
    if path.is_file() and path.suffix == ".json":
        return "deepfakebench"
    for kind, names in (
        ("faceforensics", ("original_sequences", "manipulated_sequences")),
        ("celeb_df", ("Celeb-real", "Celeb-synthesis")),
        ("folder", ("real", "fake")),
    ):
        if all((path / name).is_dir() for name in names):
            return kind
    raise ValueError(
        f"source '{path}': expected a FaceForensics++ tree (original_sequences, manipulated_sequences), a Celeb-DF v2 "
        "tree (Celeb-real, Celeb-synthesis), a folder with real and fake, or a DeepfakeBench .json"
    )
