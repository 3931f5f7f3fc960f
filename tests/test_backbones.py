"""Detectors of every kind of timm model: what they give, what is trained, what is refused and with which words."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from training.models.detector import Detector, pretrained_setting

pytestmark = pytest.mark.usefixtures("one_thread")


def trained_by(loss, model):
    model.zero_grad()
    loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


LINEAR = {"backbone.fc.weight", "backbone.fc.bias"}


@pytest.mark.parametrize(
    ("name", "size", "head", "channels", "sides"),
    [
        ("resnet18", 64, LINEAR, [64, 128, 256, 512], [16, 8, 4, 2]),
        ("resnet50", 64, LINEAR, [256, 512, 1024, 2048], [16, 8, 4, 2]),
        ("legacy_xception", 64, LINEAR, [128, 256, 728, 2048], [15, 8, 4, 2]),
        ("efficientnet_b0", 64, "backbone.classifier", [24, 40, 112, 320], [16, 8, 4, 2]),
        ("convnext_atto", 64, "backbone.head.fc", [40, 80, 160, 320], [16, 8, 4, 2]),
        # heads that are convolutions
        ("resnetv2_18", 64, "backbone.head.fc", [64, 128, 256, 512], [16, 8, 4, 2]),
        ("dpn48b", 64, "backbone.classifier", [144, 320, 512, 832], [16, 8, 4, 2]),
        ("dla46x_c", 64, "backbone.fc", [64, 64, 128, 256], [16, 8, 4, 2]),
        # two heads, whose logits are averaged
        ("deit_tiny_distilled_patch16_224", 64, ("backbone.head", "backbone.head_dist"), [192] * 4, [4] * 4),
        # made for the size of their images
        ("vit_tiny_patch16_224", 64, "backbone.head", [192] * 4, [4] * 4),
        ("swin_tiny_patch4_window7_224", 64, "backbone.head.fc", [96, 192, 384, 768], [16, 8, 4, 2]),
    ],
)
def test_four_taps_and_two_logits_that_train(name, size, head, channels, sides):
    heads = head if isinstance(head, set | tuple) else (head,)
    heads = heads if isinstance(heads, set) else {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    model, images = Detector(name, size), torch.randn(2, 3, size, size)
    assert model.training and model.channels == channels

    model.eval()
    with torch.no_grad():
        features, penultimate, logits = model(images)
        expected = model.backbone(images)
    assert [tuple(f.shape) for f in features] == [(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert penultimate.shape == (2, model.backbone.num_features) and torch.equal(logits, expected)

    model.train()
    features, penultimate, logits = model(images, head_only=True)
    assert not penultimate.requires_grad and not any(f.requires_grad for f in features)
    assert trained_by(logits.sum(), model) == heads
    trained = trained_by(model(images)[2].square().sum(), model)
    assert heads < trained and len(trained) > 0.9 * len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "efficientformer_l1",
            64,
            "image_size: 'efficientformer_l1' does not run at 64, .* that works is 224; got: The",
        ),
        (
            "maxvit_pico_rw_256",
            100,
            "image_size: 'maxvit_pico_rw_256' does not run at 100, .* that works is 64; got: height",
        ),
        ("efficientvit_m0", 64, "model: 'efficientvit_m0' cannot be a detector here: expected at least four stages"),
        ("volo_d1_224", 64, "model: 'volo_d1_224' cannot be a detector here: its logits come from more than"),
        ("resnet1888", 64, r"model: timm knows no 'resnet1888'; near it: \['resnet"),
        ("resnet18.imaginary", 64, r"model: Invalid pretrained tag \(imaginary\) for resnet18"),
    ],
)
def test_what_cannot_be_a_detector_is_refused_in_one_line(name, size, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        Detector(name, size)
    assert "\n" not in str(caught.value)


def test_making_a_detector_takes_no_more_random_numbers_than_its_backbone():
    torch.manual_seed(5)
    backbone = timm.create_model("test_byobnet", num_classes=2)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    model = Detector("test_byobnet", 32)
    assert torch.equal(torch.get_rng_state(), after)
    own = model.backbone.state_dict()  # with the counters and means of batch normalisation
    assert all(torch.equal(value, own[name]) for name, value in backbone.state_dict().items())


def test_weights_from_a_local_file(tmp_path):
    source = Detector("test_resnet", 32)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": source.backbone.state_dict()}, tmp_path / "weights.pth")
    for path in (tmp_path / "weights.safetensors", tmp_path / "weights.pth"):
        loaded, expected = Detector("test_resnet", 32, weights=path), source.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        assert loaded.fit.complete
    with pytest.raises(ValueError, match="missing or of another shape"):
        Detector("resnet18", 32, weights=tmp_path / "weights.pth")


def test_the_class_of_fakes_in_a_file_becomes_class_1(tmp_path):
    source = Detector("test_byobnet", 32).eval()
    torch.save(source.backbone, tmp_path / "whole.pth")
    model = Detector("test_byobnet", 32, weights=tmp_path / "whole.pth", fake_class=0).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images)[2], source(images)[2].flip(1))


def test_pixels_of_mean_and_deviation_one_half_are_exact():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(2, 16, 8, 3)
    pixels = Detector("test_byobnet", 32).pixels(images)
    assert torch.equal(pixels, images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1))
    assert pixels.dtype == torch.float32 and pixels.is_contiguous(memory_format=torch.channels_last)


def test_pixels_are_normalised_by_channel_and_the_images_kept():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    kept, model = images.clone(), Detector("test_byobnet", 32, mean=mean, std=std)
    expected = (images.numpy() / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(model.pixels(images), expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)
    assert torch.equal(images, kept) and model.state_dict().keys() == Detector("test_byobnet", 32).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5)}, r"mean: expected a number or three, got \(0.5, 0.5\)"),
        ({"std": [0.2, 0.0, 0.2]}, r"std: expected numbers above 0, got \[0.2, 0.0, 0.2\]"),
    ],
)
def test_normalisation_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Detector("test_byobnet", 32, **options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)),
        ("legacy_xception", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 299)),
    ],
)
def test_setting_of_the_pretrained_weights(name, expected):
    assert pretrained_setting(name) == expected


def test_the_head_is_what_timm_calls_the_classifier():
    assert isinstance(Detector("test_resnet", 32).head, nn.Linear)
