"""Trained models on disk: found in runs and files, shown images as they were trained with, or as is said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from training import predict
from training.config import Config
from training.data import images
from training.models.checkpoints import Foreign, find_one_trained, find_trained, save_weights
from training.models.detector import Detector

NAME = "test_byobnet"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A timm model of another project, and the file of its weights."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=2).eval()
    with torch.no_grad():
        model.fc.weight.normal_()
    torch.save(
        {"state_dict": model.state_dict(), "best_acc1": torch.tensor(0.9)},
        path := tmp_path_factory.mktemp("f") / "a.pth",
    )
    return model, path


def answers(model, pictures, mean, std):
    """Probabilities of class 1, the images normalised by hand."""
    x = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std
    ).view(3, 1, 1)
    with torch.no_grad():
        return model(x).softmax(1)[:, 1]


def said(detector, pictures):
    with torch.no_grad():
        return detector(detector.pixels(torch.from_numpy(pictures)))[2].softmax(1)[:, 1]


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_a_foreign_file_is_shown_images_as_timm_trained_its_model(foreign):
    model, path = foreign
    trained = find_one_trained(path, Foreign(model="resnet18"))
    detector = trained.load()
    assert detector.image_size == 224
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    torch.testing.assert_close(said(detector, pictures), answers(model, pictures, *IMAGENET), rtol=1e-4, atol=1e-5)
    line = trained.assumptions(detector)[1]
    assert "images of 224×224 px, normalised to mean (0.485, 0.456, 0.406)" in line and "timm's for this model" in line


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5]), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), ([0.0], [1.0])])
def test_normalisation_and_fake_class_are_as_told(foreign, mean, std):
    model, path = foreign
    told = Foreign(model="resnet18", image_size=64, mean=mean, std=std, fake_class=0)
    trained = find_one_trained(path, told)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    three = [values * (3 // len(values)) for values in (mean, std)]
    torch.testing.assert_close(
        said(trained.load(), pictures), 1 - answers(model, pictures, *three), rtol=1e-4, atol=1e-5
    )
    assert "image_size, mean, std as told" in trained.assumptions(trained.load())[1]


def test_the_command_uses_what_is_told(foreign, tmp_path, capsys):
    model, path = foreign
    picture = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    images.write_png(tmp_path / "a.png", picture[0])
    words = [
        str(tmp_path / "a.png"),
        f"checkpoint={path}",
        "model=resnet18",
        "detector=none",
        "size=64",
        "image_size=64",
    ]
    assert predict.main([*words, "mean=[0.485,0.456,0.406]", "--std", "0.229", "0.224", "0.225", "fake_class=0"]) == 0
    printed = capsys.readouterr()
    assert f"{1 - answers(model, picture, *IMAGENET).item():.3f}" in printed.out
    assert "its class 0 is fake" in printed.err and "images of 64×64 px" in printed.err


def test_weights_of_ours_know_their_model_without_their_run(tmp_path):
    model = Detector(NAME, 40, mean=[0.1, 0.2, 0.3], std=0.4).eval()
    save_weights(model, tmp_path / "moved.safetensors")
    trained = find_one_trained(tmp_path / "moved.safetensors")
    detector = trained.load()
    assert (detector.name, detector.image_size, detector.mean, detector.std) == (NAME, 40, (0.1, 0.2, 0.3), (0.4,) * 3)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    assert torch.equal(said(detector, pictures), said(model, pictures))
    assert not trained.assumptions(detector)
    told = find_one_trained(tmp_path / "moved.safetensors", Foreign(model="resnet18", mean=[0.9], fake_class=0))
    assert told.load().mean == (0.1, 0.2, 0.3) and torch.equal(said(told.load(), pictures), said(model, pictures))
    assert "trained here, so model, mean, fake_class as told are not for it" in told.assumptions(detector)[0]
    assert not find_one_trained(tmp_path / "moved.safetensors", Foreign(model=NAME)).assumptions(detector)


def test_a_file_beside_the_configuration_of_another_project_is_foreign(tmp_path):
    (tmp_path / "config.yaml").write_text("some: thing")
    save_weights(Detector(NAME, 32), tmp_path / "ck" / "model.safetensors")
    assert find_one_trained(tmp_path / "ck" / "model.safetensors").architecture == NAME


@pytest.mark.parametrize("note", ["x", "[1]", "{", '{"name": "resnet18"}'])
def test_a_note_of_other_words_is_no_note(tmp_path, note):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"add_ops": note})
    with pytest.raises(ValueError, match="its timm model is needed"):
        find_trained(tmp_path / "a.safetensors")


def test_a_file_without_a_two_class_head_is_no_detector(tmp_path):
    torch.save(timm.create_model(NAME, num_classes=10).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no two-class head, so the model is not a detector yet"):
        find_one_trained(tmp_path / "a.pth", Foreign(model=NAME)).load()


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a run, the folder of a model"):
        find_trained(tmp_path)
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="its timm model is needed: model=NAME"):
        find_trained(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"timm knows no 'resnett18'; near it: .*resnet18"):
        find_one_trained(tmp_path / "a.pth", Foreign(model="resnett18")).load()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"mean": [0.1, 0.2]}, "mean: expected one number or three"),
        ({"std": [0.0]}, "std: expected numbers above 0"),
        ({"mean": [float("nan")]}, "mean: expected one number or three"),
        ({"image_size": 0}, "image_size: expected at least 1"),
    ],
)
def test_bad_settings_are_named(told, message):
    with pytest.raises(ValueError, match=message):
        Foreign(**told)


def test_models_of_a_run_teacher_first(tmp_path):
    config = Config(
        name="r", out=str(tmp_path), teacher_model=NAME, student_model=NAME, image_size=32, students=["none", "add"]
    )
    config.folder.mkdir()
    (config.folder / "config.yaml").write_text(config.to_yaml())
    for role in ("add", "none", "teacher"):
        save_weights(Detector(NAME, 32), config.folder / role / "model.safetensors")
    found = find_trained(config.folder)
    assert [(model.role, model.trained_on) for model in found] == [("teacher", "raw"), ("none", "c40"), ("add", "c40")]
    assert all(model.load().image_size == 32 and model.load().mean == (0.5,) * 3 for model in found)
    with pytest.raises(ValueError, match=r"expected one model, got a run of 3; choose: .*teacher.*none.*add"):
        find_one_trained(config.folder)
    assert find_one_trained(config.folder / "add").path == Path(config.folder / "add" / "model.safetensors")
    (config.folder / "config.yaml").write_text(replace(config, student_model="test_resnet").to_yaml())
    with pytest.raises(ValueError, match="missing or of another shape"):
        find_one_trained(config.folder / "add").load()
