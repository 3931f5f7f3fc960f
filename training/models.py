"""Backbones through timm, tapped at their four stages."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn


class Detector(nn.Module):
    """A timm backbone with a two-class head that also returns the feature maps of its last four stages.

    Args:
        name: timm model with ``forward_intermediates``, e.g. ``resnet18``, ``legacy_xception``, ``efficientnet_b0``.
        pretrained: start from timm's ImageNet weights, which timm downloads.
        weights: local file of weights to start from instead; a head of another size is left out.
    """

    def __init__(self, name: str, *, pretrained: bool = False, weights: str | Path | None = None) -> None:
        super().__init__()
        if not timm.is_model(name):
            nearest = timm.list_models(f"*{name[:5]}*")[:5]
            raise ValueError(f"model: timm knows no '{name}'; near it: {nearest}")
        self.backbone = timm.create_model(name, pretrained=pretrained and weights is None, num_classes=2)
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ValueError(f"model: '{name}' has no forward_intermediates to tap its stages with")
        stages = self.backbone.feature_info
        if len(stages) < 4:
            raise ValueError(f"model: expected at least four stages, '{name}' has {len(stages)}")
        self.taps = list(range(len(stages) - 4, len(stages)))
        self.channels = [stages[tap]["num_chs"] for tap in self.taps]
        if weights is not None:
            self._load_backbone(weights)

    def _load_backbone(self, path: str | Path) -> None:
        own = self.backbone.state_dict()
        state = {name.removeprefix("backbone."): value for name, value in read_weights(path).items()}
        fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
        head = {
            f"{name}.{kind}"
            for name, module in self.backbone.named_modules()
            for kind in ("weight", "bias")
            if module is self.head
        }
        if missing := sorted(set(own) - set(fitting) - head):
            raise ValueError(
                f"weights {path}: {len(missing)} tensors are missing or of another shape, e.g. {missing[0]}"
            )
        self.backbone.load_state_dict(fitting, strict=False)

    @property
    def head(self) -> nn.Module:
        return self.backbone.get_classifier()

    def forward(self, images: Tensor, *, head_only: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run the network.

        Args:
            images: ``(B, 3, H, W)``.
            head_only: no gradient reaches the backbone.

        Returns:
            The four feature maps ``(B, C_l, H_l, W_l)``, the penultimate features ``(B, D)`` and the logits ``(B, 2)``.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not head_only):
            final, features = self.backbone.forward_intermediates(images, indices=self.taps)
            penultimate = self.backbone.forward_head(final, pre_logits=True)
        return features, penultimate, self.head(penultimate)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or torch file (of the latter also one nested under ``state_dict``)."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights: no file '{path}'")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)
