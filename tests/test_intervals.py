"""Intervals against DeLong by loops and by hand, where none is given, what may be said, and what they cover."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from training.report import intervals, results, sentences, simulate, tables
from training.report.metrics import METRICS, Outcome


def drawn(sources: int, gap: float = 1.0, seed: int = 0, frames: int = 1, classes=(0, 1)) -> Outcome:
    """``sources`` groups with ``frames`` reals and as many fakes each, scores ``gap`` standard deviations apart."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.repeat(classes, frames), sources)
    groups = np.repeat(np.arange(sources), len(classes) * frames)
    return Outcome(1 / (1 + np.exp(-rng.normal(gap * labels, 1))), labels, groups)


def lines(outcomes: dict[str, Outcome]) -> list[results.Row]:
    return [results.Row(name, name, "c40", outcome, np.arange(0)) for name, outcome in outcomes.items()]


def compared(rows: list[results.Row]) -> list[results.Comparison]:
    """All rows but the last against the last."""
    return results.comparisons(rows, [rows[-1].name, *(row.name for row in rows[:-1])], 20)


# ---------------------------------------------------------------------------------------------------------- the formula


def delong(fakes: np.ndarray, reals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Covariance ``(2, 2)`` of the AUCs of two models by DeLong's equations; scores ``(2, M)`` and ``(2, N)``.

    Returns it as its parts from the fakes and from the reals.
    """
    order = [[[(x > y) + 0.5 * (x == y) for y in reals[model]] for x in fakes[model]] for model in (0, 1)]
    of_fakes, of_reals = np.mean(order, axis=2), np.mean(order, axis=1)
    return np.cov(of_fakes) / fakes.shape[1], np.cov(of_reals) / reals.shape[1]


def test_every_sample_its_own_source_is_delong():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1], [17, 12]))
    scores = np.round(rng.normal(labels, 1, (2, 29)), 1)  # with ties
    of_fakes, of_reals = delong(scores[:, labels == 1], scores[:, labels == 0])
    first, second = (intervals.placements(each, labels) for each in scores)
    for values, contrast in ((first, [1, 0]), (first - second, [1, -1])):
        error, freedom = intervals.clustered_error(values, labels, np.arange(29))
        a, b = (np.array(contrast) @ part @ contrast for part in (of_fakes, of_reals))
        assert error**2 == pytest.approx(a + b)
        assert freedom == pytest.approx((a + b) ** 2 / (a**2 / 11 + b**2 / 16)), "Satterthwaite"


def test_intervals_are_of_95_percent():
    assert intervals.percentile_interval(np.arange(1001.0)) == (25, 975)
    assert intervals.percentile_interval(np.append(np.arange(1001.0), np.nan)) == (25, 975)
    assert np.isnan(intervals.percentile_interval(np.full(5, np.nan))).all()
    first, second = drawn(30), drawn(30, gap=0.5, seed=1)
    one, other = (intervals.placements(each.scores, each.labels) for each in (first, second))
    error, freedom = intervals.clustered_error(one - other, first.labels, first.groups)
    cell = intervals.auc_difference(first, second)
    by_scipy = stats.t(freedom, loc=cell["value"], scale=error)
    assert (cell["low"], cell["high"]) == pytest.approx(by_scipy.interval(0.95))
    assert cell["p"] == pytest.approx(2 * min(by_scipy.cdf(0), by_scipy.sf(0)))
    error, freedom = intervals.clustered_error(one, first.labels, first.groups)
    auc = roc_auc_score(first.labels, first.scores)  # its logit, by the delta method
    ends = stats.t(freedom, loc=np.log(auc / (1 - auc)), scale=error / (auc * (1 - auc))).interval(0.95)
    assert intervals.auc_interval(first) == pytest.approx(tuple(1 / (1 + np.exp(-np.array(ends)))))


def test_sources_with_both_classes_by_hand():
    """Reals 1, 2, 0 and fakes 3, 4, 2 of three sources: one tie in nine pairs, AUC 17/18.

    In units of 1/54, the fakes of the sources deviate by 1, 1, −2 and the reals by 1, −2, 1; so the variance is
    3/2 · (6 + 6 − 2 · 3) = 9.
    """
    scores, labels, groups = np.array([1, 2, 0, 3, 4, 2]), np.repeat([0, 1], 3), np.tile([0, 1, 2], 2)
    values = intervals.placements(scores, labels)
    assert values.tolist() == pytest.approx([1, 5 / 6, 1, 1, 1, 5 / 6])
    assert intervals.clustered_error(values, labels, groups) == pytest.approx((3 / 54, 2))


def test_more_frames_of_the_same_say_nothing_new_and_only_the_order_of_scores_counts():
    few = drawn(12, frames=2)
    many = Outcome(*(np.repeat(part, 9) for part in (few.scores, few.labels, few.groups)))
    bent = Outcome(few.scores**5, few.labels, few.groups)
    expected = intervals.auc_interval(few)
    assert intervals.auc_interval(many) == pytest.approx(expected)
    assert intervals.auc_interval(bent) == expected


def test_a_few_large_sources_count_as_few():
    sizes = np.repeat([1, 1, 1, 1, 1, 1, 1, 50, 50, 50], 2)
    labels = np.repeat(np.tile([0, 1], 10), sizes)
    values = np.random.default_rng(0).random(len(labels))
    _, freedom = intervals.clustered_error(values, labels, np.repeat(np.arange(20) // 2, sizes))
    assert freedom == pytest.approx(2, abs=0.05)


# -------------------------------------------------------------------------------------------------- where there is none


@pytest.mark.parametrize(("sources", "known"), [(1, ()), (9, ()), (10, ("auc",)), (19, ("auc",)), (20, METRICS[:-1])])
def test_few_sources_have_no_interval_and_it_is_said(sources, known):
    outcome, other = drawn(sources, frames=5), drawn(sources, frames=5, seed=1)
    for cells in (intervals.summary({"m": outcome}, 50)["m"], intervals.difference(outcome, other, 50)):
        for metric, cell in cells.items():
            assert np.isnan([cell["low"], cell["high"]]).tolist() == [metric not in known] * 2, metric
            assert np.isnan(cell["value"]) == (metric == "recall_at_1")
            assert metric not in known or cell["low"] < cell["high"]
    said = intervals.shortage(outcome)
    if sources == 1:
        assert said == "has 1 source with reals and 1 with fakes; below 10 of either no interval is given"
    assert ("below 20 of either only AUC has an interval" in said) == (10 <= sources < 20)
    rows = lines({"A": outcome, "B": other})
    assert (sentences.verdicts(rows, compared(rows)) == [f"The test split {said}."]) == (sources < 10)


def test_the_scarcer_class_decides():
    fakes, reals = drawn(100, classes=(1,)), drawn(4, classes=(0,))
    outcome = Outcome(
        np.append(fakes.scores, reals.scores),
        np.append(fakes.labels, reals.labels),
        np.append(fakes.groups, 100 + reals.groups),
    )
    assert intervals.shortage(outcome).startswith("has 4 sources with reals and 100 with fakes; below 10")
    assert np.isnan(intervals.auc_interval(outcome)).all() and np.isnan(intervals.auc_interval(fakes)).all()


def test_a_perfect_auc_has_a_one_sided_bound_and_one_score_for_all_has_none():
    both = drawn(10)
    perfect = Outcome(both.labels.astype(float), both.labels, both.groups)
    assert intervals.auc_interval(perfect) == pytest.approx((0.025 ** (1 / 5), 1)), "five disjoint pairs of sources"
    single = Outcome(perfect.scores, both.labels, np.arange(20))
    assert intervals.auc_interval(single) == pytest.approx((0.025 ** (1 / 10), 1)), "ten"
    reversed_ = Outcome(1 - single.scores, both.labels, single.groups)
    assert intervals.auc_interval(reversed_) == pytest.approx((0, 1 - 0.025 ** (1 / 10)))
    constant = Outcome(np.full(20, 0.3), both.labels, both.groups)
    assert np.isnan(intervals.auc_interval(constant)).all()
    sure = intervals.summary({"m": drawn(30, gap=200)}, 50)["m"]
    assert np.isnan(sure["recall"]["low"]), "1 in every resample: no spread, no interval"


def test_a_model_does_not_differ_from_itself():
    outcome = drawn(30)
    cells = intervals.difference(outcome, outcome, 50)
    for metric in METRICS[:-1]:
        assert cells[metric]["value"] == 0 and np.isnan(cells[metric]["low"]) and not intervals.direction(cells[metric])
    said = sentences.verdict("A", "B", cells["auc"], 1)
    assert said == "A − B is +0.000 in AUC, the same for every source: no interval, no verdict."
    with pytest.raises(ValueError, match="same samples"):
        intervals.difference(outcome, drawn(31), 50)


# ----------------------------------------------------------------------------------------------------- what may be said


def test_holm_by_hand():
    corrected = intervals.holm(np.array([0.04, np.nan, 0.01, 0.03, 0.9]))
    assert corrected == pytest.approx([0.09, np.nan, 0.04, 0.09, 0.9], nan_ok=True), (
        "times 2, –, 4, 3, 1, never falling"
    )
    assert intervals.holm(np.array([0.6, 0.7])).tolist() == [1, 1]


def test_verdict_follows_the_corrected_decision():
    cell = {"value": 0.02, "low": 0.001, "high": 0.039, "p": 0.04}
    assert sentences.verdict("A", "B", cell, 1) == (
        "A beats B by +0.020 in AUC (95 % interval +0.001 … +0.039): the interval lies above zero."
    )
    corrected = sentences.verdict("A", "B", cell | {"p": 0.12}, 3)
    assert corrected == (
        "A and B differ by +0.020 in AUC (95 % interval +0.001 … +0.039; p = 0.12 after Holm’s correction for 3 "
        "comparisons): this test split cannot tell them apart."
    )
    worse = sentences.verdict("A", "B", {"value": -0.02, "low": -0.03, "high": -0.01, "p": 0.001}, 2)
    assert worse.startswith("A loses to B by -0.020 in AUC") and worse.endswith("the interval lies below zero.")
    assert "p < 0.001" in sentences.verdict("A", "B", cell | {"p": 1e-9}, 2)
    undefined = {"value": np.nan, "low": np.nan, "high": np.nan, "p": np.nan}
    assert "undefined" in sentences.verdict("A", "B", undefined, 0)


def test_several_students_are_corrected_for():
    """The second lead is one of three: its p-value alone would do, the corrected one does not."""
    base, noise = drawn(60), np.random.default_rng(1).normal(0, 1, 120)
    outcomes = {"base": base}
    for gap in (3, 0.57, 0.25):
        outcomes[f"{gap}"] = Outcome(base.scores + 0.1 * (noise + gap * base.labels), base.labels, base.groups)
    pairs = [(name, "base") for name in list(outcomes)[1:]]
    alone = [intervals.auc_difference(outcomes[a], outcomes[b])["p"] for a, b in pairs]
    found = intervals.compare(outcomes, pairs, 20)
    assert [cells["auc"]["p"] for cells in found.values()] == pytest.approx(intervals.holm(np.array(alone)).tolist())
    assert 0.05 > alone[1] > 0.025 and [intervals.direction(cells["auc"]) for cells in found.values()] == [1, 0, 0]
    rows = lines(outcomes | {"base": base})
    said = sentences.verdicts(rows, results.comparisons(rows, list(outcomes), 20))
    assert len(said) == 3 and all("for 3 comparisons" in line for line in said)


def test_one_way_to_write_an_interval():
    cell, none = {"value": 0.5, "low": 0.25, "high": 0.75}, {"value": 0.5, "low": np.nan, "high": np.nan}
    assert (sentences.span(cell), sentences.span(none)) == ("0.500 [0.250, 0.750]", "0.500 [–]")
    assert sentences.span(dict.fromkeys(none, np.nan)) == "undefined"
    assert sentences.span(cell, signed=True) == "+0.500 [+0.250, +0.750]"
    assert sentences.text_table([{"": "model", "AUC": cell}, {"": "m", "AUC": none}]).splitlines() == [
        "       AUC",
        "model  0.500 [0.250, 0.750]",
        "m      0.500 [–]",
    ]
    cells = {metric: cell for metric in METRICS} | {"ap": none, "auc": cell | {"p": 0.2}}
    rows = lines({"A": drawn(1), "B": drawn(1)})
    table = tables.models(rows, dict.fromkeys("AB", cells), [results.Comparison(*rows, cells, False)], ["A", "B"])
    table = table.partition('class="difference"')[2]
    assert table.count('class="value good"') == 5 and table.count('class="value bad"') == 2, (
        "EER and ECE: lower is better"
    )
    assert '<td class="value">+0.500<small>–</small></td>' in table
    assert '<td class="value">+0.500<small>+0.250 … +0.750</small></td>' in table, "AUC: the correction decides"


# ------------------------------------------------------------------------------------------------------ what they cover


@pytest.mark.parametrize(("kind", "count", "auc"), [("both", 10, 0.75), ("single", 10, 0.95), ("uneven", 20, 0.75)])
def test_intervals_hold_the_truth_and_equal_models_are_rarely_told_apart(kind, count, auc):
    covered, told = simulate.auc_rates(kind, count, auc, draws=200)
    assert 0.90 <= covered <= 0.99 and told <= 0.09


def test_bootstrap_intervals_hold_the_truth():
    accuracy, error = simulate.bootstrap_rates("both", 20, 0.75, draws=20, resamples=100)
    assert accuracy >= 0.75 and error >= 0.75
