"""Metrics by hand and against the libraries; resampled splits."""

import warnings

import numpy as np
import pytest
from sklearn.metrics import roc_curve

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
    assert metrics.compute(outcome([0.1, 0.9, 0.3], [0, 1, 0]))["auc"] == 1, "one fake is enough"
    for labels in ([0, 0, 0], [1, 1, 1]):
        one_class = outcome([0.1, 0.2, 0.3], labels)
        values = metrics.compute(one_class)
        assert np.isnan([values[name] for name in ("auc", "ap", "eer", "precision", "recall_at_1")]).all()
        assert np.isnan([values["recall"], values["f1"]]).tolist() == [not any(labels)] * 2
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


def test_chunks_of_resamples_are_those_of_one_draw():
    result = outcome(np.random.default_rng(0).random(20), np.tile([0, 1], 10))
    whole, chunks = metrics.bootstrap(result, 7), metrics.bootstrap(result, 7, batch=40)  # of two, and one left
    for name in ("accuracy", "auc"):
        assert chunks[name] == pytest.approx(whole[name]) and len(whole[name]) == 7 and len(set(whole[name])) > 3
    assert metrics.bootstrap(result, 7, seed=1)["auc"].tolist() != whole["auc"].tolist()


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
    rates, true = np.array([0, 0.2, 0.7, 1]), np.array([0, 0.3, 0.9, 1])
    grid = np.linspace(0, 1, 1_000_001)  # the curve, point by point
    miss = 1 - np.interp(grid, rates, true)
    found = grid[np.argmin(np.abs(grid - miss))]
    assert 0.2 < found < 0.7 and metrics.equal_error_rate(rates, true) == pytest.approx(found, abs=1e-5)


def test_a_score_of_one_half_is_called_fake_and_confidence_is_that_of_what_is_called():
    values = metrics.compute(outcome([0.5, 0.45, 0.55, 0.45], [1, 0, 1, 1]))
    assert (values["accuracy"], values["precision"], values["recall"]) == pytest.approx((0.75, 1, 2 / 3))
    result = metrics.weighted(outcome([0.5, 0.45, 0.55, 0.45], [1, 0, 1, 1]), np.ones((1, 4)))
    assert all(result[name][0] == pytest.approx(values[name], nan_ok=True, abs=1e-6) for name in metrics.METRICS)


def test_resamples_of_one_class_are_undefined_where_the_metric_is():
    result = outcome([0.9, 0.6, 0.4, 0.2], [1, 0, 1, 0], [1, 0, 1, 1])
    reals, fakes = np.array([[0, 2.0, 0, 2]]), np.array([[1.0, 0, 3, 0]])
    for counts, undefined in ((fakes, {"auc", "ap", "eer"}), (reals, {"auc", "ap", "eer", "recall"})):
        with warnings.catch_warnings(action="error"):
            found = metrics.weighted(result, counts)
        assert {name for name in metrics.METRICS if np.isnan(found[name][0])} == undefined


def test_samples_of_several_outcomes_are_pooled():
    one, other = outcome([0.1, 0.9], [0, 1], [True, False]), outcome([0.4], [1], [True])
    both = metrics.pooled([one, other])
    assert both.scores.tolist() == [0.1, 0.9, 0.4] and both.labels.tolist() == [0, 1, 1]
    assert both.groups.tolist() == [0, 1, 0] and both.hits.tolist() == [True, False, True]
    assert metrics.pooled([one, outcome([0.4], [1])]).hits is None
