"""What orthogonal and evenly spread directions give: the spread of estimates over draws.

``python -m benchmarks.directions`` writes ``results/directions.json`` and ``results/directions.png`` (some minutes).
Nothing is timed: the figures do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import add_ops
from add_ops._output import outliving_readers

from .charts import INK

RESULTS = Path(__file__).parent / "results"
DRAWS, LOSS_DRAWS = 1000, 400
COUNTS = {3: (1, 3, 6, 12, 24, 48, 96, 192), 64: (1, 8, 32, 64, 128, 256), 512: (1, 16, 64, 256, 512)}
COLOURS = {"uniform": "#1c9bd6", "orthogonal": "#e8590c", "quasi": "#2f9e69"}


def samplings(dim: int) -> list[str]:
    return [name for name in COLOURS if dim == 3 or name != "quasi"]


def point_sets(dim: int) -> tuple[Tensor, Tensor]:
    """64 points each, Gaussian, of spread 1 to 1/4 along the axes; the second set is shifted by 1 and turned."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 64, dim, generator=generator) * torch.linspace(1, 0.25, dim)
    return x, y.flip(2) + dim**-0.5


def spread_of_the_distance(dim: int, sampling: str, count: int) -> float:
    """Standard deviation of SWD² over draws, as a share of its mean."""
    x, y = point_sets(dim)
    generator = torch.Generator().manual_seed(1)
    values = [
        add_ops.sliced_wasserstein(x, y, add_ops.sample_projections(dim, count, sampling=sampling, generator=generator))
        for _ in range(DRAWS)
    ]
    return float(torch.cat(values).std() / torch.cat(values).mean())


def spread_of_the_loss(sampling: str, views: int = 12) -> dict[str, float]:
    """Of the multi-view loss of a batch of 8 maps 256×8×8, all options as published: the standard deviation over draws
    of the loss, and the root of the summed variances of its gradient, as shares of the means' sizes."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 256, 8, 8, generator=generator).relu() * torch.rand(8, 256, 1, 1, generator=generator)
    student = (teacher + 0.5 * torch.randn(teacher.shape, generator=generator)).relu().requires_grad_()
    labels = torch.arange(8) % 2
    generator.manual_seed(1)
    losses, total, squares = [], torch.zeros_like(student), 0.0
    for _ in range(LOSS_DRAWS):
        loss = add_ops.multi_view_loss(student, teacher, labels, views=views, sampling=sampling, generator=generator)
        (gradient,) = torch.autograd.grad(loss, student)
        losses.append(loss.detach())
        total += gradient
        squares += float(gradient.square().sum())
    mean = total / LOSS_DRAWS
    size = float(mean.square().sum())
    variance = (squares / LOSS_DRAWS - size) * LOSS_DRAWS / (LOSS_DRAWS - 1)
    values = torch.stack(losses)
    return {"loss": float(values.std() / values.mean()), "gradient": (variance / size) ** 0.5}


def draw(distances: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure, panels = plt.subplots(1, len(distances), figsize=(12, 4), layout="constrained", sharey=True)
    for axes, (dim, by_sampling) in zip(panels, distances.items(), strict=True):
        for name, by_count in by_sampling.items():
            axes.loglog([int(k) for k in by_count], by_count.values(), "o-", color=COLOURS[name], label=name)
        axes.set_title(f"{dim} dimensions", color=INK, fontsize=13)
        axes.set_xlabel("directions", color=INK, fontsize=12)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3%}".rstrip("0%").rstrip(".") + " %")
        axes.tick_params(colors=INK, which="both", labelsize=11)
        axes.grid(color=INK, alpha=0.3)
        axes.spines[:].set_color(INK)
    panels[0].set_ylabel("standard deviation / mean", color=INK, fontsize=12)
    panels[0].legend(labelcolor=INK, frameon=False, fontsize=12)
    figure.savefig(path, dpi=120, transparent=True)


def by_sampling(dim: int, measure: Callable[[str], object]) -> dict[str, object]:
    return {name: measure(name) for name in samplings(dim)}


@outliving_readers()
def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    distances = {
        str(dim): by_sampling(
            dim, lambda name, dim=dim: {str(k): spread_of_the_distance(dim, name, k) for k in COUNTS[dim]}
        )
        for dim in COUNTS
    }
    losses = by_sampling(3, spread_of_the_loss)
    results = {"draws": DRAWS, "sliced_wasserstein": distances, "loss_draws": LOSS_DRAWS, "multi_view_loss": losses}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "directions.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(distances, RESULTS / "directions.png")
    for name, shares in losses.items():
        print(f"{name:<12} loss ±{shares['loss']:.2%}   gradient ±{shares['gradient']:.1%}")


if __name__ == "__main__":
    main()
