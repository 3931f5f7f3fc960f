"""Long pieces of work side by side, each in a process of its own, some of them known only when others have ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import joblib

from .interrupts import Stopped, end_with_parent

T = TypeVar("T")


def usable_cores() -> int:
    """The cores that this process may use, by its affinity and by the quota of its container."""
    return joblib.cpu_count()


def side_by_side(
    work: Callable[[T], None],
    ready: Callable[[Collection[T]], Iterable[T]],
    output: Callable[[T], Path],
    finished: Callable[[T, str, float], None],
    *,
    width: int,
    preload: str,
) -> dict[T, str]:
    """Do what is ready, and what becomes ready by that, until nothing is left.

    Ctrl-C, and whatever else ends this process, ends the others at once; what is to survive that must be on disk.

    Args:
        work: what a process does with an item; a function of a module, or a partial of one.
        ready: called with the items that were lost, gives those that may begin and are not done, best first.
        output: the file to which the standard output and errors of an item's process are appended.
        finished: called with an item, why it was lost or "", and the seconds that it took.
        width: processes at a time.
        preload: the module that the work is in.

    Returns:
        Why each of the lost items was lost: the error that it raised, or how its process ended.
    """
    import torch  # takes seconds, which the processes of prepare.py can do without

    gpu = torch.accelerator.is_available()  # no fork may follow its first use
    context = multiprocessing.get_context("spawn") if gpu else forking(preload)
    running: dict[T, tuple[BaseProcess, Connection, float]] = {}
    lost: dict[T, str] = {}
    try:
        while True:
            for item in ready(lost):
                if len(running) == width:
                    break
                if item not in running and item not in lost:
                    running[item] = *_start(context, work, item, output(item)), time.monotonic()
            if not running:
                return lost
            wait([process.sentinel for process, _, _ in running.values()])
            for item, (process, answer, began) in list(running.items()):
                if process.exitcode is not None:
                    del running[item]
                    if process.exitcode:
                        lost[item] = _reason(process.exitcode, answer)
                    answer.close()
                    finished(item, lost.get(item, ""), time.monotonic() - began)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join(10)
            process.kill()
            process.join()


def forking(preload: str) -> BaseContext:
    """How processes begin: as forks of one that has imported a module; where a system has no such server, anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    root = str(Path(__file__).resolve().parents[1])
    if root not in (paths := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, *paths]))  # else it cannot import that
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    resource_tracker.ensure_running()  # else it would begin below, and let Ctrl-C through again
    first = context.Process(target=int)
    with _ctrl_c_is_for_this_process():  # which waits: a server, or a process that is half begun, ends with a traceback
        first.start()  # when the server has imported it
    first.join()
    return context


@contextmanager
def _ctrl_c_is_for_this_process() -> Iterator[None]:
    """Processes that begin meanwhile inherit that they do not hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(context: BaseContext, work: Callable, item: object, output: Path) -> tuple[BaseProcess, Connection]:
    answer, says = context.Pipe(duplex=False)
    process = context.Process(target=_live, args=(work, item, output, says), name=str(item))
    with _ctrl_c_is_for_this_process():
        process.start()
    says.close()
    return process, answer


def _reason(status: int, answer: Connection) -> str:
    try:
        return answer.recv()
    except EOFError:
        return f"its process ended with {f'signal {-status}' if status < 0 else f'status {status}'}"


def _live(work: Callable, item: object, output: Path, says: Connection) -> None:
    """The life of a process: it ends when its work is done, or with its parent."""
    end_with_parent()
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        work(item)
    except Exception as error:
        traceback.print_exc()
        says.send(f"{'' if isinstance(error, (Stopped, ValueError)) else f'{type(error).__name__}: '}{error}")
        sys.exit(1)
