"""The study: its statistics by other means, its choices, and a miniature one that is interrupted, continued, grown."""

import json
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import nn

from training import study
from training.data import embedded
from training.data.frames import Split
from training.files import read_npz, write_text
from training.options import Stopped
from training.report import folds
from training.report.metrics import Outcome
from training.study import Model, StudyConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(
    name="s",
    image_size=32,
    train_clips=8,
    val_clips=8,
    test_clips=16,
    batch_size=8,
    student_model="test_byobnet",
    teacher_model="test_byobnet",
    epochs=1,
    teacher_epochs=1,
    validations_per_epoch=1,
    multi_view_weights=[0, 0, 1.0, 0],
    frequency_weights=[0, 1.0, 0, 0],
    folds=2,
    conditions=["c40"],
    crfs=[40],
    scales=[1.0, 10.0],
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


# ---------------------------------------------------------------------------------------------------------- statistics


def five_folds(of_fold: float, of_photograph: float) -> dict[tuple[int, str], float]:
    rng = np.random.default_rng(3)
    shared = of_fold * rng.normal(size=5)
    return {(i % 5, f"p{i}"): 0.05 + shared[i % 5] + of_photograph * rng.normal() for i in range(15)}


def test_where_folds_differ_the_interval_is_that_of_their_means():
    values = five_folds(0.1, 0.01)
    found = folds.estimate(values)
    means = [np.mean([v for (fold, _), v in values.items() if fold == k]) for k in range(5)]
    other = stats.ttest_1samp(means, 0)
    assert found["value"] == pytest.approx(np.mean(list(values.values()))) and found["p"] == pytest.approx(other.pvalue)
    assert [found["low"], found["high"]] == pytest.approx(list(other.confidence_interval()))


def test_where_folds_are_alike_the_interval_is_that_of_photographs_with_the_folds_freedom():
    values = five_folds(0.0, 0.1)
    numbers = list(values.values())
    assert stats.f_oneway(*np.reshape(numbers, (3, 5)).T).statistic < 1, "folds differ less than their photographs do"
    found = folds.estimate(values)
    half = stats.t.ppf(0.975, 4) * stats.sem(numbers)
    assert [found["low"], found["high"]] == pytest.approx([np.mean(numbers) - half, np.mean(numbers) + half])


def test_folds_of_unequal_size_weigh_by_their_photographs():
    values = {(0, f"a{i}"): 0.9 for i in range(9)} | {(1, f"b{i}"): 0.6 for i in range(3)}
    found = folds.estimate(values)
    # (0.9 · 9 + 0.6 · 3) / 12 = 0.825; moved by 9/12 · 0.075 and −3/12 · 0.225: variance 2 · 2 · 0.05625²
    half = stats.t.ppf(0.975, 1) * 2 * 0.05625
    assert [found["value"], found["high"]] == pytest.approx([0.825, 0.825 + half])


def test_auc_stays_between_0_and_1_and_few_photographs_have_no_interval():
    values = {(i % 5, f"p{i}"): 0.8 + 0.195 * (i % 2) for i in range(15)}
    found = folds.estimate(values, share=True)
    assert 0.5 < found["low"] < found["value"] < found["high"] < 1
    few = folds.estimate(dict(list(values.items())[:9]), share=True)
    assert few["value"] > 0.8 and np.isnan([few["low"], few["high"], few["p"]]).all()
    assert np.isnan(folds.estimate(dict.fromkeys(values, 0.9))["low"]), "the same everywhere tells nothing"


def test_auc_by_photograph():
    rng = np.random.default_rng(0)
    labels, photographs, scores = rng.integers(0, 2, 90), rng.integers(0, 3, 90) * 2, rng.normal(size=90).round(1)
    found = folds.photograph_aucs(scores, labels, photographs)
    assert list(found) == [0, 2, 4]
    for number, auc in found.items():
        here = photographs == number
        assert auc == pytest.approx(roc_auc_score(labels[here], scores[here]))


def test_references_and_holm():
    base = five_folds(0.02, 0.02)

    def of(learnt, method, gain, quality="c36"):
        rng = np.random.default_rng(len(method))
        return folds.Tested(learnt, method, quality, {key: v + gain + 0.01 * rng.normal() for key, v in base.items()})

    tested = [
        of("raw", "teacher", 0.3),
        of("c36", "none", 0.4),
        of("c36", "ffl", 0.45),
        of("c36", "kd", 0.41),
        of("c36", "add", 0.5),
        of("raw+c36", "add", 0.48),
    ]
    lines = {(line["learnt"], line["method"]): line for line in folds.compare(tested, "none", {"c36": "ffl"})}
    add, mixed = lines["c36", "add"], lines["raw+c36", "add"]
    assert {key: add[key]["to"] for key in ("base", "teacher", "single")} == {
        "base": "none",
        "teacher": "teacher",
        "single": "ffl",
    }
    assert "own" not in add and mixed["own"]["value"] == pytest.approx(-0.02, abs=0.01)
    assert "single" not in lines["c36", "ffl"] and "base" not in lines["c36", "none"]
    plain = [folds.estimate(folds.difference(one.values, tested[1].values))["p"] for one in tested[2:5]]
    order = np.argsort(plain)
    by_hand = np.maximum.accumulate(np.array(plain)[order] * [3, 2, 1])
    got = np.array([lines["c36", method]["base"]["p"] for method in ("ffl", "kd", "add")])[order]
    assert got == pytest.approx(np.minimum(by_hand, 1))
    text = folds.table(list(lines.values()), {"c36": {"add": 3.0}}, "none")
    assert {png[:4] for png in folds.pictures(list(lines.values()), "none").values()} == {b"\x89PNG"}
    assert "| c36 | add | 3 | 15 |" in text and f"**{add['base']['value']:+.3f} [" in text


def test_the_best_single_method_is_judged_on_common_folds():
    assert folds.best({"kd": {0: 0.9, 1: 0.5}, "ffl": {0: 0.8}}) == "kd"
    assert folds.best({"kd": {0: 0.9, 1: 0.5}, "ffl": {0: 0.8, 1: 0.7}}) == "ffl"
    assert folds.best({}) is None


# --------------------------------------------------------------------------------------------------------------- study


def test_the_factor_with_the_best_validation_is_chosen_once_all_are_known(tmp_path):
    config = StudyConfig(**TINY | {"scales": [0.3, 1.0, 3.0]}, out=str(tmp_path), students=["none", "kd"])
    models = study.trials(config, "c40", "kd")
    assert [(model.fold, model.scale, model.tested) for model in models] == [(0, s, False) for s in (0.3, 1.0, 3.0)]
    for model, auc in zip(models, (0.7, 0.9, 0.8), strict=True):
        assert study.chosen(config, "c40", "kd") is None, "not before the last is trained"
        write_text(model.folder(config) / "done.json", json.dumps({"best_auc": auc}))
    assert study.chosen(config, "c40", "kd") == 1.0 and study.chosen(config, "c40", "none") == 1.0
    (models[1].folder(config) / "done.json").unlink()
    assert study.chosen(config, "c40", "kd", lost=[models[1]]) == 3.0, "of those that are left"
    assert study.chosen(config, "c40", "kd", lost=models[:2]) == 3.0


def test_a_student_is_tested_once_in_each_quality_on_the_photographs_of_its_fold(tmp_path, monkeypatch):
    labels, asked = np.arange(4) % 2, []
    images = {quality: np.zeros((4, 8, 8, 3), np.uint8) for quality in ("raw", "c23", "c40")}
    splits = {name: Split(images, labels, labels, labels, 10 * labels + len(name)) for name in ("train", "val", "test")}

    def trained(role, model, given, config, *_, teacher=None):
        asked.append((role, config.seed, config.distillation_scale, given["train"].learnt, teacher is not None))
        return model

    def predicted(model, split, config, accelerator, quality):
        asked.append((quality, int(split.photographs[0]), model.training))
        return Outcome(np.full(4, 0.1 * int(quality[1:])), labels, labels), None

    monkeypatch.setattr(study, "load_splits", lambda config: splits)
    monkeypatch.setattr(study, "new_model", lambda *_: nn.Linear(1, 1))
    monkeypatch.setattr(study, "new_student", lambda *_: nn.Linear(1, 1))
    monkeypatch.setattr(study, "fit", trained)
    monkeypatch.setattr(study, "predict", predicted)
    changes = TINY | {"conditions": ["c40", "c23"], "crfs": [23, 40], "out": str(tmp_path), "seed": 7}
    config = StudyConfig(**changes, students=["none", "kd"])
    model = Model(1, "kd", "c40", 10.0)
    study.make(config, model)
    assert asked[0][:2] == ("teacher", 8) and asked[1] == ("kd", 8, 10.0, ("c40",), True)
    assert asked[2:] == [("c40", 4, False), ("c23", 4, False)], "4: of the test split"
    for quality, path in model.tests(config).items():
        kept = read_npz(path)
        assert kept["scores"].tolist() == [0.1 * int(quality[1:])] * 4 and kept["labels"].tolist() == labels.tolist()
        assert kept["photographs"].tolist() == (10 * labels + 4).tolist()
    study.make(config, model)
    assert len(asked) == 6, "what was said is not asked for again"
    study.make(config, Model(1, "kd", "c40", 1.0, tested=False))
    assert len(asked) == 8, "who only chooses a factor is not tested"


def inline(work, ready, output, finished, *, width, preload):
    """What side_by_side does, in this process."""
    lost: dict = {}
    while item := next((item for item in ready(lost) if item not in lost), None):
        try:
            work(item)
        except ValueError as error:
            lost[item] = str(error)
        finished(item, lost.get(item, ""), 0.0)
    return lost


def test_a_study_goes_on_where_it_was_interrupted_and_grows(tmp_path, cache, monkeypatch):
    changes = TINY | dict(out=str(tmp_path), cache=cache)
    trained, opened = [], []
    real_fit, real_predict = study.fit, study.predict

    def counted(role, model, splits, config, *rest, **more):
        if not (config.folder / role / "done.json").exists():
            if len(trained) == 4:
                trained.append(None)
                raise KeyboardInterrupt
            trained.append((role, config.fold, config.seed, config.distillation_scale))
        return real_fit(role, model, splits, config, *rest, **more)

    def watched(model, split, config, accelerator, quality, **more):
        opened.append((config.name, quality))
        return real_predict(model, split, config, accelerator, quality, **more)

    monkeypatch.setattr(study, "fit", counted)
    monkeypatch.setattr(study, "predict", watched)
    monkeypatch.setattr(study, "side_by_side", inline)
    monkeypatch.setattr(folds, "pictures", lambda *_: {"light": b"light", "dark": b"dark"})
    config = StudyConfig(**changes, students=["none", "kd"])
    with pytest.raises(KeyboardInterrupt):
        study.study(config, say=lambda line: None)
    assert trained[:4] == [("teacher", 0, 0, 1), ("teacher", 1, 1, 1), ("kd", 0, 0, 1), ("kd", 0, 0, 10)]
    assert len(opened) == 4, "teachers on raw and c40; nobody is tested before the choice"
    study.study(config, say=lambda line: None)
    factor = study.chosen(config, "c40", "kd")
    assert trained[5:] == [("none", 0, 0, 1), ("none", 1, 1, 1), ("kd", 1, 1, factor)], "nothing is done twice"
    other = next(scale for scale in config.scales if scale != factor)
    assert len(opened) == len(set(opened)) == 8, "the test split is opened once for each model and quality"
    assert not list(Model(0, "kd", "c40", other).folder(config).glob("test-*"))
    study.study(config, say=lambda line: None)
    assert len(trained) == 8 and len(opened) == 8

    grown = StudyConfig(**changes | {"conditions": ["c40", "raw+c40"]}, students=["none", "kd", "add"])
    study.study(grown, say=lambda line: None)
    assert not [one for one in trained[8:] if one[0] == "teacher"] and len(set(opened)) == len(opened)
    folder = tmp_path / "s"
    found = json.loads((folder / "results.json").read_text())
    lines = {(line["learnt"], line["method"], line["quality"]): line for line in found["lines"]}
    assert len(lines) == 2 + 2 * 2 * 3, "every student on every quality"
    for line in lines.values():
        tested = {Path(path).stem for path in embedded.FOLDED}
        assert set(line["photographs"]) == tested and not tested & {Path(p).stem for p in embedded.PHOTOGRAPHS["val"]}
        assert line["auc"]["value"] == pytest.approx(np.mean(list(line["photographs"].values())))
    none, add = lines["c40", "none", "c40"], lines["c40", "add", "c40"]
    assert add["base"]["value"] == pytest.approx(add["auc"]["value"] - none["auc"]["value"])
    assert lines["raw+c40", "add", "c40"]["own"]["to"] == "add"
    validation = found["scales"]["c40"]["add"]["validation"]
    assert validation[str(found["scales"]["c40"]["add"]["chosen"])] == max(validation.values())
    assert found["best_single"] == {"c40": "kd", "raw+c40": "kd"}
    assert f"| c40 | add | {found['scales']['c40']['add']['chosen']:g} | 15 |" in (folder / "table.md").read_text()
    assert (folder / "study.png").read_bytes() == b"light" and (folder / "study-dark.png").read_bytes() == b"dark"
    assert not list(folder.rglob("checkpoint-*")), "models leave weights and scores, not optimiser states"
    with pytest.raises(ValueError, match=r"was started with other values of lr"):
        study.study(StudyConfig(**changes, students=["none"], lr=0.5))


def test_what_is_made_side_by_side_is_the_same_and_a_lost_student_is_told(tmp_path, cache, monkeypatch):
    forkserver._forkserver._stop()  # another test's has not imported the study, which each process would do then
    monkeypatch.setattr(folds, "pictures", lambda *_: {})
    weights, side_by_side = {}, study.side_by_side
    for how in (side_by_side, inline):
        monkeypatch.setattr(study, "side_by_side", how)
        changes = TINY | dict(out=str(tmp_path / how.__name__), cache=cache, scales=[1.0])
        config = StudyConfig(**changes, students=["none", "add"], parallel=2)
        lost = Model(1, "none", "c40")
        lost.folder(config).mkdir(parents=True)
        (lost.folder(config) / "done.json").write_text("{}")  # but no weights
        lines = []
        with pytest.raises(Stopped, match=r"^1 of the models .* fold 1, c40, none: the finished model .* is damaged"):
            study.study(config, say=lines.append)
        assert sum(line.startswith("[") for line in lines) == 6 and "lost: the finished" in "".join(lines)
        weights[how] = {
            str(path.relative_to(config.folder)): path.read_bytes() for path in config.folder.rglob("model.safetensors")
        }
        found = json.loads((config.folder / "results.json").read_text())["lines"]
        counts = {(line["method"], line["quality"]): len(line["photographs"]) for line in found}
        assert counts["none", "c40"] == 8 and counts["add", "c40"] == 15, "fold 1 of none is lost"
    assert len(weights[inline]) == 5 and weights[inline] == weights[side_by_side]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["students=[magic]"], "error: students: unknown ['magic']"),
        (["conditions=[c99]"], "error: conditions: expected different ones of ['raw', 'c23', 'c36'], or of these by +"),
        (["conditions=[raw+c36,c36+raw]"], "error: conditions: expected different ones"),
        (["manifest=pairs.csv"], "error: manifest: the study has folds of the embedded set"),
        (["fold=1"], "error: fold: the study sets it"),
        (["folds=1"], "error: folds: expected at least 2"),
        (["test_clips=4"], "error: test_clips: expected two for each photograph of a fold, 6, got 4"),
        (["parallel=-1"], "error: parallel: expected at least 0"),
        (["sedes=3"], "did you mean 'seed'"),
    ],
)
def test_bad_options_are_named(capsys, words, message):
    assert study.main(words) == 2
    assert message in capsys.readouterr().err
