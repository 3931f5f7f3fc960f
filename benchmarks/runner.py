"""The command: measures the suite, prints tables and bars, writes the results, or guards against a regression."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

import add_ops

from . import environment
from .bars import added_share, bars, ratios
from .bench_host import host_ratio, measure_host
from .bench_step import measure_step
from .entry import POINTS, STAGES, Entry, Provider, Shape, compiled_backend, providers
from .measure import Row, copy_bandwidth, growth, measure
from .memory import measure_extra_bytes
from .suite import ENTRIES, PRIMITIVES

RESULTS = Path(__file__).parent / "results"
BATCH = {"cpu": 16, "cuda": 144}
STEP_ROUNDS = {"cpu": 9, "cuda": 31}
HOST_ROUNDS = 51
GATE: dict[str, tuple[tuple[Shape, ...], float]] = {  # less than half of what the kernels give: a noisy machine passes
    "spectral_distance": (STAGES[:2], 1.5),
    "view_histogram": (STAGES[:2], 2.0),
    "project_and_sort": (POINTS[1:3], 1.2),
}


def _cell(value: float | None, text: str) -> str:
    return "–" if value is None else text.format(value)


def print_head(row: Row) -> None:
    print(f"\n{row.entry}: forward + backward, batch {row.sizes['batch']}, float32")
    print(
        f"{'shape':<18}{'provider':<11}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}{'runs':>6}{'GB/s':>8}{'of copy':>9}"
        f"{'extra MB':>10}{'× input':>9}{'× plain':>9}{'× released':>12}{'error':>9}"
    )


def print_shape(rows: list[Row]) -> None:
    """One line per provider of a shape."""
    for row in rows:
        print(f"{row.shape if row is rows[0] else '':<18}{row.provider:<11}", end="")
        if row.error or row.timing is None:
            print(f"  {row.error}")
            continue
        against = [ratios(rows, row.entry, row.provider, rival).get(row.shape) for rival in ("plain", "released")]
        print(
            f"{row.timing.p20:>9.2f}{row.timing.p50:>9.2f}{row.timing.p80:>9.2f}{row.timing.rounds:>6}"
            f"{_cell(row.gigabytes_per_second, '{:.2f}'):>8}{_cell(row.share_of_copy, '{:.1%}'):>9}"
            f"{_cell(row.extra_bytes and row.extra_bytes / 1e6, '{:.1f}'):>10}"
            f"{_cell(row.extra_over_input, '{:.2f}'):>9}"
            f"{_cell(against[0], '{:.2f}'):>9}{_cell(against[1], '{:.1f}'):>12}"
            f"{_cell(row.relative_errors and max(row.relative_errors), '{:.0e}'):>9}"
        )


def print_means(rows: list[Row]) -> None:
    """The geometric means over the shapes."""
    for rival in ("plain", "released"):
        by_provider = {name: ratios(rows, rows[0].entry, name, rival) for name in {row.provider for row in rows}}
        means = {name: geometric_mean(by_shape.values()) for name, by_shape in by_provider.items() if by_shape}
        told = ", ".join(f"{name} {mean:.2f}×" for name, mean in sorted(means.items(), key=lambda item: -item[1]))
        if told:
            print(f"geometric mean against {rival}: {told}")


def print_step(rows: list[Row]) -> None:
    print(f"\n{rows[0].entry}: {rows[0].shape}, batch {rows[0].sizes['batch']}, Adam, the teacher's features given")
    print(f"{'losses by':<18}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}{'runs':>6}{'added':>9}{'error':>9}")
    for row in rows:
        if row.timing is None:
            print(f"{row.provider:<18}  {row.error}")
            continue
        added = None if row.provider == "none" else added_share(rows, row.provider)
        print(
            f"{row.provider:<18}{row.timing.p20:>9.1f}{row.timing.p50:>9.1f}{row.timing.p80:>9.1f}{row.timing.rounds:>6}"
            f"{_cell(added, '{:.1%}'):>9}{_cell(row.relative_errors and max(row.relative_errors), '{:.0e}'):>9}"
        )


def print_host(rows: list[Row]) -> None:
    print(f"\n{rows[0].entry}: forward + backward on {rows[0].shape}, float32, on the CPU, where only the calls count")
    print(f"{'loss':<26}{'p20 µs':>9}{'p50 µs':>9}{'p80 µs':>9}{'runs':>6}{'× mse_loss':>12}{'error':>9}")
    for row in rows:
        if row.timing is None:
            print(f"{row.provider:<26}  {row.error}")
            continue
        print(
            f"{row.provider:<26}{1e3 * row.timing.p20:>9.0f}{1e3 * row.timing.p50:>9.0f}{1e3 * row.timing.p80:>9.0f}"
            f"{row.timing.rounds:>6}{_cell(host_ratio(rows, row.provider), '{:.1f}'):>12}"
            f"{_cell(row.relative_errors and max(row.relative_errors), '{:.0e}'):>9}"
        )


def print_growth(exponents: dict[str, dict[str, dict[str, float]]]) -> None:
    print("\nGrowth of the time, exponent (1 = proportional)")
    for name, by_provider in exponents.items():
        for provider, by_axis in by_provider.items():
            print(f"{name:<20}{provider:<11}" + "   ".join(f"{axis} {value:.2f}" for axis, value in by_axis.items()))


def print_bars(rows: list[Row], provider: str, quick: bool) -> None:
    print(f"\nBars for {provider!r}" + (" (few shapes: no verdict on the suite)" if quick else ""))
    if (status := add_ops.backends()[provider]) != "available":
        print(f"not measured, the backend is not available: {status}")
        return
    for bar in bars(rows, provider):
        figure = _cell(bar.figure, "{:.1%}" if bar.text.endswith("%") else "{:.2f}×")
        print(f"{bar.text:<66}{figure:>9}  {({True: 'met', False: 'NOT MET', None: 'not measured'})[bar.met]}")


def add_memory(rows: list[Row], shapes: dict[str, Shape], device: torch.device) -> None:
    """Fill in the extra memory of the primitives' rows; compiling takes memory itself, so "compile" has no figure."""
    wanted = [row for row in rows if row.entry in PRIMITIVES and row.timing and row.provider != "compile"]
    calls = [(ENTRIES[row.entry], shapes[row.shape], row.provider) for row in wanted]
    for row, extra in zip(wanted, measure_extra_bytes(calls, device), strict=True):
        row.extra_bytes = extra
        if extra is not None:
            row.extra_over_input = extra / (4 * shapes[row.shape].elements)


def run_suite(device: torch.device, quick: bool, minutes: float, save: Callable[..., None]) -> None:
    """Measure and print everything; ``save(results, rows, finished)`` after every shape, so that a run
    that is cut short leaves what it had.

    The primitives come first, then the training step. What has not begun after ``minutes`` is left out, and named.
    """
    end, left_out = time.monotonic() + 60 * minutes, []

    def in_time(what: str) -> bool:
        if time.monotonic() > end:
            left_out.append(what)
        return time.monotonic() <= end

    stamp = environment.stamp()
    copy = copy_bandwidth(device)
    machine = stamp["gpu"] if device.type == "cuda" else stamp["machine"]
    print(f"{machine}, {stamp['threads']} threads; commit {stamp['commit']}, {stamp['date']}")
    print(", ".join(f"{name} {version}" for name, version in stamp["versions"].items()))
    print(", ".join(f"{name}={value}" for name, value in stamp["policy"].items()))
    print(f"copy bandwidth {copy / 1e9:.1f} GB/s (bytes read + written; what fits the cache can exceed it)")
    print("GB/s: of the bytes that must move; of copy: as a share of that bandwidth, which is the floor over the time")
    batch, budget = BATCH[device.type], 0.3 if quick or device.type == "cuda" else 1.0
    provider = compiled_backend(device)
    rows: list[Row] = []
    exponents: dict[str, dict[str, dict[str, float]]] = {}

    def keep(found: list[Row], finished: bool = False) -> None:
        rows.extend(found)
        results = {
            **stamp,
            "device": device.type,
            "quick": quick,
            "copy_bytes_per_second": copy,
            "rows": [asdict(row) for row in rows],
            "growth": exponents,
            "left_out": left_out,
            "bars": [asdict(bar) for bar in bars(rows, provider)],
        }
        save(results, rows, finished)

    def measure_entry(entry: Entry) -> None:
        first = len(rows)
        for shape in [shape._replace(batch=batch) for shape in (entry.quick if quick else entry.shapes)]:
            if not in_time(f"{entry.name} {shape}"):
                continue
            found = measure(entry, shape, providers(entry, shape, device, compiled=not quick), device, budget, copy)
            if entry.name in PRIMITIVES and not quick:
                add_memory(found, {str(shape): shape}, device)
            if len(rows) == first:
                print_head(found[0])
            print_shape(found)
            keep(found)
        if len(rows) > first:
            print_means(rows[first:])
            keep([], finished=True)

    for name in PRIMITIVES:
        measure_entry(ENTRIES[name])
    if in_time("training_step"):
        step = measure_step(device, batch, rounds=3 if quick else STEP_ROUNDS[device.type])
        print_step(step)
        keep(step)
    if in_time("host_cost"):
        host = measure_host(rounds=11 if quick else HOST_ROUNDS)
        print_host(host)
        keep(host)
    for name in [name for name in ENTRIES if name not in PRIMITIVES]:
        measure_entry(ENTRIES[name])
    print_bars(rows, provider, quick)
    if not quick:
        for name in PRIMITIVES:
            if in_time(f"growth of {name}"):
                exponents[name] = growth(ENTRIES[name], contenders(name, device), device, budget=0.2)
        print_growth(exponents)
    if left_out:
        print(f"\nnot measured within {minutes:g} minutes: {', '.join(left_out)}")
    keep([])


def contenders(name: str, device: torch.device) -> list[Provider]:
    """The best of the package that is available here, and plain PyTorch."""
    entry = ENTRIES[name]
    found = {provider.name: provider for provider in providers(entry, entry.shapes[0], device, compiled=False)}
    return [found.get(compiled_backend(device), found["reference"]), found["plain"]]


def write(results: dict[str, Any], rows: list[Row], finished: bool) -> None:
    """Save the results so far as JSON, and the chart of the primitive that was measured last, if it is finished."""
    from . import charts

    machine = results["gpu"] if results["device"] == "cuda" else results["machine"]
    day = results["date"][:10]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{re.sub('[^a-z0-9]+', '-', machine.lower()).strip('-')}-{day}.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if finished and rows[-1].entry in PRIMITIVES:
        chosen = [row for row in rows if row.entry == rows[-1].entry]
        title = f"{chosen[0].entry}, batch {chosen[0].sizes['batch']}, float32 · {machine}, "
        title += f"{results['threads']} threads · {day}"
        charts.draw(chosen, title, RESULTS / f"{chosen[0].entry}-{results['device']}.png")


def gate(device: torch.device) -> int:
    """1 if the compiled backend has lost its lead over plain PyTorch at any of the gate's shapes, else 0.

    Ratios of one run only, never a time; a red figure is measured a second time, since a neighbour can spoil one.
    """
    backend = compiled_backend(device)
    if add_ops.backends()[backend] != "available":
        print(f"no gate: backend {backend!r} is not available here: {add_ops.backends()[backend]}")
        return 0
    red = False
    for name, (shapes, floor) in GATE.items():
        for shape in shapes:
            ratio = 0.0
            for _ in range(2):
                rows = measure(ENTRIES[name], shape, contenders(name, device), device, budget=0.5, copy=1.0)
                ratio = max(ratio, *ratios(rows, name, backend, "plain").values(), 0.0)
                if ratio >= floor:
                    break
            errors = "; ".join(f"{row.provider}: {row.error}" for row in rows if row.error)
            red |= ratio < floor
            verdict = "ok" if ratio >= floor else f"BELOW {errors}"
            print(f"{name:<20}{shape!s:<18}{backend} {ratio:6.2f}× plain, floor {floor}  {verdict}")
    return int(red)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few shapes, under a minute")
    parser.add_argument("--write", action="store_true", help="save results and charts under benchmarks/results")
    parser.add_argument("--gate", action="store_true", help="exit with 1 if the compiled backend lost its lead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=tuple(BATCH))
    parser.add_argument("--minutes", type=float, default=math.inf, help="what has not begun by then is left out")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.gate:
        sys.exit(gate(device))
    run_suite(device, options.quick, options.minutes, write if options.write else lambda *_: None)
    if options.write:
        print(f"\nwritten: {RESULTS.parent.name}/{RESULTS.name}")
