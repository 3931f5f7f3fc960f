"""A training step of ResNet50 at 128 px with Adam: without distillation, and with ADD's losses by several providers.

In float32 on the CPU; on a GPU as one trains there, under bfloat16 autocast with channels_last features. The teacher's
features are computed beforehand: its forward pass is not counted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import add_ops

from . import plain
from .entry import REHEARSAL, compiled_backend
from .measure import Row, checked, interleaved

VIEWS = 2 if REHEARSAL else 12
NAME, SHAPE = "training_step", "ResNet50, 128 px"


def _plain_frequency(student: Tensor, teacher: Tensor) -> Tensor:
    return plain.frequency_attention_loss(student.float(), teacher.float())


def _plain_multi_view(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    views = add_ops.sample_views(VIEWS, device=student.device)
    return plain.multi_view_loss(student.float(), teacher.float(), labels, views)


def _forward(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    features = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        features.append(x := stage(x))
    return features, model.fc(model.avgpool(x).flatten(1))


def _small() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2)


class Steps:
    """``run(variant)`` is one step; ``"none"`` is the step without distillation losses."""

    def __init__(self, device: torch.device, batch: int) -> None:
        torch.manual_seed(0)
        self.device = device
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        side = 16 if REHEARSAL else 128
        self.images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=layout)
        self.labels = torch.arange(batch, device=device) % 2
        self.model, teacher = (
            (_small() if REHEARSAL else torchvision.models.resnet50(num_classes=2)).to(device, memory_format=layout)
            for _ in range(2)
        )
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=2e-4)
        with (
            torch.no_grad(),
            self.autocast(),
        ):  # normalised by the batch: untrained statistics would let the features explode
            self.teacher, self.student = (_forward(model, self.images)[0] for model in (teacher, self.model))
        ours = add_ops.ADDLoss(multi_view=add_ops.MultiViewLoss(views=VIEWS))
        by_plain = add_ops.ADDLoss(frequency=_plain_frequency, multi_view=_plain_multi_view)
        available = [
            name for name in ("reference", compiled_backend(device)) if add_ops.backends()[name] == "available"
        ]
        self.losses = {**{name: (ours, name) for name in available}, "plain": (by_plain, "reference")}
        self.variants = ["none", *self.losses]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def run(self, variant: str) -> None:
        self.optimiser.zero_grad()
        module, backend = self.losses.get(variant, (None, None))
        context: AbstractContextManager[None] = add_ops.use_backend(backend) if backend else nullcontext()
        with context:
            with self.autocast():
                features, logits = _forward(self.model, self.images)
                loss = F.cross_entropy(logits, self.labels)
                if module is not None:
                    loss = loss + module(features, self.teacher, self.labels)
            loss.backward()
        self.optimiser.step()

    def losses_alone(self, variant: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The distillation losses and their gradients for the three layers that have one, on the first features."""
        module, backend = self.losses[variant]
        student = [x.to(dtype).detach().requires_grad_() for x in self.student]
        teacher = [x.to(dtype) for x in self.teacher]
        with add_ops.use_backend(backend):
            loss = module(student, teacher, self.labels)
            gradients = torch.autograd.grad(loss, student[1:])
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    def check(self, variant: str) -> list[float]:
        torch.manual_seed(1)
        expected = self.losses_alone("reference", torch.float64)
        torch.manual_seed(1)
        return checked(zip(self.losses_alone(variant), expected, strict=True))


def measure_step(device: torch.device, batch: int, rounds: int) -> list[Row]:
    """Rows of the step by variant, none first."""
    steps = Steps(device, batch)
    shape = SHAPE + (", bfloat16 autocast" if device.type == "cuda" else "")
    rows = {variant: Row(NAME, shape, variant, {"batch": batch}) for variant in steps.variants}
    passed = [
        name for name in steps.variants if name == "none" or rows[name].check(lambda name=name: steps.check(name))
    ]
    runs = {variant: lambda _, variant=variant: steps.run(variant) for variant in passed}
    for variant, timing in interleaved(runs, device, budget=float("inf"), lead="none", rounds=rounds).items():
        rows[variant].timing = timing
    return list(rows.values())
