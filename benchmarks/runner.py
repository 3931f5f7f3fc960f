"""The command: measures the suite, prints tables and bars, writes the results, or guards against a regression."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import add_ops
from add_ops._output import outliving_readers

from . import environment, tables
from .bars import bars
from .entry import POINTS, REHEARSAL, SLICES, STAGES, Shape, compiled_backend
from .isolation import apart
from .jobs import BATCH, contenders, do, parts
from .measure import Row, copy_bandwidth, measure
from .suite import ENTRIES, PRIMITIVES

RESULTS = Path(__file__).parent / "results"
GATE: dict[str, dict[str, dict[Shape, float]]] = {
    "AVX512": {
        "spectral_distance": {STAGES[0]: 2.4, STAGES[1]: 2.5},
        "view_histogram": {STAGES[0]: 4.6, STAGES[1]: 3.6},
        "contrastive_loss": {SLICES[3]: 2.4, SLICES[1]._replace(batch=64): 2.5},
        "project_and_sort": {POINTS[2]: 2.7, POINTS[3]: 3.1},
    },
    "AVX2": {
        "spectral_distance": {STAGES[0]: 1.8, STAGES[1]: 1.8},
        "view_histogram": {STAGES[0]: 3.1, STAGES[1]: 2.8},
        "contrastive_loss": {SLICES[3]: 1.4, SLICES[1]._replace(batch=64): 1.8},
        "project_and_sort": {POINTS[2]: 1.5, POINTS[3]: 1.7},
    },
}
"""How many times faster than "plain" a kernel is at least, by PyTorch's vector code: less than on the slowest machine,
more than half of what the fastest gave, so that a kernel that became twice as slow is noticed on all that were seen."""
OTHER_CPUS, ATTEMPTS = 0.6, 4
"""The share of AVX2's floors that other processors have; and how often a red figure is measured."""


def run_suite(device: torch.device, quick: bool, minutes: float, save: bool) -> None:
    """Measure, print and, with ``save``, write everything, job by job: a run that is cut short leaves what it had.

    What has not begun after ``minutes``, or does not end in time, is left out, and named.
    """
    end = time.monotonic() + 60 * minutes
    stamp, copy, provider = environment.stamp(), copy_bandwidth(device), compiled_backend(device)
    tables.print_stamp(stamp, copy, device)
    rows: list[Row] = []
    results = {**stamp, "device": device.type, "quick": quick, "rehearsal": REHEARSAL, "copy_bytes_per_second": copy}
    results |= {"rows": [], "growth": {}, "switches": [], "left_out": [], "bars": []}
    for part in parts(device, quick):
        print(f"\n--- {part.name}", flush=True)
        limit = (
            math.inf if minutes == math.inf else min(part.seconds * (40 if REHEARSAL else 1), end - time.monotonic())
        )
        for job, found in apart(do, part.jobs, limit, device, quick, copy):
            if isinstance(found, str):
                results["left_out"].append(f"{job}: {found}")
                print(results["left_out"][-1], flush=True)
                continue
            new = found.get("rows", [])
            tables.print_found(found, head=not any(row.entry == new[0].entry for row in rows) if new else False)
            rows += new
            results["growth"] |= found.get("growth", {})
            results["switches"] += found.get("switches", [])
            results["rows"] = [asdict(row) for row in rows]
            results["bars"] = [asdict(bar) for bar in bars(rows, provider)]
            if save:
                write(results)
        for name in dict.fromkeys(job.name for job in part.jobs if job.kind != "growth"):
            chosen = [row for row in rows if row.entry == name]
            tables.print_means(chosen)
            if save and name in PRIMITIVES:
                chart(results, chosen)
    tables.print_bars(rows, provider, quick)
    if results["left_out"]:
        print("\nleft out:", *results["left_out"], sep="\n")
    if save:
        print("\nwritten:", *folders())


def folders() -> list[Path]:
    """Where results go: beside the code, and where ``OUT`` says."""
    found = [] if REHEARSAL else [RESULTS]
    return found + [Path(os.environ[name]) for name in ("OUT",) if os.environ.get(name)]


def machine_and_day(results: dict[str, Any]) -> tuple[str, str]:
    machine = results["gpu"] if results["device"] == "cuda" else results["machine"]
    return machine, results["date"][:10]


def write(results: dict[str, Any]) -> None:
    machine, day = machine_and_day(results)
    name = f"{re.sub('[^a-z0-9]+', '-', machine.lower()).strip('-')}-{day}.json"
    for folder in folders():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def chart(results: dict[str, Any], rows: list[Row]) -> None:
    """Of one primitive, contiguous maps in float32."""
    from . import charts

    usual = [row for row in rows if "float32" in row.sizes.values() and "channels_last" not in row.sizes.values()]
    if not any(row.timing for row in usual):
        return
    machine, day = machine_and_day(results)
    title = f"{usual[0].entry}, batch {usual[0].sizes['batch']}, float32 · {machine}, "
    title += f"{results['threads']} threads · {day}"
    for folder in folders():
        charts.draw(usual, title, folder / f"{usual[0].entry}-{results['device']}.png")


def gate(device: torch.device) -> int:
    """1 if the compiled backend has lost its lead over plain PyTorch at any of the gate's shapes, else 0.

    Ratios of one run only, never a time. A red figure is measured again, since a neighbour can spoil one.
    """
    backend = compiled_backend(device)
    if (status := add_ops.backends()[backend]) != "available":
        print(f"RED: backend {backend!r} is not available here, so that nothing was measured: {status}")
        return 1
    code, red = torch.backends.cpu.get_cpu_capability(), False
    share = 1.0 if code in GATE else OTHER_CPUS
    for name, floors in GATE.get(code, GATE["AVX2"]).items():
        for shape, floor in floors.items():
            ratio, wanted = 0.0, share * floor
            for _ in range(ATTEMPTS):
                rows = measure(ENTRIES[name], shape, contenders(name, device), device, budget=0.5, copy=1.0)
                quickest = {row.provider: row.timing.p20 for row in rows if row.timing}
                if {backend, "plain"} <= quickest.keys():
                    ratio = max(ratio, quickest["plain"] / quickest[backend])
                if ratio >= wanted:
                    break
            errors = "; ".join(f"{row.provider}: {row.error}" for row in rows if row.error)
            red |= ratio < wanted
            verdict = "ok" if ratio >= wanted else f"BELOW {errors}"
            print(f"{name:<20}{shape!s:<18}{backend} {ratio:6.2f}× plain, floor {wanted:.2f}  {verdict}")
    return int(red)


@outliving_readers()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few shapes, under a minute")
    parser.add_argument("--write", action="store_true", help="save results and charts, see benchmarks/results, OUT")
    parser.add_argument("--gate", action="store_true", help="exit with 1 if the compiled backend lost its lead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=tuple(BATCH))
    parser.add_argument("--minutes", type=float, default=math.inf, help="what has not begun by then is left out")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.gate:
        sys.exit(gate(device))
    run_suite(device, options.quick, options.minutes, options.write)
