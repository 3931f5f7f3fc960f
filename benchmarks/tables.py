"""What a run prints: tables by shape, means, growth, and the bars."""

from __future__ import annotations

import sys
from statistics import geometric_mean
from typing import Any

import torch

import add_ops

from .bars import BEST, added_share, bars, ratios
from .bench_host import host_ratio
from .measure import Row


def _cell(value: float | None, text: str) -> str:
    return "–" if value is None else text.format(value)


def print_stamp(stamp: dict[str, Any], copy: float, device: torch.device) -> None:
    machine = stamp["gpu"] if device.type == "cuda" else stamp["machine"]
    print(f"{machine}, {stamp['threads']} threads; commit {stamp['commit']}, {stamp['date']}")
    print(", ".join(f"{name} {version}" for name, version in stamp["versions"].items()))
    print(", ".join(f"{name}={value}" for name, value in stamp["policy"].items()))
    print(f"copy bandwidth {copy / 1e9:.1f} GB/s (bytes read + written; what fits the cache can exceed it)")
    print("GB/s: of the bytes that must move; of copy: as a share of that bandwidth, which is the floor over the time")


def print_found(found: dict[str, Any], head: bool) -> None:
    """What one job gave."""
    if rows := found.get("rows"):
        if rows[0].entry == "training_step":
            print_step(rows)
        elif rows[0].entry == "host_cost":
            print_host(rows)
        else:
            if head:
                print_head(rows[0])
            print_shape(rows)
    if growth := found.get("growth"):
        print_growth(growth)
    for line in found.get("switches", []):
        print(f"{line['switch']:<22}{line['shape']:<20}{line['setting']:<18}{1e3 * line['ms']:>10.1f} µs")
    sys.stdout.flush()


def print_head(row: Row) -> None:
    print(f"\n{row.entry}: forward + backward, batch {row.sizes['batch']}")
    print(
        f"{'shape':<36}{'provider':<11}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}{'runs':>6}{'GB/s':>8}{'of copy':>9}"
        f"{'extra MB':>10}{'× input':>9}{'× best':>9}{'× released':>12}{'error':>9}"
    )


def print_shape(rows: list[Row]) -> None:
    """One line per provider of a shape."""
    for row in rows:
        print(f"{row.shape if row is rows[0] else '':<36}{row.provider:<11}", end="")
        if row.error or row.timing is None:
            print(f"  {row.error}")
            continue
        against = [ratios(rows, row.entry, row.provider, rival).get(row.shape) for rival in (BEST, "released")]
        print(
            f"{row.timing.p20:>9.3f}{row.timing.p50:>9.3f}{row.timing.p80:>9.3f}{row.timing.rounds:>6}"
            f"{_cell(row.gigabytes_per_second, '{:.2f}'):>8}{_cell(row.share_of_copy, '{:.1%}'):>9}"
            f"{_cell(row.extra_bytes and row.extra_bytes / 1e6, '{:.1f}'):>10}"
            f"{_cell(row.extra_over_input, '{:.2f}'):>9}"
            f"{_cell(against[0], '{:.2f}'):>9}{_cell(against[1], '{:.1f}'):>12}"
            f"{_cell(row.relative_errors and max(row.relative_errors), '{:.0e}'):>9}"
        )


def print_means(rows: list[Row]) -> None:
    """The geometric means over the shapes of one entry."""
    if not any(row.timing for row in rows):
        return
    for rival in (BEST, "released"):
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
    print("growth of the time, exponent (1 = proportional)")
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
