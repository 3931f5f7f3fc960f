"""ADDLoss: frequency and multi-view attention distillation, summed with weights over the tapped layers."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import count, floating, number
from .frequency_attention.op import FrequencyAttentionLoss
from .multi_view.op import MultiViewLoss


class Adapter(nn.Module):
    """A student's map in its teacher's shape: a trained 1×1 convolution where the channels differ, then bilinear
    resizing where the sizes do.

    Args:
        student_channels, teacher_channels: S and T, >= 1. ``weight`` is ``(T, S, 1, 1)``, or None where S = T.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.channels = {"student": student_channels, "teacher": teacher_channels}
        differ = student_channels != teacher_channels
        self.weight = nn.Conv2d(student_channels, teacher_channels, 1, bias=False).weight if differ else None

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(B, S, H, W)`` in the channels and size of the teacher's ``(B, T, H', W')``; float32 or wider if convolved.

        Raises:
            TypeError, ValueError: a map that is not dense floating point, or has other channels than were said.
        """
        for name, features in (("student", student), ("teacher", teacher)):
            floating(name, features, "B C H W")
            if features.shape[1] != self.channels[name]:
                raise ValueError(
                    f"{name}: expected {self.channels[name]} channels, see {name}_channels, got {features.shape[1]}"
                )
        if self.weight is not None:
            dtype = torch.promote_types(student.dtype, self.weight.dtype)  # half-precision maps outside of autocast
            student = F.conv2d(student.to(dtype), self.weight.to(dtype))
        if student.shape[2:] != teacher.shape[2:]:
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
        return student

    def extra_repr(self) -> str:
        return f"student_channels={self.channels['student']}, teacher_channels={self.channels['teacher']}"


def _per_layer(name: str, values: Sequence[float], layers: int | None = None) -> Sequence[float]:
    if not isinstance(values, Sized):
        raise TypeError(f"{name}: expected one number per layer, got {type(values).__name__}")
    if layers is not None and len(values) != layers:
        raise ValueError(
            f"{name}: expected one number for each of the {layers} layers of frequency_weights, got {len(values)}"
        )
    return values


class ADDLoss(nn.Module):
    """The distillation loss of ADD (Le & Woo 2022): ``Σ_l f·a_l·FR(S_l, T_l) + m·b_l·MV(S_l, T_l)``.

    The defaults are the authors' for the four stages of a ResNet. The cross-entropy is the caller's to add.

    FR needs maps of equal shape: where the channels are given, the student's maps are adapted for it, by trained 1×1
    convolutions (this module's ``parameters()``, for the optimiser) and by resizing. MV takes the student's own maps,
    which may differ in channels and size; with ``slicing="points"`` it needs equal shapes, too, and takes the adapted.

    Args:
        frequency_weights, multi_view_weights: ``a`` and ``b``, one weight >= 0 per tapped layer, equally many, not
            all 0. A weight of 0 costs nothing: the layer's features are not looked at and may be None.
        student_channels, teacher_channels: of each layer, integers >= 1; both or neither.
        frequency, multi_view: the two losses; default those of the paper.
        frequency_scale, multi_view_scale: ``f`` and ``m``, >= 0.

    Raises:
        TypeError, ValueError: weights of unequal number, negative, not finite, or all zero; channels that are not one
            positive integer per layer.
    """

    def __init__(
        self,
        frequency_weights: Sequence[float] = (0, 1, 2, 0.25),
        multi_view_weights: Sequence[float] = (0, 0.5, 2.5, 2),
        *,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        frequency: FrequencyAttentionLoss | None = None,
        multi_view: MultiViewLoss | None = None,
        frequency_scale: float = 1.0,
        multi_view_scale: float = 16.0,
    ) -> None:
        super().__init__()
        layers = len(_per_layer("frequency_weights", frequency_weights))
        _per_layer("multi_view_weights", multi_view_weights, layers)
        number("frequency_scale", frequency_scale, at_least=0)
        number("multi_view_scale", multi_view_scale, at_least=0)
        a = [number("frequency_weights", weight, at_least=0) for weight in frequency_weights]
        b = [number("multi_view_weights", weight, at_least=0) for weight in multi_view_weights]
        self._given = {"frequency_weights": a, "multi_view_weights": b}
        self._given |= {"frequency_scale": frequency_scale, "multi_view_scale": multi_view_scale}
        self.frequency_weights = [frequency_scale * weight for weight in a]
        self.multi_view_weights = [multi_view_scale * weight for weight in b]
        if not any(self.frequency_weights + self.multi_view_weights):
            raise ValueError(
                "frequency_weights: expected a scaled weight above 0 here or in multi_view_weights, got none"
            )
        self.frequency = frequency if frequency is not None else FrequencyAttentionLoss()
        self.multi_view = multi_view if multi_view is not None else MultiViewLoss()
        self._adapts_both = isinstance(multi_view, MultiViewLoss) and multi_view.slicing == "points"
        self.adapters = nn.ModuleDict()
        if student_channels is None and teacher_channels is None:
            return
        student, teacher = (
            [count(name, channels) for channels in _per_layer(name, values, layers)]
            for name, values in (("student_channels", student_channels), ("teacher_channels", teacher_channels))
        )
        self._given |= {"student_channels": student, "teacher_channels": teacher}
        for index in range(layers):
            if self.frequency_weights[index] or (self._adapts_both and self.multi_view_weights[index]):
                self.adapters[f"layer{index + 1}"] = Adapter(student[index], teacher[index])

    def terms(
        self,
        student_features: Sequence[Tensor | None],
        teacher_features: Sequence[Tensor | None],
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms, each a scalar, by name: ``"frequency/layer2"``, ``"multi_view/layer3"``, … from layer 1.

        Args:
            student_features, teacher_features: one ``(B, C, H, W)`` per layer; None where a layer's weights are 0.
            labels: ``(B,)``, integer; None drops the contrastive part.

        Raises:
            TypeError, ValueError: not one feature map per layer, or what the two losses refuse, naming the layer.
        """
        layers = len(self.frequency_weights)
        for name, features in (("student_features", student_features), ("teacher_features", teacher_features)):
            if len(features) != layers:
                raise ValueError(f"{name}: expected {layers} layers, got {len(features)}")
        result: dict[str, Tensor] = {}
        for index, (student, teacher) in enumerate(zip(student_features, teacher_features, strict=True)):
            layer = f"layer{index + 1}"
            try:
                adapted = self.adapters[layer](student, teacher) if layer in self.adapters else student
                if weight := self.frequency_weights[index]:
                    result[f"frequency/{layer}"] = weight * self.frequency(adapted, teacher)
                if weight := self.multi_view_weights[index]:
                    compared = adapted if self._adapts_both else student
                    result[f"multi_view/{layer}"] = weight * self.multi_view(compared, teacher, labels)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {index + 1}: {error}") from error
        return result

    def forward(
        self,
        student_features: Sequence[Tensor | None],
        teacher_features: Sequence[Tensor | None],
        labels: Tensor | None = None,
    ) -> Tensor:
        """The sum of :meth:`terms`, a scalar."""
        return sum(self.terms(student_features, teacher_features, labels).values())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._given.items())
