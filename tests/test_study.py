"""The study: its statistics by hand, and a miniature one that is interrupted, continued and grown."""

import json
import math

import numpy as np
import pytest

from training import study
from training.study import Sample, StudyConfig

TINY = dict(
    name="s",
    image_size=32,
    train_clips=20,
    val_clips=8,
    test_clips=12,
    batch_size=8,
    student_model="test_byobnet",
    teacher_model="test_byobnet",
    epochs=1,
    teacher_epochs=1,
    validations_per_epoch=1,
    bootstrap=20,
    multi_view_weights=[0, 0, 1.0, 0],
    frequency_weights=[0, 1.0, 0, 0],
    seeds=2,
    scales=[1.0, 10.0],
)


def test_interval_adds_the_variance_of_seeds_and_of_the_test_split():
    """Seeds 0.6, 0.8: mean 0.7, variance of the mean 0.01; resamples of the mean 0.6, 0.8: variance 0.02."""
    sample = Sample(np.array([0.6, 0.8]), np.array([[0.5, 0.7], [0.7, 0.9]]))
    found = sample.summary()
    half = 12.7062 * math.sqrt(0.01 + 0.02)  # Student's t of one degree of freedom
    assert found["mean"] == pytest.approx(0.7)
    assert found["low"] == pytest.approx(0.7 - half, rel=1e-4) and found["high"] == pytest.approx(0.7 + half, rel=1e-4)


def test_differences_are_paired():
    """What seeds and resamples have in common cancels: a constant lead has no width."""
    shared = np.array([[0.5, 0.7, 0.6], [0.8, 0.6, 0.9]])
    difference = (Sample(np.array([0.8, 0.6]), shared + 0.1) - Sample(np.array([0.7, 0.5]), shared)).summary()
    assert [difference[key] for key in ("mean", "low", "high")] == pytest.approx([0.1] * 3)


def test_a_single_model_has_the_test_splits_variance_only():
    resampled = np.random.default_rng(0).normal(0.7, 0.1, (1, 4000))
    found = Sample(np.array([0.7]), resampled).summary()
    assert found["high"] - found["mean"] == pytest.approx(1.96 * 0.1, rel=0.05)


def test_a_study_goes_on_where_it_was_interrupted_and_grows(tmp_path, monkeypatch):
    changes = TINY | dict(out=str(tmp_path), cache=str(tmp_path / "cache"))
    trained = []
    real_fit, real_predict = study.fit, study.predict

    def counted(role, model, splits, config, *rest, **more):
        if not (config.folder / role / "done.json").exists():
            trained.append((role, config.seed, config.distillation_scale))
            if len(trained) == 4:
                raise KeyboardInterrupt
        return real_fit(role, model, splits, config, *rest, **more)

    opened = []

    def watched(model, split, *rest, **more):
        opened.append(len(split))
        return real_predict(model, split, *rest, **more)

    monkeypatch.setattr(study, "fit", counted)
    monkeypatch.setattr(study, "predict", watched)
    with pytest.raises(KeyboardInterrupt):
        study.study(StudyConfig(**changes, students=["none", "kd"]), say=lambda line: None)
    assert trained == [("teacher", 0, 1.0), ("none", 0, 1.0), ("none", 1, 1.0), ("kd", 0, 1.0)]
    study.study(StudyConfig(**changes, students=["none", "kd"]), say=lambda line: None)
    assert sorted(set(trained[4:])) == sorted(trained[4:]) and len(trained) == 7, "nothing is done twice"
    assert opened == [12] * 6, "teacher on both qualities, two students of two methods: the test split once for each"

    found = study.study(StudyConfig(**changes, students=["none", "kd", "fr"]), say=lambda line: None)
    assert {role for role, *_ in trained[7:]} == {"fr"}
    folder = tmp_path / "s"
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(found))
    cell = found["compressions"]["c40"]
    assert list(cell["methods"]) == ["teacher on raw", "teacher on c40", "none", "kd", "fr"]
    none, fr = (cell["methods"][name]["auc"] for name in ("none", "fr"))
    assert cell["methods"]["fr"]["minus none"]["mean"] == pytest.approx(fr["mean"] - none["mean"])
    validation = cell["scales"]["fr"]["validation"]
    assert set(validation) == {1.0, 10.0} and validation[cell["scales"]["fr"]["chosen"]] == max(validation.values())
    text = (folder / "table.md").read_text()
    assert f"| fr | {cell['scales']['fr']['chosen']:g} | {fr['mean']:.3f} [" in text
    assert (folder / "study.png").stat().st_size > 10_000 and (folder / "study-dark.png").exists()
    assert not list(folder.rglob("checkpoint-*/state.pt")) or {
        path.parents[1].name for path in folder.rglob("checkpoint-*/state.pt")
    } == {"teacher"}, "students leave weights and scores, not optimiser states"

    with pytest.raises(ValueError, match=r"was started with other values of lr"):
        study.study(StudyConfig(**changes, students=["none"], lr=0.5))


def test_bad_options_are_named(capsys):
    for words, message in (
        (["seeds=1"], "error: seeds: expected at least 2"),
        (["students=[magic]"], "error: students: unknown ['magic']"),
        (["sedes=3"], "did you mean 'seeds'"),
    ):
        assert study.main(words) == 2
        assert message in capsys.readouterr().err
