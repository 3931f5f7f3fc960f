"""Checks a provider against the float64 reference, then times it turn by turn with its rivals."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import add_ops

from .entry import REHEARSAL, Entry, Provider, Shape

TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 8e-3}
"""Relative L2 of value and gradient, by the dtype stored. A zero tensor is off by 1, one 0.1 % too large by 1e-3."""
SLOW_ROUNDS, FEWEST_ROUNDS, MOST_ROUNDS = 3, 7, 61
HEAD_START = 5_000_000
"""Cycles (about 3 ms) that a GPU sleeps before a run, while the host queues its launches, as in a training loop."""


@dataclass
class Timing:
    """Milliseconds at the 20th, 50th and 80th percentile of ``rounds`` runs."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        ordered = sorted(1e3 * value for value in seconds)
        p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
        return cls(p20, p50, p80, len(ordered))


@dataclass
class Row:
    """One provider at one shape: its figures, or the error that forbids them."""

    entry: str
    shape: str
    provider: str
    sizes: dict[str, int]
    error: str | None = None
    relative_errors: list[float] | None = None
    timing: Timing | None = None
    gigabytes_per_second: float | None = None
    share_of_copy: float | None = None
    extra_bytes: int | None = None
    extra_over_input: float | None = None

    def check(self, errors: Callable[[], list[float]]) -> bool:
        """Keep the errors of the check, or the exception that it ended with."""
        try:
            self.relative_errors = errors()
        except Exception as error:  # whatever it is, it stands where the figures would
            self.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return self.error is None


def stopwatch(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A function that runs its argument and returns the seconds it took: by events on a GPU, else by the clock.

    The events of a GPU stand around the run in its queue, and the host has a head start: what the kernels take.
    """

    def on_cpu(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def on_cuda(run: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_cuda if device.type == "cuda" else on_cpu


def interleaved(
    runs: dict[str, Callable[[int], Any]], device: torch.device, budget: float, lead: str, rounds: int | None = None
) -> dict[str, Timing]:
    """Time ``runs[name](round)`` in turn, round after round, after a warm-up each.

    Whoever is about as fast as ``lead`` or faster runs in every round, as often as ``budget`` seconds allow (or
    ``rounds`` times); a slower one leaves the later rounds once it has used up as much.
    """
    if not runs:
        return {}
    watch = stopwatch(device)
    once = {name: watch(lambda run=run: run(0)) for name, run in runs.items()}
    quick = [name for name in runs if once[name] <= 1.5 * once.get(lead, math.inf)]
    if rounds is None:
        fewest = 1 if REHEARSAL else FEWEST_ROUNDS
        rounds = min(max(round(budget / sum(once[name] for name in quick)), fewest), MOST_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in quick or turn < SLOW_ROUNDS or turn * once[name] < budget:
                samples[name].append(watch(lambda run=runs[name], turn=turn: run(turn)))
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by the best of several copies, each far larger than the caches."""
    size = 1 << (30 if device.type == "cuda" else 16 if REHEARSAL else 28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    watch = stopwatch(device)
    return 2 * source.nbytes / min(watch(lambda: target.copy_(source)) for _ in range(10))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖``; infinite where the shapes differ or a number is not finite."""
    if actual.shape != expected.shape:
        return math.inf
    error = float((actual.double() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


def checked(results: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """Relative error of each (actual, expected) pair; raises ArithmeticError where one is above the tolerance."""
    errors, allowed = [], []
    for actual, expected in results:
        errors.append(relative_error(actual, expected))
        allowed.append(TOLERANCE[actual.dtype])
    if any(not error <= most for error, most in zip(errors, allowed, strict=True)):
        pairs = (f"{error:.1e} (at most {most:.0e})" for error, most in zip(errors, allowed, strict=True))
        raise ArithmeticError(f"relative errors {', '.join(pairs)}")
    return errors


class Case:
    """An entry at a shape: inputs, a random upstream gradient, and what the float64 reference makes of them."""

    def __init__(self, entry: Entry, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.entry, self.shape = entry, shape
        inputs = entry.inputs(shape, device)
        exact = tuple(x.detach().double() if x.is_floating_point() else x for x in inputs)
        exact[0].requires_grad_()
        with torch.no_grad(), add_ops.use_backend("reference"):
            self.upstream = entry.upstream(entry.call(entry.ours, inputs, shape))
        torch.manual_seed(1)
        oracle = Provider("float64", entry.ours, "reference")
        self.expected = oracle.run(entry, exact, shape, self.upstream.double())
        copies = 1
        if device.type == "cuda":  # enough to exceed the cache twice, so that every run reads from memory
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            copies += math.ceil(2 * cache / sum(x.nbytes for x in inputs))
        self.rotation = [
            tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs) for _ in range(copies)
        ]

    def check(self, provider: Provider) -> list[float]:
        """Relative errors of value and gradient; raises ArithmeticError above the tolerance."""
        torch.manual_seed(1)  # the views that the reference drew
        return checked(zip(self.run(provider), self.expected, strict=True))

    def run(self, provider: Provider, turn: int = 0) -> tuple[Tensor, Tensor]:
        return provider.run(self.entry, self.rotation[turn % len(self.rotation)], self.shape, self.upstream)


def measure(
    entry: Entry, shape: Shape, candidates: list[Provider], device: torch.device, budget: float, copy: float
) -> list[Row]:
    """Check every candidate, then time those that passed; ``copy`` is the bandwidth that counts as 100 %."""
    case = Case(entry, shape, device)
    rows = {provider.name: Row(entry.name, str(shape), provider.name, shape._asdict()) for provider in candidates}
    passed = [provider for provider in candidates if rows[provider.name].check(lambda p=provider: case.check(p))]
    runs = {provider.name: lambda turn, p=provider: case.run(p, turn) for provider in passed}
    for name, timing in interleaved(runs, device, budget, lead="plain").items():
        row, speed = rows[name], entry.floor(shape) / (timing.p50 / 1e3)
        row.timing, row.gigabytes_per_second, row.share_of_copy = timing, speed / 1e9, speed / copy
    return list(rows.values())


def growth(
    entry: Entry, axes: dict[str, tuple[Shape, ...]], candidates: list[Provider], device: torch.device, budget: float
) -> dict[str, dict[str, float]]:
    """Exponent of the time's growth along each axis, by least squares over its shapes: 1 is proportional."""
    slopes: dict[str, dict[str, float]] = {provider.name: {} for provider in candidates}
    for axis, shapes in axes.items():
        rows = [measure(entry, shape, candidates, device, budget, copy=1.0) for shape in shapes]
        sizes = [shape.height * shape.width if "×" in axis else getattr(shape, axis) for shape in shapes]
        for of_provider in zip(*rows, strict=True):
            if all(row.timing for row in of_provider):
                logs = [[math.log(x) for x in column] for column in (sizes, [row.timing.p50 for row in of_provider])]
                slopes[of_provider[0].provider][axis] = statistics.linear_regression(*logs).slope
    return slopes
