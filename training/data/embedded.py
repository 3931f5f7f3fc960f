"""The embedded set: real photographs, real forgeries, real H.264 — built offline, in about a minute on two cores.

A clip is a moving 64-pixel window over a randomly scaled, flipped and recoloured crop of a photograph that the wheels
of scikit-image, scikit-learn and matplotlib carry. Each has a forged twin: an ellipse of varied size and place is
shifted, blurred, recoloured and sent through a 2× down- and up-sampling with a checkerboard kernel, the fingerprint of
generators. The whole clip is then encoded by libx264 once per CRF and decoded again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import remove_drafts, write_whole
from ..interrupts import serve_parent
from ..locks import beside, only_one
from ..processes import usable_cores
from . import images, video
from .sources.common import SPLITS
from .video import compress

# Photographs, not crops, are split. All of these lie inside the wheels; nothing is ever downloaded.
PHOTOGRAPHS = {
    "train": [
        "skimage/data/astronaut.png",
        "skimage/data/coffee.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/camera.png",
        "skimage/data/ihc.png",
        "skimage/data/grass.png",
        "skimage/data/retina.jpg",
        "skimage/data/hubble_deep_field.jpg",
        "sklearn/datasets/images/china.jpg",
    ],
    "val": ["sklearn/datasets/images/flower.jpg", "skimage/data/coins.png", "skimage/data/gravel.png"],
    "test": [
        "skimage/data/chelsea.png",
        "skimage/data/rocket.jpg",
        "skimage/data/brick.png",
        "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
    ],
}

# What folds test in turn: all but those of "val". Scenes first, then textures and instruments, so that each fold, which
# takes every k-th, has of both. Of the two motorcycles one is here: it is one scene. The wheels' other pictures are
# smaller than a window can move in, or drawn.
FOLDED = (
    "skimage/data/astronaut.png",
    "skimage/data/coffee.png",
    "skimage/data/chelsea.png",
    "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/camera.png",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
    "sklearn/datasets/images/china.jpg",
    "skimage/data/moon.png",
    "skimage/data/brick.png",
    "skimage/data/ihc.png",
    "skimage/data/grass.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/retina.jpg",
    "skimage/data/cell.png",
)


@dataclass(frozen=True)
class EmbeddedSpec:
    """What defines the embedded set; its hash names the cache file.

    Args:
        train_clips, val_clips, test_clips: clips per split, half of them forged.
        train_frames: frames kept of each training clip, spread evenly; validation and test keep the middle one.
        clip_length: frames per clip.
        size: side of a frame in pixels, even.
        crfs: H.264 constant rate factors; each clip is encoded once for each.
        fingerprint: least and greatest contrast of the forgery's checkerboard; its shift of colours goes with it.
        seed: of everything drawn.
        fold: ``(i, k)``: the test photographs are the i-th of k parts of ``FOLDED``, the training photographs all its
            others; None: those of ``PHOTOGRAPHS``. The validation photographs are the same in all.
    """

    train_clips: int = 1600
    val_clips: int = 600
    test_clips: int = 3000
    train_frames: int = 2
    clip_length: int = 5
    size: int = 64
    crfs: tuple[int, ...] = (23, 40)
    fingerprint: tuple[float, float] = (0.15, 0.30)
    seed: int = 0
    fold: tuple[int, int] | None = None

    def photographs(self, split: str) -> list[str]:
        """The photographs of a split, by their paths inside site-packages."""
        if self.fold is None or split == "val":
            return PHOTOGRAPHS[split]
        number, count = self.fold
        return [path for place, path in enumerate(FOLDED) if (place % count == number) == (split == "test")]

    def digest(self) -> str:
        """Hash of the parameters, of the code and of the encoder: a cached set is never stale."""
        code = Path(__file__).read_bytes() + Path(video.__file__).read_bytes()
        photographs = [self.photographs(split) for split in SPLITS]
        recipe = json.dumps([asdict(self), photographs, av.__version__, np.__version__, Image.__version__])
        return hashlib.sha256(code + recipe.encode()).hexdigest()[:16]


@cache
def load_photograph(path: str) -> Image.Image:
    """A photograph by its path inside site-packages, as RGB."""
    package, _, inner = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"photograph {path}: the package {package} is not installed")
    return Image.fromarray(images.read(Path(spec.origin).parent / inner))


def forge(canvas: np.ndarray, spec: EmbeddedSpec, rng: np.random.Generator) -> np.ndarray:
    """Blend a regenerated ellipse into a picture.

    Args:
        canvas: ``(H, W, 3)`` float32 in 0…255.
        spec: the side of a frame, for the ellipse lies in view of most of them, and the strength of the fingerprint.
        rng: source of place, size and strength.

    Returns:
        ``(H, W, 3)`` float32, equal to ``canvas`` outside the ellipse's soft edge.
    """
    side = canvas.shape[0]
    fake = np.roll(canvas, rng.integers(-3, 4, size=2), axis=(0, 1))
    for axis in (0, 1):
        fake = 0.25 * np.roll(fake, 1, axis) + 0.5 * fake + 0.25 * np.roll(fake, -1, axis)
    recolour = spec.fingerprint[1] / 0.30  # 0.07 of contrast and 6 grey levels beside the strongest checkerboard
    fake = fake * (1 + recolour * rng.uniform(-0.07, 0.07, 3)) + recolour * rng.uniform(-6, 6, 3)
    half = fake.reshape(side // 2, 2, side // 2, 2, 3).mean(axis=(1, 3))
    checkerboard = 1 + rng.uniform(*spec.fingerprint) * np.array([[1, -1], [-1, 1]])
    fake = np.kron(half, checkerboard[:, :, None])
    radius_y, radius_x = rng.uniform(0.20, 0.38, 2) * spec.size / 2
    centre_y, centre_x = side / 2 + rng.uniform(-0.5, 0.5, 2) * spec.size / 2
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    y, x = y - centre_y, x - centre_x
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.sqrt((u / radius_x) ** 2 + (v / radius_y) ** 2)
    alpha = np.clip((1.15 - distance) / 0.3, 0, 1)[:, :, None]
    return canvas + alpha * (fake - canvas)


def render_clip(photograph: Image.Image, fake: bool, spec: EmbeddedSpec, rng: np.random.Generator) -> np.ndarray:
    """One raw clip: ``(clip_length, size, size, 3)`` uint8, a window panning over a crop of the photograph."""
    margin = 2 * (spec.clip_length - 1)
    side = spec.size + margin
    crop = rng.uniform(side, min(min(photograph.size), 4.5 * spec.size))
    left, top = rng.uniform(0, 1, 2) * (np.array(photograph.size) - crop)
    box = (left, top, left + crop, top + crop)
    canvas = np.asarray(photograph.resize((side, side), Image.Resampling.BICUBIC, box), np.float32)
    canvas = canvas[:, :, rng.permutation(3)]
    if rng.random() < 0.5:
        canvas = canvas[:, ::-1]
    step = rng.integers(-2, 3, size=2)
    if fake:
        canvas = forge(canvas, spec, rng)
    canvas = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    start = margin // 2 - step * (spec.clip_length - 1) // 2
    corners = [start + i * step for i in range(spec.clip_length)]
    return np.stack([canvas[y : y + spec.size, x : x + spec.size] for y, x in corners])


def _build_clip(spec: EmbeddedSpec, split: str, index: int) -> dict[str, np.ndarray]:
    # A fake is forged from the real clip before it, as a face-swap is from its target: nothing but the forgery differs.
    source, label = divmod(index, 2)
    stream = [spec.seed, SPLITS.index(split), source, *(spec.fold or ())]  # a clip's own: whoever makes it, and when
    rng, photographs = np.random.default_rng(stream), spec.photographs(split)
    photograph = source % len(photographs)
    raw = render_clip(load_photograph(photographs[photograph]), bool(label), spec, rng)
    count = spec.train_frames if split == "train" else 1
    kept = [(2 * i + 1) * spec.clip_length // (2 * count) for i in range(count)]
    facts = {"label": label, "source": source, "photograph": photograph}
    columns = {name: np.full(count, value, np.int64) for name, value in facts.items()} | {"frame": np.array(kept)}
    return columns | {"raw": raw[kept]} | {f"c{crf}": compress(raw, crf)[kept] for crf in spec.crfs}


def _clips(spec: EmbeddedSpec) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    # Forked workers start at once; where there is no fork, spawned ones import this module first.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    with context.Pool(usable_cores(), serve_parent) as pool:
        for split in SPLITS:
            indices = range(getattr(spec, f"{split}_clips"))
            for columns in pool.imap(partial(_build_clip, spec, split), indices, chunksize=8):
                yield split, columns


def file_of(spec: EmbeddedSpec, cache: str | os.PathLike[str]) -> Path:
    """Where a cache has the set."""
    return Path(cache) / f"embedded-{spec.digest()}.npz"


def build(spec: EmbeddedSpec, cache: str | os.PathLike[str]) -> Path:
    """Build the set unless it lies in the cache already.

    Returns:
        The file: an ``.npz`` with, for each split, ``{split}_raw`` and ``{split}_c{crf}``, ``(N, size, size, 3)``
        uint8; and each ``(N,)``: ``{split}_label`` (1 = fake), ``{split}_source`` (which a real and its forged twin
        share), ``{split}_photograph`` and ``{split}_frame``.
    """
    for split in SPLITS:
        if (clips := getattr(spec, f"{split}_clips")) < 2:
            raise ValueError(f"{split}_clips: expected at least 2, got {clips}")
    if spec.size % 2 or not 1 <= spec.train_frames <= spec.clip_length:
        raise ValueError(f"expected an even size and 1 <= train_frames <= clip_length, got {spec}")
    if not 0 <= spec.fingerprint[0] <= spec.fingerprint[1] <= 1:
        raise ValueError(f"fingerprint: expected 0 <= least <= greatest <= 1, got {spec.fingerprint}")
    if spec.fold is not None and not (2 <= spec.fold[1] <= len(FOLDED) and 0 <= spec.fold[0] < spec.fold[1]):
        raise ValueError(f"fold: expected (i, k) with 0 <= i < k and 2 <= k <= {len(FOLDED)}, got {spec.fold}")
    if not all(0 <= crf <= 51 for crf in spec.crfs) or len(set(spec.crfs)) != len(spec.crfs):
        raise ValueError(f"crfs: expected different rate factors in 0…51, got {spec.crfs}")
    path = file_of(spec, cache)
    if not path.exists():
        with only_one(beside(path), f"the embedded set {path}", wait=True):
            if not path.exists():  # nobody else has built it in the meantime
                remove_drafts(path.parent, f"{path.name}.*")
                _build(spec, path)
    return path


def _build(spec: EmbeddedSpec, path: Path) -> None:
    total = sum(getattr(spec, f"{split}_clips") for split in SPLITS)
    parts: dict[str, list[np.ndarray]] = {}
    for split, columns in tqdm(_clips(spec), desc="embedded set", total=total, unit=" clips"):
        for name, values in columns.items():
            parts.setdefault(f"{split}_{name}", []).append(values)

    def write(target: Path) -> None:
        with target.open("wb") as file:
            np.savez(file, **{name: np.concatenate(values) for name, values in parts.items()})

    write_whole(path, write)
