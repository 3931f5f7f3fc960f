"""Works for the engines of prepare.py to do; they stand alone, for every process that does one imports this file."""

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
