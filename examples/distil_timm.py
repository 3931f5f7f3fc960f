"""Distil between any two timm networks in a plain PyTorch loop: the teacher sees raw crops, the student JPEG ones.

``python examples/distil_timm.py [teacher student steps result.png]``; by default a resnet18 teaches a small mobilenet.
Fakes are crops whose left half has the checkerboard that up-sampling leaves. Weights are random, nothing is fetched.
"""

import io
import sys

import matplotlib.pyplot as plt
import numpy as np
import skimage
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import add_ops

TEACHER, STUDENT, STEPS, RESULT = sys.argv[1:] or ("resnet18", "mobilenetv3_small_050", "60", "distil_timm.png")
PHOTOGRAPH, BOARD = torch.from_numpy(skimage.data.astronaut()), (-1) ** torch.arange(64)


def jpeg(image: torch.Tensor) -> torch.Tensor:  # (H, W, 3) uint8
    Image.fromarray(image.numpy()).save(file := io.BytesIO(), "jpeg", quality=30)
    return torch.from_numpy(np.array(Image.open(file)))


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # raw, compressed (B, 3, 64, 64), labels
    labels = torch.arange(size) % 2
    corners = torch.randint(0, 448, (size, 2)).tolist()
    raw = torch.stack([PHOTOGRAPH[y : y + 64, x : x + 64] for y, x in corners]).int()
    raw[:, :, :32] += 10 * (labels.view(-1, 1, 1) * BOARD[:, None] * BOARD[:32])[..., None]
    raw = raw.clamp(0, 255).byte()
    twins = torch.stack([raw, torch.stack([jpeg(image) for image in raw])]).permute(0, 1, 4, 2, 3) / 127.5 - 1
    return *twins, labels


def stages(model: torch.nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    last, maps = model.forward_intermediates(images)
    return maps[-4:], model.forward_head(last)  # the maps (B, C, H, W) of the last four stages, and logits


torch.manual_seed(0)
teacher, student = (timm.create_model(name, num_classes=2) for name in (TEACHER, STUDENT))
s, t = ([m.shape[1] for m in stages(model.eval(), batch(1)[0])[0]] for model in (student, teacher))
distil = add_ops.ADDLoss([1] * 4, [1] * 4, student_channels=s, teacher_channels=t)
scales, history = {}, []
for model, role in ((teacher.train(), "teacher"), (student.train(), "student")):
    optimizer = torch.optim.Adam([*model.parameters(), *distil.parameters()], lr=1e-3)
    for _ in range(int(STEPS)):
        raw, compressed, labels = batch()
        maps, logits = stages(model, raw if role == "teacher" else compressed)
        terms = {f"{role}: cross-entropy": F.cross_entropy(logits, labels)}
        if role == "student":
            with torch.no_grad():
                targets, _ = stages(teacher.eval(), raw)
            terms |= distil.terms(maps, targets, labels)  # of any size: let each start at half of the cross-entropy
            scales = scales or {name: 0.5 * np.log(2) / term.item() for name, term in terms.items()}
            terms = {name: term * (scales[name] if "/" in name else 1) for name, term in terms.items()}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: term.item() for name, term in terms.items()})

figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name in dict.fromkeys(name for row in history for name in row):
    axes[int("/" in name)].plot([row[name] for row in history if name in row], label=name)
for axis, title in zip(axes, ("cross-entropy, each on its images", "distillation terms of the student"), strict=True):
    axis.set(title=title, xlabel="step", ylim=(0, None))
    axis.legend(fontsize=8)
figure.savefig(RESULT, dpi=100)
