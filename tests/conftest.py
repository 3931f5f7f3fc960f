"""What every test runs under: fixed seeds, poisoned uninitialised memory, and each backend that this machine has."""

import gc
import os
from collections.abc import Iterator
from typing import Any

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores; torch reads this when imported
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is imported: the kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import add_ops

pytest.register_assert_rewrite("triton_checks")


def _quicken_the_interpreter() -> None:
    """Triton's interpreter replaces the language at every call in a kernel, sums included: here, once in a launch."""
    from triton.runtime import interpreter

    replaced, replace, launch = set(), interpreter._patch_lang, interpreter.GridExecutor.__call__

    def replace_once(function: Any) -> Any:
        if (known := id(function.__globals__)) in replaced:
            return None
        replaced.add(known)
        return replace(function)

    def launched(self: Any, *args: Any, **options: Any) -> None:
        replaced.clear()
        launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launched


if add_ops.backends()["triton"] == "available" and not torch.cuda.is_available():
    _quicken_the_interpreter()


def pytest_sessionstart(session: pytest.Session) -> None:
    """A backend that ``ADD_OPS_REQUIRE`` names is there: otherwise its tests are left out, and all is green."""
    for name in os.environ.get("ADD_OPS_REQUIRE", "").split():
        if (status := add_ops.backends().get(name, "no such backend")) != "available":
            pytest.exit(f"ADD_OPS_REQUIRE: backend {name!r} cannot run here: {status}", returncode=1)


def pytest_collection_finish() -> None:
    """Leave what is loaded out of the garbage collections to come; accelerate asks for one at the end of each model."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    # In this mode torch fills torch.empty with NaN: an element that nobody writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[name for name, status in add_ops.backends().items() if status == "available"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The test runs on this backend; where the Triton kernels are compiled for a GPU, its tensors are made there."""
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    if on_gpu:
        numpy = torch.Tensor.numpy
        monkeypatch.setattr(torch.Tensor, "numpy", lambda x: numpy(x.cpu()))  # for POT
    torch.set_default_device("cuda" if on_gpu else None)
    with add_ops.use_backend(request.param):
        yield request.param
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The tests of a module run on one thread: its networks are so small that more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
