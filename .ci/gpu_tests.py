"""A pytest plugin for a rented GPU: failures are printed as they happen, and an illegal access ends with its test.

After an illegal access every call on CUDA fails in that process. Under xdist the process ends then, another one takes
its place, and the test that did it is reported as the one that the process crashed in.
"""

import os

import pytest

WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and not WORKER:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}", flush=True)


def pytest_runtest_logfinish(nodeid: str) -> None:
    import torch  # not before tests/conftest.py has set what torch reads then

    try:
        if WORKER and torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)
