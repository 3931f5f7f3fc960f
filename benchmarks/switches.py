"""Decisions that wait for a GPU: the register limit of the view histogram, and what the dispatcher costs the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

import add_ops
from add_ops import _dispatch, _triton

from .entry import REHEARSAL, Maps, compiled_backend
from .measure import interleaved

CALLS = 1 if REHEARSAL else 100
"""Without waiting for the device; a queue holds more."""


@contextmanager
def launched_with(kernel: str, **options: Any) -> Iterator[None]:
    """Launch the kernel so named with these options, too."""
    launch = _triton.launch

    def changed(function: Any, grid: tuple[int, ...], *args: Any, **usual: Any) -> None:
        launch(function, grid, *args, **usual | (options if function.__name__ == kernel else {}))

    with patch.object(_triton, "launch", changed):
        yield


def histogram_registers(device: torch.device, shapes: list[Maps], budget: float) -> list[dict[str, Any]]:
    """The forward pass as shipped, one program per multiprocessor, and with 128 registers per thread: two."""
    found = []
    for shape in shapes:
        features, views = shape.random(device), add_ops.sample_views(shape.views, device=device)

        def shipped(_: int = 0, features: Any = features, views: Any = views) -> torch.Tensor:
            return add_ops.multi_view_attention(features, views, max(features.shape[1] // 2, 1))

        def limited(_: int = 0, shipped: Callable[[], torch.Tensor] = shipped) -> torch.Tensor:
            with launched_with("view_histogram_forward_kernel", maxnreg=128, num_stages=1):
                return shipped()

        if not torch.equal(shipped(), limited()):
            raise ArithmeticError(f"view_histogram {shape}: another register limit gives other bits")
        timed = interleaved({"as shipped": shipped, "128 registers": limited}, device, budget, lead="as shipped")
        found += [
            {"switch": "histogram registers", "shape": str(shape), "setting": name, "ms": timing.p50}
            for name, timing in timed.items()
        ]
    return found


def host_overhead(device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds of the host for a forward pass on 1×4×4×4: by the public function, and by its kernels alone."""
    backend, features = compiled_backend(device), torch.randn(1, 4, 4, 4, device=device)
    views, theta = add_ops.sample_views(2, device=device), add_ops.sample_projections(4, 2, device=device)
    points = features.flatten(2).mT
    calls = {
        "spectral_distance": (add_ops.spectral_distance, (features, features), ("l2", 1.0, "forward")),
        "view_histogram": (add_ops.multi_view_attention, (features, views, 2), ("index",)),
        "project_and_sort": (add_ops.project_and_sort, (points, theta), ()),
    }
    found = []
    for name, (public, args, more) in calls.items():
        kernels = _dispatch._kernels[name, backend][0]
        ways = {
            "public function": lambda f=public, a=args: f(*a),
            "kernels alone": lambda f=kernels, a=(*args, *more): f(*a),
        }
        for setting, run in ways.items():
            run()
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            spent = time.perf_counter() - start
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append({"switch": "host overhead", "shape": name, "setting": setting, "ms": 1e3 * spent / CALLS})
    return found


def measure_switches(device: torch.device, shapes: list[Maps], budget: float) -> list[dict[str, Any]]:
    with add_ops.use_backend(compiled_backend(device)), torch.no_grad():
        return histogram_registers(device, shapes, budget) + host_overhead(device)
