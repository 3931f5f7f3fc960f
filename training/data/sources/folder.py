"""Any folder with ``real/`` and ``fake/``."""

from __future__ import annotations

from pathlib import Path

from .common import REAL, Found, Video, left_out, listing, stem, subfolder, usable
from .splits import Draw, complete, unknown_people


def folder(root: Path, draw: Draw) -> Found:
    """Videos and pictures below ``real/`` and ``fake/``: pictures beside each other in a sub-folder are one clip.

    A fake belongs to the real video of the same name, endings aside, and to those whose names it is put together from
    (``000_003`` of ``000`` and ``003``). Splits are drawn so that what belongs together stays together.

    Raises:
        ValueError: ``real/`` or ``fake/`` exists twice, in capital and small letters.
    """
    listings = {name: listing(subfolder(root, name)) for name in (REAL, "fake") if subfolder(root, name).is_dir()}
    clips = {name: found.clips(draw.images == "stills") for name, found in listings.items()}
    reals = {stem(name) for name in clips.get(REAL, ())}
    by_last: dict[str, list[str]] = {}
    for name in sorted(reals):
        by_last.setdefault(name.rpartition("/")[2], []).append(name)
    videos: list[Video] = []
    more: dict[str, tuple[str, ...]] = {}
    matched = 0
    for manipulation, found in clips.items():
        label = int(manipulation != REAL)
        for name, clip in found.items():
            twins = _originals(stem(name), reals, by_last) if label else [stem(name)]
            matched += label and bool(twins)
            twin, *others = twins or [f"{manipulation}/{stem(name)}"]
            dataset, files = root.resolve().name or "folder", {"source": clip}
            videos.append(Video(dataset, manipulation, name, label, "", "source", files, twin, root=root))
            more[videos[-1].key] = tuple(others)
    videos, refused = usable(videos)
    videos, remarks = complete(videos, draw, more)
    fakes = len(clips.get("fake", ()))
    remarks.append(f"{matched} of {fakes} fakes belong to a real video by name and are in its split")
    return Found(videos, remarks + unknown_people(videos) + left_out(listings.values()), refused)


def _originals(fake: str, reals: set[str], by_last: dict[str, list[str]]) -> list[str]:
    """The real videos that a fake is named after, in the order of its name.

    Args:
        fake: path without ending.
        reals: paths without endings.
        by_last: the same by their last part; one that several share counts only in the fake's own sub-folder.
    """
    if fake in reals:
        return [fake]
    parent, _, last = fake.rpartition("/")
    words = last.split("_")
    found = []
    for start in range(len(words)):
        for end in range(len(words), start, -1):
            candidates = by_last.get(name := "_".join(words[start:end]), [])
            beside = f"{parent}/{name}" if parent else name
            found += [beside] if beside in candidates else candidates if len(candidates) == 1 else []
    return list(dict.fromkeys(found))
