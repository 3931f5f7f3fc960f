"""A bound on the memory that a library takes for a file from elsewhere; where the system knows none, as macOS, none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ROOM = 2**31  # bytes
_alone = threading.Lock()  # the bound is that of the process


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, the process gets no more than :data:`ROOM` on top of what it has: what asks for more fails."""
    if sys.platform != "linux":
        yield
        return
    import resource

    with _alone:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm", "rb", buffering=0) as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        bounds = [bound for bound in (soft, hard, taken + ROOM) if bound != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
