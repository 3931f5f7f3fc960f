"""What a student learns from its teacher beside the labels: ADD, its two halves, and the baselines of the field.

A distiller is called with ``(student_features, teacher_features, student_logits, teacher_logits, labels)`` and returns
its weighted loss terms by name. It is an ``nn.Module``, so that it may own trained parts (adapters), which are not
exported with the student.
``DISTILLERS`` maps names to factories ``(config, student_channels, teacher_channels) -> nn.Module``. The weights of the
baselines are those of RepDistiller (Tian, Krishnan & Isola, ICLR 2020) where it has the method; ``distillation_scale``
multiplies the terms of whichever method is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from focal_frequency_loss import FocalFrequencyLoss
from torch import Tensor, nn

from add_ops import ADDLoss, FrequencyAttentionLoss, MultiViewLoss
from add_ops.add_loss import Adapter

from ..config import Config


class NoDistillation(nn.Module):
    """Cross-entropy alone: no terms, and no teacher is run."""

    needs_teacher = False

    def forward(self, *_: Tensor | list[Tensor]) -> dict[str, Tensor]:
        return {}


class ADD(nn.Module):
    """Frequency and multi-view attention distillation (Le & Woo 2022) with the weights of the configuration."""

    needs_teacher = True

    def __init__(self, config: Config, student_channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__()
        self.loss = ADDLoss(
            config.frequency_weights,
            config.multi_view_weights,
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            frequency=FrequencyAttentionLoss(gamma=config.frequency_gamma, distance=config.distance),
            multi_view=MultiViewLoss(
                views=config.views,
                bins=config.bins,
                gamma=config.attention_gamma,
                eta=config.contrast,
                margin=config.margin,
                coordinates=config.coordinates,
                slicing=config.slicing,
                sampling=config.sampling,
            ),
            frequency_scale=config.frequency_scale,
            multi_view_scale=config.multi_view_scale,
        )

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], _s: Tensor, _t: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        return self.loss.terms(student, teacher, labels)


class KnowledgeDistillation(nn.Module):
    """``T² · KL(teacher || student)`` of the softened predictions, T = 4, weight 1 (Hinton, Vinyals & Dean 2015)."""

    needs_teacher = True
    temperature = 4.0

    def forward(self, _s: list[Tensor], _t: list[Tensor], student: Tensor, teacher: Tensor, _: Tensor) -> dict:
        log_student, log_teacher = ((logits.float() / self.temperature).log_softmax(1) for logits in (student, teacher))
        divergence = F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
        return {"kd": self.temperature**2 * divergence}


class FitNet(nn.Module):
    """Mean squared error of the second stage's adapted map, the hint; weight 100 (Romero et al., ICLR 2015)."""

    needs_teacher = True
    weight = 100.0

    def __init__(self, student_channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__()
        self.adapter = Adapter(student_channels[1], teacher_channels[1])

    def forward(self, student: list[Tensor], teacher: list[Tensor], *_: Tensor) -> dict[str, Tensor]:
        return {"fitnet": self.weight * F.mse_loss(self.adapter(student[1], teacher[1]).float(), teacher[1])}


class AttentionTransfer(nn.Module):
    """Squared distance of the maps of channel energy, each of unit length, at stages 2 to 4; weight 1000, mean over
    pixels (Zagoruyko & Komodakis, ICLR 2017). Channels may differ; a larger map is averaged to the smaller one's size.
    """

    needs_teacher = True
    weight = 1000.0

    @staticmethod
    def attention(features: Tensor, size: tuple[int, int]) -> Tensor:
        """Energy over channels ``(B, H·W)``, of unit length in each sample."""
        return F.normalize(F.adaptive_avg_pool2d(features.float(), size).square().mean(1).flatten(1))

    def forward(self, student: list[Tensor], teacher: list[Tensor], *_: Tensor) -> dict[str, Tensor]:
        terms = {}
        for stage in (1, 2, 3):
            size = tuple(map(min, student[stage].shape[2:], teacher[stage].shape[2:]))
            s, t = self.attention(student[stage], size), self.attention(teacher[stage], size)
            terms[f"at/layer{stage + 1}"] = self.weight * F.mse_loss(s, t)
        return terms


class NonLocal(nn.Module):
    """Mean squared error of the non-local responses at stages 2 to 4, weight 1 (Zhang & Ma, ICLR 2021).

    The response of a pixel is the mean of all pixels' features, weighted by the softmax of their inner products with
    its own (Wang et al., CVPR 2018), without learned projections, which the student could shrink to hide a distance.
    """

    needs_teacher = True
    stages = (1, 2, 3)

    def __init__(self, student_channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(Adapter(student_channels[i], teacher_channels[i]) for i in self.stages)

    @staticmethod
    def response(features: Tensor) -> Tensor:
        pixels = features.float().flatten(2).mT
        return F.scaled_dot_product_attention(pixels, pixels, pixels)

    def forward(self, student: list[Tensor], teacher: list[Tensor], *_: Tensor) -> dict[str, Tensor]:
        terms = {}
        for stage, adapter in zip(self.stages, self.adapters, strict=True):
            adapted = adapter(student[stage], teacher[stage])
            terms[f"nl/layer{stage + 1}"] = F.mse_loss(self.response(adapted), self.response(teacher[stage]))
        return terms


class FocalFrequency(nn.Module):
    """Focal frequency loss of the adapted maps at stages 2 to 4, α = 1, weight 1 (Jiang et al., ICCV 2021), by the
    authors' package; its own checks wait for the device once per stage.
    """

    needs_teacher = True
    stages = (1, 2, 3)

    def __init__(self, student_channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(Adapter(student_channels[i], teacher_channels[i]) for i in self.stages)
        self.loss = FocalFrequencyLoss()

    def forward(self, student: list[Tensor], teacher: list[Tensor], *_: Tensor) -> dict[str, Tensor]:
        terms = {}
        for stage, adapter in zip(self.stages, self.adapters, strict=True):
            adapted = adapter(student[stage], teacher[stage])
            terms[f"ffl/layer{stage + 1}"] = self.loss(adapted.float(), teacher[stage])
        return terms


DISTILLERS: dict[str, Callable[[Config, list[int], list[int]], nn.Module]] = {
    "none": lambda config, student, teacher: NoDistillation(),
    "kd": lambda config, student, teacher: KnowledgeDistillation(),
    "fitnet": lambda config, student, teacher: FitNet(student, teacher),
    "at": lambda config, student, teacher: AttentionTransfer(),
    "nl": lambda config, student, teacher: NonLocal(student, teacher),
    "ffl": lambda config, student, teacher: FocalFrequency(student, teacher),
    "fr": lambda config, student, teacher: ADD(replace(config, multi_view_scale=0.0), student, teacher),
    "mv": lambda config, student, teacher: ADD(replace(config, frequency_scale=0.0), student, teacher),
    "add": ADD,
    "mv_points": lambda config, *channels: DISTILLERS["mv"](replace(config, slicing="points"), *channels),
    "add_points": lambda config, *channels: ADD(replace(config, slicing="points"), *channels),
}
