"""What a student learns from its teacher beside the labels.

A distiller is called with ``(student_features, teacher_features, student_logits, teacher_logits, labels)`` and returns
its weighted loss terms by name. It is an ``nn.Module``, so that it may own trained parts (adapters), which are not
exported with the student.
``DISTILLERS`` maps names to factories ``(config, student_channels, teacher_channels) -> nn.Module``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from add_ops import ADDLoss, FrequencyAttentionLoss, MultiViewLoss

from .config import Config


class NoDistillation(nn.Module):
    """Cross-entropy alone: no terms, and no teacher is run."""

    needs_teacher = False

    def forward(self, *_: Tensor | list[Tensor]) -> dict[str, Tensor]:
        return {}


class ADD(nn.Module):
    """Frequency and multi-view attention distillation (Le & Woo 2022).

    The frequency term compares maps channel by channel and pixel by pixel: where channels differ a trained 1×1
    convolution adapts the student's map, where sizes differ it is resized. The multi-view term needs neither.
    """

    needs_teacher = True

    def __init__(self, config: Config, student_channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__()
        layers = len(student_channels)
        self.adapters = nn.ModuleList(
            nn.Conv2d(s, t, 1, bias=False) if weight * config.frequency_scale and s != t else nn.Identity()
            for s, t, weight in zip(student_channels, teacher_channels, config.frequency_weights, strict=True)
        )
        self.weights = config.frequency_weights
        off = [0.0] * layers
        frequency = FrequencyAttentionLoss(gamma=config.frequency_gamma, distance=config.distance)
        multi_view = MultiViewLoss(
            views=config.views,
            bins=config.bins,
            gamma=config.attention_gamma,
            eta=config.contrast,
            margin=config.margin,
            coordinates=config.coordinates,
        )
        if config.frequency_scale and any(self.weights):
            self.frequency = ADDLoss(self.weights, off, frequency=frequency, frequency_scale=config.frequency_scale)
        if config.multi_view_scale and any(config.multi_view_weights):
            scale = config.multi_view_scale
            self.multi_view = ADDLoss(off, config.multi_view_weights, multi_view=multi_view, multi_view_scale=scale)

    def adapt(self, student: Tensor, teacher: Tensor, layer: int) -> Tensor:
        """The student's map of a layer in the teacher's channels and size: ``(B, C_T, H_T, W_T)``."""
        adapted = self.adapters[layer](student)
        if adapted.shape[2:] != teacher.shape[2:]:
            adapted = F.interpolate(adapted, teacher.shape[2:], mode="bilinear", align_corners=False)
        return adapted

    def forward(
        self,
        student_features: list[Tensor],
        teacher_features: list[Tensor],
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        pairs = list(zip(student_features, teacher_features, strict=True))
        if hasattr(self, "frequency"):
            adapted = [self.adapt(s, t, i) if self.weights[i] else None for i, (s, t) in enumerate(pairs)]
            terms |= self.frequency.terms(adapted, teacher_features, labels)
        if hasattr(self, "multi_view"):
            terms |= self.multi_view.terms(student_features, teacher_features, labels)
        return terms


DISTILLERS: dict[str, Callable[[Config, list[int], list[int]], nn.Module]] = {
    "none": lambda config, student_channels, teacher_channels: NoDistillation(),
    "add": ADD,
}
