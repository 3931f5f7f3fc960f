"""Celeb-DF, with the official test list."""

from __future__ import annotations

import re
from pathlib import Path

from ...files import shown
from .common import (
    REAL,
    Found,
    Listing,
    Video,
    by_stem,
    clips_of_level,
    left_out,
    place,
    stem,
    subfolder,
    twin_and_people,
    usable,
)
from .splits import Draw, complete

TESTED_V2 = 518  # videos that the test list of the second version names
FOLDERS = (("Celeb-real", 0), ("YouTube-real", 0), ("Celeb-synthesis", 1))


def celeb_df(root: Path, draw: Draw) -> Found:
    """``Celeb-real/``, ``YouTube-real/`` and ``Celeb-synthesis/``; validation is drawn from what is not in the list.

    The data set is called Celeb-DF-v1 or -v2 as the folder says it, else v2 by the length of its list, else Celeb-DF.

    Raises:
        ValueError: the test list is missing, malformed or calls a video of another class, or two files are the same.
    """
    path = root / "List_of_testing_videos.txt"
    testing = _test_list(root, path)
    version = re.search(r"v([12])\b", root.resolve().name.lower())
    known = f"-v{version[1]}" if version else "-v2" if len(testing) == TESTED_V2 else ""
    dataset = f"Celeb-DF{known}"
    videos: list[Video] = []
    listings: list[Listing] = []
    for name, label in FOLDERS:
        listings.append(found := clips_of_level(subfolder(root, name)))
        for bare, clip in by_stem(found.clips(), root).items():
            listed = f"{name}/{bare}"
            if testing.get(listed, label) != label:
                called = "fake" if testing[listed] else "real"
                raise ValueError(f"source {root}: '{path}' calls {name}/{shown(place(clip).name)} {called}")
            twin, people = twin_and_people(bare) or (bare, None)
            video_id, split = f"{name}/{place(clip).name}", "test" if listed in testing else "train"
            manipulation, files = name if label else REAL, {"source": clip}
            videos.append(Video(dataset, manipulation, video_id, label, split, "source", files, twin, people, root))
    gone = len(testing.keys() - {stem(video.video_id) for video in videos})
    remarks = [f"{gone} of the {len(testing)} test videos are not in the tree"] if gone else []
    videos, refused = usable(videos)
    videos, more = complete(videos, draw)
    known = {tested: {p for v in videos if (v.split == "test") == tested for p in v.people or ()} for tested in (0, 1)}
    if both := known[0] & known[1]:
        more.append(f"{len(both)} of the {len(known[1])} people of the official test list are in training as well")
    return Found(videos, remarks + more + left_out(listings), refused)


def _test_list(root: Path, path: Path) -> dict[str, int]:
    """The label of each test video, by its folder and name without the ending; the list's 1 is real."""
    if not path.is_file():
        raise ValueError(f"source {root}: the split file '{path}' is missing; it comes with Celeb-DF")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise ValueError(f"source {root}: expected text in '{path}': {error}") from error
    testing: dict[str, int] = {}
    for line in lines:
        if words := line.split(maxsplit=1):
            if len(words) != 2 or words[0] not in ("0", "1"):
                raise ValueError(
                    f"source {root}: expected '1 folder/video.mp4' (1 = real) in '{path}', got '{shown(line)}'"
                )
            testing[stem(words[1].strip().replace("\\", "/"))] = 1 - int(words[0])
    return testing
