"""Verify prepared pairs: hashes, alignment of raw and compressed crops, and a contact sheet to look at."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

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


def faults_of(folder: Path, row: object) -> list[str]:
    """What is wrong with one pair, each with its path."""
    faults, images = [], []
    for name, expected in ((row.path_raw, row.sha256_raw), (row.path_compressed, row.sha256_compressed)):
        path = folder / name
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != expected:
                faults.append(f"{path}: its hash is not that of the manifest")
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            faults.append(f"{path}: cannot be read: {error}")
    if not faults:
        raw, compressed = images
        if raw.shape != compressed.shape:
            faults.append(f"{folder / row.path_compressed}: another size than its raw twin")
        elif misaligned(raw, compressed):
            faults.append(f"{folder / row.path_compressed}: not aligned with its raw twin")
    return faults


def contact_sheet(folder: Path, table: object) -> Image.Image:
    """Evenly drawn pairs, raw above compressed: a double row for each class and compression."""
    groups = [group for _, group in table.groupby(["compression", "label"])]
    sheet = Image.new("RGB", (SHOWN * TILE, 2 * len(groups) * TILE))
    for line, group in enumerate(groups):
        chosen = group.iloc[np.unique(np.linspace(0, len(group) - 1, SHOWN).round().astype(int))]
        for place, row in enumerate(chosen.itertuples()):
            for below, name in enumerate((row.path_raw, row.path_compressed)):
                with Image.open(folder / name) as image:
                    tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
                sheet.paste(tile, (place * TILE, (2 * line + below) * TILE))
    return sheet


def check(folder: Path) -> int:
    """Print what is wrong with the pairs in a folder and write ``contact-sheet.png``; returns the exit status.

    Raises:
        ValueError: there is no manifest.
    """
    import pandas

    manifests = sorted(folder.glob("manifest*.parquet"))
    if not manifests:
        raise ValueError(f"out: no manifest in '{folder}'")
    table = pandas.concat([pandas.read_parquet(path) for path in manifests]).drop_duplicates()
    faults = [fault for row in tqdm(table.itertuples(), "pairs", len(table)) for fault in faults_of(folder, row)]
    faults = list(dict.fromkeys(faults))
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{folder}: {len(table)} pairs, {len(faults)} faults")
    if not faults:
        contact_sheet(folder, table).save(folder / "contact-sheet.png")
    return 1 if faults else 0
