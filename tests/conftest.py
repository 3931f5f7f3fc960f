"""What every test runs under: fixed seeds, poisoned uninitialised memory, and each backend that this machine has."""

from collections.abc import Iterator

import pytest
import torch

import add_ops


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    # In this mode torch fills torch.empty with NaN: an element that nobody writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[name for name, status in add_ops.backends().items() if status == "available"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with add_ops.use_backend(request.param):
        yield request.param
