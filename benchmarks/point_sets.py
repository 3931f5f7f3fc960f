"""The sliced Wasserstein distance against POT and plain PyTorch: equal, unequal and weighted point sets.

``python -m benchmarks.point_sets`` prints a table and the bars; ``--write`` saves ``results/point_sets.json``,
``--quick`` takes few shapes, ``--memory`` measures the memory alone. Every provider is checked against the float64
reference before it is timed, turn by turn with the others. POT takes no batch, so that a batch is a loop there, and its
NumPy backend gives no gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from . import environment

if __name__ == "__main__":
    environment.fix_policy()

import ot
import torch
from torch import Tensor

import add_ops
from add_ops._output import outliving_readers

from . import plain
from .measure import Timing, checked, interleaved
from .memory import GIVE_BACK, SUPPORTED, resident

RESULTS = Path(__file__).parent / "results"
KINDS = ("equal", "unequal", "weighted")
MOST = 2**22
"""Values to sort, B·K·N, of the largest shape."""
BARS = (
    ("plain", "both", ("equal",), 3.0, 0.9),
    ("plain", "both", ("unequal", "weighted"), 2.0, 0.9),
    ("POT numpy", "forward", KINDS, 5.0, None),
    ("POT torch", "forward", KINDS, 5.0, None),
)
"""Rival, what is timed, kinds, geometric mean at least, every shape at least."""
GROWTH = 1.15
"""Largest exponent of the time's growth from 4096 to 65,536 points that N·log N explains."""


class Case(NamedTuple):
    """Batch, points of x, dimension, directions; y has three quarters as many points unless they are equal."""

    kind: str
    batch: int
    points: int
    dim: int
    projections: int


HEAVY = [Case(kind, 1, 2**16, 3, 50) for kind in KINDS]
"""Where memory is measured."""


def cases(quick: bool) -> list[Case]:
    sizes = (64, 1024, 16384) if quick else (64, 256, 1024, 4096, 16384, 65536)
    every = [
        Case(kind, batch, points, dim, projections)
        for kind in KINDS
        for batch in (1, 16)
        for points in sizes
        for dim in ((3,) if quick else (3, 64, 512))
        for projections in ((50,) if quick else (50, 512))
    ]
    return [case for case in every if case.batch * case.points * case.projections <= MOST]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(0)
    others = case.points if case.kind == "equal" else 3 * case.points // 4
    x, y = (torch.randn(case.batch, n, case.dim) for n in (case.points, others))
    projections = add_ops.sample_projections(case.dim, case.projections)
    weights = [None, None]
    if case.kind == "weighted":
        weights = [torch.rand(points.shape[:2]) + 0.1 for points in (x, y)]
        weights = [w / w.sum(1, keepdim=True) for w in weights]
    return x.requires_grad_(), y + 4 * torch.randn(case.dim), projections, *weights


def ours(x: Tensor, y: Tensor, projections: Tensor, x_weights: Tensor | None, y_weights: Tensor | None) -> Tensor:
    return add_ops.sliced_wasserstein(x, y, projections, x_weights=x_weights, y_weights=y_weights)


def best_plain(x: Tensor, y: Tensor, projections: Tensor, *weights: Tensor | None) -> Tensor:
    if x.shape == y.shape and weights == (None, None):
        return plain.sliced_wasserstein(x, y, projections)
    return plain.weighted_sliced_wasserstein(x, y, projections, *weights)


def pot(x: Any, y: Any, projections: Any, *weights: Any) -> Tensor:
    of_sample = [[None] * len(x) if w is None else w for w in weights]
    roots = [
        ot.sliced_wasserstein_distance(*sample, projections=projections, p=2)
        for sample in zip(x, y, *of_sample, strict=True)
    ]
    return torch.stack([torch.as_tensor(root) for root in roots]).square()


def pot_numpy(*tensors: Tensor | None) -> Tensor:
    return pot(*(tensor if tensor is None else tensor.detach().numpy() for tensor in tensors))


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "ours": ours,
    "plain": best_plain,
    "POT torch": pot,
    "POT numpy": pot_numpy,
}


def measure(case: Case, budget: float) -> dict[str, dict[str, Any]]:
    """By what is timed ("forward", "both") and provider: the timing, or the error of the check."""
    x, *rest = inputs(case)
    upstream = torch.randn(case.batch)
    exact = [x.detach().double().requires_grad_(), *(None if t is None else t.double() for t in rest)]
    with add_ops.use_backend("reference"):
        value = ours(*exact)
        expected = value.detach(), torch.autograd.grad(value, exact[0], upstream.double())[0]

    def forward(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(x, *rest)

    def both(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        value = function(x, *rest)
        return value.detach(), torch.autograd.grad(value, x, upstream)[0]

    runs: dict[str, dict[str, Callable[[int], Any]]] = {"forward": {}, "both": {}}
    result: dict[str, dict[str, Any]] = {"forward": {}, "both": {}}
    for name, function in PROVIDERS.items():
        try:
            checked([(forward(function), expected[0])])
            runs["forward"][name] = lambda _, function=function: forward(function)
            if name != "POT numpy":
                checked(zip(both(function), expected, strict=True))
                runs["both"][name] = lambda _, function=function: both(function)
        except (ArithmeticError, RuntimeError) as error:
            result["both"][name] = f"{type(error).__name__}: {error}"
    for what, of_provider in runs.items():
        result[what] |= interleaved(of_provider, torch.device("cpu"), budget, lead="plain")
    return result


def extra_bytes(case: Case, provider: str) -> int:
    """Peak memory of forward + backward beyond the inputs, after a small call, which loads what is needed."""
    for chosen in (case._replace(batch=1, points=64), case):
        x, *rest = inputs(chosen)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
        before = resident("VmRSS")
        torch.autograd.grad(PROVIDERS[provider](x, *rest).sum(), x)
        extra = resident("VmHWM") - before
    return extra


def measure_memory() -> list[dict[str, Any]]:
    """Rows of :data:`HEAVY`, each of a process of its own; none where the system cannot tell."""
    if not SUPPORTED:
        return []
    calls = [(case, name) for case in HEAVY for name in PROVIDERS if name != "POT numpy"]
    with patch.dict(os.environ, GIVE_BACK), multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(extra_bytes, calls, chunksize=1)
    rows = [
        case._asdict() | {"provider": name, "MB": round(size / 1e6)}
        for (case, name), size in zip(calls, found, strict=True)
    ]
    for row in rows:
        print(*row.values(), "MB", flush=True)
    return rows


def ratios(results: dict[Case, dict], rival: str, what: str, kinds: tuple[str, ...]) -> list[float]:
    timed = [found[what] for case, found in results.items() if case.kind in kinds]
    pairs = [(found.get(rival), found.get("ours")) for found in timed]
    return [a.p50 / b.p50 for a, b in pairs if isinstance(a, Timing) and isinstance(b, Timing)]


def verdicts(results: dict[Case, dict]) -> list[str]:
    lines = []
    for rival, what, kinds, mean, least in BARS:
        found = ratios(results, rival, what, kinds)
        got = statistics.geometric_mean(found)
        met = got >= mean and (least is None or min(found) >= least)
        bar = f"≥ {mean:g}×" + (f", every shape ≥ {least:g}×" if least else "")
        text = f"{'/'.join(kinds)}, {what}, against {rival}: {got:.2f}× ({min(found):.2f}–{max(found):.2f})"
        lines.append(f"{text}, bar {bar}: {'met' if met else 'NOT MET'}")
    for kind in KINDS:
        curve = {
            case.points: found["both"]["ours"].p50
            for case, found in results.items()
            if case[:2] == (kind, 1) and case[3:] == (3, 50) and case.points >= 1024
        }
        if len(curve) > 1:
            slope = statistics.linear_regression(
                [math.log(n) for n in curve], [math.log(t) for t in curve.values()]
            ).slope
            lines.append(f"{kind}: grows as N^{slope:.2f}, bar {GROWTH:g}: {'met' if slope <= GROWTH else 'NOT MET'}")
    return lines


@outliving_readers()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--write", action="store_true", help="save the results")
    parser.add_argument("--memory", action="store_true", help="memory alone; --write adds it to the results")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of timing per shape")
    options = parser.parse_args()
    saved = RESULTS / "point_sets.json"
    if options.memory:
        rows = measure_memory()
        if options.write:
            kept = json.loads(saved.read_text(encoding="utf-8")) | {"memory": rows}
            saved.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    stamp, results = environment.stamp(), {}
    stamp["versions"]["POT"] = ot.__version__
    print(f"{stamp['machine']}, {stamp['threads']} threads; commit {stamp['commit']}, {stamp['date']}; ms, p50")
    for case in cases(options.quick):
        results[case] = measure(case, options.budget)
        cells = [
            f"{what} {name} {timing.p50:.2f}" if isinstance(timing, Timing) else f"{what} {name}: {timing}"
            for what, found in results[case].items()
            for name, timing in found.items()
        ]
        print(" ".join(map(str, case)) + ": " + ", ".join(cells), flush=True)
    lines = verdicts(results)
    print("\n" + "\n".join(lines))
    if options.write:
        rows = [
            case._asdict()
            | {"timed": what, "provider": name, "ms": asdict(timing) if isinstance(timing, Timing) else timing}
            for case, found in results.items()
            for what, by_provider in found.items()
            for name, timing in by_provider.items()
        ]
        kept = {**stamp, "quick": options.quick, "bars": lines, "rows": rows, "memory": measure_memory()}
        saved.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
