"""Many items, one function: by the processes of this machine, or by the workers of a Dask cluster.

Both engines yield each item once, as it is finished, with the reason why it could not be done (None: it is done).
An exception is such a reason ("OSError: …"), and so is the end of the process that worked on the item. Ctrl-C drops
what has not begun, lets what is at work be finished, and passes on. The function should write its result itself and
return at once where that is there already: after a crash an item may be begun again.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..interrupts import serve_parent
from ..processes import forking, usable_cores

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
PATIENCE = 10  # seconds for a scheduler to answer
ENDED = "it ended the process that read it (a crash of the decoder, or no memory)"


def _attempt(work: Callable[[T], str | None], item: T) -> str | None:
    try:
        return work(item)
    except Exception as error:  # one odd file must not end a run of days
        return f"{type(error).__name__}: {error}"


def by_processes(
    work: Callable[[T], str | None], items: Sequence[T], jobs: int, *, preload: str = __name__
) -> Iterator[tuple[T, str | None]]:
    """Each item and the reason why it could not be done, from processes of this machine.

    Args:
        work: a function of a module, or a partial of one; returns the reason, or None.
        items: what it is called with, one by one; they can be pickled.
        jobs: processes at a time; 0: one per core.
        preload: the module that they need, imported once for all, also for those that replace ended ones.
    """
    context = forking(preload)
    waiting = [(list(items), jobs or usable_cores())]
    while waiting:
        batch, width = waiting.pop()
        lost = []
        # Ctrl-C lets the items at work be finished.
        with ProcessPoolExecutor(min(width, max(len(batch), 1)), context, serve_parent) as pool:
            futures = {pool.submit(_attempt, work, item): item for item in batch}
            try:
                for future in as_completed(futures):
                    try:
                        yield futures[future], future.result()
                    except BrokenProcessPool:
                        lost.append(futures[future])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if lost and len(batch) == 1:
            yield batch[0], ENDED
        elif lost:  # the culprit was running, so it is among the first: each of these alone, then the others
            lost.sort(key=batch.index)
            waiting += [(lost[2 * width + 1 :], width)] if lost[2 * width + 1 :] else []
            waiting += [([item], 1) for item in lost[: 2 * width + 1]]


def by_dask(scheduler: str, work: Callable[[T], str | None], items: Sequence[T]) -> Iterator[tuple[T, str | None]]:
    """Each item and the reason why it could not be done, from the workers of a Dask cluster, also of later ones.

    Start ``dask scheduler`` on one machine and, on each of the others, a worker per core, of one thread each (decoders
    and detectors are not made to share a process)::

        dask worker tcp://host:8786 --nworkers 8 --nthreads 1

    They need this checkout at the same path, the same Python and the same packages, and stand in folders of their own:
    paths in ``work`` and ``items`` must be absolute. A worker keeps the code that it has once imported: start new ones
    when the checkout has changed.

    Args:
        scheduler: its address, as in ``tcp://host:8786``.
        work: as for :func:`by_processes`.
        items: as for :func:`by_processes`.

    Raises:
        ValueError: Dask is not installed; no scheduler answers within ``PATIENCE``, or it is lost later; a worker
            cannot import the work.
    """
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import connect
    except ImportError as error:
        raise ValueError("scheduler: needs Dask: pip install 'add_ops[cluster]'") from error

    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what it tells with tracebacks is told below

    async def greet() -> None:  # a Client waits forever for whatever else listens there
        comm = await asyncio.wait_for(connect(scheduler, timeout=PATIENCE), PATIENCE)
        await comm.close()

    try:
        asyncio.run(greet())
        client = Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except Exception as error:  # what a foreign server answers is read as anything
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ValueError(f"scheduler: no Dask scheduler answers at '{scheduler}' ({reason})") from error
    with client:
        suspects = []  # Dask blames what was queued beside the culprit too: each of these once more, alone
        for item, answer in _answers(client, work, items, 1000):  # enough for any cluster; all may be too much for it
            if isinstance(answer, KilledWorker):
                suspects.append(item)
            else:
                yield item, answer
        for item, answer in _answers(client, work, suspects, 1):
            yield item, ENDED if isinstance(answer, KilledWorker) else answer


def _answers(client: Client, work: Callable, items: Sequence[T], width: int) -> Iterator[tuple[T, object]]:
    """Each item and its reason, None or a KilledWorker; at most ``width`` of them are at the scheduler."""
    import cloudpickle
    from distributed import CancelledError, KilledWorker, as_completed

    root = str(Path(__file__).parents[2])

    def call(pickled: bytes) -> str | None:  # nested, so that it is sent by value: with it a worker finds `training`
        if root not in sys.path:
            sys.path.insert(0, root)
        attempt, item = pickle.loads(pickled)
        return attempt(item)

    lost = "scheduler: the connection to it was lost; the same command continues"
    finished = as_completed(loop=client.loop, with_results=True, raise_errors=False)
    rest, waiting, told = iter(items), {}, False
    while True:
        for item in islice(rest, width - len(waiting)):
            future = client.submit(call, cloudpickle.dumps((partial(_attempt, work), item)), pure=False)
            waiting[future] = item
            finished.add(future)
        if not waiting:
            return
        while not finished.has_ready():
            try:
                workers = client.nthreads()
            except OSError as error:
                raise ValueError(lost) from error
            if not workers and not told:
                told = True
                print("scheduler: no worker is connected yet; waiting for some", file=sys.stderr, flush=True)
            time.sleep(0.1)
        future, answer = next(finished)
        if isinstance(answer, tuple):  # of a failed future: type, exception, traceback
            answer = answer[1]
        if isinstance(answer, CancelledError):
            raise ValueError(lost)
        if isinstance(answer, Exception) and not isinstance(answer, KilledWorker):
            reason = f"{type(answer).__name__}: {answer}"
            raise ValueError(f"scheduler: a worker cannot begin ({reason}); it needs '{root}' and the same packages")
        yield waiting.pop(future), answer
