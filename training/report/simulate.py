"""What the intervals of a report cover, and how often two equal models are told apart, by simulation.

    python -m training.report.simulate [draws]        two tables in Markdown; 4000 draws take minutes on one core

Scores are normal. Half of a score's variance belongs to its source: a quarter to all of the source's samples, a quarter
to those of one class, so that the samples of a source are correlated as frames of one face are. Two models of equal
AUC share half of all of this. Sources hold reals and fakes ("both"), or one class each ("single", that many of either),
or both with uneven numbers of fakes ("uneven": one source in three has 16 times as many as the others).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain

import numpy as np
from scipy.stats import norm

from add_ops._output import outliving_readers

from . import folds, intervals
from .metrics import Outcome

KINDS = ("both", "single", "uneven")
AUCS = (0.75, 0.95)
COUNTS = (10, 20, 50)


def equal_models(rng: np.random.Generator, kind: str, count: int, auc: float) -> tuple[Outcome, Outcome]:
    """What two models of one true AUC say about the same draw of sources; scores are probabilities of fake."""
    reals = rng.integers(2, 7, count)
    fakes = reals * rng.choice([1, 1, 16], count) if kind == "uneven" else reals
    numbers = np.concatenate([reals, fakes])
    labels = np.repeat([0, 1], [reals.sum(), fakes.sum()])
    part = np.repeat(np.arange(2 * count), numbers)  # the samples of one class of one source
    groups = part if kind == "single" else part % count

    def scores() -> np.ndarray:
        source, own, sample = (rng.normal(size=size) for size in (2 * count, 2 * count, len(labels)))
        return np.sqrt(0.25) * source[groups] + np.sqrt(0.25) * own[part] + np.sqrt(0.5) * sample

    gap = np.sqrt(2) * norm.ppf(auc)  # unit normals this far apart have this AUC
    common = scores()
    first, second = (np.sqrt(0.5) * (common + scores()) + gap * (labels - 0.5) for _ in range(2))
    return Outcome(norm.cdf(first), labels, groups), Outcome(norm.cdf(second), labels, groups)


def auc_rates(kind: str, count: int, auc: float, draws: int, seed: int = 0) -> tuple[float, float]:
    """The share of intervals that hold the true AUC, and of comparisons of equal models with a verdict."""
    rng = np.random.default_rng([seed, KINDS.index(kind), count, round(1000 * auc)])
    held = told = 0
    for _ in range(draws):
        first, second = equal_models(rng, kind, count, auc)
        low, high = intervals.auc_interval(first)
        held += low <= auc <= high
        told += intervals.direction(intervals.auc_difference(first, second)) != 0
    return held / draws, told / draws


def bootstrap_rates(kind: str, count: int, auc: float, draws: int, resamples: int = 200) -> tuple[float, float]:
    """The share of bootstrap intervals that hold the true accuracy, and the true equal error rate."""
    rng = np.random.default_rng([1, KINDS.index(kind), count, round(1000 * auc)])
    error = norm.cdf(-norm.ppf(auc) / np.sqrt(2))  # at the threshold in the middle both rates are equal
    held = np.zeros(2)
    for _ in range(draws):
        cells = intervals.summary({"": equal_models(rng, kind, count, auc)[0]}, resamples)[""]
        for place, (metric, true) in enumerate((("accuracy", 1 - error), ("eer", error))):
            held[place] += cells[metric]["low"] <= true <= cells[metric]["high"]
    return held[0] / draws, held[1] / draws


def table(draws: int) -> Iterator[str]:
    """The lines of the table in Markdown, as they come; the bootstrap has a sixteenth of the draws."""
    yield "| sources of each class | hold | true AUC | AUC covered | false verdicts | accuracy covered | EER covered |"
    yield "|---|---|---|---|---|---|---|"
    for count in COUNTS:
        for kind in KINDS:
            for auc in AUCS:
                rates = [f"{rate:.3f}" for rate in auc_rates(kind, count, auc, draws)]
                resampled = count >= intervals.FEWEST_TO_RESAMPLE
                rates += [f"{r:.2f}" for r in bootstrap_rates(kind, count, auc, draws // 16)] if resampled else "––"
                yield f"| {count} | {kind} | {auc} | {' | '.join(rates)} |"


def folds_rate(count: int, of_fold: float, of_training: float, draws: int) -> float:
    """The share of the study's intervals (:func:`.folds.estimate`) that hold the true difference of two methods, 0.

    Of 15 photographs in ``count`` folds each has a difference of its own, with standard deviation 1. To it a fold adds
    one for its teacher, students and seed (``of_fold``), and one for what it learns from: the sum of what each of its
    training photographs does, with standard deviation ``of_training``; folds share most of these.
    """
    rng = np.random.default_rng([2, count, round(100 * of_fold), round(100 * of_training)])
    photographs = 15
    fold = np.arange(photographs) % count
    keys = [(int(k), str(i)) for i, k in enumerate(fold)]
    held = 0
    for _ in range(draws):
        own, taught = rng.normal(size=(2, photographs))
        shared = rng.normal(size=count) * of_fold
        learnt = taught.sum() - np.bincount(fold, taught)
        learnt *= of_training / np.sqrt(photographs - np.bincount(fold))
        cell = folds.estimate(dict(zip(keys, own + (shared + learnt)[fold], strict=True)))
        held += cell["low"] <= 0 <= cell["high"]
    return held / draws


def folds_table(draws: int) -> Iterator[str]:
    """The lines of the study's table in Markdown."""
    yield "| folds of 15 photographs | of the fold | of what it learns from | covered |"
    yield "|---|---|---|---|"
    for count in (3, 5):
        for of_fold, of_training in ((0, 0), (0.5, 0), (1, 0), (0, 0.25), (0.3, 0.3), (0, 0.5), (0.5, 0.5)):
            yield f"| {count} | {of_fold} | {of_training} | {folds_rate(count, of_fold, of_training, draws):.3f} |"


@outliving_readers()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draws", nargs="?", type=int, default=4000, help="per row")
    draws = parser.parse_args().draws
    for line in chain(folds_table(draws), [""], table(draws)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
