"""Evaluation: rows against metrics computed by hand, videos by their full identity, a run against its own results."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_training import without_pictures
from torch import nn

from training import evaluate as command
from training import train as scroll
from training.config import Config
from training.models import checkpoints
from training.report import figures

pytestmark = pytest.mark.usefixtures("one_thread")

REALS, FAKES = ("youtube",), ("Deepfakes", "FaceSwap")
DRAW = command.draw


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    """To draw them takes longer than all else; DRAW does."""
    monkeypatch.setattr(command, "draw", lambda *_: None)


class Brightness(nn.Module):
    """Stands in for a detector: its probability of fake is the mean of the pixels, its feature the same."""

    fit, mean, std, image_size = None, 0.5, 0.5, 4

    def pixels(self, images):
        return images.permute(0, 3, 1, 2) / 127.5 - 1

    def forward(self, images):
        mean = (images.mean((1, 2, 3)) + 1) / 2
        return [], mean[:, None], torch.stack([torch.zeros_like(mean), torch.logit(mean.double())], dim=1)


@pytest.fixture
def bright(monkeypatch, tmp_path):
    """Command-line words that evaluate the stand-in."""
    monkeypatch.setattr(checkpoints.Trained, "load", lambda self, device: Brightness())
    (tmp_path / "any.pth").touch()
    words = ["--checkpoint", str(tmp_path / "any.pth"), "--model", "resnet18", "--image_size", "4", "--bootstrap", "20"]
    return [*words, "--out", str(tmp_path / "out"), "--manifest"]


def manifest(folder: Path, splits=("train", "test"), kinds=(*REALS, *FAKES), videos=4, frames=3) -> pandas.DataFrame:
    """A table of frames, fakes a little brighter; the same video ids under every manipulation of a split."""
    rng, rows = np.random.default_rng(0), []
    for split in splits:
        for kind in kinds:
            for video in range(videos):
                for frame in range(frames):
                    shades = np.clip(rng.normal(110 + 30 * (kind in FAKES), 50, 3), 5, 250).astype(int)
                    for quality, shade in zip(("raw", "c23", "c40"), shades, strict=True):
                        noise = rng.integers(-5, 6, (4, 4, 3))
                        Image.fromarray((shade + noise).astype(np.uint8)).save(
                            folder / f"{split}-{kind}-{video}-{frame}-{quality}.png"
                        )
                    stem, label = f"{split}-{kind}-{video}-{frame}", int(kind in FAKES)
                    for quality in ("c23", "c40"):
                        where = (f"{stem}-raw.png", f"{stem}-{quality}.png", label, split, quality)
                        rows.append((*where, "FF++", kind, f"{split}{video}"))
    columns = "path_raw path_compressed label split compression dataset manipulation video_id"
    table = pandas.DataFrame(rows, columns=columns.split())
    table.to_csv(folder / "pairs.csv", index=False)
    return table


def results(folder: Path) -> tuple[dict[tuple, dict], list[str]]:
    contents = json.loads((folder / "results.json").read_text())
    assert contents["notes"][:2] == ["None", contents["notes"][1]] and "images of 4×4 px" in contents["notes"][1]
    return {(row["manipulation"], row["compression"]): row for row in contents["rows"]}, contents["notes"][2:]


def shade(folder: Path, names) -> np.ndarray:
    return np.array([np.asarray(Image.open(folder / name)).mean() / 255 for name in names])


def test_rows_against_metrics_by_hand(tmp_path, bright, capsys):
    table = manifest(tmp_path)
    command.main([*bright, str(tmp_path / "pairs.csv")])
    rows, _ = results(tmp_path / "out")
    assert set(rows) == {(m, q) for m in ("all", *FAKES) for q in ("raw", "c23", "c40")}
    test = table[table["split"] == "test"]
    for (manipulation, quality), row in rows.items():
        kept = test if manipulation == "all" else test[test["manipulation"].isin([manipulation, *REALS])]
        kept = kept[kept["compression"] == ("c23" if quality == "raw" else quality)]
        column = "path_raw" if quality == "raw" else "path_compressed"
        scores = pandas.Series(shade(tmp_path, kept[column]), index=kept.index)
        videos = scores.groupby([kept["manipulation"], kept["video_id"]]).mean()
        labels = kept["label"].groupby([kept["manipulation"], kept["video_id"]]).first()
        assert row["frame"]["auc"]["value"] == pytest.approx(roc_auc_score(kept["label"], scores))
        assert row["video"]["auc"]["value"] == pytest.approx(roc_auc_score(labels, videos))
        assert row["frame"]["accuracy"]["value"] == pytest.approx(((scores >= 0.5) == kept["label"]).mean())
        assert (row["reals"], row["fakes"], row["videos"]) == (12, len(kept) - 12, len(kept) // 3)
        gallery = table[(table["split"] == "train") & (table["compression"] == kept["compression"].iloc[0])]
        distance = np.abs(scores.to_numpy()[:, None] - shade(tmp_path, gallery[column]))
        nearest = gallery["label"].to_numpy()[distance.argmin(1)]
        assert row["frame"]["recall_at_1"]["value"] == pytest.approx((nearest == kept["label"]).mean())
        assert row["video"]["recall_at_1"]["value"] is None
    assert "FaceSwap" in capsys.readouterr().out


def test_csv_says_what_json_says(tmp_path, bright, monkeypatch):
    monkeypatch.setattr(command, "draw", DRAW)
    manifest(tmp_path, videos=20, frames=1)
    command.main([*bright, str(tmp_path / "pairs.csv")])
    rows, _ = results(tmp_path / "out")
    with open(tmp_path / "out" / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 9
    for line in lines:
        row = rows[line["manipulation"], line["compression"]]
        for level, metric in (("frame", "eer"), ("video", "ap"), ("frame", "recall_at_1")):
            assert float(line[f"{level}_{metric}_low"]) == pytest.approx(row[level][metric]["low"])
        assert float(line["video_f1"]) == pytest.approx(row["video"]["f1"]["value"])
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        f"{name}{theme}.png" for name in ("compression-gap", "cross-compression") for theme in ("", "-dark")
    }


def test_few_sources_have_no_intervals_anywhere(tmp_path, bright, capsys):
    manifest(tmp_path, splits=("test",), kinds=("youtube", "FaceSwap"))
    command.main([*bright, str(tmp_path / "pairs.csv")])
    rows, notes = results(tmp_path / "out")
    for row in rows.values():
        for cell in (*row["frame"].values(), *row["video"].values()):
            assert cell["low"] is cell["high"] is None
    with open(tmp_path / "out" / "results.csv") as file:
        assert {line["frame_auc_low"] for line in csv.DictReader(file)} == {""}
    said = "FF++, FaceSwap, c40 has 4 sources with reals and 4 with fakes; below 10 of either no interval is given"
    printed = capsys.readouterr().out
    assert said in notes and said in printed and f"{rows['all', 'c40']['video']['auc']['value']:.3f} [–]" in printed


def test_intervals_draw_videos_not_frames(tmp_path, bright):
    table = manifest(tmp_path, videos=10, frames=2)
    command.main([*bright, str(tmp_path / "pairs.csv")])
    once, _ = results(tmp_path / "out")
    pandas.concat([table] * 5).to_csv(tmp_path / "pairs.csv", index=False)
    table.loc[:, "path_raw"] = [f"./{name}" for name in table["path_raw"]]
    command.main([*bright, str(tmp_path / "pairs.csv")])
    again, _ = results(tmp_path / "out")
    for quality in ("c23", "c40"):
        one, five = once["all", quality]["frame"]["auc"], again["all", quality]["frame"]["auc"]
        assert one == pytest.approx(five) and one["low"] < one["value"] < one["high"]


def test_what_is_undefined_is_null_and_said(tmp_path, bright, capsys, monkeypatch):
    monkeypatch.setattr(command, "draw", DRAW)
    manifest(tmp_path, splits=("test",), kinds=("Deepfakes",))
    command.main([*bright, str(tmp_path / "pairs.csv")])
    rows, notes = results(tmp_path / "out")
    for row in rows.values():
        assert [row["frame"][name]["value"] for name in ("auc", "ap", "eer", "recall_at_1")] == [None] * 4
        assert row["frame"]["accuracy"]["value"] is not None
    assert "FF++, Deepfakes, c40: fakes only, so AUC, AP and EER are undefined there" in notes
    assert "FF++, raw: no train split as gallery, no recall@1" in notes
    printed = capsys.readouterr().out
    assert all(note in printed for note in notes) and "undefined" in printed


def test_a_manifest_of_the_least_columns(tmp_path, bright):
    table = manifest(tmp_path, splits=("test",), frames=1)
    table = table[table["compression"] == "c40"]
    table[["path_raw", "path_compressed", "label", "split"]].to_parquet(tmp_path / "pairs.parquet")
    command.main([*bright, str(tmp_path / "pairs.parquet")])
    rows, _ = results(tmp_path / "out")
    assert set(rows) == {(m, q) for m in ("all", "fake") for q in ("raw", "compressed")}
    assert {row["dataset"] for row in rows.values()} == {"pairs"} and rows["all", "raw"]["videos"] == 12


def test_frames_without_a_raw_twin_have_no_row_of_raw(tmp_path, bright):
    table = manifest(tmp_path)
    table["path_raw"] = table["path_raw"].where(table["manipulation"] != "FaceSwap", "")
    table.to_csv(tmp_path / "pairs.csv", index=False)
    command.main([*bright, str(tmp_path / "pairs.csv")])
    rows, _ = results(tmp_path / "out")
    assert set(rows) == {(m, q) for m in ("all", *FAKES) for q in ("raw", "c23", "c40")} - {("FaceSwap", "raw")}
    assert [rows["all", quality]["fakes"] for quality in ("raw", "c23", "c40")] == [12, 24, 24]
    test = table[(table["split"] == "test") & (table["compression"] == "c40")]
    by_hand = roc_auc_score(test["label"], shade(tmp_path, test["path_compressed"]))
    assert rows["all", "c40"]["frame"]["auc"]["value"] == pytest.approx(by_hand)
    assert rows["all", "raw"]["frame"]["recall_at_1"]["value"] is not None
    table.drop(columns="path_raw").to_csv(tmp_path / "pairs.csv", index=False)
    command.main([*bright, str(tmp_path / "pairs.csv")])
    again, _ = results(tmp_path / "out")
    assert set(again) == {(m, q) for m in ("all", *FAKES) for q in ("c23", "c40")}
    assert again["all", "c40"] == rows["all", "c40"]


def test_shards_are_one_set_and_its_reference_has_its_name(tmp_path, bright):
    table = manifest(tmp_path, videos=20, frames=1).assign(reference="source")
    files = [tmp_path / f"manifest-{i}-of-2.parquet" for i in (1, 2)]
    for path, split in zip(files, ("train", "test"), strict=True):
        table[table["split"] == split].to_parquet(path)
    found = []
    for where in (tmp_path, ",".join(map(str, files)), tmp_path / "pairs.csv"):
        command.main([*bright, str(where)])
        rows, notes = results(tmp_path / "out")
        found.append([row | {"manifest": None, "compression": None} for row in rows.values()])
        reference = "raw" if str(where).endswith(".csv") else "source"
        assert [quality for _, quality in rows] == [q for q in (reference, "c23", "c40") for _ in range(3)]
    assert found[0] == found[1] == found[2] and not notes, "the CSV is the same table but for the column"
    assert all(row["frame"]["recall_at_1"]["value"] is not None for row in found[0]), "the train split is the gallery"


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda t: t.drop(columns="label"), [], r"missing \['label'\]"),
        (lambda t: t.assign(label=2), [], r"label, rows 1–72: expected 0 or real, 1 or fake .* got '2'"),
        (lambda t: t.assign(split=["val", *t["split"][1:]]), [], "more than one split: 'FF\\+\\+/youtube/test0'"),
        (lambda t: t, ["--split", "val"], "split: manifest .* has \\['test'\\], got 'val'"),
        (lambda t: t.assign(path_raw="absent.png"), [], "absent.png"),
        (lambda t: t, ["--model=null"], "its timm model is needed"),
        (lambda t: t, ["--manifest", "absent.csv"], "no file 'absent.csv'"),
        (lambda t: t, ["--checkpoint", "absent"], "checkpoint absent: expected the folder of a run"),
        (lambda t: t, ["--bootstrap", "0"], "bootstrap"),
        (lambda t: t, ["--bootstraps", "5"], "unknown key 'bootstraps' .* did you mean 'bootstrap'"),
    ],
)
def test_errors_exit_2_and_are_said_without_a_traceback(tmp_path, bright, capsys, change, words, message):
    change(manifest(tmp_path, splits=("test",))).to_csv(tmp_path / "pairs.csv", index=False)
    assert command.main([*bright, str(tmp_path / "pairs.csv"), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and re.search(message, said), said


def test_frames_that_cannot_be_read_are_listed_and_the_rest_is_evaluated(tmp_path, bright, capsys):
    table = manifest(tmp_path)
    broken = [name for name in table.loc[(table.split == "test") & (table.compression == "c40"), "path_compressed"]][:2]
    for name in broken:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    assert command.main([*bright, str(tmp_path / "pairs.csv")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("failed: cannot read the image ") for line in said)
    rows, _ = results(tmp_path / "out")
    assert (rows["all", "c40"]["reals"] + rows["all", "c40"]["fakes"], rows["all", "c23"]["reals"]) == (34, 12)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["unread"]) == 2


def test_what_was_evaluated_before_ctrl_c_is_kept(tmp_path, bright, capsys, monkeypatch):
    manifest(tmp_path)
    score, asked = command.score, []

    def interrupted(model, frames, options, what):
        asked.append(what)
        if what == "c40":
            raise KeyboardInterrupt
        return score(model, frames, options, what)

    monkeypatch.setattr(command, "score", interrupted)
    assert command.main([*bright, str(tmp_path / "pairs.csv")]) == 130
    assert "interrupted; the rows so far stand in results.json" in capsys.readouterr().err
    assert {quality for _, quality in results(tmp_path / "out")[0]} == {"raw", "c23"}
    with open(tmp_path / "out" / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on the embedded set: a teacher and two students."""
    folder = tmp_path_factory.mktemp("runs")
    config = Config(
        name="tiny",
        out=str(folder),
        cache=str(folder / "cache"),
        image_size=32,
        train_clips=20,
        val_clips=8,
        test_clips=40,
        batch_size=8,
        teacher_model="test_byobnet",
        student_model="test_byobnet",
        validations_per_epoch=1,
        bootstrap=50,
        multi_view_weights=[0, 0, 1.0, 0],
        frequency_weights=[0, 1.0, 0, 0],
    )
    with without_pictures():
        return scroll.train(config)


def test_a_run_on_its_own_set_gives_the_results_of_the_run(trained, tmp_path):
    command.main(["--checkpoint", str(trained), "--bootstrap", "50", "--out", str(tmp_path)])
    contents = json.loads((tmp_path / "results.json").read_text())
    own = json.loads((trained / "results.json").read_text())["models"]
    rows = {(row["model"], row["manipulation"], row["compression"]): row["frame"] for row in contents["rows"]}
    assert len(rows) == 3 * 2 * 3 and not contents["notes"]
    pairs = {"teacher on raw": ("teacher", "all", "raw"), "teacher on compressed": ("teacher", "all", "c40")}
    pairs |= {name: (name, "all", "c40") for name in ("CE student", "ADD student")}
    for title, key in pairs.items():
        for metric, cell in own[title].items():
            assert rows[key][metric] == pytest.approx(cell, abs=1e-6), (title, metric)


def test_one_model_of_a_run_by_folder_or_file(trained, tmp_path):
    for path in (trained / "add", trained / "add" / "model.safetensors"):
        command.main(["--checkpoint", str(path), "--bootstrap", "5", "--out", str(tmp_path)])
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        assert {(row["model"], row["trained_on"]) for row in rows} == {("ADD student", "c40")}
    (trained / "add" / "done.json").rename(tmp_path / "done.json")
    command.main(["--checkpoint", str(trained / "add"), "--bootstrap", "5", "--out", str(tmp_path)])
    assert "training has not ended" in json.loads((tmp_path / "results.json").read_text())["notes"][0]
    (tmp_path / "done.json").rename(trained / "add" / "done.json")


def test_a_weights_file_of_another_run_is_refused(trained, tmp_path):
    (tmp_path / "none").mkdir()
    config = (trained / "config.yaml").read_text().replace("student_model: test_byobnet", "student_model: test_resnet")
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "none" / "model.safetensors").write_bytes((trained / "none" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="missing or of another shape"):
        checkpoints.find_trained(tmp_path)[0].load()


def test_a_given_teacher_belongs_to_the_run(trained, tmp_path):
    (tmp_path / "none").mkdir()
    given = f"teacher_checkpoint: {trained / 'teacher' / 'model.safetensors'}"
    config = (trained / "config.yaml").read_text().replace("teacher_checkpoint: null", given)
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "none" / "model.safetensors").write_bytes((trained / "none" / "model.safetensors").read_bytes())
    teacher, student = checkpoints.find_trained(tmp_path, outside=True)
    assert (teacher.role, teacher.trained_on, student.role) == ("teacher", "raw", "none")
    assert teacher.path == trained / "teacher" / "model.safetensors"


def test_names_tell_models_apart():
    def model(role, **changes):
        return checkpoints.Trained(Path("x"), role, "resnet18", checkpoints.Foreign(), Config(**changes))

    several = [model("teacher"), model("add"), model("add", compression="c23"), model("none"), model("none", name="b")]
    mixed = [model("add"), model("add", qualities=["raw", "c40"])]
    assert command.names(mixed)[1] == "ADD student, trained on raw+c40"
    assert command.names(several) == [
        "teacher",
        "ADD student, trained on c40",
        "ADD student, trained on c23",
        "CE student, trained on c40, embedded",
        "CE student, trained on c40, b",
    ]


def test_pictures_show_the_rows():
    def row(model, trained_on, compression, auc):
        cell = {"auc": {"value": auc, "low": auc - 0.1, "high": auc + 0.1}}
        about = {"model": model, "trained_on": trained_on, "dataset": "FF++", "compression": compression}
        return about | {"manipulation": "all", "videos": 2, "reals": 4, "fakes": 4, "frame": cell, "video": cell}

    rows = [row("teacher", "raw", "raw", 0.9), row("teacher", "raw", "c40", 0.6)]
    rows += [row("CE student", "c40", "raw", 0.8), row("CE student", "c40", "c40", float("nan"))]
    theme = figures.Theme(figures.LIGHT, ["teacher", "CE student"])
    gap = figures.compression_gap(theme, rows)
    assert [axis.get_title(loc="left") or axis.get_title() for axis in gap.axes] == [
        "FF++: AUC of frames",
        "FF++: AUC of videos",
    ]
    drawn = [line.get_ydata().tolist() for line in gap.axes[0].lines[:2]]
    assert drawn[0] == [0.9, 0.6] and drawn[1][0] == 0.8
    matrix = figures.cross_compression(theme, rows)
    assert np.array_equal(matrix.axes[0].images[0].get_array().filled(-1), [[0.9, 0.6], [0.8, -1]])
    assert [text.get_text() for text in matrix.axes[0].texts] == ["0.900", "0.600", "0.800", "–"]
    figures.plt.close("all")
