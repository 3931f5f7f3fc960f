"""ADD as a training task of timm (``timm.task``): a subclass that taps the stages of teacher and student.

``python examples/timm_task.py [teacher student steps result.png]``. A task is called with input and target and gives a
dict with ``loss``, ``output`` and what is to be logged; here the input holds each raw image and its compressed twin.
"""

import sys

import matplotlib.pyplot as plt
import skimage
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import Tensor, nn

import add_ops

TEACHER, STUDENT, STEPS, RESULT = sys.argv[1:] or ("resnet18", "mobilenetv3_small_050", "40", "timm_task.png")


def stages(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    last, maps = model.forward_intermediates(images)
    return maps[-4:], model.forward_head(last)


class Distilled(nn.Module):
    """The student and the adapters of its loss in one module, so that optimisers and DDP see both."""

    def __init__(self, student: nn.Module, distil: add_ops.ADDLoss) -> None:
        super().__init__()
        self.student, self.distil = student, distil

    def forward(self, images: Tensor, targets: list[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps, logits = stages(self.student, images)
        return logits, self.distil.terms(maps, targets, labels)


class ADDTask(ClassificationTask):
    """``input`` (B, 2, 3, H, W), raw and compressed; ``target`` (B,)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, weight: float = 1.0, **options: object) -> None:
        probe = torch.zeros(1, 3, 64, 64)
        s, t = ([m.shape[1] for m in stages(model.eval(), probe)[0]] for model in (student, teacher))
        super().__init__(Distilled(student, add_ops.ADDLoss(student_channels=s, teacher_channels=t)), **options)
        self.teacher, self.weight = teacher.requires_grad_(False), weight

    def train(self, mode: bool = True) -> "ADDTask":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        raw, compressed = input.unbind(1)
        output, terms = self.trainable_module(compressed, stages(self.teacher, raw)[0], target)
        task_loss = self.criterion(output, target)
        return {
            "loss": task_loss + self.weight * sum(terms.values()),
            "output": output,
            "task_loss": task_loss,
            **terms,
        }


torch.manual_seed(0)
task = ADDTask(*(timm.create_model(name, num_classes=2) for name in (STUDENT, TEACHER)), weight=1e-3).train()
optimizer = torch.optim.Adam(task.get_trainable_module().parameters(), lr=3e-4)
photographs = [torch.from_numpy(picture.copy()) for picture in (skimage.data.astronaut(), skimage.data.chelsea())]
history = []
for _ in range(int(STEPS)):
    target = torch.arange(16) % 2  # which photograph a crop is of
    corners = torch.randint(0, 200, (16, 2)).tolist()
    raw = torch.stack([photographs[t][y : y + 64, x : x + 64] for t, (y, x) in zip(target, corners, strict=True)])
    raw = raw.permute(0, 3, 1, 2) / 127.5 - 1
    found = task(torch.stack([raw, F.interpolate(F.avg_pool2d(raw, 2), scale_factor=2)], 1), target)
    optimizer.zero_grad()
    found["loss"].backward()
    optimizer.step()
    history.append({name: value.item() for name, value in found.items() if value.ndim == 0})

figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
for name, first in history[0].items():
    axis.plot([row[name] / first for row in history], "k-" if name == "loss" else "-", label=name)
axis.set(title=f"ADDTask, {TEACHER} → {STUDENT}: relative to the first step", xlabel="step", ylim=(0, None))
axis.legend(fontsize=8, ncols=2)
figure.savefig(RESULT, dpi=100)
