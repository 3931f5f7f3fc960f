"""Backbones through timm, tapped at their four stages, and the trained ones that a run or a file holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from .config import Config, load
from .weights import Fit, load_into, read_weights

WEIGHTS = "model.safetensors"


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
        self.fit: Fit | None = load_into(self.backbone, weights) if weights is not None else None

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


@dataclass(frozen=True)
class Trained:
    """A trained model on disk.

    Attributes:
        path: its file of weights.
        role: ``teacher``, a distiller's name, or the file's stem.
        architecture: its timm model.
        config: of the run that trained it; None for a file from elsewhere.
    """

    path: Path
    role: str
    architecture: str
    config: Config | None = None

    @property
    def trained_on(self) -> str:
        """The quality of the images it learnt from: ``raw`` for a teacher, ``unknown`` for a file from elsewhere."""
        if self.config is None:
            return "unknown"
        return "raw" if self.role == "teacher" else self.config.compression

    def image_size(self, asked: int | None = None) -> int:
        """Side in pixels of its images: the one asked for, else that of its run.

        Raises:
            ValueError: a file from elsewhere, and no size was asked for.
        """
        if asked is None and self.config is None:
            raise ValueError(f"checkpoint {self.path}: from elsewhere; the size of its images is needed: --image_size")
        return asked or self.config.image_size

    def load(self, device: torch.device | str = "cpu") -> Detector:
        """The model in evaluation mode; of a file from elsewhere, ``fit`` tells how it fitted.

        Raises:
            ValueError: not its weights, or no two-class head among them.
        """
        if self.config is None:
            model = Detector(self.architecture, weights=self.path)
            if not model.fit.head:
                raise ValueError(
                    f"weights {self.path}: no two-class head, so the model is not a detector yet; {model.fit}"
                )
        else:
            model = Detector(self.architecture)
            try:
                model.load_state_dict(read_weights(self.path))
            except RuntimeError as error:
                raise ValueError(f"{self.path}: not the weights of '{self.architecture}': {error}") from error
        return model.to(device, memory_format=torch.channels_last).eval()


def find_trained(path: str | Path, architecture: str | None = None) -> list[Trained]:
    """The trained models that a path holds.

    Args:
        path: the folder of a run (every model of it, the teacher first), the folder of one model, or a file of weights.
        architecture: the timm model of a file that lies in no run.

    Raises:
        ValueError: nothing there, or a file whose architecture is not known.
    """
    path = Path(path)
    if path.is_file() and not (path.name == WEIGHTS and _saved_config(path.parent)):
        if architecture is None:
            raise ValueError(f"checkpoint {path}: a file from elsewhere; its timm model is needed: --model NAME")
        return [Trained(path, path.stem, architecture)]
    folder = path.parent if path.is_file() else path
    if (folder / WEIGHTS).is_file() and (saved := _saved_config(folder)):
        return [_of_run(folder / WEIGHTS, load(saved))]
    if (folder / "config.yaml").is_file():
        config = load(folder / "config.yaml")
        found = {file.parent.name: _of_run(file, config) for file in folder.glob(f"*/{WEIGHTS}")}
        if "teacher" not in found and config.teacher_checkpoint and Path(config.teacher_checkpoint).is_file():
            found["teacher"] = Trained(Path(config.teacher_checkpoint), "teacher", config.teacher_model, config)
        order = ["teacher", *config.students, *sorted(found)]
        if found:
            return sorted(found.values(), key=lambda model: order.index(model.role))
    raise ValueError(
        f"checkpoint {path}: expected the folder of a run, the folder of a model ({WEIGHTS} in a run), or a file of "
        f"weights; found none"
    )


def find_one_trained(path: str | Path, architecture: str | None = None) -> Trained:
    """As :func:`find_trained`, where one model is needed; several are an error that names them."""
    found = find_trained(path, architecture)
    if len(found) > 1:
        folders = ", ".join(str(model.path.parent) for model in found)
        raise ValueError(f"checkpoint {path}: expected one model, got a run of {len(found)}; choose: {folders}")
    return found[0]


def _saved_config(folder: Path) -> Path | None:
    file = folder.resolve().parent / "config.yaml"
    return file if file.is_file() else None


def _of_run(file: Path, config: Config) -> Trained:
    role = file.resolve().parent.name
    return Trained(file, role, config.teacher_model if role == "teacher" else config.student_model, config)
