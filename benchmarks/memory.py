"""Peak memory of one forward + backward beyond its inputs and results.

On a GPU torch's allocator counts. On the CPU it is the peak of the process' resident set, where whatever anybody
allocated appears; every measurement has a process of its own, in which large allocations are mapped and given back.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from unittest.mock import patch

import torch

from .entry import REHEARSAL, Entry, Provider, Shape, providers

SUPPORTED = Path("/proc/self/clear_refs").exists()
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}


def extra_bytes(entry: Entry, shape: Shape, name: str, device: torch.device) -> int:
    """Of the provider called ``name``; on the CPU after a tiny warm-up, which loads its libraries."""
    provider = next(provider for provider in providers(entry, device, compiled=False) if provider.name == name)
    if device.type == "cpu":
        sizes = {key: min(size, 8) for key, size in shape._asdict().items() if isinstance(size, int)}
        _peak(entry, shape._replace(**sizes | {"batch": 2}), provider, device)
    return _peak(entry, shape, provider, device)


def _peak(entry: Entry, shape: Shape, provider: Provider, device: torch.device) -> int:
    inputs = entry.inputs(shape, device)
    with torch.no_grad():
        upstream = entry.upstream(entry.call(entry.plain, inputs, shape))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
        before = resident("VmRSS")
    value, gradient = provider.run(entry, inputs, shape, upstream)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    return max(peak - before - value.nbytes - gradient.nbytes, 0)


def resident(name: str) -> int:
    """Bytes in memory, now ("VmRSS") or at most ("VmHWM"), of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _of_entry(name: str, shape: Shape, provider: str) -> int:
    from .suite import ENTRIES

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return extra_bytes(ENTRIES[name], shape, provider, torch.device("cpu"))


def measure_extra_bytes(calls: list[tuple[Entry, Shape, str]], device: torch.device) -> list[int | None]:
    """``extra_bytes`` of every (entry, shape, provider's name); None where this system cannot tell."""
    if device.type == "cuda":
        return [extra_bytes(entry, shape, name, device) for entry, shape, name in calls]
    if not SUPPORTED or REHEARSAL:
        return [None] * len(calls)
    with patch.dict(os.environ, GIVE_BACK):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.suite"])
        with context.Pool(1, maxtasksperchild=1) as pool:
            return pool.starmap(_of_entry, [(entry.name, shape, name) for entry, shape, name in calls], chunksize=1)
