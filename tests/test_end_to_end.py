"""The whole way as a user goes it: videos to pairs, training, evaluation, prediction, export, with every file checked.

Sources that do not add up (a missing split file, an identity in two splits) and broken videos are in test_prepare.py.
"""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import trees
from noted_work import one_by_one
from PIL import Image
from safetensors.torch import load_file
from test_training import without_pictures

from training import evaluate, export, predict, prepare, train
from training.data import workers

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 64
STEPS = 2
NETWORKS = ["resnet18", pytest.param("legacy_xception", marks=pytest.mark.slow)]
SMALL = "test_byobnet"  # where a second run is enough


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders of pairs from a FaceForensics++ tree, a video of which is broken, and from a Celeb-DF v2 tree."""
    folder = tmp_path_factory.mktemp("sets")
    once = {"train": 1, "val": 1, "test": 1}
    trees.faceforensics(folder / "ff", pairs=once, size=SIZE, frames=4)
    trees.celeb_df(folder / "celeb", size=SIZE, frames=2)
    (folder / "ff/manipulated_sequences/NeuralTextures/raw/videos/005_004.mp4").write_bytes(b"not a video")
    ff, celeb = (
        [str(folder / name), f"out={folder / 'pairs' / name}", f"size={SIZE}", "crfs=[40]", "detector=none", "jobs=1"]
        for name in ("ff", "celeb")
    )
    ended = subprocess.run([sys.executable, prepare.__file__, *ff], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and "005_004.mp4: " in ended.stderr, ended.stderr
    with pytest.MonkeyPatch.context() as patch:  # another process would only import everything once more
        patch.setattr(workers, "by_processes", one_by_one)
        assert prepare.main(celeb) == 0
    return folder


@pytest.fixture(scope="module")
def run_of(sets):
    """Gives the run of a network, a teacher and an ADD student of two steps."""

    @cache
    def trained(network: str) -> Path:
        words = [f"name={network}", f"out={sets / 'runs'}", f"manifest={sets / 'pairs' / 'ff'}", "compression=c40"]
        words += [f"teacher_model={network}", f"student_model={network}", "students=[add]", f"image_size={SIZE}"]
        words += ["epochs=1", "teacher_epochs=1", "validations_per_epoch=1", "batch_size=8", "log_every=1"]
        with nullcontext() if network == "resnet18" else without_pictures():
            assert train.main([*words, "bootstrap=20"]) == 0
        return sets / "runs" / network

    return trained


def test_pairs(sets):
    for name, reference, videos, frames in (("ff", "raw", 11, 4), ("celeb", "source", 15, 2)):
        folder = sets / "pairs" / name
        table = pandas.read_parquet(folder / "manifest.parquet")
        assert len(table) == videos * frames and set(table.reference) == {reference}
        for column in ("raw", "compressed"):
            for path, sha in zip(table[f"path_{column}"], table[f"sha256_{column}"], strict=True):
                assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == sha
                with Image.open(folder / path) as image:
                    assert image.size == (SIZE, SIZE)
        assert set(table.groupby("split").label.nunique()) == {2} and table.split.nunique() == 3
        assert table.groupby(["manipulation", "video_id"]).split.nunique().max() == 1


@pytest.mark.parametrize("network", NETWORKS)
def test_training(run_of, network):
    folder = run_of(network)
    results = json.loads((folder / "results.json").read_text())
    assert set(results["models"]) == {"teacher on raw", "teacher on compressed", "ADD student"}
    for values in results["models"].values():
        assert 0 <= values["auc"]["value"] <= 1 and values["auc"]["low"] is None, "two sources say nothing"
    weights = {role: load_file(folder / role / "model.safetensors") for role in ("teacher", "add")}
    assert all(value.isfinite().all() for state in weights.values() for value in state.values())
    assert weights["teacher"].keys() == weights["add"].keys()
    assert any(not torch.equal(value, weights["add"][key]) for key, value in weights["teacher"].items())
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in logged) == STEPS
    assert "ADD student" in (folder / "report.html").read_text()


def test_evaluation_on_both_sets(sets, run_of):
    out, runs = sets / "evaluation", {network: run_of(network) for network in ("resnet18", SMALL)}
    words = ["--checkpoint", *map(str, runs.values()), "--manifest", str(sets / "pairs/ff"), str(sets / "pairs/celeb")]
    evaluate.main([*words, "--bootstrap", "20", "--out", str(out)])
    rows = json.loads((out / "results.json").read_text())["rows"]
    tested = {(row["dataset"], row["manipulation"], row["compression"]): row for row in rows}
    kinds = {"FaceForensics++": ("NeuralTextures", "raw", 3), "Celeb-DF": ("Celeb-synthesis", "source", 5)}
    assert set(tested) == {
        (name, manipulation, quality)
        for name, (forgery, reference, _) in kinds.items()
        for manipulation in ("all", forgery)
        for quality in (reference, "c40")
    }
    assert len(rows) == len(tested) * len(runs) * 2 and all(0 <= row["frame"]["auc"]["value"] <= 1 for row in rows)
    assert all(row["videos"] == kinds[row["dataset"]][2] for row in rows), "the broken video is missing"
    again = json.loads((runs["resnet18"] / "results.json").read_text())["models"]["ADD student"]["auc"]["value"]
    (own,) = [
        row["frame"]["auc"]["value"]
        for row in rows
        if row["role"] == "add" and "resnet18" in row["path"]
        and (row["dataset"], row["manipulation"], row["compression"]) == ("FaceForensics++", "all", "c40")
    ]  # fmt: skip
    assert own == pytest.approx(again, abs=1e-6)
    assert len(pandas.read_csv(out / "results.csv")) == len(rows)
    assert {path.name for path in out.glob("*.png")} == {
        f"{name}{theme}.png" for name in ("compression-gap", "cross-compression") for theme in ("", "-dark")
    }


@pytest.mark.parametrize("network", NETWORKS)
def test_prediction_and_export_agree_on_the_prepared_crops(sets, run_of, network, tmp_path, capsys):
    import onnxruntime

    checkpoint = str(run_of(network) / "add")
    video = sets / "ff/manipulated_sequences/NeuralTextures/raw/videos/004_005.mp4"
    (tmp_path / "in").mkdir()
    shutil.copy(video, tmp_path / "in")
    (tmp_path / "in" / "broken.mp4").write_bytes(video.read_bytes()[:1000])
    words = ["--checkpoint", checkpoint, "--detector", "none", "--size", str(SIZE)]
    capsys.readouterr()  # what the training said, where this test is the first that asks for it
    assert predict.main([str(video), *words]) == 0
    alone = capsys.readouterr().out
    words += ["--csv", str(tmp_path / "frames.csv"), "--annotate", str(tmp_path / "drawn")]
    assert predict.main([str(tmp_path / "in"), *words]) == 1
    scored, broken = sorted(capsys.readouterr().out.splitlines())
    assert "broken.mp4: " in broken and "mean of" not in broken and scored.endswith("(mean of 4 frames)")
    assert alone.partition(": ")[2].strip() == scored.partition(": ")[2]
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["004_005.mp4.png"]
    with open(tmp_path / "frames.csv") as file:
        lines = {int(line["frame"]): float(line["probability"]) for line in csv.DictReader(file) if line["frame"]}

    files = [tmp_path / "student.onnx", tmp_path / "student.pt2"]
    assert export.main([checkpoint, "--out", *map(str, files)]) == 0
    folder = sets / "pairs" / "ff"
    table = pandas.read_parquet(folder / "manifest.parquet").query("video_id == '004_005'").sort_values("frame")
    crops = np.stack([np.asarray(Image.open(folder / path)) for path in table.path_raw])
    expected = [lines[frame] for frame in table.frame]
    assert len(expected) == 4
    onnx = onnxruntime.InferenceSession(files[0]).run(["probability"], {"images": crops})[0]
    assert onnx.tolist() == pytest.approx(expected, abs=1e-5)
    program = torch.export.load(files[1]).module()
    assert program(torch.from_numpy(crops))[0].tolist() == pytest.approx(expected, abs=1e-5)
