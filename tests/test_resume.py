"""What an earlier run is worth: continued where that means the same, refused with the reason where it cannot."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_training import breaks_off, cache, rows, tiny, without_pictures  # noqa: F401 - fixtures

from training import fit, train
from training.config import Config
from training.data.loader import load_splits
from training.models import checkpoints
from training.models.weights import read_weights
from training.report.log import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def opened(cache, tmp_path):  # noqa: F811
    """A run that was begun by one process, its configuration and data."""
    config = tiny(cache, tmp_path, students=["none"])
    splits = load_splits(config)
    train.open_run(config, splits, 1)
    return replace(config, resume=True), splits


def test_harmless_options_may_change_and_are_saved(opened):
    config, splits = opened
    changes = dict(workers=2, log_every=7, checkpoint_every=3, bootstrap=9, gallery=5, students=["none", "add"])
    train.open_run(replace(config, **changes), splits, 1)
    assert f"workers: {changes['workers']}" in (config.folder / "config.yaml").read_text()


@pytest.mark.parametrize("change", [{"lr": 1.0}, {"epochs": 9}, {"seed": 3}, {"views": 2, "margin": 0.5}])
def test_options_that_change_what_is_learnt_are_refused(opened, change):
    config, splits = opened
    before = ", ".join(f"{key}={getattr(config, key)}" for key in change)
    with pytest.raises(ValueError, match=f"was started with {before}; say so again, or start anew"):
        train.open_run(replace(config, **change), splits, 1)


def test_another_number_of_processes_needs_the_same_steps(opened, capsys):
    config, splits = opened
    train.open_run(replace(config, batch_size=config.batch_size // 2), splits, 2)
    assert "another number of processes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="had steps of 4 pairs on each of 2 processes, now 4 on each of 1: its steps"):
        train.open_run(replace(config, batch_size=config.batch_size // 2), splits, 1)


def test_other_training_pairs_are_refused_other_test_pairs_are_not(opened):
    config, splits = opened
    fewer = replace(splits["train"], labels=splits["train"].labels[:-2])
    with pytest.raises(ValueError, match=r"the split train .* had 40 pairs, now 38 pairs, or others .* start anew"):
        train.open_run(config, splits | {"train": fewer}, 1)
    swapped = replace(splits["val"], labels=1 - splits["val"].labels)
    with pytest.raises(ValueError, match=r"the split val .* had 8 pairs, now 8 pairs, or others of them"):
        train.open_run(config, splits | {"val": swapped}, 1)
    train.open_run(config, splits | {"test": fewer}, 1)


def test_where_nothing_is_left_to_train_the_table_may_have_grown(opened):
    config, splits = opened
    for role in ("teacher", "none"):
        with pytest.raises(ValueError, match="its steps would be others"):
            train.open_run(config, splits | {"train": splits["val"]}, 3)
        (config.folder / role).mkdir()
        (config.folder / role / "done.json").write_text("{}")
    train.open_run(config, splits | {"train": splits["val"]}, 3)
    known = json.loads((config.folder / "run.json").read_text())
    assert known["processes"] == 3 and known["data"]["train"] == splits["val"].fingerprint()


def test_a_set_that_cannot_be_read_leaves_the_earlier_run_alone(opened):
    config, _ = opened
    with pytest.raises(ValueError, match="compression: the embedded set has"):
        train.train(replace(config, resume=False, compression="c1"))
    assert (config.folder / "config.yaml").exists() and len(list(config.folder.parent.iterdir())) == 1


@pytest.fixture(scope="module")
def broken_off(cache, tmp_path_factory):  # noqa: F811
    """Folder and configuration of a run that ended whole, and of one that broke off after five steps of its student."""
    folder = tmp_path_factory.mktemp("runs")
    changes = dict(epochs=2, students=["none"], checkpoint_every=1)
    whole, broken = (tiny(cache, folder / name, **changes) for name in ("whole", "broken"))
    with without_pictures():
        train.train(whole)
    with breaks_off("none", 5):
        train.train(broken)
    return whole, replace(broken, resume=True)


def spoil_bytes(folder):
    path = folder / checkpoints.WEIGHTS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


def spoil_by_cutting(folder):
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:1000])


def spoil_by_emptying(folder):
    (folder / checkpoints.WEIGHTS).write_bytes(b"")


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_by_cutting, spoil_by_emptying])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(broken_off, tmp_path, spoil):
    shutil.copytree(broken_off[1].folder / "none", tmp_path / "none")
    kept = sorted((tmp_path / "none").glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-00000004", "checkpoint-00000005"]
    said = []
    assert checkpoints.last_checkpoint(tmp_path / "none", said.append) == kept[1] and not said
    spoil(kept[1])
    assert checkpoints.last_checkpoint(tmp_path / "none", said.append) == kept[0]
    assert len(said) == 1 and said[0].startswith(f"note: the checkpoint {kept[1]} is damaged, the one before it")


@without_pictures()
def test_from_the_older_checkpoint_a_run_ends_the_same(broken_off, tmp_path):
    whole, broken = broken_off
    copy = replace(broken, out=str(tmp_path))
    shutil.copytree(broken.folder, copy.folder)
    spoil_bytes(copy.folder / "none" / "checkpoint-00000005")
    train.train(copy)
    ended = [config.folder / "none" / "checkpoint-00000010" / checkpoints.WEIGHTS for config in (whole, copy)]
    first, second = map(read_weights, ended)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    timeless = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(c.folder)]
                for c in (whole, copy)]  # fmt: skip
    assert timeless[0] == timeless[1], "what was logged after the older checkpoint is dropped and logged again"


def test_where_every_checkpoint_is_damaged_they_are_named(broken_off, tmp_path):
    copy = replace(broken_off[1], out=str(tmp_path))
    shutil.copytree(broken_off[1].folder, copy.folder)
    for folder in (copy.folder / "none").glob("checkpoint-*"):
        spoil_bytes(folder)
    with pytest.raises(ValueError, match="can be read: checkpoint-00000005, checkpoint-00000004"):
        train.train(copy)


def test_fp16_without_a_gpu_is_refused():
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="mixed_precision: fp16 needs a GPU"):
        fit.new_accelerator(Config(mixed_precision="fp16"))


def test_an_interrupted_command_says_how_to_go_on(cache, tmp_path, monkeypatch, capsys):  # noqa: F811
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    config = tiny(cache, tmp_path)
    (tmp_path / "a.yaml").write_text(config.to_yaml())
    monkeypatch.setattr(train, "fit", interrupted)
    assert train.main(["--config", str(tmp_path / "a.yaml")]) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert json.loads((config.folder / "run.json").read_text())["processes"] == 1


def test_a_finished_model_whose_weights_changed_is_named(broken_off, tmp_path):
    whole = replace(broken_off[0], out=str(tmp_path), resume=True)
    shutil.copytree(broken_off[0].folder, whole.folder)
    spoil_bytes(whole.folder / "teacher")
    with pytest.raises(ValueError, match=r"the finished model .*teacher is damaged; remove it to train it again"):
        train.train(whole)
    (whole.folder / "teacher" / checkpoints.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"the finished model .*teacher is damaged"):
        train.train(whole)


def test_best_weights_that_changed_before_the_end_are_named(broken_off, tmp_path):
    whole = replace(broken_off[0], out=str(tmp_path), resume=True)
    shutil.copytree(broken_off[0].folder, whole.folder)
    (whole.folder / "none" / "done.json").unlink()
    spoil_bytes(whole.folder / "none")
    with pytest.raises(ValueError, match=r"none/model\.safetensors is not as it was written; remove .*none to train"):
        train.train(whole)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"processes": "x", "data": {}}'])
def test_a_damaged_record_of_a_run_is_named(opened, content):
    config, splits = opened
    (config.folder / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged, so what the run saw is not known"):
        train.open_run(config, splits, 1)


def test_lines_of_the_log_that_are_none_are_left_out(opened):
    config, _ = opened
    path = config.folder / "metrics.jsonl"
    path.write_bytes(b'{"model": "none", "step": 1}\n3\n{}\n\xff\n{"model": "none", "st')
    assert [row["step"] for row in read_rows(path)] == [1]


def test_a_run_may_be_renamed_and_one_that_is_not_there_begins(opened, capsys):
    config, splits = opened
    config.folder.rename(config.folder.with_name("other"))
    train.open_run(replace(config, name="other"), splits, 1)
    assert not capsys.readouterr().out
    train.open_run(replace(config, name="never"), splits, 1)
    assert "note: there is no run" in capsys.readouterr().out
    (config.folder.with_name("never") / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"config\.yaml: cannot be read"):
        train.open_run(replace(config, name="never"), splits, 1)


def test_options_that_a_distiller_refuses_are_found_before_the_teacher_is_trained(cache, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained"))
    none = dict(frequency_weights=[0, 0, 0, 0], multi_view_weights=[0, 0, 0, 0])
    with pytest.raises(ValueError, match="frequency_weights: expected a"):
        train.train(tiny(cache, tmp_path, students=["add"], **none))
    with pytest.raises(ValueError, match=r"unknown .'magic'"):
        train.train(tiny(cache, tmp_path, students=["magic"]))
