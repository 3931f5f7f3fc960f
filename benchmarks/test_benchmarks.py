"""The suite through pytest-benchmark, ``pytest benchmarks --benchmark-only``: a red check fails and is not timed."""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from .bench_step import Steps
from .entry import Shape, providers
from .jobs import BATCH
from .measure import Case
from .suite import ENTRIES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    pytest.param(entry.name, shape, provider.name, id=f"{entry.name}-{shape}-{provider.name}")
    for entry in ENTRIES.values()
    for shape in (shape._replace(batch=BATCH[DEVICE.type]) for shape in entry.shapes)
    for provider in providers(entry, DEVICE, compiled=shape._replace(batch=16) in entry.compiled)
]


@lru_cache(maxsize=1)
def _case(name: str, shape: Shape) -> Case:
    return Case(ENTRIES[name], shape, DEVICE)


@lru_cache(maxsize=1)
def _steps() -> Steps:
    return Steps(DEVICE, BATCH[DEVICE.type])


def _finished(run: Callable[[], object]) -> Callable[[], None]:
    def finish() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return finish


@pytest.mark.parametrize(("name", "shape", "provider_name"), CASES)
def test_entry(benchmark: Callable, name: str, shape: Shape, provider_name: str) -> None:
    case = _case(name, shape)
    found = providers(case.entry, DEVICE, compiled=provider_name == "compile")
    provider = next(provider for provider in found if provider.name == provider_name)
    case.check(provider)
    benchmark.group = f"{name} {shape}"
    benchmark.pedantic(_finished(lambda: case.run(provider)), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("variant", ["none", "reference", "plain", "cpp", "triton"])
def test_training_step(benchmark: Callable, variant: str) -> None:
    steps = _steps()
    if variant not in steps.variants:
        pytest.skip(f"backend {variant!r} is not available for {DEVICE.type}")
    if variant != "none":
        steps.check(variant)
    benchmark.group = "training step"
    benchmark.pedantic(_finished(lambda: steps.run(variant)), rounds=3, warmup_rounds=1)
