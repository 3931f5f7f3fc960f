"""Give one picture the colours of another: gradient descent on the sliced Wasserstein distance between their pixels.

``python examples/colour_transfer.py [picture colours result.png]``; without arguments two pictures of scikit-image.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import skimage
import torch

import add_ops

DATA = Path(skimage.__file__).parent / "data"
PICTURE, COLOURS, RESULT = sys.argv[1:] or (DATA / "coffee.png", DATA / "rocket.jpg", "colour_transfer.png")


def read(path: str | Path, width: int) -> torch.Tensor:  # (H, W, 3) in [0, 1]
    image = torch.from_numpy(skimage.io.imread(path)[..., :3].copy()).float() / 255
    size = image.shape[0] * width // image.shape[1], width
    return torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], size, mode="area")[0].permute(1, 2, 0)


picture, colours = read(PICTURE, 192), read(COLOURS, 160)  # the numbers of pixels differ
pixels = picture.reshape(1, -1, 3).clone().requires_grad_()
target = colours.reshape(1, -1, 3)
optimiser = torch.optim.SGD([pixels], lr=0.5 * pixels.shape[1])  # a gradient is about 2/(3N) of the way to go
generator = torch.Generator().manual_seed(0)

for step in range(40):
    projections = add_ops.sample_projections(3, 12, sampling="quasi", generator=generator)
    distance = add_ops.sliced_wasserstein(pixels, target, projections).sum()
    optimiser.zero_grad()
    distance.backward()
    optimiser.step()
    if step % 10 == 0:
        print(f"step {step:2}: distance {distance.item() ** 0.5:.4f}")

figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
result = pixels.detach().reshape(picture.shape).clamp(0, 1)
for axis, image, title in zip(axes, (picture, colours, result), ("picture", "colours", "result"), strict=True):
    axis.imshow(image)
    axis.set(title=title, xticks=[], yticks=[])
figure.savefig(RESULT, dpi=100)
