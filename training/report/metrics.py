"""Metrics over a whole split, and over splits resampled by source; their intervals are in intervals.py."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.functional.classification import multiclass_calibration_error

METRICS = ("accuracy", "auc", "ap", "eer", "precision", "recall", "f1", "ece", "recall_at_1")
LOWER_IS_BETTER = ("eer", "ece")
ECE_BINS = 20


@dataclass
class Outcome:
    """What a model said about a split.

    Attributes:
        scores: ``(N,)`` float64, the probability of fake.
        labels: ``(N,)`` int64, 1 = fake.
        groups: ``(N,)`` int64, the source of each sample: a real and everything made from it.
        hits: ``(N,)`` bool, whether the nearest training sample has the same label; None: not looked up.
    """

    scores: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    hits: np.ndarray | None = None


def pooled(outcomes: list[Outcome]) -> Outcome:
    """The samples of several outcomes of one model together; equal groups stay one, as of a source in two qualities."""
    hits = None if any(outcome.hits is None for outcome in outcomes) else np.concatenate([o.hits for o in outcomes])
    return Outcome(
        *(np.concatenate([getattr(o, key) for o in outcomes]) for key in ("scores", "labels", "groups")), hits
    )


def equal_error_rate(false_positive_rate: np.ndarray, true_positive_rate: np.ndarray) -> float:
    """Where the straight-line ROC curve meets ``FPR = 1 - TPR``; both ``(K,)``, rising from 0 to 1."""
    gap = false_positive_rate - (1 - true_positive_rate)
    right = int(np.argmax(gap >= 0))
    left = max(right - 1, 0)
    share = 0.0 if gap[right] == gap[left] else -gap[left] / (gap[right] - gap[left])
    return float(false_positive_rate[left] + share * (false_positive_rate[right] - false_positive_rate[left]))


def compute(outcome: Outcome) -> dict[str, float]:
    """Every metric of a split, threshold 0.5; NaN where it is undefined, e.g. AUC of one class."""
    scores, labels = outcome.scores, outcome.labels
    predicted = (scores >= 0.5).astype(int)
    two_classes = 0 < labels.sum() < len(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the undefined is answered by NaN, not by a warning
        values = {
            "accuracy": accuracy_score(labels, predicted),
            "auc": roc_auc_score(labels, scores) if two_classes else np.nan,
            "ap": average_precision_score(labels, scores) if two_classes else np.nan,
            "eer": equal_error_rate(*roc_curve(labels, scores)[:2]) if two_classes else np.nan,
            "precision": precision_score(labels, predicted, zero_division=np.nan),
            "recall": recall_score(labels, predicted, zero_division=np.nan),
            "f1": f1_score(labels, predicted, zero_division=np.nan),
        }
    probabilities = torch.from_numpy(np.stack([1 - scores, scores], axis=1))
    error = multiclass_calibration_error(probabilities, torch.tensor(labels), num_classes=2, n_bins=ECE_BINS)
    values["ece"] = error.item()
    values["recall_at_1"] = np.nan if outcome.hits is None else outcome.hits.mean()
    return {name: float(values[name]) for name in METRICS}


def nearest_neighbour_hits(
    queries: np.ndarray, query_labels: np.ndarray, gallery: np.ndarray, gallery_labels: np.ndarray
) -> np.ndarray:
    """Whether the Euclidean nearest of ``gallery`` ``(M, D)`` has the label of the query ``(N, D)``: ``(N,)`` bool."""
    model = KNeighborsClassifier(1, algorithm="brute").fit(gallery, gallery_labels)
    return model.predict(queries) == query_labels


def bootstrap(outcome: Outcome, resamples: int, seed: int = 0, batch: int = 2**24) -> dict[str, np.ndarray]:
    """Metrics of resampled splits: groups are drawn with replacement.

    The draw depends on the seed and the groups only, so that two models on one split share their resamples and the
    difference of their results is paired.

    Returns:
        For each metric ``(resamples,)``, NaN where undefined.
    """
    members, group_of = np.unique(outcome.groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    parts = []
    step = max(1, batch // max(len(outcome.scores), 1))
    for start in range(0, resamples, step):
        draws = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), min(step, resamples - start))
        parts.append(weighted(outcome, draws[:, group_of].astype(np.float64)))
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def weighted(outcome: Outcome, counts: np.ndarray) -> dict[str, np.ndarray]:
    """:func:`compute` for many splits at once, each sample taken ``counts`` times.

    Args:
        counts: ``(R, N)`` float64, whole numbers.

    Returns:
        For each metric ``(R,)``.
    """
    order = np.argsort(-outcome.scores, kind="stable")
    scores, labels, counts = outcome.scores[order], outcome.labels[order], counts[:, order]
    predicted = scores >= 0.5
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # equal scores share one threshold
    true = np.cumsum(counts * labels, axis=1)[:, ends]
    false = np.cumsum(counts * (1 - labels), axis=1)[:, ends]
    start = np.zeros((len(counts), 1))
    total, positives, negatives = counts.sum(1), true[:, -1], false[:, -1]
    hit = (counts * (labels * predicted)).sum(1)
    called = (counts * predicted).sum(1)
    confidence = np.maximum(scores, 1 - scores)
    bins = np.minimum(np.floor(confidence * ECE_BINS), ECE_BINS - 1).astype(int)
    member = np.eye(ECE_BINS)[bins]
    calibration = np.abs((counts * ((predicted == labels) - confidence)) @ member).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        tpr = np.concatenate([start, true / positives[:, None]], axis=1)
        fpr = np.concatenate([start, false / negatives[:, None]], axis=1)
        precision = np.nan_to_num(true / (true + false))
        return {
            "accuracy": (counts * (predicted == labels)).sum(1) / total,
            "auc": np.trapezoid(tpr, fpr, axis=1),
            "ap": np.where(negatives > 0, (np.diff(tpr, axis=1) * precision).sum(1), np.nan),
            "eer": np.array(
                [np.nan if np.isnan(f + t).any() else equal_error_rate(f, t) for f, t in zip(fpr, tpr, strict=True)]
            ),
            "precision": hit / called,
            "recall": hit / positives,
            "f1": 2 * hit / (called + positives),
            "ece": calibration / total,
            "recall_at_1": np.full(len(counts), np.nan)
            if outcome.hits is None
            else (counts * outcome.hits[order]).sum(1) / total,
        }
