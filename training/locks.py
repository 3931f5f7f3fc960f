"""One process at a time: a lock that says who works in a folder, and that ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from .files import naming, shown

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None

_held: set[int] = set()  # descriptors of the locked files
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what file systems without locks answer


class InUse(ValueError):
    """Another process, or another thread of this one, is at work there."""


def beside(folder: Path) -> Path:
    """The lock file of a folder, which may be moved while it is held."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def only_one(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file while the work inside goes on.

    The lock is the system's (``flock``, on NFS, too), forked processes do not keep it, and it does not survive
    ``kill -9``. The file tells who holds it and is removed in the end; one that a kill has left bars nobody.

    Args:
        path: the file; its folder is made.
        what: is locked, for the message.
        wait: for whoever holds it, saying so, instead of raising.

    Raises:
        InUse: somebody holds it.
        OSError: it cannot be written.
    """
    if fcntl is None:
        yield
        return
    told = False
    while (descriptor := _take(path)) is None:
        if not wait:
            raise InUse(f"{shown(what)} is in use by {_holder(path)}")
        if not told:
            print(f"waiting for {shown(what)}, in use by {_holder(path)}", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)
    try:
        yield
    finally:
        if descriptor in _held:  # and this is no fork
            path.unlink(missing_ok=True)  # while it is held: who has opened it by now sees that it is gone
            _held.discard(descriptor)
            os.close(descriptor)


def _take(path: Path) -> int | None:
    """The descriptor of the file, locked, with what it tells; None where somebody holds it."""
    while True:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # it is emptied
            try:
                if not _lock(descriptor, path):
                    return None
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    now = datetime.now().isoformat(" ", "seconds")
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
                    _held.add(descriptor)
                    return descriptor
            except FileNotFoundError:
                pass  # its holder has removed it in between
            finally:
                if descriptor not in _held:
                    os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"note: {shown(path)}: nothing can be locked there; start nothing twice", file=sys.stderr)
    return True


def _holder(path: Path) -> str:
    try:
        return shown(path.read_text(encoding="utf-8")) or "another process"
    except (OSError, ValueError):
        return "another process"


def _forget() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)  # else a fork would hold on when its parent is killed
