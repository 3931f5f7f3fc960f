"""DFDC, the Deepfake Detection Challenge, and its preview."""

from __future__ import annotations

from pathlib import Path

from ...files import read_json, shown
from ..tables import LABELS, NOTHING, SPLITS
from .common import REAL, Found, Video, is_hidden, left_out, listing, stem, usable
from .splits import Draw, complete


def lists_of(root: Path) -> list[Path]:
    """The lists of videos in a folder and two levels below: ``metadata.json``, or ``dataset.json`` of the preview."""
    names = [f"{below}{name}.json" for name in ("metadata", "dataset") for below in ("", "*/", "*/*/")]
    return sorted(path for name in names for path in root.glob(name) if not is_hidden(path.parent.name))


def is_dfdc(root: Path) -> bool:
    """Whether one of :func:`lists_of` a folder gives labels to names; others have a metadata.json of another kind."""
    for path in lists_of(root):
        try:
            content = _entries(path)
        except (OSError, ValueError):
            continue
        if any(isinstance(entry, dict) and "label" in entry for entry in content.values()):
            return True
    return False


def dfdc(root: Path, draw: Draw) -> Found:
    """``{"x.mp4": {"label": "FAKE", "split": "train", "original": "y.mp4"}}`` in each folder of videos.

    The preview's list has paths, ``set``, ``target_id`` and ``swapped_id``. What the lists do not split is drawn so
    that an original and the fakes made from it stay together.

    Raises:
        ValueError: there is no list, or an entry is not like that.
    """
    lists = lists_of(root)
    if not lists:
        raise ValueError(f"source {root}: expected metadata.json in it or in its folders, found none")
    found = listing(root)
    found.skipped[".json"] -= len(lists)
    clips = found.clips()
    by_stem = {stem(name): name for name in clips}  # a folder of frames may lack the ending
    videos: list[Video] = []
    used: set[str] = set()
    gone = orphans = 0
    for path in lists:
        folder = path.parent.relative_to(root).as_posix()
        for name, entry in _entries(path).items():
            label, split = _label_and_split(entry, f"source {root}: '{path}', '{shown(name)}'")
            video_id = name if folder == "." else f"{folder}/{name}"
            on_disk = video_id if video_id in clips else by_stem.get(stem(video_id))
            if on_disk is None:
                gone += 1
                continue
            used.add(on_disk)
            people = tuple(str(entry[key]) for key in ("target_id", "swapped_id") if entry.get(key) is not None)
            own = stem(name).rpartition("/")[2]
            original = entry.get("original")  # NaN where a table was turned into JSON
            named = isinstance(original, str) and original.lower() not in NOTHING
            twin = (stem(original) if named else "") if label else own
            orphans += not twin and not people
            twin = people[0] if people else twin or own
            dataset = "DFDC" if path.name == "metadata.json" else "DFDC-preview"
            manipulation = REAL if not label else name.partition("/")[0] if "/" in name else "fake"
            files = {"source": clips[on_disk]}
            videos.append(
                Video(dataset, manipulation, video_id, label, split, "source", files, twin, people or None, root)
            )
    counts = {
        "videos are listed but are not there": gone,
        "videos are there but in no list, and are left out": len(clips) - len(used),
        "fakes name no original": orphans,
    }
    videos, refused = usable(videos)
    videos, more = complete(videos, draw)
    remarks = [f"{count} {what}" for what, count in counts.items() if count]
    return Found(videos, remarks + more + left_out([found]), refused)


def _entries(path: Path) -> dict[str, object]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"source '{path}': not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"source '{path}': expected {{\"x.mp4\": {{…}}}}, got {type(content).__name__}")
    return content


def _label_and_split(entry: object, where: str) -> tuple[int, str]:
    """1 for a fake; and the split, empty where the entry has none."""
    if not isinstance(entry, dict) or str(entry.get("label")).lower() not in LABELS:
        raise ValueError(f'{where}: expected {{"label": "FAKE" or "REAL", …}}, got {shown(str(entry)[:80])}')
    word = entry.get("split", entry.get("set")) or ""
    if word and str(word).lower() not in SPLITS:
        raise ValueError(f"{where}: expected the split train, val or test, got {word!r}")
    return LABELS[str(entry["label"]).lower()], SPLITS.get(str(word).lower(), "")
