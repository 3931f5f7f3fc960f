"""Jobs in a process of their own: one that dies, hangs or breaks its CUDA context costs its own job and no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch


def _broken(device: torch.device) -> bool:
    """After an illegal access every further call in the process fails."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _work(sender: Connection, do: Callable[..., Any], jobs: list[Any], device: torch.device, settings: Any) -> None:
    for job in jobs:
        try:
            result = do(job, device, *settings)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        sender.send(result)
        if _broken(device):
            sender.send(None)
            return


def apart(
    do: Callable[..., Any], jobs: list[Any], seconds: float, device: torch.device, *settings: Any
) -> Iterator[tuple[Any, Any]]:
    """Every job with ``do(job, device, *settings)``, or with a text that says why there is no result."""
    end, left = time.monotonic() + seconds, list(jobs)
    while left:
        receiver, sender = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=_work, args=(sender, do, left, device, settings))
        process.start()
        sender.close()
        try:
            while left:
                if not receiver.poll(max(end - time.monotonic(), 0) if seconds < 1e6 else None):
                    yield from ((job, f"not done within {seconds:.0f} s") for job in left)
                    return
                result = receiver.recv()
                if result is None:  # its context is broken
                    break
                yield left.pop(0), result
        except EOFError:
            process.join()
            yield left.pop(0), f"its process ended with exit status {process.exitcode}"
        finally:
            process.kill()
            process.join()
