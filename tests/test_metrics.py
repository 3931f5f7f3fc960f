"""Metrics by hand and against the libraries; resampled splits."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_curve

from training.report import metrics


def outcome(scores, labels, hits=None):
    labels = np.array(labels)
    return metrics.Outcome(
        np.array(scores, float), labels, np.arange(len(labels)), None if hits is None else np.array(hits)
    )


def test_metrics_by_hand():
    values = metrics.compute(outcome([0.9, 0.8, 0.3, 0.6, 0.2, 0.1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 1]))
    assert values["accuracy"] == pytest.approx(4 / 6)
    assert values["auc"] == pytest.approx(8 / 9)
    assert values["ap"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert values["eer"] == pytest.approx(1 / 3)
    assert values["precision"] == values["recall"] == values["f1"] == pytest.approx(2 / 3)
    # Confidences .9 .8 .7 .6 .8 .9, right except the third and fourth; equal ones share a bin.
    assert values["ece"] == pytest.approx((2 * 0.1 + 2 * 0.2 + 0.7 + 0.6) / 6, abs=1e-6)
    assert values["recall_at_1"] == pytest.approx(4 / 6)


def test_undefined_metrics_are_nan_and_do_not_crash():
    for labels in ([0, 0, 0], [1, 1, 1]):
        one_class = outcome([0.1, 0.2, 0.3], labels)
        values = metrics.compute(one_class)
        assert np.isnan([values["auc"], values["eer"], values["precision"], values["recall_at_1"]]).all()
        assert not np.isnan([values["accuracy"], values["ece"]]).any()


@pytest.mark.parametrize("decimals", [1, 6])  # with and without ties
def test_bootstrap_formulas_equal_the_libraries(decimals):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    scores = np.clip(np.round(rng.normal(0.4 + 0.2 * labels, 0.2), decimals) + 1e-4, 0, 0.9999)
    result = outcome(scores, labels, rng.random(200) < 0.6)
    counts = rng.multinomial(200, np.full(200, 1 / 200), size=5)
    answers = metrics.weighted(result, np.concatenate([np.ones((1, 200)), counts]).astype(float))
    for row, count in enumerate([np.ones(200, int), *counts]):
        drawn = np.repeat(np.arange(200), count)
        expected = metrics.compute(metrics.Outcome(scores[drawn], labels[drawn], drawn, result.hits[drawn]))
        for name in metrics.METRICS:
            assert answers[name][row] == pytest.approx(expected[name], abs=1e-5), name  # the library's ECE is float32


def test_bootstrap_spread_shrinks_with_the_root_of_the_groups():
    rng = np.random.default_rng(0)
    spread = {100: [], 400: []}
    for count in [100, 400] * 20:
        labels = rng.permutation(np.arange(count) % 2)
        spread[count].append(metrics.bootstrap(outcome(rng.normal(labels, 1.0), labels), 100)["auc"].std())
    assert np.mean(spread[100]) / np.mean(spread[400]) == pytest.approx(2, rel=0.2)


def test_bootstrap_resamples_groups():
    labels = np.tile([0, 1], 50)
    scores = np.random.default_rng(0).random(100)
    frames = metrics.Outcome(np.repeat(scores, 9), np.repeat(labels, 9), np.repeat(np.arange(100), 9))
    clips = outcome(scores, labels)
    assert metrics.bootstrap(frames, 200)["auc"] == pytest.approx(metrics.bootstrap(clips, 200)["auc"])


def test_nearest_neighbour_hits():
    gallery, labels = np.array([[0.0, 0], [10, 0]]), np.array([0, 1])
    hits = metrics.nearest_neighbour_hits(np.array([[1.0, 1], [9, 0], [8, 0]]), np.array([0, 1, 0]), gallery, labels)
    assert hits.tolist() == [True, True, False]


def test_equal_error_rate_interpolates():
    assert metrics.equal_error_rate(np.array([0, 1.0]), np.array([0, 1.0])) == pytest.approx(0.5)
    assert metrics.equal_error_rate(np.array([0, 0, 1.0]), np.array([0, 1.0, 1.0])) == pytest.approx(0)
    assert metrics.equal_error_rate(*roc_curve([0, 1, 0, 1], [0.1, 0.4, 0.35, 0.8])[:2]) == pytest.approx(0)
    assert average_precision_score([0, 1], [0.1, 0.9]) == 1
