"""Verify prepared pairs: hashes, alignment of raw and compressed crops, and a contact sheet to look at."""

from __future__ import annotations

import hashlib
import sys
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


def misaligned(raw: np.ndarray, compressed: np.ndarray) -> bool:
    """Whether the compressed crop fits the raw one better when it is moved by a pixel or two.

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
    return bool(errors.min() < 0.9 * errors[SHIFT, SHIFT])  # a flat picture fits everywhere alike


def faults_of(row: tuple) -> list[str]:
    """What is wrong with one pair, a row of a manifest, each with its path."""
    faults, crops = [], []
    for path, expected in ((row.path_raw, row.sha256_raw), (row.path_compressed, row.sha256_compressed)):
        try:
            if hashlib.sha256(Path(path).read_bytes()).hexdigest() != expected:
                faults.append(f"{path}: its hash is not that of the manifest")
            crops.append(images.read(path))
        except (OSError, BrokenFile) as error:
            faults.append(f"{path}: cannot be read: {error}")
    if not faults:
        raw, compressed = crops
        if raw.shape != compressed.shape:
            faults.append(f"{row.path_compressed}: another size than its raw twin")
        elif misaligned(raw, compressed):
            faults.append(f"{row.path_compressed}: not aligned with its raw twin")
    return faults


def contact_sheet(table: pandas.DataFrame) -> np.ndarray:
    """Evenly drawn pairs, raw above compressed, a double row for each class and compression: ``(H, W, 3)`` uint8."""
    groups = [group for _, group in table.groupby(["compression", "label"])]
    sheet = np.zeros((2 * len(groups) * TILE, SHOWN * TILE, 3), np.uint8)
    for line, group in enumerate(groups):
        chosen = group.iloc[np.unique(np.linspace(0, len(group) - 1, SHOWN).round().astype(int))]
        for place, row in enumerate(chosen.itertuples()):
            for y, path in enumerate((row.path_raw, row.path_compressed), 2 * line):
                tile = images.resized(images.read(path), TILE)
                sheet[y * TILE : (y + 1) * TILE, place * TILE : (place + 1) * TILE] = tile
    return sheet


def check(folder: Path) -> int:
    """Print what is wrong with the pairs in a folder and write ``contact-sheet.png``; returns the exit status.

    Raises:
        ValueError: there is no manifest, or the set is not complete.
    """
    table = manifest.read(str(folder), pictures=False)
    faults = [fault for row in tqdm(table.itertuples(), "pairs", len(table)) for fault in faults_of(row)]
    faults = list(dict.fromkeys(faults))
    for fault in faults:
        print(shown(fault), file=sys.stderr)
    print(f"{folder}: {len(table)} pairs, {len(faults)} faults")
    if not faults:
        images.write_png(folder / "contact-sheet.png", contact_sheet(table))
    return 1 if faults else 0
