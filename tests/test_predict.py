"""Prediction on real pictures and real mp4 files, Grad-CAM against its closed form, and exports that must be equal."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image

from training import export, predict, prepare, sources, synthetic
from training.checkpoints import save_weights
from training.config import Config
from training.data import pixels
from training.models import Detector
from training.prepare_options import Options

SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a student whose answers differ from picture to picture."""
    torch.manual_seed(3)
    run = tmp_path_factory.mktemp("run")
    config = Config(name="tiny", image_size=SIZE, student_model="test_byobnet", teacher_model="test_byobnet")
    (run / "config.yaml").write_text(config.to_yaml())
    model = Detector("test_byobnet").train()
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
    model = Detector("test_byobnet", weights=checkpoint / "model.safetensors").eval()

    def of(crop: Image.Image) -> float:
        crop = np.array(crop.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        with torch.no_grad():
            logits = model(pixels(torch.from_numpy(crop[None]), torch.device("cpu")))[2]
        return logits.double().softmax(1)[0, 1].item()

    return of


@pytest.fixture
def folder(tmp_path):
    """A portrait, a picture without a face, and a video in a folder below."""
    astronaut = synthetic.load_photograph("skimage/data/astronaut.png")
    astronaut.save(tmp_path / "astronaut.png")
    synthetic.load_photograph("skimage/data/coffee.png").save(tmp_path / "coffee.png")
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
    cropping = Options(source=str(folder), out=str(out), crfs=[40], **options)
    rows = prepare.prepare_video(item, cropping)
    predictor = predict.Predictor(None, image_size=cropping.size, batch_size=1, cropping=cropping)
    for row, (number, frame, where) in zip(rows, predict.faces_of(path, cropping), strict=True):
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
    assert status == 1 and "6 of 8 files have no score" in said.err
    assert re.match(r"(fake|real) 0\.\d{3}$", said_of.pop("astronaut.png"))
    assert said_of.pop("below/clip.mp4").endswith("(mean of 10 frames)")
    assert said_of.pop("coffee.png") == "no face found"
    assert said_of.pop("notes.txt") == "neither an image nor a video by its name"
    assert len(said_of) == 4 and all(re.match("cannot be (read|decoded): ", text) for text in said_of.values())
    drawn = folder.parent / "drawn"
    pictures = {str(path.relative_to(drawn)) for path in drawn.rglob("*.*")}
    assert pictures == {"astronaut.png.png", "below/clip.mp4.png"}
    assert Image.open(drawn / "astronaut.png.png").size[0] > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.png"], "no file or folder 'absent.png'"),
        (["{folder}/empty"], "has no files"),
        (["{folder}", "--checkpoint", "{run}"], "expected one model, got a run of 2; choose: .*none.*add"),
        (["{folder}", "--checkpoint", "{folder}"], "expected the folder of a run"),
        (["{folder}", "--detector", "magic"], "detector"),
        (["{folder}", "--detector", "yunet"], "detector_file: goes with"),
        (["{folder}", "--detector=yunet", "--detector_file=absent.onnx"], "detector_file: no file 'absent.onnx'"),
        (["{folder}", "--frames", "0"], "frames: expected at least 1, got 0"),
        (["{folder}", "--frame", "1"], "frame"),
        (["{folder}", "--checkpoint", "{folder}/coffee.png", "--model", "resnet18"], "weights .* of weights, got"),
        (["{folder}", "--checkpoint", "{folder}/coffee.png"], "its timm model is needed"),
    ],
)
def test_wrong_usage_exits_2(folder, checkpoint, capsys, words, message):
    (folder / "empty").mkdir()
    words = [word.format(folder=folder, run=checkpoint.parent) for word in words]
    with pytest.raises(SystemExit) as stop:
        predict.main(["--checkpoint", str(checkpoint), *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, said) and "Traceback" not in said


@pytest.mark.parametrize("command", [predict, export])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(["--help"] if command is predict else ["export", "--help"])
    assert stop.value.code == 0 and "--checkpoint" in capsys.readouterr().out
    for action in command.parser()._actions:
        assert action.help, action.dest


def test_grad_cam_of_a_pooled_linear_head_is_its_class_map():
    model = Detector("resnet18").eval()
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    heat = predict.grad_cam(model, image)
    with torch.no_grad():
        final = model(pixels(torch.from_numpy(image[None]), torch.device("cpu")))[0][-1]
        weight = model.head.weight[1] - model.head.weight[0]
        expected = torch.einsum("c,bchw->bhw", weight, final).relu()
        expected = torch.nn.functional.interpolate(expected[None], (128, 128), mode="bilinear")[0, 0]
    assert heat.max() == 1 and heat.min() >= 0
    assert torch.from_numpy(heat) == pytest.approx((expected / expected.max()).numpy(), abs=1e-4)


@pytest.mark.parametrize("name", ["legacy_xception", "test_byobnet"])
def test_grad_cam_of_other_networks(name):
    torch.manual_seed(1)
    model = Detector(name).eval()
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


def test_exports_answer_as_pytorch_and_describe_themselves(checkpoint, probability, tmp_path, capsys):
    import onnx
    import onnxruntime

    paths = [tmp_path / "new" / "student.onnx", tmp_path / "new" / "student.pt2"]
    assert predict.main(["export", "--checkpoint", str(checkpoint), "--out", *map(str, paths)]) == 0
    assert capsys.readouterr().out.count("equal to PyTorch") == 2
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
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"student.onnx", "student.pt2"}


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
@pytest.mark.parametrize("offset", [1e-2, float("nan")])
def test_an_export_that_differs_is_not_kept(checkpoint, tmp_path, monkeypatch, capsys, ending, offset):
    write, run = export.FORMATS[ending]
    monkeypatch.setitem(export.FORMATS, ending, (write, lambda path: lambda images: run(path)(images) * (1 + offset)))
    path = tmp_path / f"student{ending}"
    with pytest.raises(SystemExit) as stop:
        predict.main(["export", "--checkpoint", str(checkpoint), "--out", str(path)])
    assert stop.value.code == 1 and "differs from PyTorch by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "student.tflite")])
    assert stop.value.code == 2 and "end in .onnx or .pt2" in capsys.readouterr().err
