"""Distil one timm network into another in a plain PyTorch loop: the teacher sees raw crops, the student JPEGs of them.

``python examples/distil_timm.py [teacher student steps result.png]``. Fakes are crops whose left half has the faint
checkerboard that up-sampling leaves. Weights are random at first, nothing is fetched.
"""

import io
import sys

import numpy as np
import pandas
import skimage
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import add_ops

TEACHER, STUDENT, STEPS, RESULT = sys.argv[1:] or ("resnet10t", "regnetx_002", "80", "distil_timm.png")
PHOTOGRAPH, BOARD = skimage.data.astronaut().astype(int), 1 - np.indices((64, 32, 1)).sum(0) % 2 * 2


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:  # (2, B, 3, 64, 64), raw and compressed; labels (B,)
    labels, pairs = torch.arange(size) % 2, []
    for label, (y, x) in zip(labels, torch.randint(448, (size, 2)), strict=True):
        crop = PHOTOGRAPH[y : y + 64, x : x + 64].copy()
        crop[:, :32] += 10 * int(label) * BOARD
        raw = Image.fromarray(crop.clip(0, 255).astype(np.uint8))
        raw.save(file := io.BytesIO(), "jpeg", quality=75)
        pairs.append([np.array(raw), np.array(Image.open(file))])
    return torch.from_numpy(np.array(pairs)).permute(1, 0, 4, 2, 3) / 127.5 - 1, labels


torch.manual_seed(0)
teacher, student = (timm.create_model(name, num_classes=2) for name in (TEACHER, STUDENT))
t, s = ([stage["num_chs"] for stage in model.feature_info[-4:]] for model in (teacher, student))
distil = add_ops.ADDLoss(student_channels=s, teacher_channels=t)  # with adapters where the channels differ
names = {teacher: "teacher on raw crops: cross-entropy", student: "student on compressed ones: cross-entropy"}
history, scale = {name: [] for name in (*names.values(), "student: ADD, scaled")}, None
for model, name in names.items():
    optimizer = torch.optim.Adam([*model.parameters(), *distil.parameters()], lr=1e-3)
    for _ in range(int(STEPS)):
        (raw, compressed), labels = batch()
        last, maps = model.forward_intermediates(raw if model is teacher else compressed)
        loss = F.cross_entropy(model.forward_head(last), labels)
        history[name].append(loss.item())
        if model is student:
            with torch.no_grad():
                targets = teacher.eval().forward_intermediates(raw, intermediates_only=True)
            add = distil(maps[-4:], targets[-4:], labels)
            scale = scale or 1 / add.item()  # its size depends on the networks: let it begin at 1
            loss = loss + scale * add
            history["student: ADD, scaled"].append(scale * add.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

axis = pandas.DataFrame(history).plot(title=f"{TEACHER} → {STUDENT}", xlabel="step", ylim=(0, None), figsize=(8, 4))
axis.figure.savefig(RESULT, dpi=100, bbox_inches="tight")
