"""From videos to pairs: miniature trees through prepare.py, as a user runs it, into what training reads."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
import trees
from noted_work import one_by_one
from PIL import Image

from training import prepare
from training.config import Config
from training.data import crops, inspection, loader, manifest, video, workers
from training.prepare import Options

PLAIN = {"detector": "none", "frames": 4, "size": 32, "jobs": 1, "crfs": [40]}


@pytest.fixture(scope="module", autouse=True)
def _in_this_process():
    """One process is enough but for the tests that are about processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "by_processes", one_by_one)
        yield


@pytest.fixture(scope="module")
def ff(tmp_path_factory):
    return trees.faceforensics(tmp_path_factory.mktemp("ff"), levels=("raw", "c23"), frames=6)


def run(source, out, **options):
    options = Options(source=str(source), out=str(out), **PLAIN | options)
    return prepare.prepare(options), pandas.read_parquet(manifest.file_of(options.out, *options.part))


@pytest.fixture(scope="module")
def whole(ff, tmp_path_factory):
    """The folder that an undisturbed run leaves, and its table."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, table = run(ff, out)
    assert status == 0
    return out, table


def copy(tree, tmp_path):
    return Path(shutil.copytree(tree, tmp_path / "tree"))


def frames_of(path):
    return [video.pixels_of(frame) for frame, _ in video.read(path)]


def same(one, other):
    """Whether two folders hold the same files, settings aside."""
    listed = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file() and p.name != "settings.json"}
              for f in (one, other)]  # fmt: skip
    return listed[0] == listed[1] and len(listed[0]) > 0


def test_faceforensics_to_training(ff, tmp_path, capsys):
    status, table = run(ff, tmp_path / "out", size=None, crfs=[23, 40])
    printed = capsys.readouterr().out
    assert status == 0 and len(table) == 16 * 4 * 2
    assert re.search(r"NeuralTextures +fake +4 +2 +2\n", printed) and "reference: raw of 16 videos" in printed
    assert "c23: 16 files exist" in printed and "c40: 0 files exist, 16 are made here" in printed
    row = table[(table.video_id == "001_000") & (table.compression == "c40")].iloc[2]
    assert (row.label, row.split, row.dataset, row.reference) == (1, "train", "FaceForensics++", "raw")
    assert row.frame == crops.evenly(6, 4)[2] and "crf=40 preset=medium pix_fmt=yuv444p threads=1" in row.encoder
    clip = trees.clip_of("train", 1, 1, frames=6)
    raw, compressed = (np.asarray(Image.open(tmp_path / "out" / p)) for p in (row.path_raw, row.path_compressed))
    assert np.array_equal(raw, clip[row.frame]), "the raw crop is the raw frame, bit for bit"
    assert 0.5 < np.abs(compressed.astype(int) - raw).mean() < 25
    given = table[(table.video_id == "001_000") & (table.compression == "c23")].iloc[2]
    frames = frames_of(ff / "manipulated_sequences/NeuralTextures/c23/videos/001_000.mp4")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / given.path_compressed)), frames[row.frame])
    assert given.encoder == "file of the source"

    splits = loader.load_splits(Config(manifest=str(tmp_path / "out"), compression="c40", image_size=16))
    assert {name: len(split) for name, split in splits.items()} == {"train": 32, "val": 16, "test": 16}
    train = splits["train"]
    assert loader.PairDataset(train, 16)[0, 3]["raw"].shape == (16, 16, 3)
    for twin in np.unique(train.twins):
        assert sorted(train.labels[train.twins == twin]) == [0, 1], "a fake shares a batch with the real it is made of"


def test_c0_is_raw_and_without_it_the_best_is_the_source(tmp_path, capsys):
    small = {"pairs": {"train": 1, "val": 1, "test": 1}, "frames": 3, "size": 34}
    c0 = trees.faceforensics(tmp_path / "c0", levels=("c0",), manipulations=("Deepfakes", "FaceSwap"), **small)
    status, table = run(c0, tmp_path / "a", manipulations=["FaceSwap"])
    assert status == 0 and set(table.reference) == {"raw"} and set(table.manipulation) == {"real", "FaceSwap"}
    assert table.frame.nunique() == 3, "a clip of three frames has no fourth"
    c23 = trees.faceforensics(tmp_path / "c23", levels=("c23", "c40"), **(small | {"size": 32}))
    status, table = run(c23, tmp_path / "b")
    assert status == 0 and set(table.reference) == {"source"} and table.path_raw.str.startswith("source/").all()
    assert set(table.encoder) == {"file of the source"}
    assert "reference: source of 12 videos" in capsys.readouterr().out


def test_celeb_df(tmp_path):
    tree = trees.celeb_df(tmp_path / "celeb", identities=8, frames=4)
    status, table = run(tree, tmp_path / "out")
    assert status == 0 and set(table.reference) == {"source"}
    videos = table.drop_duplicates("video_id")
    test = set(videos[videos.split == "test"].video_id)
    lines = (tree / "List_of_testing_videos.txt").read_text().split("\n")
    assert test == {line.split()[1] for line in lines if line}
    assert (videos.label == videos.video_id.str.startswith("Celeb-synthesis")).all(), "its 1 is real"
    people = {s: set(re.findall(r"id\d+", " ".join(videos[videos.split == s].video_id))) for s in ("train", "val")}
    assert people["val"] and people["train"] and not people["val"] & people["train"]
    again = prepare.understand(Options(source=str(tree), **PLAIN)).videos
    assert {v.video_id: v.split for v in again} == dict(zip(videos.video_id, videos.split, strict=True))
    other = prepare.understand(Options(source=str(tree), seed=5, **PLAIN)).videos
    assert {v.video_id: v.split for v in other} != {v.video_id: v.split for v in again}

    path = tree / "List_of_testing_videos.txt"
    path.write_text(path.read_text().replace("1 Celeb-real", "0 Celeb-real"))
    with pytest.raises(ValueError, match=r"calls Celeb-real/id6_0000\.mp4 fake"):
        run(tree, tmp_path / "bad")
    path.unlink()
    with pytest.raises(ValueError, match=r"split file '.*List_of_testing_videos.txt' is missing"):
        run(tree, tmp_path / "bad")


def test_what_does_not_add_up_is_refused(ff, tmp_path):
    tree = copy(ff, tmp_path)
    val = tree / "splits" / "val.json"
    before = val.read_text()
    val.write_text(json.dumps([["000", "005"]]))
    with pytest.raises(ValueError, match="identity '000' is in the splits train and val"):
        run(tree, tmp_path / "out")
    val.unlink()
    with pytest.raises(ValueError, match=r"split file '.*val.json' is missing"):
        run(tree, tmp_path / "out")
    val.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"expected pairs of ids in '.*val.json'"):
        run(tree, tmp_path / "out")
    val.write_text(before)
    with pytest.raises(ValueError, match=r"\['Deepfakes'\] are not in the source, which has \['NeuralTextures'\]"):
        run(tree, tmp_path / "out", manipulations=["Deepfakes"])
    for path in (tree / "manipulated_sequences").rglob("00[67]_*.mp4"):
        path.unlink()
    with pytest.raises(ValueError, match="split test has no fake videos"):
        run(tree, tmp_path / "out")
    with pytest.raises(ValueError, match="expected a FaceForensics"):
        run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_videos_are_listed_and_the_rest_survives(ff, tmp_path, capsys):
    tree = copy(ff, tmp_path)
    path = tree / "original_sequences/youtube/{}/videos/000.mp4"
    broken, short = Path(str(path).format("raw")), Path(str(path).format("c23")).with_name("001.mp4")
    content = bytearray(broken.read_bytes())
    content[200 : len(content) // 2] = bytes(len(content) // 2 - 200)
    broken.write_bytes(content)
    trees.write_video(short, trees.clip_of("train", 1, 0, frames=5), crf=23)
    status, table = run(tree, tmp_path / "out", crfs=[23])
    errors = capsys.readouterr().err
    assert status == 1 and table.drop_duplicates(["manipulation", "video_id"]).shape[0] == 14
    assert re.search(rf"failed: {broken}: (cannot be|frame \d+ is)", errors)
    assert "001.mp4: c23: 5 frames were decoded, expected 6" in errors
    shutil.copy(ff / broken.relative_to(tree), broken)
    shutil.copy(ff / short.relative_to(tree), short)
    status, _ = run(tree, tmp_path / "out", crfs=[23])
    run(tree, tmp_path / "whole", crfs=[23])
    assert status == 0 and same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_rerun(ff, whole, tmp_path, end):
    words = [f"{key}={str(value).replace(' ', '')}" for key, value in PLAIN.items()]
    command = [sys.executable, prepare.__file__, str(ff), f"out={tmp_path / 'out'}", *words]
    # A job in a shell's background inherits a Ctrl-C that is ignored; a user's terminal does not.
    heard = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **heard)
    rows, limit = tmp_path / "out" / "rows", time.monotonic() + 60
    while not list(rows.rglob("*.json")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    os.killpg(process.pid, end)
    said = process.communicate()[1].decode()
    if end == signal.SIGINT:
        assert process.returncode == 130 and "the same command continues" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    done = {path: path.stat().st_mtime_ns for path in rows.rglob("*.json")}
    assert 0 < len(done) < 16
    assert run(ff, tmp_path / "out")[0] == 0
    for path in rows.rglob(".*.tmp"):
        path.unlink()
    assert same(tmp_path / "out", whole[0])
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "finished videos are not redone"
    with pytest.raises(ValueError, match="was made with frames=4; name another folder"):
        run(ff, tmp_path / "out", frames=5)


def test_extracted_frames_and_actors(tmp_path):
    (tmp_path / "splits").mkdir()
    for number, split in enumerate(("train", "val", "test")):
        one, other = f"{2 * number:03d}", f"{2 * number + 1:03d}"
        (tmp_path / "splits" / f"{split}.json").write_text(json.dumps([[one, other]]))
        for name in (one, other):
            folder = tmp_path / "original_sequences/youtube/raw/images" / name
            fake = tmp_path / "manipulated_sequences/Deepfakes/raw/frames" / f"{name}_{other if name == one else one}"
            for path in (folder, fake):
                path.mkdir(parents=True)
                for index in range(2):
                    Image.new("RGB", (32, 32), (99, 50 * index, 0)).save(path / f"{index:04d}.png")
    for name in (
        "original_sequences/actors/raw/videos/01__walking.mp4",
        "manipulated_sequences/DeepFakeDetection/raw/videos/01_02__walking__ABC.mp4",
        "manipulated_sequences/Deepfakes/masks/videos/000_001.mp4",
        "original_sequences/youtube/raw/images/999/0000.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = prepare.understand(Options(source=str(tmp_path), **PLAIN))
    assert found.remarks == ["1 videos are in no official split and are left out"]
    acted = [(v.video_id, v.label, v.split) for v in found.videos if v.dataset == "DeepFakeDetection"]
    assert acted == [("01__walking", 0, "test"), ("01_02__walking__ABC", 1, "test")], "actors have no split"
    (fake,) = [v for v in found.videos if v.key == "FaceForensics++/Deepfakes/000_001"]
    assert fake.path.name == "000_001" and [path.name for path in fake.files["raw"]] == ["0000.png", "0001.png"]
    options = Options(source=str(tmp_path), out=str(tmp_path / "out"), manipulations=["Deepfakes"], **PLAIN)
    assert len(prepare.understand(options).videos) == len(found.videos) - 2 == 12
    assert [row["frame"] for row in crops.pairs_of(fake, options)[0]] == [0, 1]


def test_shards_are_read_together(ff, whole, tmp_path):
    parts = [run(ff, tmp_path / "out", shard=f"{i}/3")[1] for i in (1, 2, 3)]
    columns = ["path_compressed", "sha256_raw", "sha256_compressed", "split"]
    merged = pandas.concat(parts)[columns].sort_values(columns, ignore_index=True)
    assert merged.equals(whole[1][columns].sort_values(columns, ignore_index=True))
    folder = loader.load_splits(Config(manifest=str(tmp_path / "out")))
    files = ",".join(str(path) for path in sorted((tmp_path / "out").glob("manifest-*.parquet")))
    listed = loader.load_splits(Config(manifest=files))
    raws = [sorted(splits["train"].images["raw"]) for splits in (folder, listed)]
    assert raws[0] == raws[1] and len(raws[0]) == 32


def test_check_finds_tampered_and_shifted_crops(ff, tmp_path, capsys):
    _, table = run(ff, tmp_path, size=None)
    assert inspection.check(tmp_path) == 0
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.size == (8 * 128, 4 * 128) and np.asarray(sheet).std() > 10
    row = table.iloc[0]
    path, image = tmp_path / row.path_compressed, np.asarray(Image.open(tmp_path / row.path_compressed))
    Image.fromarray(np.roll(image, 1, axis=1)).save(path)
    assert inspection.check(tmp_path) == 1
    assert f"{path}: its hash is not that of the manifest" in capsys.readouterr().err
    raw = np.asarray(Image.open(tmp_path / row.path_raw))
    assert inspection.misaligned(raw, np.roll(image, 1, axis=1)) and not inspection.misaligned(raw, image)
    assert inspection.misaligned(raw, np.roll(image, -2, axis=0))
    (tmp_path / row.path_raw).unlink()
    assert inspection.check(tmp_path) == 1 and "cannot be read" in capsys.readouterr().err
    with pytest.raises(ValueError, match="manifest: no file"):
        inspection.check(tmp_path / "nowhere")


def test_folders_of_videos_and_images(tmp_path):
    for label, name in enumerate(("real", "fake")):
        for i in range(4):
            trees.write_video(tmp_path / "v" / name / "deep" / f"{i}.mp4", trees.clip_of("train", i, label), crf=20)
            clip = trees.clip_of("train", i, label, size=40, frames=3)
            for j, pixels in enumerate(clip):
                path = tmp_path / "i" / name / f"clip{i}" / f"{j}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            Image.fromarray(clip[0, :39, :37]).save(tmp_path / "i" / name / f"{i}.png")  # odd sides
    status, table = run(tmp_path / "v", tmp_path / "a")
    assert status == 0 and table.video_id.unique().tolist() == [f"deep/{i}.mp4" for i in range(4)]
    assert "pix_fmt=yuv420p" in table.encoder[0] and set(table.reference) == {"source"}
    assert table.groupby(["split", "label"]).video_id.nunique().to_dict() == {
        (split, label): count for split, count in (("train", 2), ("val", 1), ("test", 1)) for label in (0, 1)
    }
    status, table = run(tmp_path / "i", tmp_path / "b", size=None)
    assert status == 0 and table.groupby("frames_in_clip").video_id.nunique().to_dict() == {1: 4, 3: 4}
    single = table[table.video_id == "0.png"].iloc[0]
    assert Image.open(tmp_path / "b" / single.path_compressed).size == (37, 39), "the padding is cut off again"
    status, table = run(tmp_path / "i", tmp_path / "c", images="stills")
    assert status == 0 and set(table.frames_in_clip) == {1} and table.video_id.nunique() == 16
    for path in (tmp_path / "v" / "fake" / "deep").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="has no fake videos"):
        run(tmp_path / "v", tmp_path / "d")


def test_deepfakebench(tmp_path):
    content = {}
    for label, name in enumerate(("FF-real", "FF-DF")):
        for number, split in enumerate(("train", "val", "test")):
            for level in ("c23", "c40"):
                frames = []
                for j, pixels in enumerate(trees.clip_of("train", number, label, size=32, frames=3)):
                    path = Path("FaceForensics++", name, level, str(number), f"{j:03d}.png")
                    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels // (1 if level == "c23" else 2)).save(tmp_path / path)
                    frames.append(str(path).replace("/", "\\"))
                entry = {"label": name, "frames": frames}
                inner = content.setdefault(name, {}).setdefault(split, {}).setdefault(level, {})
                inner[f"{number:03d}" + f"_{900 + number}" * label] = entry
    path = tmp_path / "dataset_json" / "FaceForensics++.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"FaceForensics++": content}))
    status, table = run(path, tmp_path / "out", size=None)
    assert status == 0 and len(table) == 6 * 3 and set(table.encoder) == {"file of the source"}
    raw, compressed = (np.asarray(Image.open(tmp_path / "out" / table[c][0])) for c in ("path_raw", "path_compressed"))
    assert np.array_equal(raw // 2, compressed) and set(table.reference) == {"source"}
    assert set(table.manipulation) == {"real", "FF-DF"} and table.groupby("twin").label.nunique().eq(2).all()
    content["FF-DF"]["val"] = content["FF-DF"]["test"]
    path.write_text(json.dumps({"FaceForensics++": content}))
    with pytest.raises(ValueError, match=r"in the splits val and test; draw_val=true draws"):
        run(path, tmp_path / "bad")
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        run(path, tmp_path / "bad")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/data", "frame=3"], "unknown key 'frame' in the command line; did you mean 'frames'"),
        (["/data", "frames=0"], "frames: expected at least 1, got 0"),
        (["/data", "frames=two"], "frames"),
        (["/data", "crfs=[23, 60]"], "crfs: expected different numbers in 0…51"),
        (["/data", "shard=3/2"], "shard: expected i/n"),
        (["/data", "splits=[dev]"], "splits: expected some of"),
        (["/data", "detector=yunet"], "detector_file: goes with"),
        (["/nowhere"], "no folder or file '/nowhere'"),
        ([], "source: expected the folder"),
        (["--check", "out=/nowhere"], "manifest: no file '/nowhere'"),
    ],
)
def test_bad_words_are_named(words, message, capsys):
    status = prepare.main(words)
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and message in error


def test_status_says_which_shards_are_whole_and_readers_refuse_the_others(ff, tmp_path, capsys):
    out = tmp_path / "out"
    run(ff, out, shard="1/3")
    run(ff, out, shard="3/3")
    capsys.readouterr()
    assert prepare.main(["--status", f"out={out}"]) == 1
    said = capsys.readouterr().out
    assert "1/3: 6 of 6 videos" in said and "2/3: not started" in said and "3/3: 5 of 5 videos" in said
    with pytest.raises(ValueError, match=r"is not complete: shard 2/3 has not started"):
        loader.load_splits(Config(manifest=str(out)))
    manifest.write_shard(out, 2, 3, 5, 1, {}, False)
    assert prepare.main(["--check", f"out={out}"]) == 2
    assert "2/3 has not ended" in capsys.readouterr().err
    run(ff, out, shard="2/3")
    assert prepare.main(["--status", f"out={out}"]) == 0 and len(loader.load_splits(Config(manifest=str(out)))) == 3


def test_a_table_of_ones_own_goes_all_the_way(ff, tmp_path, capsys):
    rows = ["Path;Label;Split;Manipulation;Video_ID"]
    for split, numbers in (("train", "01"), ("val", "4"), ("test", "6")):
        for number in numbers:
            partner = int(number) ^ 1
            real, fake = f"00{number}", f"00{number}_00{partner}"
            rows.append(f"ff/original_sequences/youtube/raw/videos/{real}.mp4;real;{split};real;{real}")
            rows.append(f"ff/manipulated_sequences/NeuralTextures/raw/videos/{fake}.mp4;FAKE;{split};NT;{fake}")
    (tmp_path / "ff").symlink_to(ff)
    (tmp_path / "mine.csv").write_text("\n".join(rows), encoding="cp1252")
    assert prepare.main([str(tmp_path / "mine.csv"), f"out={tmp_path / 'none'}", "detector=none", "jobs=1"]) == 1
    assert capsys.readouterr().err.count(f"leads outside of {tmp_path}; outside=true reads it") == 8
    status, table = run(tmp_path / "mine.csv", tmp_path / "out", outside=True)  # the link is the user's own
    assert status == 0 and len(table) == 8 * 4 and set(table.manipulation) == {"real", "NT"}
    assert table.groupby("split").label.apply(list).map(set).eq({0, 1}).all()
    assert {name: len(split) for name, split in loader.load_splits(Config(manifest=str(tmp_path / "out"))).items()} == {
        "train": 16, "val": 8, "test": 8,
    }  # fmt: skip


def test_names_that_cannot_be_written_are_listed_as_failed_and_the_rest_is_prepared(ff, tmp_path, capsys):
    for label, kind in enumerate(("real", "fake")):
        for number in range(3):
            trees.write_video(tmp_path / "in" / kind / f"{number}.mp4", trees.clip_of("train", number, label), crf=20)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/in/real/caf\xe9.mp4")
    shutil.copy(tmp_path / "in/real/0.mp4", odd)
    status, table = run(tmp_path / "in", tmp_path / "out")
    assert status == 1 and table.video_id.nunique() == 3
    assert "caf\\xe9.mp4: its name is no UTF-8" in capsys.readouterr().err


def test_crops_are_not_written_into_the_source(ff, capsys):
    assert prepare.main([str(ff), f"out={ff / 'pairs'}", "detector=none"]) == 2
    assert "lies in the source" in capsys.readouterr().err and not (ff / "pairs").exists()
