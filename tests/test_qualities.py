"""Learning from several qualities and from frames without a raw twin: draws, mixtures, processes, interruptions."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas
import pytest
import torch
from test_training import breaks_off, rows, tiny, train_in_two_processes, without_pictures

from training import fit as loop
from training import train as scroll
from training.config import Config
from training.data import images, loader
from training.models.distillers import DISTILLERS, NoDistillation
from training.models.weights import read_weights
from training.report.log import LossHistory, NonFiniteLoss

pytestmark = pytest.mark.usefixtures("one_thread")

THREE = ("raw", "c23", "c40")


def stack(count=60, size=8) -> loader.Split:
    """Frames whose pixels tell their quality: 0…99 raw, 100…199 c23, 200 and more c40."""
    pixels = np.random.default_rng(0).integers(0, 50, (count, size, size, 3), dtype=np.uint8)
    found = {quality: pixels + np.uint8(100 * place) for place, quality in enumerate(THREE)}
    return loader.Split(found, np.arange(count) % 2, np.arange(count) // 2, np.arange(count) // 2, learnt=THREE)


def drawn(batch) -> list[str]:
    return [THREE[int(image.min()) // 100] for image in batch["compressed"]]


def test_each_quality_is_drawn_as_often_and_anew_in_each_epoch():
    dataset = loader.PairDataset(stack(), 8, seed=3)
    found = {epoch: [dataset.quality(epoch, index) for index in range(60)] for epoch in range(30)}
    counts = Counter(quality for qualities in found.values() for quality in qualities)
    assert all(abs(counts[quality] - 600) < 4 * np.sqrt(1800 * 2 / 9) for quality in THREE)
    assert len({tuple(qualities) for qualities in found.values()}) == 30
    again = loader.PairDataset(stack(), 8, seed=3)
    assert [again.quality(7, index) for index in reversed(range(60))] == found[7][::-1], "by epoch and index alone"
    assert [loader.PairDataset(stack(), 8, seed=4).quality(7, index) for index in range(60)] != found[7]
    agreement = np.mean([a == b for a, b in zip(found[0], found[1], strict=True)])
    assert 0.1 < agreement < 0.6


def test_the_draw_leaves_the_flip_and_a_single_quality_as_they_were():
    split = stack()
    several = loader.PairDataset(split, 8, seed=1, flip=True)
    one = loader.PairDataset(replace(split, learnt=("c40",)), 8, seed=1, flip=True)
    for index in range(60):
        a, b = several[2, index], one[2, index]
        assert (
            torch.equal(a["raw"], b["raw"])
            and b["compressed"].min() >= 200
            and torch.equal(b["compressed"], b["raw"] + 200)
        )
        assert torch.equal(a["compressed"] - a["compressed"].min() // 100 * 100, a["raw"]), "a pair is flipped alike"


def test_a_quality_that_a_frame_has_not_is_never_drawn():
    split = stack(count=8)
    split.images["c23"] = [image if index % 2 else None for index, image in enumerate(split.images["c23"])]
    dataset = loader.PairDataset(split, 8)
    found = [{dataset.quality(epoch, index) for epoch in range(40)} for index in range(8)]
    assert found == [{"raw", "c40"}, set(THREE)] * 4
    assert split.where("c23").tolist() == [1, 3, 5, 7] and split.of("c23").labels.tolist() == [1] * 4
    with pytest.raises(ValueError, match=r"^quality: expected one of \['raw', 'c23', 'c40'\], got 'c30'$"):
        split.where("c30")
    with pytest.raises(ValueError, match=r"^qualities: frame 0 exists in none of c23$"):
        loader.PairDataset(split, 8, ["c23"])[0, 0]


def batches(config, **where):
    found = loader.training_loader(stack(), config, **(dict(epoch=1, start=0, rank=0, world=1) | where))
    return [(batch["index"].tolist(), drawn(batch), batch["compressed"]) for batch in found]


def test_qualities_do_not_depend_on_workers_interruptions_and_processes():
    config = Config(batch_size=12, image_size=8)
    whole = batches(config)
    assert len({quality for _, qualities, _ in whole for quality in qualities}) == 3
    for one, other in ((whole, batches(replace(config, workers=2))), (whole[2:], batches(config, start=24))):
        assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True))
    shares = [batches(replace(config, batch_size=6), rank=rank, world=2) for rank in (0, 1)]
    for step, parts in zip(whole, zip(*shares, strict=True), strict=True):
        for place in (0, 1):
            assert step[place] == [value for part in parts for value in part[place]]


# ----------------------------------------------------------------------------------------------------- missing twins


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> pandas.DataFrame:
    """Pictures of reals and brighter fakes in raw, c23 and c40, every path whole."""
    folder, rng, found = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0), []
    for quality in THREE:
        (folder / quality).mkdir()
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        for index in range(count):
            pixels = rng.integers(0, 200, (32, 32, 3)) + 20 * (index % 2)
            paths = [folder / quality / f"{split}{index}.png" for quality in THREE]
            for level, path in enumerate(paths):
                images.write_png(path, (pixels // (level + 1)).astype(np.uint8))
            for path, level in zip(paths[1:], THREE[1:], strict=True):
                about = {"label": index % 2, "split": split, "compression": level, "twin": f"{split}{index // 2}"}
                found.append({"path_raw": str(paths[0]), "path_compressed": str(path)} | about)
    return pandas.DataFrame(found)


def mixed(pairs: pandas.DataFrame) -> pandas.DataFrame:
    """Two thirds of the pairs of real and fake without a raw twin; some frames in one compression only."""
    number = pairs["twin"].str.extract(r"(\d+)", expand=False).astype(int)
    without = pairs["path_raw"].where(number % 3 == 0, "")
    return pairs.assign(path_raw=without)[(number % 4 != 1) | (pairs["compression"] == "c40")]


def config_of(table: pandas.DataFrame, folder: Path, **changes) -> Config:
    table.to_csv(folder / "pairs.csv", index=False)
    several = dict(qualities=list(THREE), students=["add"], batch_size=4, flip=False)
    several |= dict(manifest=str(folder / "pairs.csv"), outside=True)
    return tiny(str(folder / "cache"), folder, **(several | changes))


def test_frames_without_a_raw_twin_are_frames_of_their_own(pairs, tmp_path):
    table = mixed(pairs)
    splits = loader.load_splits(config_of(table, tmp_path))
    train = table[table["split"] == "train"]
    paired = train[train["path_raw"] != ""]
    assert len(splits["train"]) == paired["path_raw"].nunique() + (train["path_raw"] == "").sum()
    assert len(splits["train"].where("raw")) == paired["path_raw"].nunique() == 8
    assert len(splits["train"].where("c40")) == (train["compression"] == "c40").sum()
    assert len(splits["train"].of("raw")) == 8 and splits["train"].of("raw").learnt == ("raw",)
    assert len(set(splits["train"].groups)) == train["twin"].nunique()
    dataset = loader.PairDataset(splits["train"], 16)
    for index in range(len(dataset)):
        item = dataset[0, index]
        assert item["paired"] == (index in splits["train"].where("raw")) == bool(item["raw"].any())
    one = loader.load_splits(config_of(table, tmp_path, qualities=[], compression="c40"))["train"]
    assert len(one) == (train["compression"] == "c40").sum() and one.learnt == ("c40",)


class Recorder(NoDistillation):
    """Notes what it is shown; its one term is 2."""

    needs_teacher = True
    calls: ClassVar[list[tuple]] = []

    def forward(self, student, teacher, student_logits, teacher_logits, labels):
        sizes = {len(values) for values in (*student, *teacher, student_logits, teacher_logits, labels)}
        self.calls.append((labels.tolist(), sizes))
        return {"two": 2 + 0 * student[0].sum()}


@without_pictures()
def test_a_mixed_batch_distils_its_pairs_by_their_share(pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(DISTILLERS, "recorder", lambda *_: Recorder())
    monkeypatch.setattr(Recorder, "calls", [])
    real_loader, seen = loop.training_loader, []

    def spied(split, *rest, **more):
        for batch in real_loader(split, *rest, **more):
            positions = [place for place, i in enumerate(batch["index"]) if split.images["raw"][i] is not None]
            assert batch["positions"].tolist() == positions and len(batch["raw"]) == len(positions)
            seen.append(
                (split.labels[batch["index"].numpy()[positions]].tolist(), len(positions) / len(batch["label"]))
            )
            yield batch

    monkeypatch.setattr(loop, "training_loader", spied)
    folder = scroll.train(config_of(mixed(pairs), tmp_path, students=["recorder"], epochs=2, batch_size=3))
    seen = seen[2:]  # the teacher's two
    shares = [share for _, share in seen]
    assert {0.0, 1.0} < set(shares), "there are batches without twins, with some, with twins only"
    shown = [(labels, {len(labels)}) for labels, share in seen if share]
    assert Recorder.calls == shown, "the distiller sees the pairs alone, and nothing where there are none"
    logged = [row for row in rows(folder) if row["model"] == "recorder" and "loss" in row]
    assert [row.get("two", 0.0) for row in logged] == pytest.approx([2 * share for share in shares])
    assert all(row["loss"] == pytest.approx(row["cross_entropy"] + row.get("two", 0.0)) for row in logged)
    validated = [row for row in rows(folder) if row["model"] == "recorder" and "val_auc" in row]
    for row in validated:
        assert row["val_auc"] == pytest.approx(np.mean([row[f"val_auc/{quality}"] for quality in THREE]))
    assert not any("val_auc/raw" in row for row in rows(folder) if row["model"] == "teacher")


def test_the_pairs_of_a_batch_are_taken_without_a_look_at_the_device():
    values = [torch.empty(4, 3, 2, 2, device="meta"), torch.empty(4, device="meta")]  # nothing can be read from these
    batch = {"label": torch.zeros(4), "positions": torch.tensor([0, 3]), "raw": torch.zeros(2, 8, 8, 3)}
    raw, part = loop.paired_part(batch, values)
    assert raw is batch["raw"] and [len(value) for value in part] == [2, 2]
    whole = loop.paired_part(batch | {"positions": torch.arange(4)}, values)[1]
    assert whole is values, "a batch of pairs is left as it is"
    none = batch | {"positions": torch.arange(0), "compressed": torch.ones(4, 8, 8, 3)}
    raw, part = loop.paired_part(none, values)
    assert torch.equal(raw, none["compressed"][:1]) and [len(value) for value in part] == [1, 1]


def test_a_term_that_a_batch_has_not_is_zero_in_the_means():
    history = LossHistory()
    one = {"cross_entropy": torch.tensor(2.0)}
    history.add(1, one)
    history.add(2, one | {"kd": torch.tensor(3.0)})
    history.add(3, one)
    assert history.read() == {"loss": 3.0, "cross_entropy": 2.0, "kd": 1.0} and history.read() == {}
    history.add(4, one, warming_up=True)
    history.add(5, {"cross_entropy": torch.tensor(4.0)})
    assert history.read() == {"loss": 4.0, "cross_entropy": 4.0}, "the warm-up is left out"
    history.add(6, one)
    history.add(7, one | {"kd": torch.tensor(float("inf"))})
    with pytest.raises(NonFiniteLoss, match=r"step 7: kd = inf$"):
        history.read()


@without_pictures()
def test_three_qualities_and_missing_twins_resume_bit_for_bit(pairs, tmp_path):
    changes = dict(epochs=2, checkpoint_every=1, accumulate=2, log_every=2, flip=True)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    whole = scroll.train(config_of(mixed(pairs), folders[0], **changes))
    with breaks_off("add", 5):  # within the second epoch
        scroll.train(config_of(mixed(pairs), folders[1], **changes))
    resumed = scroll.train(config_of(mixed(pairs), folders[1], resume=True, workers=2, **changes))
    kept = [sorted((folder / "add").glob("checkpoint-*"))[-1] for folder in (whole, resumed)]
    assert kept[0].name == kept[1].name
    first, second = (read_weights(path / "model.safetensors") for path in kept)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    logs = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(f)] for f in (whole, resumed)]
    assert logs[0] == logs[1]


def test_two_processes_with_adapters_and_batches_without_twins(pairs, tmp_path):
    config = config_of(
        mixed(pairs), tmp_path, student_model="test_efficientnet", batch_size=2, bootstrap=5, balance=1.0
    )
    train_in_two_processes(replace(config, balance_steps=2))
    results = json.loads((config.folder / "results.json").read_text())
    assert results["models"] and json.loads((config.folder / "add" / "done.json").read_text())["step"] > 4


@without_pictures()
def test_without_anything_raw_there_is_no_teacher(pairs, tmp_path):
    table = pairs.drop(columns="path_raw")
    config = config_of(table, tmp_path, qualities=["c23", "c40"], students=["none"], bootstrap=5)
    folder = scroll.train(config)
    assert not (folder / "teacher").exists() and (folder / "none" / "done.json").exists()
    assert not any("teacher" in name for name in json.loads((folder / "results.json").read_text())["models"])
    scroll.train(replace(config, resume=True))
    with pytest.raises(ValueError, match=r"^students: add learn from a teacher, .*: nothing for the teacher to"):
        loader.load_splits(replace(config, students=["none", "add"]))
    with pytest.raises(ValueError, match=r"^qualities: manifest .* has \['c23', 'c40'\], got 'raw', 'c30'$"):
        loader.load_splits(replace(config, qualities=["raw", "c30", "c40"]))


def test_a_teacher_needs_both_classes_among_the_frames_with_a_raw_twin(pairs, tmp_path):
    table = pairs.assign(path_raw=pairs["path_raw"].where((pairs["label"] == 0) | (pairs["split"] != "val"), ""))
    config = config_of(table, tmp_path)
    with pytest.raises(
        ValueError, match=r"split val has no fake \(label 1\) with a path_raw, for the teacher: its AUC"
    ):
        loader.load_splits(replace(config, qualities=["c23", "c40"]))
    given = replace(config, qualities=["c23", "c40"], teacher_checkpoint="teacher.safetensors")
    assert len(loader.load_splits(given)["val"].where("raw")) == 4


def test_qualities_are_different_ones_that_the_set_has(tmp_path):
    config = tiny(str(tmp_path), tmp_path, qualities=["c23", "raw"])
    assert config.learnt == ["c23", "raw"] and replace(config, qualities=[]).learnt == ["c40"]
    with pytest.raises(ValueError, match=r"^qualities: expected different ones, got \['c23', 'c23'\]$"):
        replace(config, qualities=["c23", "c23"])
    with pytest.raises(ValueError, match=r"^qualities: the embedded set has \['raw', 'c23', 'c40'\], got 'c30', 'c0'$"):
        loader.load_splits(replace(config, qualities=["c30", "raw", "c0"]))
    found = loader.load_splits(config)["val"]
    assert list(found.images) == ["raw", "c23"] and found.learnt == ("c23", "raw")
