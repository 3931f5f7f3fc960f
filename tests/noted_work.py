"""Works for the engines of prepare.py, and one engine; alone, for every process that works imports this file."""

import os
import signal
import sys
import time


def record(folder, item):
    """A work that shows how often, when and where it was done."""
    with open(folder / "begun", "a") as file:
        file.write(f"{item} {os.getpid()}\n")
    if item == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "odd":
        raise OSError("no such codec")
    time.sleep(1 if item == "long" else 0.2)
    with open(folder / "done", "a") as file:
        file.write(f"{item} {os.getpid()}\n")
    return "it has no face" if item == "faceless" else None


def is_imported(module):
    """A work that says which modules were not there before it."""
    return None if module in sys.modules else "it is not imported"


def one_by_one(work, items, *_, **__):
    """An engine without processes, which would only import everything once more."""
    return ((item, work(item)) for item in items)
