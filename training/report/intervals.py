"""95 % intervals over sources, when there is none, and what may be said from one.

A sample is not independent of the others of its source, so every interval here treats sources as the unit. What they
cover is simulated by ``python -m training.report.simulate``; its table stands in README.md.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t as student_t

from .metrics import METRICS, Outcome, bootstrap, compute

ALPHA = 0.05
FEWEST = 10  # sources with reals, and with fakes: with fewer, no interval is given
FEWEST_TO_RESAMPLE = 20  # the same for the bootstrap, which is too narrow below
NONE = (np.nan, np.nan)


def sources(outcome: Outcome) -> tuple[int, int]:
    """How many groups hold a real, and how many hold a fake."""
    reals, fakes = (len(np.unique(outcome.groups[outcome.labels == label])) for label in (0, 1))
    return reals, fakes


def shortage(outcome: Outcome) -> str:
    """Why there are no intervals, or only those of AUC, as a clause to stand after the name of a split; or ""."""
    reals, fakes = sources(outcome)
    if min(reals, fakes) >= FEWEST_TO_RESAMPLE:
        return ""
    counts = f"has {reals} source{'s' * (reals != 1)} with reals and {fakes} with fakes"
    if min(reals, fakes) >= FEWEST:
        return f"{counts}; below {FEWEST_TO_RESAMPLE} of either only AUC has an interval"
    return f"{counts}; below {FEWEST} of either no interval is given"


# ----------------------------------------------------------------------------------------------------------------- AUC


def placements(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Placement values: for a fake the share of reals scored below it, for a real the share of fakes above it.

    Equal scores count half. Their mean over the fakes, and over the reals, is the AUC.

    Args:
        scores: ``(N,)``; only their order matters.
        labels: ``(N,)``, 1 = fake; both classes must occur.

    Returns:
        ``(N,)`` float64.
    """
    fake = labels == 1
    real_scores, fake_scores = np.sort(scores[~fake]), np.sort(scores[fake])
    below, above = (
        (np.searchsorted(known, asked, "left") + np.searchsorted(known, asked, "right")) / (2 * len(known))
        for known, asked in ((real_scores, scores[fake]), (fake_scores, scores[~fake]))
    )
    values = np.empty(len(scores))
    values[fake], values[~fake] = below, 1 - above
    return values


def clustered_error(values: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Standard error of an AUC, or of a difference of two, and its degrees of freedom; groups are independent.

    With ``M`` fakes, ``N`` reals and AUC ``A``, group k's placement values deviate by ``f_k = Σ (V − A) / M`` over its
    fakes and ``r_k = Σ (V − A) / N`` over its reals. Of ``K`` groups, ``K₁`` hold fakes and ``K₀`` reals:

        variance = K₁/(K₁−1) Σ f_k² + K₀/(K₀−1) Σ r_k² + 2 K/(K−1) Σ f_k r_k

    (N. A. Obuchowski, Nonparametric analysis of clustered ROC curve data, Biometrics 53, 1997, 567–578). Where every
    sample is a group of its own this is the variance of E. R. DeLong, D. M. DeLong and D. L. Clarke-Pearson (Comparing
    the areas under two or more correlated receiver operating characteristic curves, Biometrics 44, 1988, 837–845). It
    is linear in V, so differences of placement values give the variance of the paired difference.

    The degrees of freedom are Satterthwaite's. A group's term is expected to be as ``e_k = (m_k/M)² + (n_k/N)²``, with
    ``m_k`` and ``n_k`` its fakes and reals, so that a few large groups count as few: the sum over a part of the groups
    has ``(Σ e_k)² / Σ e_k²`` degrees less one for the mean, which is the number of groups less one where all are of one
    size. The parts, groups with reals only, with fakes only, with both, are independent.

    Args:
        values: ``(N,)`` placement values, or their differences between two models.
        labels: ``(N,)``, 1 = fake.
        groups: ``(N,)`` int64; at least two of them must hold reals and two fakes.
    """
    _, group = np.unique(groups, return_inverse=True)
    center = values[labels == 1].mean()
    of_class = [labels == label for label in (0, 1)]
    real, fake = (np.bincount(group, np.where(mine, values - center, 0)) / mine.sum() for mine in of_class)
    shares = [np.bincount(group, mine) / mine.sum() for mine in of_class]
    held = [share > 0 for share in shares]
    reals, fakes, both = (count / (count - 1) for count in (held[0].sum(), held[1].sum(), len(real)))
    terms = reals * real**2 + fakes * fake**2 + 2 * both * real * fake
    expected = shares[0] ** 2 + shares[1] ** 2
    variance = uncertainty = 0.0
    for part in (held[0] & ~held[1], held[1] & ~held[0], held[0] & held[1]):
        if part.any():
            freedom = max(expected[part].sum() ** 2 / (expected[part] ** 2).sum() - 1, 1)
            variance += terms[part].sum()
            uncertainty += terms[part].sum() ** 2 / freedom
    error = float(np.sqrt(max(variance, 0)))
    return (error, float(variance**2 / uncertainty)) if error > 1e-12 else (0.0, np.nan)  # but for rounding


def auc_interval(outcome: Outcome) -> tuple[float, float]:
    """The 95 % interval of an AUC, from :func:`clustered_error` on the logit scale; NaN where none is given.

    A perfect AUC has no spread to estimate from and gets a one-sided bound: among n pairs of a group with fakes and a
    group with reals, no group in two pairs, all are ordered rightly with probability AUC^n at most; so an AUC below
    0.025^(1/n) would show this with probability 0.025 at most. An AUC of 0 mirrors it. Where all groups say the same
    otherwise (one score for everything), there is no interval.
    """
    with_reals, with_fakes = sources(outcome)
    if min(with_reals, with_fakes) < FEWEST:
        return NONE
    values = placements(outcome.scores, outcome.labels)
    auc = values[outcome.labels == 1].mean()
    if auc in (0, 1):
        pairs = min(with_reals, with_fakes, len(np.unique(outcome.groups)) // 2)
        bound = (ALPHA / 2) ** (1 / pairs)
        return (bound, 1.0) if auc == 1 else (0.0, 1 - bound)
    error, freedom = clustered_error(values, outcome.labels, outcome.groups)
    if error == 0:
        return NONE
    half = student_t.ppf(1 - ALPHA / 2, freedom) * error / (auc * (1 - auc))
    return float(expit(logit(auc) - half)), float(expit(logit(auc) + half))


def auc_difference(first: Outcome, second: Outcome) -> dict[str, float]:
    """``first − second`` in AUC on the same samples: ``value``, its 95 % interval ``low``, ``high``, and ``p``.

    ``p`` is the two-sided probability of so large a difference if there were none. All but the value are NaN where
    there are too few sources or where the difference is the same in all of them, as of a model with itself.
    """
    if len(set(first.labels)) < 2:
        return {"value": np.nan, "low": np.nan, "high": np.nan, "p": np.nan}
    values = placements(first.scores, first.labels) - placements(second.scores, second.labels)
    found = {"value": float(values[first.labels == 1].mean()), "low": np.nan, "high": np.nan, "p": np.nan}
    if min(sources(first)) < FEWEST:
        return found
    error, freedom = clustered_error(values, first.labels, first.groups)
    if error == 0:
        return found
    half = student_t.ppf(1 - ALPHA / 2, freedom) * error
    p = 2 * student_t.sf(abs(found["value"]) / error, freedom)
    return found | {"low": float(found["value"] - half), "high": float(found["value"] + half), "p": float(p)}


# ---------------------------------------------------------------------------------------------------------- all metrics


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap results, undefined ones left out; NaN where they are all the same or undefined."""
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return NONE
    low, high = np.percentile(defined, [100 * ALPHA / 2, 100 - 100 * ALPHA / 2])
    return (float(low), float(high)) if low < high else NONE


def _resampled(outcome: Outcome, resamples: int) -> dict[str, np.ndarray]:
    if min(sources(outcome)) < FEWEST_TO_RESAMPLE:
        return {metric: np.empty(0) for metric in METRICS}
    return bootstrap(outcome, resamples)


def summary(outcomes: dict[str, Outcome], resamples: int) -> dict[str, dict[str, dict[str, float]]]:
    """``{model: {metric: {"value", "low", "high"}}}`` with 95 % intervals, NaN where there is none.

    AUC has that of :func:`auc_interval`, the others that of the bootstrap over sources.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model, outcome in outcomes.items():
        samples = _resampled(outcome, resamples)
        found[model] = {}
        for metric, value in compute(outcome).items():
            low, high = auc_interval(outcome) if metric == "auc" else percentile_interval(samples[metric])
            found[model][metric] = {"value": value, "low": low, "high": high}
    return found


def difference(first: Outcome, second: Outcome, resamples: int) -> dict[str, dict[str, float]]:
    """``first − second`` per metric with its paired 95 % interval, as of :func:`summary`; AUC also has its ``p``.

    Raises:
        ValueError: they do not speak about the same samples.
    """
    if not (np.array_equal(first.labels, second.labels) and np.array_equal(first.groups, second.groups)):
        raise ValueError("difference: expected two outcomes on the same samples")
    values, others = compute(first), compute(second)
    samples, other_samples = _resampled(first, resamples), _resampled(second, resamples)
    result = {}
    for metric in METRICS:
        low, high = percentile_interval(samples[metric] - other_samples[metric])
        result[metric] = {"value": values[metric] - others[metric], "low": low, "high": high}
    return result | {"auc": auc_difference(first, second)}


# --------------------------------------------------------------------------------------------------------- comparisons


def holm(p: np.ndarray) -> np.ndarray:
    """p-values ``(C,)`` of C comparisons, corrected for there being several (Holm 1979); NaN was no comparison."""
    corrected, tested = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested])]
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def compare(
    outcomes: dict[str, Outcome], pairs: list[tuple[str, str]], resamples: int
) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """:func:`difference` for each pair of models; the ``p`` of AUC is corrected for the number of pairs."""
    found = {(a, b): difference(outcomes[a], outcomes[b], resamples) for a, b in pairs}
    corrected = holm(np.array([cells["auc"]["p"] for cells in found.values()]))
    for cells, p in zip(found.values(), corrected, strict=True):
        cells["auc"]["p"] = float(p)
    return found


def direction(cell: dict[str, float]) -> int:
    """What a difference supports: 1, above zero; −1, below; 0, neither, or its corrected ``p`` does not allow it."""
    if cell.get("p", 0) >= ALPHA:
        return 0
    return int(cell["low"] > 0) - int(cell["high"] < 0)
