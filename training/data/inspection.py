"""Verify prepared pairs: hashes, alignment of raw and compressed crops, and a contact sheet to look at."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ..files import BrokenFile, shown
from . import images, manifest

if TYPE_CHECKING:
    import pandas

SHOWN = 8  # pairs of each class and compression on the contact sheet
TILE = 128
SHIFT = 2  # pixels of misalignment that are looked for
GAIN = 0.75  # below that part of its error a clip is moved; what compression alone did to whole clips was 0.81 and more
FEWEST = 2  # frames of a clip; of one alone, compression leaves as little as 0.21


def fit(raw: np.ndarray, compressed: np.ndarray) -> np.ndarray:
    """How well a pair fits when the compressed crop is moved by up to two pixels: ``(5, 5)`` float64, down and right.

    Mean squared errors over that of the middle, where it is not moved.

    Args:
        raw, compressed: ``(H, W, 3)`` uint8 of one size.
    """
    raw, compressed = (image.mean(2) for image in (raw, compressed))
    inner = raw[SHIFT:-SHIFT, SHIFT:-SHIFT]
    height, width = inner.shape
    shifts = range(2 * SHIFT + 1)
    errors = np.array(
        [[np.mean((compressed[y : y + height, x : x + width] - inner) ** 2) for x in shifts] for y in shifts]
    )
    return (errors + 1) / (errors[SHIFT, SHIFT] + 1)  # a level of grey does not tell


def moved(fits: Sequence[np.ndarray]) -> bool:
    """Whether the frames of a clip, each by its :func:`fit`, would in the median fit clearly better at one other place.

    The boxes of a clip are the same in both qualities, so that what is wrong with them is wrong in all frames, while
    strong compression lets single frames stay behind a motion by a pixel, and is no fault.
    """
    return bool(np.median(fits, axis=0).min() < GAIN)


def misaligned(raw: np.ndarray, compressed: np.ndarray) -> bool:
    """:func:`moved` for one pair alone, ``(H, W, 3)`` uint8 of one size; at CRF 40 and above it may be wrong."""
    return moved([fit(raw, compressed)])


def faults_of(row: tuple) -> tuple[list[str], np.ndarray | None]:
    """What is wrong with one pair, a row of a manifest, each with its path; and its :func:`fit` if nothing is and it
    has a raw twin.

    Hashes are compared where the manifest has them.
    """
    faults, crops = [], []
    for path, column in ((row.path_raw, "sha256_raw"), (row.path_compressed, "sha256_compressed")):
        if not path:
            continue
        try:
            if not os.path.isfile(path):  # a device or a pipe may be read for ever
                raise BrokenFile("no file")
            expected = getattr(row, column, None)
            if isinstance(expected, str) and hashlib.sha256(Path(path).read_bytes()).hexdigest() != expected:
                faults.append(f"{path}: its hash is not that of the manifest")
            crops.append(images.read(path))
        except (OSError, BrokenFile) as error:
            faults.append(f"{path}: cannot be read: {error}")
    if not faults and crops[0].shape != crops[-1].shape:
        faults.append(f"{row.path_compressed}: another size than its raw twin")
    return faults, None if faults or len(crops) < 2 else fit(*crops)


def contact_sheet(table: pandas.DataFrame) -> np.ndarray:
    """Evenly drawn pairs, raw above compressed, a double row for each class and compression: ``(H, W, 3)`` uint8.

    Where there is no raw twin, its place is black.
    """
    groups = [group for _, group in table.groupby(["compression", "label"])]
    sheet = np.zeros((2 * len(groups) * TILE, SHOWN * TILE, 3), np.uint8)
    for line, group in enumerate(groups):
        chosen = group.iloc[np.unique(np.linspace(0, len(group) - 1, SHOWN).round().astype(int))]
        for place, row in enumerate(chosen.itertuples()):
            for y, path in enumerate((row.path_raw, row.path_compressed), 2 * line):
                if not path:
                    continue
                tile = images.resized(images.read(path), TILE)
                sheet[y * TILE : (y + 1) * TILE, place * TILE : (place + 1) * TILE] = tile
    return sheet


def check(folder: Path) -> int:
    """Print what is wrong with the pairs in a folder and write ``contact-sheet.png``; returns the exit status.

    One crop that was moved afterwards is known by its hash, a clip whose crops were all moved by :func:`moved`.

    Raises:
        ValueError: there is no manifest, or the set is not complete.
    """
    table = manifest.read(str(folder), pictures=False)
    faults: dict[str, None] = {}  # each once, in order
    clips: dict[tuple[str, ...], list[np.ndarray]] = {}
    for row in tqdm(table.itertuples(), "pairs", len(table)):
        wrong, found = faults_of(row)
        faults |= dict.fromkeys(wrong)
        if found is not None:
            clips.setdefault((row.dataset, row.manipulation, row.video_id, row.compression), []).append(found)
    judged = {clip: moved(fits) for clip, fits in clips.items() if len(fits) >= FEWEST}
    for (*video, compression), wrong in judged.items():
        if wrong:
            faults[f"{'/'.join(video)}: its {compression} crops are not aligned with their raw twins"] = None
    if lacking := [column for column in ("sha256_raw", "sha256_compressed") if column not in table]:
        print(f"note: the manifest has no {' and no '.join(lacking)}: these hashes are not compared")
    if alone := int((table["path_raw"] == "").sum()):
        print(f"note: {alone} of {len(table)} rows have no raw twin to be aligned with")
    if few := len(clips) - len(judged):
        print(f"note: {few} clips have one frame, which is too few to judge how it is aligned")
    for fault in faults:
        print(shown(fault), file=sys.stderr)
    print(f"{folder}: {len(table)} pairs, {len(faults)} faults")
    if not faults:
        images.write_png(folder / "contact-sheet.png", contact_sheet(table))
    return 1 if faults else 0
