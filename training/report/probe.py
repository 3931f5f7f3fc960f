"""What the pictures of a report show of images and features: spectra, attention maps, attention vectors, examples."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import torch
from torch import Tensor

import add_ops

from ..config import Config
from ..data.frames import RAW, Split, picture
from ..models.detector import Detector

PROBES = 128  # test pairs behind the feature pictures


def paired(split: Split, qualities: list[str]) -> np.ndarray:
    """Which frames exist in all of the qualities, as rising positions."""
    return reduce(np.intersect1d, [split.where(quality) for quality in qualities])


def frames(split: Split, quality: str, chosen: np.ndarray, size: int) -> np.ndarray:
    """The frames of one quality at some positions: ``(N, size, size, 3)`` uint8."""
    return np.stack([picture(split.images[quality], int(index), size) for index in chosen])


def _radial(power: np.ndarray) -> np.ndarray:
    """Mean of an unshifted spectrum ``(H, W)`` over rings of equal frequency: ``(min(H, W) // 2 + 1,)``."""
    height, width = power.shape
    rings = min(height, width) // 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) * 2 * rings
    ring = np.round(radius).astype(int)
    return np.array([power[ring == r].mean() for r in range(rings + 1)])


def power(images: Tensor) -> Tensor:
    """Mean power spectrum of grey images, from ``(N, S, S, 3)`` uint8: ``(S, S)`` float32, unshifted."""
    window = torch.hann_window(images.shape[1], periodic=False)  # else the borders' jump hides the high frequencies
    spectrum = torch.fft.fft2((images.float() / 127.5 - 1).mean(3) * window * window[:, None], norm="ortho")
    return spectrum.abs().square().mean(0)


@torch.no_grad()
def features(
    config: Config, split: Split, quality: str, teacher: Detector, models: dict[str, Detector]
) -> tuple[dict[str, np.ndarray], dict, dict, list[dict[str, np.ndarray]], np.ndarray, int]:
    """Compare features with the teacher's on test frames, of which some must exist both raw and in ``quality``.

    Returns:
        Radial image spectra; relative feature gap ``{layer: {model: (R,)}}``; mean frequency attention map
        ``{layer: {model: (H, W)}}``; attention vectors ``[{model: (M,)}]`` per view; the views ``(K, 3)``; their layer.
    """
    device = next(teacher.parameters()).device
    both = paired(split, [RAW, quality])
    chosen = both[np.random.default_rng(0).choice(len(both), min(PROBES, len(both)), replace=False)]
    raw, compressed = (torch.from_numpy(frames(split, kind, chosen, config.image_size)) for kind in (RAW, quality))
    targets = teacher(teacher.pixels(raw))[0]
    tapped = {name: model(model.pixels(compressed))[0] for name, model in models.items()}
    gaps: dict[int, dict[str, np.ndarray]] = {}
    maps: dict[int, dict[str, np.ndarray]] = {}
    for layer, target in enumerate(targets, start=1):
        comparable = {
            name: maps_[layer - 1] for name, maps_ in tapped.items() if maps_[layer - 1].shape == target.shape
        }
        if min(target.shape[2:]) < 4 or not comparable:
            continue  # too few frequencies to draw, or no common shape without an adapter
        own = add_ops.spectral_distance(torch.zeros_like(target), target).mean(0).cpu().numpy()
        for name, feature in comparable.items():
            gap = add_ops.spectral_distance(feature, target).mean(0).cpu().numpy()
            gaps.setdefault(layer, {})[name] = _radial(gap) / np.maximum(_radial(own), 1e-12)
            if config.frequency_weights[layer - 1] > 0:
                weights = add_ops.frequency_attention_map(
                    feature, target, gamma=config.frequency_gamma, distance=config.distance
                )
                maps.setdefault(layer, {})[name] = weights.mean(0).cpu().numpy()
    weights = config.multi_view_weights
    layer = max(range(4), key=lambda i: weights[i]) + 1
    directions = torch.nn.functional.normalize(torch.tensor([[0.8, 0.6, 0.0], [0.2, -0.5, 0.85]]), dim=1).to(device)
    seen = {"teacher": targets} | tapped
    bins = config.bins or max(1, math.gcd(*(maps_[layer - 1].shape[1] for maps_ in seen.values())) // 2)
    vectors: list[dict[str, np.ndarray]] = [{} for _ in directions]
    for name, maps_ in seen.items():
        attention = add_ops.multi_view_attention(
            maps_[layer - 1].float(), directions, bins, coordinates=config.coordinates
        ).mean(0)
        for view, vector in enumerate(attention.cpu().numpy()):
            vectors[view][name] = vector
    image = {"raw": _radial(power(raw).numpy()), "compressed": _radial(power(compressed).numpy())}
    return image, gaps, maps, vectors, directions.cpu().numpy(), layer


def examples(split: Split, qualities: list[str], size: int, count: int = 8) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Reals and fakes by turns, twins beside each other, of frames that exist in all of the qualities.

    Returns:
        Images ``(count, size, size, 3)`` uint8 by quality, and labels ``(count,)``.
    """
    known = paired(split, qualities)
    labels, twins = split.labels[known], split.twins[known]
    order = np.lexsort((labels, twins))
    real = np.flatnonzero((np.diff(twins[order]) == 0) & (np.diff(labels[order]) == 1))
    if len(real):
        starts = real[np.linspace(0, len(real) - 1, count // 2).astype(int)]
        chosen = known[order[np.stack([starts, starts + 1], axis=1).ravel()]]
    else:
        chosen = known[np.unique(np.linspace(0, len(known) - 1, count).astype(int))]
    return {quality: frames(split, quality, chosen, size) for quality in qualities}, split.labels[chosen]
