"""How files are named and written: whole or not at all, in folders that are made, with names that can be shown."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class BrokenFile(ValueError):
    """Why a file, be it a picture or a clip, cannot be used."""


def shown(text: object) -> str:
    """A path, or a line that names one, for a message or a table, on one line.

    Bytes that are no UTF-8 are written as ``\\xff``, characters that move the cursor of a terminal as ``\\n``.
    """
    text = os.fsencode(str(text)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_lines(text: object) -> str:
    """:func:`shown` of each line."""
    return "\n".join(map(shown, str(text).split("\n")))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary neighbour (a file, or a folder it makes) and rename it to ``path``.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{shown(path)} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """:func:`write_whole` for a text, in UTF-8 whatever the locale."""
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
