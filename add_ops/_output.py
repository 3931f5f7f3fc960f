"""For commands: what they print is dropped once nobody reads it (``| head``), and their work goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TextIO


class _Unbroken:
    """A text stream whose pipe may lose its reader; ``heard`` says whether it still has one, as far as is known."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.heard = stream, True

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        self.heard, nowhere = False, os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # also for what is buffered and for what C libraries say
        os.close(nowhere)


@contextmanager
def outliving_readers() -> Iterator[None]:
    """While it lasts, a pipe behind standard output or errors that lost its reader raises no BrokenPipeError.

    Other failures, such as a full disk under a redirected output, raise as ever.
    """
    with redirect_stdout(sys.stdout and _Unbroken(sys.stdout)), redirect_stderr(sys.stderr and _Unbroken(sys.stderr)):
        try:
            yield
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                with suppress(OSError):  # of another kind: the interpreter flushes once more at its end, and says so
                    stream.flush()
