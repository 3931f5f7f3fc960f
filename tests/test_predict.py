"""Prediction on real pictures and real mp4 files, Grad-CAM against its closed form, and exports that must be equal."""

import csv
import io
import json
import os
import re
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import trees
from PIL import Image

from training import export, predict
from training.config import Config
from training.data import crops, embedded, sources
from training.models.checkpoints import save_weights
from training.models.detector import Detector

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a student whose answers differ from picture to picture."""
    torch.manual_seed(3)
    run = tmp_path_factory.mktemp("run")
    config = Config(name="tiny", image_size=SIZE, student_model="test_byobnet", teacher_model="test_byobnet")
    (run / "config.yaml").write_text(config.to_yaml())
    model = Detector("test_byobnet", SIZE).train()
    with torch.no_grad():
        for _ in range(20):  # statistics of the normalisation layers, so that inputs matter
            model(torch.randn(16, 3, SIZE, SIZE))
        model.head.weight.normal_(0, 0.1)
    for role in ("add", "none"):
        (run / role).mkdir()
        save_weights(model, run / role / "model.safetensors")
        (run / role / "done.json").touch()
    return run / "add"


@pytest.fixture(scope="module")
def probability(checkpoint):
    """The probability of fake of one crop, straight from the weights."""
    model = Detector("test_byobnet", SIZE, weights=checkpoint / "model.safetensors").eval()

    def of(crop: Image.Image) -> float:
        crop = np.array(crop.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        with torch.no_grad():
            logits = model(model.pixels(torch.from_numpy(crop[None])))[2]
        return logits.double().softmax(1)[0, 1].item()

    return of


@pytest.fixture
def folder(tmp_path):
    """A portrait, a picture without a face, and a video in a folder below."""
    astronaut = embedded.load_photograph("skimage/data/astronaut.png")
    astronaut.save(tmp_path / "astronaut.png")
    embedded.load_photograph("skimage/data/coffee.png").save(tmp_path / "coffee.png")
    trees.write_video(tmp_path / "below" / "clip.mp4", trees.face_clip(frames=10))
    return tmp_path


def answers(*words) -> tuple[int, list[dict]]:
    """Exit status and the lines of the CSV."""
    table = Path(words[0]).parent / "frames.csv"
    status = predict.main([str(word) for word in (*words, "--csv", table)])
    with open(table) as file:
        return status, list(csv.DictReader(file))


def box(line) -> tuple[int, ...]:
    return tuple(int(line[side]) for side in ("left", "top", "right", "bottom"))


def stored(picture, box) -> Image.Image:
    """The crop as prepare.py stores it by default."""
    return picture.resize((128, 128), Image.Resampling.BICUBIC, box=box)


def test_an_image_is_cropped_at_its_face_and_scored(folder, checkpoint, probability, capsys):
    path = folder / "astronaut.png"
    status, (line,) = answers(path, "--checkpoint", checkpoint)
    left, top, right, bottom = box(line)
    assert status == 0 and right - left == bottom - top, "the box is square"
    assert left < 223 < right and top < 115 < bottom, "the astronaut's nose is in it"
    expected = probability(stored(Image.open(path), box(line)))
    assert float(line["probability"]) == pytest.approx(expected, abs=1e-6)
    label = "fake" if expected >= 0.5 else "real"
    assert capsys.readouterr().out.strip() == f"{path}: {label} {expected:.3f}"
    wide = answers(path, "--checkpoint", checkpoint, "--margin", "2.6")[1][0]
    assert box(wide)[2] - box(wide)[0] == pytest.approx(2 * (right - left), abs=2)


def test_a_video_has_the_mean_of_frames_spread_evenly(folder, checkpoint, probability, capsys):
    path, clip = folder / "below" / "clip.mp4", trees.face_clip(frames=10)
    status, lines = answers(path, "--checkpoint", checkpoint, "--frames", "5", "--batch_size", "2")
    assert status == 0 and [int(line["frame"]) for line in lines] == [1, 3, 5, 7, 9]
    scores = [probability(stored(Image.fromarray(clip[int(line["frame"])]), box(line))) for line in lines]
    assert [float(line["probability"]) for line in lines] == pytest.approx(scores, abs=1e-6)
    assert np.std(scores) > 1e-4, "frames must differ for the mean to say anything"
    assert f" {np.mean(scores):.3f} (mean of 5 frames)" in capsys.readouterr().out
    assert len(answers(path, "--checkpoint", checkpoint, "--frames", "99")[1]) == 10


def test_a_crop_is_taken_whole(folder, checkpoint, probability):
    words = ("--checkpoint", checkpoint, "--detector", "none", "--size", "null")
    status, (line,) = answers(folder / "coffee.png", *words)
    picture = Image.open(folder / "coffee.png")
    assert status == 0 and box(line) == (0, 0, *picture.size)
    assert float(line["probability"]) == pytest.approx(probability(picture), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"margin": 1.7, "smoothing": 0.0, "size": 50, "frames": 3}], ids=["by default", "otherwise"]
)
def test_crops_are_those_of_prepare(folder, checkpoint, probability, options):
    path, out = folder / "below" / "clip.mp4", folder / "pairs"
    item = sources.Video("set", "real", "0", 0, "train", "source", {"source": path}, "0")
    pairing = crops.Pairing(out=str(out), crfs=[40], **options)
    rows, _ = crops.pairs_of(item, pairing)
    predictor = predict.Predictor(SimpleNamespace(image_size=pairing.size), pairing, batch_size=1)
    for row, (number, frame, where) in zip(rows, crops.faces_of(path, (), pairing), strict=True):
        assert number == row["frame"]
        assert np.array_equal(predictor.crop(frame, where), np.asarray(Image.open(out / row["path_raw"])))
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    for row, line in zip(rows, answers(path, "--checkpoint", checkpoint, *words)[1], strict=True):
        assert box(line) == tuple(row[side] for side in ("left", "top", "right", "bottom"))
        assert float(line["probability"]) == pytest.approx(probability(Image.open(out / row["path_raw"])), abs=1e-6)


def test_a_mixed_folder_says_what_each_file_is(folder, checkpoint, capsys):
    (folder / "broken.mp4").write_bytes(b"hello")
    (folder / "broken.png").write_bytes(b"hello")
    (folder / "cut.mp4").write_bytes((folder / "below" / "clip.mp4").read_bytes()[:2000])
    (folder / "cut.png").write_bytes((folder / "astronaut.png").read_bytes()[:20000])
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden").write_text("hello")
    status = predict.main([str(folder), "--checkpoint", str(checkpoint), "--annotate", str(folder.parent / "drawn")])
    said = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in said.out.splitlines())
    said_of = {str(Path(path).relative_to(folder)): text for path, text in lines.items()}
    assert status == 1 and "5 of 7 files have no score" in said.err
    assert "note: left out: 1 .txt, 1 hidden" in said.err
    assert re.match(r"(fake|real) 0\.\d{3}$", said_of.pop("astronaut.png"))
    assert said_of.pop("below/clip.mp4").endswith("(mean of 10 frames)")
    assert said_of.pop("coffee.png") == "no face found"
    assert set(said_of) == {"broken.mp4", "broken.png", "cut.mp4", "cut.png"}
    assert not any(text.startswith(("fake", "real")) for text in said_of.values())
    assert predict.main([str(folder / "notes.txt"), "--checkpoint", str(checkpoint)]) == 1
    assert "notes.txt: neither an image nor a video by its name" in capsys.readouterr().out
    drawn = folder.parent / "drawn"
    pictures = {str(path.relative_to(drawn)) for path in drawn.rglob("*.*")}
    assert pictures == {"astronaut.png.png", "below/clip.mp4.png"}
    assert Image.open(drawn / "astronaut.png.png").size[0] > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.png"], "no file or folder 'absent.png'"),
        (["{folder}/empty"], "has no images or videos; it is empty"),
        ([], "input: expected images, videos or folders"),
        (["{folder}", "--checkpoint", "{run}"], "expected one model, got a run of 2; choose: .*none.*add"),
        (["{folder}", "--checkpoint", "{folder}"], "expected the folder of a run"),
        (["{folder}", "--detector", "magic"], "detector"),
        (["{folder}", "--detector", "yunet"], "detector_file: goes with"),
        (["{folder}", "--detector=yunet", "--detector_file=absent.onnx"], "detector_file: no file 'absent.onnx'"),
        (["{folder}", "--frames", "0"], "frames: expected at least 1, got 0"),
        (["{folder}", "--frame", "1"], "unknown key 'frame' .* did you mean 'frames'"),
        (["{folder}", "--checkpoint", "{folder}/coffee.png", "--model", "resnet18"], "weights .* of weights, got"),
        (["{folder}", "--checkpoint", "{folder}/coffee.png"], "its timm model is needed"),
    ],
)
def test_wrong_usage_exits_2(folder, checkpoint, capsys, words, message):
    (folder / "empty").mkdir()
    words = [word.format(folder=folder, run=checkpoint.parent) for word in words]
    assert predict.main(["--checkpoint", str(checkpoint), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and re.search(message, said), said


def test_crops_for_weights_from_elsewhere_keep_the_pixels_of_the_frame(folder, checkpoint, probability):
    """Shrinking them to the size of stored crops first would take away what such a model looks at."""
    picture = Image.open(folder / "coffee.png")
    foreign = folder / "foreign.pth"
    torch.save(Detector("test_byobnet", SIZE, weights=checkpoint / "model.safetensors").backbone.state_dict(), foreign)
    words = ("--checkpoint", foreign, "model=test_byobnet", "image_size=32", "mean=0.5", "std=0.5", "detector=none")
    found = {size: answers(folder / "coffee.png", *words, *size)[1][0]["probability"] for size in ((), ("size=128",))}
    assert float(found[()]) == pytest.approx(probability(picture), abs=1e-6)
    assert float(found["size=128",]) == pytest.approx(probability(stored(picture, (0, 0, *picture.size))), abs=1e-6)
    assert abs(float(found[()]) - float(found["size=128",])) > 1e-5


def test_whatever_goes_wrong_with_a_file_is_its_line(folder, checkpoint, capsys, monkeypatch):
    def odd(clip, *_):
        raise RuntimeError("odd\nthing")

    monkeypatch.setattr(predict, "faces_of", odd)
    names = [folder / "astronaut.png", folder / "below"]
    assert predict.main([*map(str, names), "--checkpoint", str(checkpoint)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(line.endswith(": RuntimeError: odd\\nthing") for line in said)


def test_the_mean_decides_and_the_most_fake_frame_is_shown(tmp_path, monkeypatch):
    """A model to which a crop is as fake as it is bright."""

    class Model:
        image_size = 8

        def pixels(self, images):
            return images.double().mean((1, 2, 3)) / 100

        def __call__(self, fake):
            return None, None, torch.stack([1 - fake, fake], 1).log()

    def faces(shades):
        return lambda *_: ((i, np.full((8, 8, 3), shade, np.uint8), (0, 0, 8, 8)) for i, shade in enumerate(shades))

    predictor = predict.Predictor(Model(), predict.Cropping(size=None), batch_size=2)
    for shades, said in (([45], "real 0.450"), ([55], "fake 0.550"), ([50], "fake 0.500")):
        monkeypatch.setattr(predict, "faces_of", faces(shades))
        assert str(predictor(predict.Item(tmp_path, tmp_path, tmp_path))) == said
    monkeypatch.setattr(predict, "faces_of", faces([40, 90, 10, 20, 30]))
    answer = predictor(predict.Item(tmp_path, tmp_path, tmp_path))
    assert str(answer) == "real 0.380 (mean of 5 frames)", "though one frame is called fake"
    assert answer.shown[2] == pytest.approx(0.9) and int(answer.shown[0].max()) == 90


def test_any_number_of_inputs_and_files_of_one_name(folder, checkpoint, capsys):
    (folder / "other").mkdir()
    shutil.copy(folder / "coffee.png", folder / "other" / "astronaut.png")
    drawn, inputs = folder / "drawn", [folder / "astronaut.png", folder / "below", folder / "other" / "astronaut.png"]
    words = ["--checkpoint", str(checkpoint), "--detector", "none", "--annotate", str(drawn)]
    assert predict.main([*map(str, inputs), *words]) == 0
    said = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [str(inputs[0]), str(folder / "below" / "clip.mp4"), str(inputs[2])]
    assert {path.name for path in drawn.iterdir()} == {"astronaut.png.png", "astronaut.png (2).png", "clip.mp4.png"}


def test_a_folder_called_like_a_video_is_one(folder, checkpoint, capsys):
    for name in ("held.mp4", "loose"):
        for number, pixels in enumerate(trees.face_clip(frames=3)):
            (folder / "frames" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "frames" / name / f"{number}.png")
    assert predict.main([str(folder / "frames"), "--checkpoint", str(checkpoint)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[0].startswith(f"{folder / 'frames' / 'held.mp4'}: ") and "mean of 3" in said[0]


def test_the_table_has_what_was_scored_when_ctrl_c_came(folder, checkpoint, capsys, monkeypatch):
    look = predict.Predictor.__call__

    def interrupted(self, item):
        if item.path.name == "clip.mp4":
            raise KeyboardInterrupt
        return look(self, item)

    monkeypatch.setattr(predict.Predictor, "__call__", interrupted)
    table = folder / "new" / "frames.csv"
    words = ["--checkpoint", str(checkpoint), "--csv", str(table)]
    assert predict.main([str(folder / "astronaut.png"), str(folder / "below"), *words]) == 130
    assert "interrupted; the files so far" in capsys.readouterr().err
    with open(table) as file:
        assert [Path(line["file"]).name for line in csv.DictReader(file)] == ["astronaut.png"]


@pytest.mark.parametrize(("words", "looked_at"), [([], 1), (["--csv", "all.csv"], 3)])
def test_it_stops_when_nobody_reads_unless_there_is_a_table(folder, checkpoint, monkeypatch, words, looked_at):
    looked = []

    def look(self, item):
        looked.append(item)
        raise predict.BrokenFile("nothing")

    monkeypatch.setattr(predict.Predictor, "__call__", look)
    monkeypatch.chdir(folder)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread, patch.object(sys, "stdout", unread):
        predict.main([".", "--checkpoint", str(checkpoint), *words])
    assert len(looked) == looked_at


def test_a_table_that_cannot_be_written_is_said_before_the_work(folder, checkpoint, capsys):
    (folder / "file").write_text("")
    words = ["--checkpoint", str(checkpoint), "--csv", str(folder / "file" / "frames.csv")]
    assert predict.main([str(folder / "astronaut.png"), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and str(folder / "file") in said.err and not said.out


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_names_that_are_no_utf8_are_carried_through(folder, checkpoint, capsys):
    odd = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")
    shutil.copy(folder / "astronaut.png", odd)
    status, (line,) = answers(Path(odd), "--checkpoint", checkpoint)
    assert status == 0 and line["file"].endswith("caf\\xe9.png") and "caf\\xe9.png: " in capsys.readouterr().out


def test_the_old_word_for_export_is_answered_with_the_new_one(capsys):
    assert predict.main(["export", "--checkpoint", "a b", "--out", "c.onnx"]) == 2
    new = "python training/export.py --checkpoint 'a b' --out c.onnx"
    assert capsys.readouterr().err == f"error: export is a command of its own: {new}\n"


def test_grad_cam_of_a_pooled_linear_head_is_its_class_map():
    model = Detector("resnet18", 128).eval()
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    heat = predict.grad_cam(model, image)
    with torch.no_grad():
        final = model(model.pixels(torch.from_numpy(image[None])))[0][-1]
        weight = model.head.weight[1] - model.head.weight[0]
        expected = torch.einsum("c,bchw->bhw", weight, final).relu()
        expected = torch.nn.functional.interpolate(expected[None], (128, 128), mode="bilinear")[0, 0]
    assert heat.max() == 1 and heat.min() >= 0
    assert torch.from_numpy(heat) == pytest.approx((expected / expected.max()).numpy(), abs=1e-4)


@pytest.mark.parametrize("name", ["legacy_xception", "test_byobnet"])
def test_grad_cam_of_other_networks(name):
    torch.manual_seed(1)
    model = Detector(name, 64).eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    heats = [predict.grad_cam(model, image)]
    with torch.no_grad():
        model.head.weight.neg_()
    heats.append(predict.grad_cam(model, image))
    assert all(heat.shape == (64, 64) and np.isfinite(heat).all() for heat in heats)
    assert max(heat.max() for heat in heats) == 1 and not np.array_equal(*heats), "what looks fake then looked real"
    with torch.no_grad():
        model.head.weight.zero_()
    assert not predict.grad_cam(model, image).any(), "no evidence, no heat, no NaN"


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The checkpoint as ONNX and as .pt2, alone in a folder, and what was said."""
    folder = tmp_path_factory.mktemp("exported") / "new"
    paths = [folder / "student.onnx", folder / "student.pt2"]
    with redirect_stdout(io.StringIO()) as said:
        assert export.main([str(checkpoint), "--out", *map(str, paths)]) == 0
    return paths, said.getvalue()


def test_exports_answer_as_pytorch_and_describe_themselves(exported, probability):
    import onnx
    import onnxruntime

    paths, said = exported
    assert said.count("equal to PyTorch") == 2
    images = np.random.default_rng(7).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    expected = [probability(Image.fromarray(image)) for image in images]
    session = onnxruntime.InferenceSession(paths[0])
    assert session.run(["probability"], {"images": images})[0] == pytest.approx(expected, abs=1e-5)
    extra = {"metadata.json": ""}
    program = torch.export.load(paths[1], extra_files=extra)
    assert program.module()(torch.from_numpy(images))[0].tolist() == pytest.approx(expected, abs=1e-5)
    facts = {entry.key: entry.value for entry in onnx.load(paths[0]).metadata_props}
    assert facts == json.loads(extra["metadata.json"])
    assert f"(batch, {SIZE}, {SIZE}, 3) uint8 RGB; the graph normalises" in facts["input"]
    assert facts["trained_on"] == "c40" and "1.3 times" in facts["crop"]
    assert {path.name for path in paths[0].parent.iterdir()} == {"student.onnx", "student.pt2"}


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
@pytest.mark.parametrize("offset", [1e-2, float("nan")])
def test_an_export_that_differs_is_not_kept(checkpoint, exported, tmp_path, monkeypatch, capsys, ending, offset):
    path, (_, run) = tmp_path / f"student{ending}", export.FORMATS[ending]
    (made,) = (made for made in exported[0] if made.suffix == ending)  # takes seconds to make again
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    write = lambda program, draft, facts: draft.write_bytes(made.read_bytes())  # noqa: E731
    monkeypatch.setitem(export.FORMATS, ending, (write, lambda draft: lambda images: run(draft)(images) * (1 + offset)))
    assert export.main([str(checkpoint), "--out", str(path)]) == 1
    assert "differs from PyTorch by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused(checkpoint, tmp_path, capsys):
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "student.tflite")]) == 2
    assert "end in .onnx or .pt2" in capsys.readouterr().err
