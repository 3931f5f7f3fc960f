"""The report: which lines its tables have, what they compare, what it says of photographs and terms, and the file."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from training.config import Config
from training.data.frames import Split
from training.models.detector import Detector
from training.report import idea, intervals, metrics, page, results, sentences
from training.report.metrics import Outcome

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER, CE, ADD = "teacher", "CE student", "ADD student"
FRAMES = 60


def split(photographs: bool = False, missing: dict[str, list[int]] | None = None) -> Split:
    """Sixty frames of thirty sources, a real and a fake each, in c23 and c40; some may be missing in a quality."""
    rng = np.random.default_rng(0)
    images = {}
    for quality in ("raw", "c23", "c40"):
        images[quality] = rng.integers(0, 256, (FRAMES, 32, 32, 3), np.uint8)
        if gone := (missing or {}).get(quality):
            images[quality] = [None if i in gone else frame for i, frame in enumerate(images[quality])]
    labels, groups = np.arange(FRAMES) % 2, np.arange(FRAMES) // 2
    return Split(images, labels, groups, groups, groups % 4 if photographs else None)


def outcome(test: Split, quality: str, skill: float, seed: int) -> Outcome:
    chosen = test.where(quality)
    noise = np.random.default_rng([seed, len(quality)]).normal(size=FRAMES)
    scores = 1 / (1 + np.exp(-noise - skill * test.labels))
    return Outcome(scores[chosen], test.labels[chosen], test.groups[chosen], test.labels[chosen] == 1)


def said(test: Split, learnt: list[str]) -> dict[str, dict[str, Outcome]]:
    skills = {TEACHER: 1.0, CE: 0.5, ADD: 2.0}
    found = {
        model: {quality: outcome(test, quality, skill, seed) for quality in learnt}
        for seed, (model, skill) in enumerate(skills.items())
    }
    found[TEACHER]["raw"] = outcome(test, "raw", 3.0, 9)
    return found


# ---------------------------------------------------------------------------------------------------------------- lines


def test_one_quality_has_the_lines_of_old():
    test = split()
    rows = results.rows(said(test, ["c40"]), test)
    assert [row.name for row in rows] == ["teacher on raw", "teacher on compressed", CE, ADD]
    (only,) = results.comparisons(rows, [CE, ADD], 20)
    assert only.name == "ADD student − CE student"
    expected = intervals.compare({row.name: row.outcome for row in rows}, [(ADD, CE)], 20)[ADD, CE]
    assert only.cells["auc"] == expected["auc"]
    (line,) = sentences.verdicts(rows, [only])
    assert line == sentences.verdict(ADD, CE, expected["auc"], 1) and line.startswith("ADD student beats CE student by")


def test_several_qualities_stand_together_after_all_of_them():
    test = split(missing={"c23": [0, 1, 2, 3]})
    outcomes = said(test, ["raw", "c23", "c40"])
    rows = results.rows(outcomes, test)
    models = (TEACHER, CE, ADD)
    assert [row.name for row in rows] == [f"{m} on {q}" for q in ("all", "raw", "c23", "c40") for m in models]
    pooled = rows[2].outcome
    parts = outcomes[ADD].values()
    assert pooled.scores.tolist() == np.concatenate([part.scores for part in parts]).tolist()
    assert len(pooled.scores) == len(rows[2].frames) == 2 * FRAMES + FRAMES - 4
    assert intervals.sources(pooled) == (30, 30), "a frame in three qualities is of one source"
    assert metrics.compute(pooled)["auc"] == pytest.approx(roc_auc_score(pooled.labels, pooled.scores))
    assert pooled.hits.mean() == pytest.approx(0.5)
    assert np.array_equal(test.labels[rows[2].frames], pooled.labels), "frames say which sample is which"


def test_all_comparisons_of_the_table_are_one_family():
    test = split()
    rows = results.rows(said(test, ["c23", "c40"]), test)
    assert rows[0].name == "teacher on raw" and rows[1].name == "teacher on all"
    compared = results.comparisons(rows, [CE, ADD], 20)
    assert [c.name for c in compared] == [f"ADD student − CE student on {q}" for q in ("all", "c23", "c40")]
    alone = [intervals.auc_difference(c.first.outcome, c.second.outcome)["p"] for c in compared]
    assert [c.cells["auc"]["p"] for c in compared] == pytest.approx(intervals.holm(np.array(alone)).tolist())
    lines = sentences.verdicts(rows, compared)
    places = ("on all qualities together", "on c23", "on c40")
    for line, place in zip(lines, places, strict=True):
        assert line.startswith(f"ADD student beats CE student {place} by +") and "for 3 comparisons" in line


def test_the_quality_that_lacks_sources_is_named():
    test = split(missing={"c23": list(range(16, FRAMES))})
    rows = results.rows(said(test, ["c23", "c40"]), test)
    lines = sentences.verdicts(rows, results.comparisons(rows, [CE, ADD], 20))
    assert [line.partition(" by ")[0] for line in lines[:2]] == [
        f"ADD student beats CE student on {place}" for place in ("all qualities together", "c40")
    ]
    why = "8 sources with reals and 8 with fakes; below 10 of either no interval is given."
    assert lines[2:] == [f"On c23 the test split has {why}"]


# --------------------------------------------------------------------------------------------------------- photographs


@pytest.mark.parametrize("learnt", [["c40"], ["c23", "c40"]])
def test_auc_by_photograph(learnt):
    test = split(photographs=True)
    outcomes = said(test, learnt)
    rows = results.rows(outcomes, test)
    compared = results.comparisons(rows, [CE, ADD], 20)
    lines = results.by_photograph(rows, compared, test, ["cat", "brick", "rocket", "face"])
    assert [line["photograph"] for line in lines] == ["cat", "brick", "rocket", "face"]
    suffix = " on all" if len(learnt) > 1 else ""
    for number, line in enumerate(lines):
        here = test.photographs == number
        assert line["reals"] == line["fakes"] == here.sum() / 2
        for model in (CE, ADD):
            scores, labels = (
                np.concatenate([getattr(outcomes[model][quality], kind)[here] for quality in learnt])
                for kind in ("scores", "labels")
            )
            assert line["auc"][f"{model}{suffix}"] == pytest.approx(roc_auc_score(labels, scores))
        gap = line["auc"][f"{ADD}{suffix}"] - line["auc"][f"{CE}{suffix}"]
        assert line["differences"] == {f"ADD student − CE student{suffix}": pytest.approx(gap)}


def test_what_is_said_of_photographs_is_their_range():
    name = "ADD student − CE student"
    lines = [{"photograph": p, "auc": {ADD: a}, "differences": {name: d}} for p, a, d in (
        ("cat", 0.9, 0.1), ("brick", 0.7, -0.02), ("rocket", np.nan, np.nan))]  # fmt: skip
    assert sentences.of_photographs(lines) == (
        "All test clips are of these 3 photographs, and no interval here reaches beyond them; between them, "
        "ADD student − CE student runs from -0.020 (brick) to +0.100 (cat) in AUC."
    )
    alone = [line | {"differences": {}} for line in lines]
    assert "ADD student runs from 0.700 (brick) to 0.900 (cat) in AUC" in sentences.of_photographs(alone)
    assert sentences.of_photographs(lines[2:]).endswith("of this photograph, and no interval here reaches beyond them.")


def test_a_verdict_is_about_the_photographs_it_saw():
    test = split(photographs=True)
    for learnt, place in ((["c40"], "clips"), (["c23", "c40"], "clips in all qualities")):
        rows = results.rows(said(test, learnt), test)
        compared = results.comparisons(rows, [CE, ADD], 20)
        lines = results.by_photograph(rows, compared, test, list("abcd"))
        first = sentences.verdicts(rows, compared, lines)[0]
        assert first.startswith(f"ADD student beats CE student on {place} of these 4 photographs by +")


# --------------------------------------------------------------------------------------------------------------- terms

LOG = [
    {"model": "add", "step": 5, "epoch": 0.2, "loss": 0.7, "cross_entropy": 0.7, "lr": 0.1},  # warm-up
    {"model": "add", "step": 10, "epoch": 0.4, "cross_entropy": 0.8, "frequency/layer2": 0.4, "multi_view/layer4": 1.6},
    {"model": "add", "step": 10, "factor/frequency": 0.25, "factor/multi_view": 12.0},
    {"model": "add", "step": 10, "epoch": 0.4, "val_auc": 0.8, "val_auc/c23": 0.8},
    {"model": "none", "step": 12, "epoch": 0.4, "loss": 0.7, "cross_entropy": 0.7, "images_per_second": 9.0},
    {"model": "add", "step": 20, "epoch": 0.8, "cross_entropy": 0.5, "frequency/layer2": 0.1, "multi_view/layer4": 2.0},
]


def test_terms_at_start_and_end():
    assert results.terms(LOG, "add") == {
        "frequency/layer2": {"start": 0.4, "end": 0.1, "start_share": 0.5, "end_share": 0.2},
        "multi_view/layer4": {"start": 1.6, "end": 2.0, "start_share": 2.0, "end_share": 4.0},
    }
    assert results.terms(LOG, "none") == {} and results.factors(LOG, "none") == {}
    assert sentences.of_terms(ADD, results.terms(LOG, "add"), results.factors(LOG, "add")) == (
        "ADD student: all terms together began at 2.5 times the cross-entropy and ended at 4.2 times it. The largest "
        "at the end is multi-view, layer 4. Frequency, layer 2 fell most, to 0.25 of its start. The balance, set once "
        "at the start: frequency × 0.25, multi-view × 12."
    )
    only = {"kd": {"start": 1.0, "end": 1.5, "start_share": 1.0, "end_share": 3.0}}
    assert sentences.of_terms("kd student", only, {}) == (
        "kd student: kd began at 1 times the cross-entropy and ended at 3 times it. None fell."
    )


# ------------------------------------------------------------------------------------------------------------- the file


def run(tmp_path, **changes) -> Config:
    networks = {"teacher_model": "test_byobnet", "student_model": "test_byobnet", "image_size": 32}
    weights = {"multi_view_weights": [0, 0, 1.0, 0], "frequency_weights": [0, 1.0, 0, 0]}
    config = Config(out=str(tmp_path), bootstrap=20, **networks, **weights, **changes)
    config.folder.mkdir(exist_ok=True)
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
    return config


def write(config: Config, test: Split, learnt: list[str]) -> tuple[str, dict, str]:
    model = Detector("test_byobnet", 32, pretrained=False, weights=None).eval()
    models = {"start": model, "none": model, "add": model}
    printed = page.write(config, {"test": test}, model, models, said(test, learnt), {"data": 1.0})
    found = json.loads((config.folder / "results.json").read_text())
    return printed, found, (config.folder / "report.html").read_text()


def test_the_page_of_several_qualities_and_of_photographs(tmp_path):
    config = run(tmp_path, qualities=["c23", "c40"])
    printed, found, shown = write(config, split(photographs=True), ["c23", "c40"])
    assert list(found["models"])[:2] == ["teacher on raw", "teacher on all"]
    assert next(iter(found["differences"])) == "ADD student − CE student on all"
    first, second = found["verdicts"][:2]
    assert first.startswith("ADD student beats CE student on clips in all qualities of these 4 photographs by +")
    assert "4 photographs" in second and "runs from" in second and second in shown and second in printed
    assert len(found["photographs"]) == 4 and shown.count("data:image/jpeg;base64,") == 4
    assert found["terms"]["ADD student"]["frequency/layer2"]["end_share"] == 0.2
    assert "What each term did" in shown and "multi-view × 12" in shown and "multi-view, layer 4" in shown
    assert shown.count("data:image/png;base64,") == 14 and 'src="http' not in shown
    assert "in several qualities (c23, c40)" in shown and "Compressed is c40 here." in shown
    place = shown.index
    assert place(first) < place("<table") and place("AUC by photograph") < place("What each term did")


def test_looks_at_the_test_split_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_figures", lambda *_: {})
    config, test = run(tmp_path), split()
    for opened, words in ((1, "opened once"), (2, "opened twice"), (3, "opened 3 times")):
        _, found, shown = write(config, test, ["c40"])
        assert found["opened"] == opened and words in shown
    for text in ("{}", "damaged", "[]"):  # of before this was counted, or broken: there was one
        (config.folder / "results.json").write_text(text)
        assert write(config, test, ["c40"])[1]["opened"] == 2


def test_without_raw_twins_no_picture_needs_them(tmp_path):
    config, test = run(tmp_path), split(missing={"raw": list(range(FRAMES))})
    outcomes = said(test, ["c40"])
    del outcomes[TEACHER]["raw"]
    model = Detector("test_byobnet", 32, pretrained=False, weights=None).eval()
    page.write(config, {"test": test}, model, {"start": model, "none": model, "add": model}, outcomes, {})
    names = {path.stem for path in (config.folder / "figures").glob("*.png") if "dark" not in path.stem}
    assert names == {"roc", "curves"}
    assert list(json.loads((config.folder / "results.json").read_text())["models"]) == [
        "teacher on compressed",
        CE,
        ADD,
    ]


# -------------------------------------------------------------------------------------------------------- first picture


def test_what_compression_took_is_a_share_of_the_power():
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (20, 32, 32, 1)).repeat(3, 3)
    blurred = sum(np.roll(rough, shift, (1, 2)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1))) // 4  # mean of 2×2
    raw, smooth = rough.astype(np.uint8), blurred.astype(np.uint8)
    taken = idea.share_taken(raw, smooth)
    cosines = np.cos(np.pi * np.fft.fftfreq(32)) ** 2
    assert taken.shape == (32, 32) and np.abs(taken - (1 - np.outer(cosines, cosines))).max() < 0.1
    assert taken[16, 16] > 0.99 and taken[0, 1] < 0.1, "unshifted: the highest frequency stands in the middle"
    assert idea.share_taken(raw, raw).max() == 0 and idea.share_taken(smooth, raw).max() < 0.05


def test_the_frame_shown_is_the_most_changed_fake():
    raw = np.full((4, 8, 8, 3), 100, np.uint8)
    compressed = raw - np.array([50, 9, 20, 0], np.uint8).reshape(4, 1, 1, 1)
    assert idea.most_changed_fake(raw, compressed, np.array([0, 1, 1, 1])) == 2
    assert idea.most_changed_fake(raw, compressed, np.zeros(4, int)) == 0, "of all, where there is no fake"
