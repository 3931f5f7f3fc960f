"""Splits: drawn in whole groups where a source has none, and checked where it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from ...files import shown
from .common import Video


@dataclass(kw_only=True)
class Draw:
    """How splits that a source does not have are drawn."""

    val_fraction: float = 0.1
    """Part of the videos for validation, where the source has no such split."""
    test_fraction: float = 0.2
    """Part of the videos for the test, where the source has no such split."""
    draw_val: bool = False
    """Draw the validation split from the training videos even where the source (a DeepfakeBench manifest, DFDC, a
    table) has one; its own is left out."""
    draw_splits: bool = False
    """Draw the splits of a FaceForensics++ tree without splits/."""
    images: Literal["clips", "stills"] = "clips"
    """Images beside each other in a sub-folder of real/ or fake/: the frames of a clip, or stills, compressed each."""
    seed: int = 0
    """Seed of drawn splits."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        if min(self.val_fraction, self.test_fraction) <= 0 or self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                "val_fraction, test_fraction: expected above 0, and their sum below 1, "
                f"got {self.val_fraction} and {self.test_fraction}"
            )


def complete(
    videos: list[Video], draw: Draw, more: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[list[Video], list[str]]:
    """Draw the splits that a source does not have from its training videos and those without a split.

    Args:
        more: twins that a video has besides its own, by its key.

    Returns:
        The videos in the same order, and remarks on what was drawn and what was left out.
    """
    remarks = []
    if draw.draw_val and (given := sum(video.split == "val" for video in videos)):
        videos = [video for video in videos if video.split != "val"]
        remarks.append(f"draw_val: the {given} validation videos of the source are left out")
    shares = {"val": draw.val_fraction, "test": draw.test_fraction}
    missing = {split: share for split, share in shares.items() if not any(video.split == split for video in videos)}
    pool = [video for video in videos if video.split in ("", "train")]
    if missing and pool:
        origin = "the training videos" if any(video.split for video in pool) else "all videos"
        verb = "are" if len(missing) > 1 else "is"
        remarks.append(f"{' and '.join(missing)} {verb} drawn from {origin}, seed {draw.seed}")
        splits = _drawn(pool, missing, draw.seed, more or {})
        mixed = sum(video.key not in splits for video in pool)
        videos = [replace(v, split=splits.get(v.key, "")) if v.split in ("", "train") else v for v in videos]
        videos = [video for video in videos if video.split]
        if mixed:
            remarks.append(f"{mixed} fakes mix people of two drawn splits and are left out")
    return videos, remarks


def _drawn(
    videos: list[Video], shares: dict[str, float], seed: int, more: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    """The split of each video by its key, in whole groups: what is tied by a twin or a person stays together.

    A group that leaves too little to the other splits (in Celeb-DF nearly everyone is swapped with everyone) is broken
    up into the originals or people that fakes tie together; fakes that mix those of two splits get none.
    """
    rng = np.random.default_rng(seed)
    ties = {v.key: [f"twin {twin}" for twin in (v.twin, *more.get(v.key, ()))]
            + [f"person {person}" for person in v.people or ()] for v in videos}  # fmt: skip
    by_reals = _joined(ties.values(), [ties[video.key] for video in videos if not video.label])
    units = {key: tuple(dict.fromkeys(by_reals[name] for name in names)) for key, names in ties.items()}
    by_all = _joined(units.values(), units.values())
    groups: dict[str, list[Video]] = {}
    for video in videos:
        groups.setdefault(by_all[units[video.key][0]], []).append(video)

    total = Counter(video.label for video in videos)
    wanted = {(name, label): max(1, round(share * total[label])) for name, share in shares.items() for label in total}
    others = {label: sum(wanted[name, label] for name in shares) for label in total}
    split_of: dict[str, str] = {}  # by unit; the rest is train
    whole = []
    for group in groups.values():
        held = Counter(video.label for video in group)
        if len({units[v.key] for v in group}) > 1 and any(total[i] - held[i] < others[i] for i in held):
            split_of |= _broken_up([units[video.key] for video in group], shares, rng)
        else:
            whole.append((group, held))

    def split(video: Video) -> str | None:
        splits = {split_of.get(unit, "train") for unit in units[video.key]}
        return splits.pop() if len(splits) == 1 else None

    counts = Counter((split(video), video.label) for video in videos)
    order = [whole[i] for i in rng.permutation(len(whole))]
    for name in shares:
        chosen, rest = [], []
        for group, held in order:
            fits = all(counts[name, label] + count <= wanted[name, label] for label, count in held.items())
            (chosen if fits else rest).append((group, held))
            if fits:
                counts += Counter({(name, label): count for label, count in held.items()})
        for label in total:  # no group was small enough: the smallest
            if not counts[name, label] and (having := [item for item in rest if item[1][label]]):
                smallest = min(having, key=lambda item: len(item[0]))
                rest.remove(smallest)
                chosen.append(smallest)
                counts += Counter({(name, label): count for label, count in smallest[1].items()})
        split_of |= {unit: name for group, _ in chosen for video in group for unit in units[video.key]}
        order = rest
    return {video.key: name for video in videos if (name := split(video))}


def _joined(names: Iterable[Sequence[str]], ties: Iterable[Sequence[str]]) -> DisjointSet:
    """All names, those of each tie joined, directly or through others."""
    joined = DisjointSet(chain.from_iterable(names))
    for first, *others in ties:
        for other in others:
            joined.merge(first, other)
    return joined


def _broken_up(ties: list[tuple[str, ...]], shares: dict[str, float], rng: np.random.Generator) -> dict[str, str]:
    """Splits for the units of one group: those that some fake ties together, until the share is reached."""
    count = len({unit for units in ties for unit in units})
    pairs = sorted({units for units in ties if len(units) > 1})
    split_of: dict[str, str] = {}
    for name, share in shares.items():
        taken: set[str] = set()
        for index in rng.permutation(len(pairs)):
            if len(taken) >= share * count:
                break
            if split_of.keys().isdisjoint(pairs[index]):
                taken |= set(pairs[index])
        split_of |= dict.fromkeys(taken, name)
    return split_of


# -------------------------------------------------------------------------------------------------------------- checks


def unknown_people(videos: list[Video]) -> list[str]:
    """The remark on videos of which it is not known whose faces they show."""
    unknown = sum(video.people is None for video in videos)
    if not unknown:
        return []
    return [
        f"whose faces these are is not known: of {unknown} of {len(videos)} videos, one person may be in two splits"
    ]


def check(videos: Iterable[Video], splits: list[str], source: str) -> None:
    """Refuse what does not add up.

    Raises:
        ValueError: two videos of one name; a video, a real and its fakes, or a person in two splits; a split without
            one of the classes.
    """
    videos = list(videos)
    for ties in (lambda video: [("video", video.key)], _original_and_people):
        seen: dict[tuple[str, str, str], Video] = {}
        for video in videos:
            for what, name in ties(video):
                other = seen.setdefault((what, video.dataset, name), video)
                if other is video or (other.split == video.split and what != "video"):
                    continue
                if other.split == video.split:
                    told = f"'{shown(other.path)}' and '{shown(video.path)}' are both called '{shown(name)}'"
                elif what == "video":
                    told = f"'{shown(name)}' is in the splits {other.split} and {video.split}"
                else:
                    told = (
                        f"'{other.key}' is in the split {other.split} and '{video.key}' in {video.split}, "
                        f"but they share the {what} '{shown(name)}'"
                    )
                hint = "; draw_val=true draws a validation split instead" if "val" in (other.split, video.split) else ""
                raise ValueError(f"source {source}: {told}{hint if other.split != video.split else ''}")
    counts = Counter((video.split, video.label) for video in videos)
    for split in splits:
        for label, name in enumerate(("real", "fake")):
            if not counts[split, label]:
                raise ValueError(f"source {source}: the split {split} has no {name} videos")


def _original_and_people(video: Video) -> list[tuple[str, str]]:
    if video.split == "test" and video.dataset.startswith("Celeb-DF"):
        return []  # the official test list is not by person, and not ours to change
    return [("original", video.twin), *(("person", person) for person in video.people or ())]
