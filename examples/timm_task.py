"""ADD as a training task of timm (``timm.task``), between any two of its networks; here it asks: is a crop upside down?

``python examples/timm_task.py [teacher student steps result.png]``; in earnest, with a teacher that has been trained.
"""

import sys

import pandas
import skimage
import timm
import torch
from timm.task import FeatureDistillationTask
from timm.task.distillation import FeatureDistillationTrainableModule
from torch import Tensor, nn

import add_ops

TEACHER, STUDENT, STEPS, RESULT = sys.argv[1:] or ("resnet10t", "regnetx_002", "40", "timm_task.png")


class Tapped(FeatureDistillationTrainableModule):  # the student and, as its projection, the loss with its adapters
    def forward(self, images: Tensor, targets: list[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        last, maps = self.student.forward_intermediates(images)
        return self.student.forward_head(last), self.projection.terms(maps[-4:], targets, labels)


class ADDTask(FeatureDistillationTask):  # how to save, average, evaluate and distribute it: see the base class
    def __init__(self, student: nn.Module, teacher: nn.Module, **options: object) -> None:
        super().__init__(student, teacher, **options)
        s, t = ([stage["num_chs"] for stage in model.feature_info[-4:]] for model in (student, teacher))
        self.trainable_module = Tapped(student, add_ops.ADDLoss(student_channels=s, teacher_channels=t))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # (B, 2, 3, H, W), raw and compressed; (B,)
        with torch.no_grad():
            targets = self.teacher.model.forward_intermediates(input[:, 0], intermediates_only=True)[-4:]
        output, terms = self.trainable_module(input[:, 1], targets, target)
        task_loss = self.criterion(output, target)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * sum(terms.values())
        return {"loss": loss, "output": output, "task_loss": task_loss, **terms}


torch.manual_seed(0)
crops = torch.from_numpy(skimage.data.astronaut()).unfold(0, 64, 64).unfold(1, 64, 64).flatten(0, 1) / 127.5 - 1
raw, target = torch.cat([crops, crops.flip(2)]), torch.arange(128) // 64
pairs = torch.stack([raw, raw[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)], 1)  # half as sharp
task = ADDTask(*(timm.create_model(name, num_classes=2) for name in (STUDENT, TEACHER)), distill_loss_weight=1e-3)
optimizer = torch.optim.Adam(task.train().get_trainable_module().parameters(), lr=1e-3)
history = []
for _ in range(int(STEPS)):
    chosen = torch.randperm(128)[:32]
    found = task(pairs[chosen], target[chosen])
    optimizer.zero_grad()
    found["loss"].backward()
    optimizer.step()
    history.append({name: value.item() for name, value in found.items() if name != "output"})

means = pandas.DataFrame(history).rolling(8, min_periods=1).mean()
axis = (means / means.iloc[0]).plot(title="smoothed, relative to the first step", xlabel="step", ylim=(0, None))
axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
axis.figure.savefig(RESULT, dpi=100, bbox_inches="tight")
