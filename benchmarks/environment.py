"""What every figure stands on: the allocator and thread policy, the same for all providers, and the stamp of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
THREADS = int(os.environ.get("OMP_NUM_THREADS") or len(CORES))
POLICY = {
    # Freed memory stays with the process. Otherwise every large tensor is mapped anew at each call, and all providers
    # mostly wait for page faults.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "OMP_NUM_THREADS": str(THREADS),
    "GOMP_CPU_AFFINITY": " ".join(map(str, CORES[:THREADS])),
}


def fix_policy() -> None:
    """Start this Python process again with the policy in force, which allocator and OpenMP read only at their start."""
    if any(os.environ.get(name) != value for name, value in POLICY.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **POLICY})


def stamp() -> dict[str, object]:
    """Machine, versions, commit and date of this run, and whether the policy holds in it."""
    import torch

    import add_ops

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    versions = {"add_ops": add_ops.__version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "torchvision"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    root = Path(__file__).parent.parent
    git = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "machine": f"{processor.strip()}, {len(CORES)} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "vector_code": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "policy": {name: os.environ.get(name, "not set") for name in POLICY},
        "versions": versions,
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
