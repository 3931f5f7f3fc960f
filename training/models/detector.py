"""Detectors of two classes: backbones from timm, tapped at their last four stages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from .weights import Fit, load_into

SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 320, 384)  # among which one that works is looked for


class Detector(nn.Module):
    """A timm model with a two-class head that also returns the feature maps of its last four stages.

    Args:
        name: timm model with ``forward_intermediates``, e.g. ``resnet18``, ``legacy_xception``, ``efficientnet_b0``.
        image_size: side of its images in pixels; models of a fixed size are made for it.
        pretrained: start from timm's ImageNet weights, which timm downloads.
        weights: local file of weights to start from instead; a head of another size is left out.
        mean, std: by which images in [0, 1] are normalised; one number, or one per channel.
        fake_class: the class of fakes in ``weights``; the model's own is 1 in any case.
        prefix: which network of ``weights`` to take, as :func:`~training.models.weights.load_into` takes it.

    Attributes:
        taps: indices of the four stages among those of timm.
        channels: of the four feature maps.
        fit: how ``weights`` fitted; None without.

    Raises:
        ValueError: no such model, one that cannot be a detector or does not take this size, or weights that do not fit.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        *,
        pretrained: bool = False,
        weights: str | Path | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        fake_class: int = 1,
        prefix: str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.image_size = name, image_size
        self.mean, self.std = _per_channel("mean", mean), _per_channel("std", std)
        if min(self.std) <= 0:
            raise ValueError(f"std: expected numbers above 0, got {std}")
        _settings(name)
        pretrained = pretrained and weights is None
        try:
            self.backbone, self.taps, self.channels = _made(name, image_size, pretrained)
        except Exception as error:  # a model of the wrong size fails with whatever its layers happen to say
            raise ValueError(_refusal(name, image_size, pretrained, error)) from error
        self.fit: Fit | None = None
        if weights is not None:
            self.fit = load_into(self.backbone, weights, fake_class=fake_class, prefix=prefix)

    @property
    def head(self) -> nn.Module | tuple[nn.Module, ...]:
        """The classifier; a tuple where the model averages two."""
        return self.backbone.get_classifier()

    def forward(self, images: Tensor, *, head_only: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run the network.

        Args:
            images: ``(B, 3, H, W)`` float, normalised as by :meth:`pixels`.
            head_only: no gradient reaches the backbone.

        Returns:
            The four feature maps ``(B, C_l, H_l, W_l)``, the penultimate features ``(B, D)`` and the logits ``(B, 2)``.
        """
        return _run(self.backbone, self.taps, images, head_only)

    def pixels(self, images: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` float32 on the model's device, normalised, channels last."""
        device = next(self.parameters()).device
        scale, shift = (
            [255 * std for std in self.std],
            [mean / std for mean, std in zip(self.mean, self.std, strict=True)],
        )
        if len({*zip(scale, shift, strict=True)}) == 1:
            scale, shift = scale[0], shift[0]
        else:
            scale, shift = (torch.tensor(values, device=device).view(3, 1, 1) for values in (scale, shift))
        return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(scale).sub_(shift)


def pretrained_setting(name: str) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean, standard deviation and side in pixels of the images that timm's weights of a model were trained with.

    Raises:
        ValueError: timm knows no such model.
    """
    settings = _settings(name)
    return tuple(settings.mean), tuple(settings.std), settings.input_size[-1]


def _settings(name: str) -> timm.models.PretrainedCfg:
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), 5)
        raise ValueError(f"model: timm knows no '{name}'; near it: {nearest}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"model: {error}") from None


def _per_channel(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    values = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),)
    if len(values) not in (1, 3):
        raise ValueError(f"{name}: expected a number or three, got {value}")
    return values * (3 // len(values))


def _created(name: str, image_size: int, pretrained: bool) -> nn.Module:
    size = {"img_size": image_size} if _settings(name).fixed_input_size else {}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=2, **size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, pretrained=pretrained, num_classes=2)


def numbers(name: str, image_size: int) -> int:
    """How many numbers a model consists of, told without the memory for them."""
    with torch.device("meta"):
        return sum(value.numel() for value in _created(name, image_size, False).state_dict().values())


def _made(name: str, image_size: int, pretrained: bool) -> tuple[nn.Module, list[int], list[int]]:
    """The backbone, its taps and their channels, after one forward that shows that it can be a detector."""
    backbone = _created(name, image_size, pretrained)
    if not hasattr(backbone, "forward_intermediates"):
        raise ValueError("it has no forward_intermediates to tap its stages with")
    if (stages := len(backbone.feature_info)) < 4:
        raise ValueError(f"expected at least four stages, it has {stages}")
    taps = list(range(stages - 4, stages))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        images = torch.linspace(-1, 1, 3 * image_size**2).view(1, 3, image_size, image_size)
        features, _, logits = _run(backbone.eval(), taps, images)
        whole = backbone(images)
    backbone.train()
    shapes = [tuple(maps.shape) for maps in features]
    if len(shapes) != 4 or any(len(shape) != 4 for shape in shapes):
        raise ValueError(f"expected four feature maps (B, C, H, W), got {shapes}")
    if logits.shape != (1, 2):
        raise ValueError(f"expected logits (1, 2) of one image, got {tuple(logits.shape)}")
    if not torch.allclose(logits, whole, rtol=1e-3, atol=1e-4):
        raise ValueError("its logits come from more than its last feature map")
    return backbone, taps, [shape[1] for shape in shapes]


def _run(
    backbone: nn.Module, taps: list[int], images: Tensor, head_only: bool = False
) -> tuple[list[Tensor], Tensor, Tensor]:
    with torch.set_grad_enabled(torch.is_grad_enabled() and not head_only):
        final, features = backbone.forward_intermediates(images, indices=taps)
        penultimate = backbone.forward_head(final, pre_logits=True).flatten(1)
    head = backbone.get_classifier()
    plain = isinstance(head, nn.Linear)  # others are convolutions, have layers before them, or are two
    return features, penultimate, head(penultimate) if plain else backbone.forward_head(final)


def _refusal(name: str, image_size: int, pretrained: bool, error: Exception) -> str:
    """Why there is no such detector, and the smallest size at which there is one."""

    @cache
    def failure(size: int) -> str:
        try:
            _made(name, size, pretrained=False)
        except Exception as error:
            return _reason(error)
        return ""

    with torch.random.fork_rng(devices=[]):
        if pretrained and not failure(image_size):
            return f"model: no pretrained weights of '{name}' here, weights=FILE takes a local file: {_reason(error)}"
        own = pretrained_setting(name)[2]
        if reason := failure(own):
            return f"model: '{name}' cannot be a detector here: {reason}"
        smallest = next(size for size in sorted({own, *SIZES} - {image_size}) if not failure(size))
    return (
        f"image_size: '{name}' does not run at {image_size}, the smallest that works is {smallest}; got: "
        f"{_reason(error)}"
    )


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
