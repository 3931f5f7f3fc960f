"""What lies in a set of videos, as one list: a module for each kind of source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .celeb_df import celeb_df
from .common import SPLITS, Found, Listing, Video, clip_at, left_out, listing, subfolder
from .deepfakebench import deepfakebench
from .dfdc import dfdc, is_dfdc
from .faceforensics import faceforensics, is_flat
from .folder import folder, split_folders
from .splits import Draw, check, unknown_people
from .table import table

__all__ = [
    "KINDS", "SPLITS", "Draw", "Found", "Listing", "Video", "check", "clip_at", "left_out", "listing", "recognise",
    "unknown_people",
]  # fmt: skip

KINDS: dict[str, Callable[[Path, Draw], Found]] = {
    "faceforensics": faceforensics,
    "celeb_df": celeb_df,
    "deepfakebench": deepfakebench,
    "dfdc": dfdc,
    "folder": folder,
    "table": table,
}

TABLES = (".csv", ".tsv", ".txt", ".parquet")


def recognise(path: Path) -> str:
    """The kind of a source, one of :data:`KINDS`, by its folders or its ending.

    Raises:
        ValueError: it is none of them.
    """
    if path.is_file() and path.suffix.lower() == ".json":
        return "deepfakebench"
    if path.is_file() and path.suffix.lower() in TABLES:
        return "table"

    def has(*names: str) -> bool:
        return all(subfolder(path, name).is_dir() for name in names)

    if has("original_sequences", "manipulated_sequences") or is_flat(path):
        return "faceforensics"
    if has("Celeb-real", "Celeb-synthesis"):
        return "celeb_df"
    if has("real", "fake") or split_folders(path):
        return "folder"
    if is_dfdc(path):
        return "dfdc"
    raise ValueError(
        f"source {path}: expected a FaceForensics++ tree (original_sequences/, manipulated_sequences/), a Celeb-DF "
        "tree (Celeb-synthesis/), DFDC folders (metadata.json), a folder with real/ and fake/ (or train/real/ and so "
        "on), a DeepfakeBench .json, or a table (.csv, .tsv, .parquet) with the columns path and label; kind= names "
        "it where it is not recognised"
    )
