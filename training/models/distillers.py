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

from ..options import Config


class NoDistillation(nn.Module):
    """Cross-entropy alone: no terms, and no teacher is run."""

    needs_teacher = False

    def forward(self, *_: Tensor | list[Tensor]) -> dict[str, Tensor]:
        return {}


class Adapters(nn.Module):
    """The student's maps in the teacher's shape: a trained 1×1 convolution for the channels, resizing for the sizes.

    Args:
        student_channels, teacher_channels: of each stage.
        weights: of each stage; where 0, nothing is adapted and ``None`` stands in the list.
    """

    def __init__(self, student_channels: list[int], teacher_channels: list[int], weights: list[float]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(s, t, 1, bias=False) if weight and s != t else nn.Identity()
            for s, t, weight in zip(student_channels, teacher_channels, weights, strict=True)
        )
        self.weights = weights

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> list[Tensor | None]:
        return [
            self._adapt(convolution, s, t) if weight else None
            for convolution, s, t, weight in zip(self.convolutions, student, teacher, self.weights, strict=True)
        ]

    def _adapt(self, convolution: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        adapted = convolution(student)
        if adapted.shape[2:] != teacher.shape[2:]:
            adapted = F.interpolate(adapted, teacher.shape[2:], mode="bilinear", align_corners=False)
        return adapted


class ADD(nn.Module):
    """Frequency and multi-view attention distillation (Le & Woo 2022).

    The frequency term compares maps channel by channel and pixel by pixel: where channels differ a trained 1×1
    convolution adapts the student's map, where sizes differ it is resized. The multi-view term needs neither.
    """

    needs_teacher = True

    def __init__(self, config: Config, student_channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__()
        layers = len(student_channels)
        frequency_weights = config.frequency_weights if config.frequency_scale else [0.0] * layers
        self.adapters = Adapters(student_channels, teacher_channels, frequency_weights)
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
        if any(frequency_weights):
            self.frequency = ADDLoss(
                frequency_weights, off, frequency=frequency, frequency_scale=config.frequency_scale
            )
        if config.multi_view_scale and any(config.multi_view_weights):
            scale = config.multi_view_scale
            self.multi_view = ADDLoss(off, config.multi_view_weights, multi_view=multi_view, multi_view_scale=scale)

    def forward(
        self,
        student_features: list[Tensor],
        teacher_features: list[Tensor],
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if hasattr(self, "frequency"):
            adapted = self.adapters(student_features, teacher_features)
            terms |= self.frequency.terms(adapted, teacher_features, labels)
        if hasattr(self, "multi_view"):
            terms |= self.multi_view.terms(student_features, teacher_features, labels)
        return terms


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
        self.adapters = Adapters(student_channels, teacher_channels, [0.0, 1.0, 0.0, 0.0])

    def forward(self, student: list[Tensor], teacher: list[Tensor], *_: Tensor) -> dict[str, Tensor]:
        return {"fitnet": self.weight * F.mse_loss(self.adapters(student, teacher)[1].float(), teacher[1])}


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
        self.adapters = Adapters(student_channels, teacher_channels, [float(i in self.stages) for i in range(4)])

    @staticmethod
    def response(features: Tensor) -> Tensor:
        pixels = features.float().flatten(2).mT
        return F.scaled_dot_product_attention(pixels, pixels, pixels)

    def forward(self, student: list[Tensor], teacher: list[Tensor], *_: Tensor) -> dict[str, Tensor]:
        adapted = self.adapters(student, teacher)
        pairs = {stage: (self.response(adapted[stage]), self.response(teacher[stage])) for stage in self.stages}
        return {f"nl/layer{stage + 1}": F.mse_loss(*pair) for stage, pair in pairs.items()}


class FocalFrequency(nn.Module):
    """Focal frequency loss of the adapted maps at stages 2 to 4, α = 1, weight 1 (Jiang et al., ICCV 2021), by the
    authors' package; its own checks wait for the device once per stage.
    """

    needs_teacher = True
    stages = (1, 2, 3)

    def __init__(self, student_channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__()
        self.adapters = Adapters(student_channels, teacher_channels, [float(i in self.stages) for i in range(4)])
        self.loss = FocalFrequencyLoss()

    def forward(self, student: list[Tensor], teacher: list[Tensor], *_: Tensor) -> dict[str, Tensor]:
        adapted = self.adapters(student, teacher)
        return {f"ffl/layer{stage + 1}": self.loss(adapted[stage].float(), teacher[stage]) for stage in self.stages}


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
}
