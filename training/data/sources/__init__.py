"""What lies in a set of videos, as one list: a module for each kind of source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .celeb_df import celeb_df
from .common import SPLITS, Found, Listing, Video, clip_at, left_out, listing, subfolder
from .deepfakebench import deepfakebench
from .dfdc import dfdc, lists_of
from .faceforensics import faceforensics
from .folder import folder
from .splits import Draw, check
from .table import table

__all__ = [
    "KINDS", "SPLITS", "Draw", "Found", "Listing", "Video", "check", "clip_at", "left_out", "listing", "recognise",
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

    if has("original_sequences", "manipulated_sequences"):
        return "faceforensics"
    if has("Celeb-real", "Celeb-synthesis"):
        return "celeb_df"
    if lists_of(path):
        return "dfdc"
    if has("real", "fake"):
        return "folder"
    raise ValueError(
        f"source {path}: expected a FaceForensics++ tree (original_sequences/, manipulated_sequences/), a Celeb-DF v2 "
        "tree (Celeb-synthesis/), DFDC folders (metadata.json), a folder with real/ and fake/, a DeepfakeBench .json, "
        "or a table (.csv, .tsv, .parquet) with the columns path and label; kind= names it where it is not recognised"
    )
