"""How files are named and written: whole or not at all, where they belong, with names that can be shown."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 200  # bytes of one part of a name: file systems take 255, and endings come on top
MOST_JSON = 2**27  # bytes of a JSON file
MOST_VALUES = 2**22  # and the values in it, each of which takes about a hundred bytes of memory
PACKED = 20  # times as large an archive may become by unpacking
CONTROLS = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"  # characters that no name has which is shown or becomes a folder


class BrokenFile(ValueError):
    """Why a file, be it a picture or a clip, cannot be used."""


# --------------------------------------------------------------------------------------------------------------- names


def readable(text: str) -> str:
    """A text without lone surrogates, which no UTF-8 file takes.

    Bytes of names that are UTF-8, as Python keeps them where the locale is not, are read as that; others are written as
    ``\\xff``, surrogates of another origin (JSON) as ``\\ud800``.
    """
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def shown(text: object) -> str:
    """A path, or a line that names one, for a message or a table, on one line.

    It is :func:`readable`, and characters that move the cursor of a terminal are written as ``\\n``.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in readable(str(text)))


def shown_lines(text: object) -> str:
    """:func:`shown` of each line of a message: those after the first begin with two blanks, others forge a line."""
    return "\n".join(map(shown, re.split(r"\n(?=  )", str(text))))


def cell(value: object) -> object:
    """A cell of a CSV for others: a text that a spreadsheet would run as a formula gets a ``'`` before it."""
    text = shown(value) if isinstance(value, str) else value
    return f"'{text}" if isinstance(value, str) and re.match(r"[=+\-@\t\r\n＝＋－＠]", value) else text


def shortened(name: str, most: int = LONGEST) -> str:
    """A part of a path that a file system takes: of a longer one the beginning and a hash of the whole."""
    data = os.fsencode(name)
    if len(data) <= most:
        return name
    return f"{data[: most - 17].decode('utf-8', 'ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


def inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a folder, or is it, when every link on the way is followed."""
    place, root = os.path.realpath(path), os.path.realpath(folder)
    return place == root or place.startswith(os.path.join(root, ""))


def reachable(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path that a file in ``folder`` names, which may come from a stranger, is read without being asked for.

    It lies in that folder, or in the current one, as what a user's own runs name does.
    """
    return inside(path, folder) or inside(path, os.curdir)


def check_folder(folder: Path) -> None:
    """Refuse a folder to go on in where something in it leads elsewhere: what is written to it would lie there.

    Raises:
        ValueError: a link in it, at any depth, leads outside of it, or something is neither a file nor a folder.
    """
    for head, folders, names in os.walk(folder):
        for path in (Path(head, name) for name in (*folders, *names)):
            if not inside(path, folder):
                raise ValueError(f"{shown(path)} leads outside of {shown(folder)}, where results lie; remove this link")
            if not (path.is_symlink() or path.is_file() or path.is_dir()):
                raise ValueError(f"{shown(path)}: expected a file or a folder, got a pipe or a device")


# -------------------------------------------------------------------------------------------------- reading and writing


def read_bytes(path: Path, most: int) -> bytes:
    """What a file holds.

    Raises:
        ValueError: it holds more than ``most`` bytes, or is a pipe that a stranger left; the reason has no path.
        OSError: it cannot be read.
    """
    if stat.S_ISFIFO(os.stat(path).st_mode) and not str(path).startswith(("/dev/", "/proc/")):  # as a shell's <(…) lies
        raise ValueError("expected a file, got a pipe, which may never end")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size <= most and len(content := file.read(most + 1)) <= most:
            return content
    raise ValueError(f"expected at most {most} bytes, got more")


def read_json(path: Path) -> Any:
    """What stands in a JSON file.

    Raises:
        ValueError: it is none, is nested too deeply, has too many values, or is no UTF-8; the reason has no path.
        OSError: it cannot be read.
    """
    content = read_bytes(path, MOST_JSON)
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"expected at most {MOST_VALUES} values, got more")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside, be it a full disk or a folder that is read-only, is told of ``path``, in one line."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{shown(path)} cannot be written: {error.strerror or error}") from error


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk, where they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # which some file systems cannot flush
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and what is missing above it; their names have reached the disk when this returns."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        flush(made.parent)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary neighbour (a file, or a folder it makes) and rename it to ``path``.

    It has reached the disk before what was called so is gone, and so has its name when this returns. A link of the name
    is replaced, not followed.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{shortened(path.name)}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            make_folder(path.parent)
            write(temporary)
            for written in (*temporary.rglob("*"), temporary):
                flush(written)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file by :func:`write_whole`."""
    write_whole(path, lambda target: target.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """:func:`write_whole` for a text, in UTF-8 whatever the locale."""
    write_whole(path, lambda target: target.write_text(readable(text), encoding="utf-8"))


def remove_drafts(folder: Path, name: str = "*") -> None:
    """Remove from a folder what a kill left of writing files of this name; nobody else may be writing there."""
    for draft in list(folder.rglob(f".{name}.tmp")):
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)


def check_unpacked(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise BrokenFile for an archive that unpacks to far more than it is."""
    unpacked, packed = sum(info.file_size for info in archive.infolist()), path.stat().st_size
    if unpacked > PACKED * packed:
        raise BrokenFile(f"an archive of {packed} bytes that unpacks to {unpacked}")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that was written here.

    Raises:
        ValueError: it is damaged; it is named.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_unpacked(archive, path)
        with np.load(path) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{shown(path)} is damaged; remove it, and it is made again: {reason}") from error
