"""What compression does to a model of your own: the frequency attention of its stages, and the gap of their spectra.

``python examples/look_inside.py [model weights picture result.png]``: a timm model, a file of its weights ("": random
ones) and a picture, which the model is shown as it is and as a JPEG; by default a ResNet18 of random weights.
"""

import io
import sys

import matplotlib.pyplot as plt
import numpy as np
import skimage
import timm
import torch
from PIL import Image

import add_ops

MODEL, WEIGHTS, PICTURE, RESULT = sys.argv[1:] or ("resnet18", "", "", "look_inside.png")
torch.manual_seed(0)
model = timm.create_model(MODEL, checkpoint_path=WEIGHTS).eval()  # or any network whose stages give maps (B, C, H, W)
picture = Image.open(PICTURE).convert("RGB") if PICTURE else Image.fromarray(skimage.data.astronaut())
picture = picture.crop((0, 0, min(picture.size), min(picture.size))).resize((256, 256))
picture.save(file := io.BytesIO(), "jpeg", quality=10)
pair = [np.array(image.convert("RGB")) for image in (picture, Image.open(file))]
mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
raw, compressed = ((torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - mean) / std for image in pair)
with torch.no_grad():
    raw_maps, maps = (model.forward_intermediates(images, intermediates_only=True)[-4:] for images in (raw, compressed))


def by_frequency(power: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:  # (H, W), unshifted -> its mean over rings
    values = power.numpy()
    rings = min(values.shape) // 2
    radius = np.hypot(*np.meshgrid(*(np.fft.fftfreq(side) for side in values.shape), indexing="ij")) * 2
    ring = np.minimum(np.round(radius * rings), rings).astype(int)
    return np.arange(rings + 1) / rings, np.bincount(ring.ravel(), values.ravel()) / np.bincount(ring.ravel())


figure, axes = plt.subplots(1, 7, figsize=(14, 2.5), layout="constrained", width_ratios=[1] * 6 + [1.6])
for axis, image, title in zip(axes, pair, ("picture", "as JPEG, quality 10"), strict=False):
    axis.imshow(image)
    axis.set_title(title)
for stage, (axis, student, teacher) in enumerate(zip(axes[2:], maps, raw_maps, strict=False), start=1):
    scale = student.shape[1] / teacher.square().sum().clamp(min=1e-12)  # gamma in units of the map's own power
    distance = add_ops.spectral_distance(student, teacher, norm="ortho")
    attention = add_ops.frequency_attention_map(student, teacher, gamma=float(100 * scale), norm="ortho")
    axis.imshow(np.fft.fftshift(attention[0].log()), cmap="cividis")  # zero frequency in the middle
    axis.set_title(f"attention, stage {stage}")
    own = add_ops.spectral_distance(torch.zeros_like(teacher), teacher, norm="ortho")
    frequency, gap = by_frequency(distance[0])
    axes[-1].plot(
        frequency, gap / np.maximum(by_frequency(own[0])[1], 1e-12), "o-", markersize=3, label=f"stage {stage}"
    )
for axis in axes[:-1]:
    axis.set(xticks=[], yticks=[])
axes[-1].set(title="relative gap of the spectra", xlabel="frequency / Nyquist", ylim=(0, None))
axes[-1].legend(fontsize=8)
figure.savefig(RESULT, dpi=100)
