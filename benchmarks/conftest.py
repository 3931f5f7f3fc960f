"""pytest cannot start itself again, so the policy is set in the running process; the header says what holds."""

import ctypes
import os
import sys

import pytest

from .environment import POLICY

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST = -1, -3, 2**31 - 1

if "torch" not in sys.modules:  # OpenMP reads its variables when torch loads it
    os.environ.update({name: POLICY[name] for name in ("OMP_NUM_THREADS", "GOMP_CPU_AFFINITY")})
try:
    libc = ctypes.CDLL(None)
    keeps_memory = all([libc.mallopt(option, LARGEST) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)])
except (OSError, AttributeError):  # no glibc
    keeps_memory = False


def pytest_report_header(config: pytest.Config) -> str:
    threads = ", ".join(
        f"{name}={os.environ.get(name, 'not set')}" for name in ("OMP_NUM_THREADS", "GOMP_CPU_AFFINITY")
    )
    return f"benchmarks: {threads}, freed memory {'stays with' if keeps_memory else 'may leave'} the process"
