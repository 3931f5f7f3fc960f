"""Pairs in a reproducible order, augmented alike, from a manifest or the embedded set."""

import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from training.config import Config
from training.data import images, loader
from training.files import BrokenFile


def pairs(count=64, size=8):
    raw = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images = {"raw": raw, "c40": 255 - raw}
    return loader.Split(images, np.arange(count) % 2, np.arange(count) // 2, np.arange(count) // 2)


def test_one_flip_per_pair():
    split = pairs()
    dataset, flips = loader.PairDataset(split, 8, seed=1, flip=True), []
    for index in range(len(split)):
        item = dataset[5, index]
        assert torch.equal(item["compressed"], 255 - item["raw"]), "both images of a pair must be flipped alike"
        flips.append(not np.array_equal(item["raw"].numpy(), split.images["raw"][index]))
        assert np.array_equal(
            item["raw"].numpy(), split.images["raw"][index][:, ::-1] if flips[-1] else split.images["raw"][index]
        )
    assert 0.3 < np.mean(flips) < 0.7

    def flipped(epoch, **seed):
        shown = loader.PairDataset(split, 8, flip=True, **seed)
        return [not np.array_equal(shown[epoch, i]["raw"], split.images["raw"][i]) for i in range(len(split))]

    assert flipped(5, seed=1) == flips and flipped(5, seed=0) == flipped(5), "0 is the default"
    assert len({tuple(found) for found in (flips, flipped(6, seed=1), flipped(5, seed=2))}) == 3
    plain = loader.PairDataset(split, 8, seed=1)
    assert all(np.array_equal(plain[5, i]["raw"].numpy(), split.images["raw"][i]) for i in range(len(split)))


def _batches(config, **where):
    batches = loader.training_loader(pairs(), config, **(dict(epoch=0, start=0, rank=0, world=1) | where))
    return [(batch["index"].tolist(), batch["raw"]) for batch in batches]


def test_order_depends_on_seed_and_epoch_only():
    config = Config(batch_size=8, image_size=8)
    whole = _batches(config)
    state = torch.get_rng_state()
    with_workers = _batches(replace(config, workers=2))
    assert torch.equal(state, torch.get_rng_state()), "a loader must not touch the global generator"
    resumed = _batches(config, start=24)
    for one, other in ((whole, with_workers), (whole[3:], resumed)):
        assert len(one) == len(other)
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))
    assert sorted(index for indices, _ in whole for index in indices) == list(range(64))
    assert [len(indices) for indices, _ in _batches(config, start=3)] == [8] * 7, "no batch is incomplete"
    assert whole[0][0] != _batches(config, epoch=1)[0][0] != _batches(replace(config, seed=9), epoch=1)[0][0]
    assert all({index ^ 1 for index in indices} == set(indices) for indices, _ in whole), "twins share a batch"


def test_flips_in_training_depend_on_the_seed():
    raw, turned = torch.from_numpy(pairs().images["raw"]), []
    for seed in (0, 9):
        batches = _batches(Config(batch_size=8, image_size=8, seed=seed))
        turned.append(
            {i for indices, shown in batches for i, x in zip(indices, shown, strict=True) if (x != raw[i]).any()}
        )
    assert turned[0] != turned[1] and all(16 < len(indices) < 48 for indices in turned)


def test_a_batch_has_the_raw_twins_that_there_are():
    split = pairs(8)
    raw = split.images["raw"]
    split.images["raw"] = [image if index % 3 else None for index, image in enumerate(raw)]
    config = Config(batch_size=4, image_size=8, flip=False)
    for batch in loader.training_loader(split, config, epoch=0, start=0, rank=0, world=1):
        kept = [place for place, index in enumerate(batch["index"].tolist()) if index % 3]
        assert batch["positions"].tolist() == kept and len(batch["compressed"]) == 4
        assert torch.equal(batch["raw"], torch.from_numpy(raw)[batch["index"][kept]])


def test_evaluation_shows_the_frames_asked_for_in_their_order_as_they_are():
    split, asked = pairs(), np.array([7, 3, 3, 60, 0])  # no whole number of batches
    shown = list(loader.evaluation_loader(split, Config(batch_size=1, image_size=8), asked, "c40"))
    assert len(shown) > 1 and torch.equal(torch.cat(shown), torch.from_numpy(split.images["c40"][asked]))
    half = loader.evaluation_loader(split, Config(batch_size=1, image_size=4), asked, "c40")
    assert torch.cat(list(half)).shape == (5, 4, 4, 3)


def test_a_step_sees_the_same_samples_however_many_processes_share_it():
    whole = [indices for indices, _ in _batches(Config(batch_size=8, image_size=8))]
    for world in (2, 4):
        config = Config(batch_size=8 // world, image_size=8)
        shares = [[indices for indices, _ in _batches(config, rank=rank, world=world)] for rank in range(world)]
        assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole
    resumed = [indices for indices, _ in _batches(Config(batch_size=4, image_size=8), start=8, rank=1, world=2)]
    assert resumed == [indices[4:] for indices in whole[2:]]


def manifest(folder: Path, levels=("c23", "c40"), videos=2) -> pandas.DataFrame:
    """Pairs of pictures of one colour each, a real and a fake of every video in every split."""
    rows = []
    for split in ("train", "val", "test"):
        for video in range(videos):
            for label, kind in enumerate(("real", "fake")):
                shade, name = 40 * label + 10 * video + 5, f"{split}-{video}-{kind}"
                for column, level in enumerate(("raw", *levels)):
                    (folder / level).mkdir(exist_ok=True)
                    images.write_png(folder / level / f"{name}.png", np.full((10, 12, 3), shade + column, np.uint8))
                for level in levels:
                    paths = {"path_raw": f"raw/{name}.png", "path_compressed": f"{level}/{name}.png"}
                    about = {"label": label, "split": split, "compression": level, "manipulation": kind}
                    rows.append(paths | about | {"video_id": f"{split}{video}", "twin": f"{split}{video}"})
    table = pandas.DataFrame(rows)
    table.to_csv(folder / "pairs.csv", index=False)
    return table


def test_pairs_of_a_manifest(tmp_path):
    manifest(tmp_path)
    splits = loader.load_splits(Config(manifest=str(tmp_path / "pairs.csv"), compression="c40", image_size=16))
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "val": 4, "test": 4}
    item = loader.PairDataset(splits["val"], 16)[0, 3]
    assert item["raw"].shape == (16, 16, 3) and item["label"] == 1
    assert item["raw"].unique().tolist() == [55] and item["compressed"].unique().tolist() == [57]
    assert splits["train"].twins.tolist() == [0, 0, 1, 1] and splits["train"].groups.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"^compression: manifest .* has \['raw', 'c23', 'c40'\], got 'c30'"):
        loader.load_splits(Config(manifest=str(tmp_path / "pairs.csv"), compression="c30"))


def test_a_configuration_asks_a_manifest_for_qualities(tmp_path):
    (one := tmp_path / "a").mkdir()
    table = manifest(one)
    config = Config(manifest=str(one / "pairs.csv"), qualities=["raw", "c40"], image_size=8)
    train = loader.load_splits(config)["train"]
    assert train.learnt == ("raw", "c40") and list(train.images) == ["raw", "c40"]
    with pytest.raises(ValueError, match=r"^qualities: manifest .* has \['raw', 'c23', 'c40'\], got 'c30'$"):
        loader.load_splits(replace(config, qualities=["raw", "c30"]))
    with pytest.raises(ValueError, match=r"^qualities: the embedded set has \['raw', 'c23', 'c40'\], got 'c30', 'c0'$"):
        loader.load_splits(replace(config, manifest=None, qualities=["c30", "raw", "c0"]))

    unnamed = table[table["compression"] == "c40"].drop(columns="compression")
    unnamed.to_csv(one / "pairs.csv", index=False)
    for qualities in ([], ["raw", "c30"]):  # the one compression that is asked for is what the table has
        found = loader.load_splits(replace(config, qualities=qualities, compression="c30"))["val"]
        assert found.learnt == tuple(qualities or ["c30"]) and found.images["c30"][0].parent.name == "c40"
    with pytest.raises(ValueError, match=r"^qualities: manifest"):
        loader.load_splits(replace(config, qualities=["c23", "c40"]))

    (other := tmp_path / "b").mkdir()
    for column in ("path_raw", "path_compressed"):
        table[column] = [str(one / name) for name in table[column]]
    table.to_csv(other / "pairs.csv", index=False)
    elsewhere = replace(config, manifest=str(other / "pairs.csv"))
    with pytest.raises(ValueError, match=r"in the folder of the manifest \(outside=true: any\), got"):
        loader.load_splits(elsewhere)
    assert len(loader.load_splits(replace(elsewhere, outside=True))["train"]) == 4


def test_who_learns_from_a_teacher_needs_a_raw_frame_to_train_it_on(tmp_path):
    table = manifest(tmp_path, levels=("c40",))
    table.assign(path_raw=table["path_raw"].where(table["split"] != "train", "")).to_csv(
        tmp_path / "pairs.csv", index=False
    )
    config = Config(manifest=str(tmp_path / "pairs.csv"), teacher_checkpoint="given.safetensors", image_size=8)
    assert len(loader.load_splits(replace(config, students=["none"]))["train"]) == 4
    message = r"^students: kd, add learn from a teacher, and no training row of manifest .*pairs\.csv has a path_raw: "
    with pytest.raises(ValueError, match=message):
        loader.load_splits(replace(config, students=["kd", "none", "add"]))
    unseen = table.assign(path_raw=table["path_raw"].where((table["split"] != "val") | (table["label"] == 0), ""))
    unseen.to_csv(tmp_path / "pairs.csv", index=False)
    assert len(loader.load_splits(config)["val"].where("raw")) == 2, "a given teacher is not validated"
    with pytest.raises(ValueError, match=r"split val has no fake \(label 1\) with a path_raw, for the teacher"):
        loader.load_splits(replace(config, teacher_checkpoint=None))


def test_a_source_is_an_original_and_all_that_was_made_from_it(tmp_path):
    table = manifest(tmp_path, levels=("c40",), videos=3)
    rows = table[table["split"] == "test"].reset_index(drop=True)
    twins = ["a", "a", "b", "c", "c", ""]  # the fourth and fifth are of one original, the third and sixth of none
    rows["twin"] = twins
    extra = rows.iloc[[2]].assign(path_raw="raw/train-0-real.png", path_compressed="c40/train-0-real.png", twin="a")
    pandas.concat([rows, extra]).to_csv(tmp_path / "pairs.csv", index=False)  # a further frame of the third video
    groups = loader.read_manifest(str(tmp_path / "pairs.csv"))["test"].table["group"].tolist()
    assert groups == [groups[0]] * 3 + [groups[3]] * 2 + [groups[5], groups[0]] and len(set(groups)) == 3


@pytest.mark.parametrize("dataset", ["FaceForensics++", "FF++", "ffpp_c40", "FF-DF", "FaceShifter"])
def test_the_people_of_a_faceforensics_pair_are_one_source(tmp_path, dataset):
    table = manifest(tmp_path, levels=("c40",), videos=4)
    rows = table[table["split"] == "test"].assign(dataset=dataset, twin=range(8))
    rows["video_id"] = ["000", "000_003", "003", "003_000", "youtube/001.mp4", "870_001", "870", "0001"]
    rows.to_csv(tmp_path / "pairs.csv", index=False)
    groups = loader.read_manifest(str(tmp_path / "pairs.csv"))["test"].table["group"].tolist()
    assert groups == [0, 0, 0, 0, 1, 1, 1, 2], "a, b, a_b and b_a; in a chain, too; other names tell nothing"
    rows.assign(dataset="mine").to_csv(tmp_path / "pairs.csv", index=False)
    groups = loader.read_manifest(str(tmp_path / "pairs.csv"))["test"].table["group"].tolist()
    assert groups == list(range(8)), "in another set such a name tells nothing"
    for place, name in enumerate(rows["path_raw"]):
        (tmp_path / "raw" / str(place)).mkdir()
        shutil.copy(tmp_path / name, tmp_path / "raw" / str(place) / "000.png")
    rows = rows.drop(columns="video_id").assign(path_raw=[f"raw/{place}/000.png" for place in range(8)])
    rows.to_csv(tmp_path / "pairs.csv", index=False)
    groups = loader.read_manifest(str(tmp_path / "pairs.csv"))["test"].table["group"].tolist()
    assert groups == list(range(8)), "the file of a frame is no name of a video"


def test_every_quality_of_a_manifest(tmp_path):
    table = manifest(tmp_path)
    table.drop(index=[1]).to_csv(tmp_path / "pairs.csv", index=False)  # the first frame has no c40
    train = loader.read_manifest(str(tmp_path / "pairs.csv"))["train"]
    assert train.qualities == ["raw", "c23", "c40"] and [len(train.where(q)) for q in train.qualities] == [4, 4, 3]
    stills = train.of("c40", 8)
    assert [stills[i][0].unique().tolist() for i in range(3)] == [[47], [17], [57]] and stills[0][1] == ""
    assert stills.table["label"].tolist() == [1, 0, 1]
    assert len(train.pairs("c23")) == 4 and len(train.pairs("c40")) == 3


def test_a_raw_frame_beside_several_of_one_compression_is_several_pairs(tmp_path):
    table = manifest(tmp_path, levels=("c40",))
    again = table.assign(path_compressed=table["path_raw"])
    pandas.concat([table, again]).to_csv(tmp_path / "pairs.csv", index=False)
    split = loader.load_splits(Config(manifest=str(tmp_path / "pairs.csv"), compression="c40"))["test"]
    assert len(split) == 8 and [len(set(split.images[quality])) for quality in ("raw", "c40")] == [4, 8]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line(tmp_path, workers):
    manifest(tmp_path)
    config = Config(manifest=str(tmp_path / "pairs.csv"), image_size=8, batch_size=4, workers=workers)
    splits = loader.load_splits(config)
    (tmp_path / "c40" / "train-1-real.png").write_bytes(b"broken")
    with pytest.raises(BrokenFile) as caught:
        list(loader.training_loader(splits["train"], config, epoch=0, start=0, rank=0, world=1))
    assert str(caught.value).startswith(f"cannot read the image {tmp_path / 'c40' / 'train-1-real.png'}: ")
    assert "\n" not in str(caught.value)
    image, reason = loader.read_manifest(config.manifest)["train"].of("c40", 8)[2]
    assert not image.any() and reason == str(caught.value)


def test_images_are_upright_in_training_and_evaluation(tmp_path):
    manifest(tmp_path)
    picture = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    (exif := Image.Exif())[0x0112] = 6  # the camera was held on its side
    picture.save(tmp_path / "raw" / "val-0-real.png", exif=exif)
    frames = loader.read_manifest(str(tmp_path / "pairs.csv"))["val"]
    upright = np.rot90(np.asarray(picture), -1)
    assert np.array_equal(loader.PairDataset(frames.pairs("c40"), 8)[0, 0]["raw"], upright)
    assert np.array_equal(frames.of("raw", 8)[0][0], upright)


def test_fingerprint_tells_other_pairs_not_another_folder(tmp_path):
    (one := tmp_path / "a").mkdir()
    table = manifest(one)
    shutil.copytree(one, other := tmp_path / "b")

    def fingerprint(folder):
        return loader.load_splits(Config(manifest=str(folder / "pairs.csv"), compression="c40"))["train"].fingerprint()

    assert fingerprint(one) == fingerprint(other) and fingerprint(one).startswith("4 pairs, ")
    for changed in (table.drop(index=[0, 1]), table.iloc[::-1], table.assign(twin=table["path_raw"])):
        changed.to_csv(other / "pairs.csv", index=False)
        assert fingerprint(one) != fingerprint(other)


def test_the_embedded_set_has_every_quality(tmp_path):
    config = Config(image_size=32, train_clips=4, val_clips=4, test_clips=4, cache=str(tmp_path))
    train = loader.read_embedded(config)["train"]
    assert train.qualities == ["raw", "c23", "c40"] and len(train.table) == 8
    split = loader.load_splits(config)["train"]
    assert np.array_equal(split.images["raw"], train.raw) and list(split.images) == ["raw", "c40"]
    assert np.array_equal(split.images["c40"], train.compressed["c40"])
    assert split.photographs.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert split.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1] and split.twins.tolist() == [1, 3, 1, 3, 5, 7, 5, 7]
    with pytest.raises(ValueError, match=r"^compression: the embedded set has \['raw', 'c23', 'c40'\], got 'c30'$"):
        loader.load_splits(replace(config, compression="c30"))
