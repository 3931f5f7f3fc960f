"""What the compiled backend of a device is to reach, and whether the run at hand did."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean

from .bench_host import host_ratio
from .measure import Row

PLAIN, BEST = ("plain", "products", "packed", "compile"), "best plain"
"""Ways in plain PyTorch, and at every shape the fastest one of those that were timed there."""
SPEED = {  # by backend: entry, rival, geometric mean at least, every shape at least
    "cpp": (
        ("spectral_distance", BEST, 5, 3),
        ("spectral_distance", "released", 25, None),
        ("frequency_attention_loss", BEST, 5, 3),
        ("frequency_attention_loss", "released", 25, None),
        ("view_histogram", BEST, 8, 5),
        ("view_histogram", "released", 200, None),
        ("project_and_sort", BEST, 2, None),
    ),
    "triton": (
        ("spectral_distance", BEST, 4, None),
        ("view_histogram", BEST, 10, None),
        ("project_and_sort", BEST, 2, None),
    ),
}
FLOOR = {  # by backend: entry, the shortest and the longest side of the maps, share of the floor at least
    "cpp": (),
    "triton": (
        ("spectral_distance", 1, 32, 0.7),
        ("spectral_distance", 56, 56, 0.5),
        ("view_histogram", 1, 56, 0.3),
    ),
}
EXTRA_MEMORY = {"cpp": (("spectral_distance", 0.3), ("view_histogram", 0.5)), "triton": ()}
STEP = 0.03
HOST = (("frequency_attention_loss", 4), ("multi_view_loss", 8))  # times mse_loss at most


@dataclass
class Bar:
    """A requirement, the figure of this run (None: not measured), and whether it is met."""

    text: str
    figure: float | None
    met: bool | None


def ratios(rows: list[Row], entry: str, provider: str, rival: str) -> dict[str, float]:
    """How many times faster ``provider`` is than ``rival``, by shape, where both were timed."""
    times = {(row.shape, row.provider): row.timing.p50 for row in rows if row.entry == entry and row.timing}
    for (shape, name), time in list(times.items()):
        if name in PLAIN:
            times[shape, BEST] = min(time, times.get((shape, BEST), time))
    shapes = dict.fromkeys(shape for shape, _ in times)
    both = [shape for shape in shapes if {(shape, provider), (shape, rival)} <= times.keys()]
    return {shape: times[shape, rival] / times[shape, provider] for shape in both}


def added_share(rows: list[Row], provider: str) -> float | None:
    """What the losses add to the training step, as a share of the step without them."""
    times = {row.provider: row.timing.p50 for row in rows if row.entry == "training_step" and row.timing}
    return times[provider] / times["none"] - 1 if {provider, "none"} <= times.keys() else None


def bars(rows: list[Row], provider: str) -> list[Bar]:
    """Every bar; one is not met if ``provider`` failed its check at a shape, whatever the other shapes gave."""
    failed = {row.entry for row in rows if row.provider == provider and row.error}

    def bar(entry: str, text: str, figure: float | None, reached: bool) -> Bar:
        return Bar(text, figure, False if entry in failed else None if figure is None else reached)

    result = []
    for entry, rival, mean, every in SPEED[provider]:
        by_shape = list(ratios(rows, entry, provider, rival).values())
        figure = geometric_mean(by_shape) if by_shape else None
        result.append(
            bar(entry, f"{entry}: ≥ {mean}× {rival}, geometric mean", figure, bool(figure and figure >= mean))
        )
        if every is not None:
            least = min(by_shape, default=None)
            result.append(
                bar(entry, f"{entry}: ≥ {every}× {rival}, every shape", least, bool(least and least >= every))
            )
    for entry, shortest, longest, share in FLOOR[provider]:
        reached = [
            row.share_of_copy
            for row in rows
            if (row.entry, row.provider) == (entry, provider)
            and row.share_of_copy is not None
            and shortest <= max(row.sizes["height"], row.sizes["width"]) <= longest
        ]
        sides = f"up to {longest}²" if shortest == 1 else f"at {longest}²"
        least = min(reached, default=None)
        text = f"{entry}, maps {sides}: share of the floor ≥ {100 * share:.0f} %"
        result.append(bar(entry, text, least, least is not None and least >= share))
    for entry, most in EXTRA_MEMORY[provider]:
        extra = [row.extra_over_input for row in rows if (row.entry, row.provider) == (entry, provider)]
        worst = max((value for value in extra if value is not None), default=None)
        text = f"{entry}: extra memory ≤ {most}× one input, every shape"
        result.append(bar(entry, text, worst, worst is not None and worst <= most))
    added = added_share(rows, provider)
    text = f"training step: the losses add ≤ {100 * STEP:.0f} %"
    result.append(bar("training_step", text, added, added is not None and added <= STEP))
    for name, most in HOST if provider == "cpp" else ():
        ratio = host_ratio(rows, name)
        text = f"host cost: {name} ≤ {most}× mse_loss"
        result.append(bar("host_cost", text, ratio, ratio is not None and ratio <= most))
    return result
