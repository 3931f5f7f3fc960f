"""How files are named and written: whole or not at all, in folders that are made, with names that can be shown."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


class BrokenFile(ValueError):
    """Why a file, be it a picture or a clip, cannot be used."""


def shown(path: object) -> str:
    """A path for a message or a table: bytes of a name that are no UTF-8 are written as ``\\xff``."""
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary neighbour (a file, or a folder it makes) and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(temporary := path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"))
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """:func:`write_whole` for a text, in UTF-8 whatever the locale."""
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
