"""ADDLoss: frequency and multi-view attention distillation, summed with weights over the tapped layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ._checks import number
from .frequency_attention.op import FrequencyAttentionLoss
from .multi_view.op import MultiViewLoss


class ADDLoss(nn.Module):
    """The distillation loss of ADD (Le & Woo 2022): ``Σ_l f·a_l·FR(S_l, T_l) + m·b_l·MV(S_l, T_l)``.

    The defaults are the authors' for the four stages of a ResNet. The cross-entropy is the caller's to add.

    Args:
        frequency_weights, multi_view_weights: ``a`` and ``b``, one weight >= 0 per tapped layer, equally many, not
            all 0. A weight of 0 costs nothing: the layer's features are not looked at and may be None.
        frequency, multi_view: the two losses; default those of the paper.
        frequency_scale, multi_view_scale: ``f`` and ``m``, >= 0.

    Raises:
        TypeError, ValueError: weights of unequal number, negative, not finite, or all zero.
    """

    def __init__(
        self,
        frequency_weights: Sequence[float] = (0, 1, 2, 0.25),
        multi_view_weights: Sequence[float] = (0, 0.5, 2.5, 2),
        *,
        frequency: FrequencyAttentionLoss | None = None,
        multi_view: MultiViewLoss | None = None,
        frequency_scale: float = 1.0,
        multi_view_scale: float = 16.0,
    ) -> None:
        super().__init__()
        if len(frequency_weights) != len(multi_view_weights):
            raise ValueError(
                f"multi_view_weights: expected one weight for each of the {len(frequency_weights)} layers of "
                f"frequency_weights, got {len(multi_view_weights)}"
            )
        number("frequency_scale", frequency_scale, at_least=0)
        number("multi_view_scale", multi_view_scale, at_least=0)
        a = [number("frequency_weights", weight, at_least=0) for weight in frequency_weights]
        b = [number("multi_view_weights", weight, at_least=0) for weight in multi_view_weights]
        self.frequency_weights = [frequency_scale * weight for weight in a]
        self.multi_view_weights = [multi_view_scale * weight for weight in b]
        if not any(self.frequency_weights + self.multi_view_weights):
            raise ValueError("frequency_weights: expected a weight above 0 here or in multi_view_weights, got none")
        self.frequency = frequency if frequency is not None else FrequencyAttentionLoss()
        self.multi_view = multi_view if multi_view is not None else MultiViewLoss()

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
            try:
                if weight := self.frequency_weights[index]:
                    result[f"frequency/layer{index + 1}"] = weight * self.frequency(student, teacher)
                if weight := self.multi_view_weights[index]:
                    result[f"multi_view/layer{index + 1}"] = weight * self.multi_view(student, teacher, labels)
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
        return f"frequency_weights={self.frequency_weights}, multi_view_weights={self.multi_view_weights}"
