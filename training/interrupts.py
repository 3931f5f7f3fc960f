"""How processes end: on Ctrl-C while a command is still importing, which takes seconds, and with their parents."""

import multiprocessing
import os
import signal
import threading


class Stopped(RuntimeError):
    """The work cannot go on although the options are right: one line and exit status 1."""


def during_imports(*_: object) -> None:
    """What Ctrl-C does then: a sentence and status 130 instead of a traceback."""
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(130)


def prepare_imports() -> None:
    """To be called by a script before its long imports; :func:`.options.run` lets Ctrl-C raise again."""
    child = multiprocessing.parent_process() is not None  # it imports the script, too; its parent speaks
    signal.signal(signal.SIGINT, signal.SIG_DFL if child else during_imports)


def end_with_parent() -> None:
    """From now on this process, which another has started, ends when that one does, also by ``kill -9``."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def serve_parent() -> None:
    """For a process of a pool: Ctrl-C is for its parent, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
