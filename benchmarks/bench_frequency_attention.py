"""Spectral distance and frequency attention loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import add_ops

from . import plain, released
from .entry import MAPS, STAGES, Entry, Maps, itemsize

BASE = Maps(16, 256, 16, 16)
GROWTH = {
    "batch": tuple(BASE._replace(batch=size) for size in (4, 16, 64)),
    "channels": tuple(BASE._replace(channels=size) for size in (64, 256, 1024)),
    "height × width": tuple(BASE._replace(height=size, width=size) for size in (8, 16, 32)),
}


def feature_pair(shape: Maps, device: torch.device) -> tuple[Tensor, Tensor]:
    """The student's features, which require a gradient, and the teacher's: (B, C, H, W) each."""
    return shape.random(device).requires_grad_(), shape.random(device)


def _call(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor], shape: Maps) -> Tensor:
    return function(*inputs)


ENTRIES = (
    Entry(
        name="spectral_distance",
        ours=add_ops.spectral_distance,
        plain=plain.spectral_distance,
        released=released.spectral_distance,
        call=_call,
        inputs=feature_pair,
        floor=lambda shape: 5 * itemsize(shape) * shape.elements,  # read both, forward and backward; write the gradient
        shapes=MAPS,
        quick=STAGES[2:],
        compiled=(STAGES[0], STAGES[2]),
        growth=GROWTH,
        rivals={"products": plain.spectral_distance_by_products},
    ),
    Entry(
        name="frequency_attention_loss",
        ours=add_ops.frequency_attention_loss,
        plain=plain.frequency_attention_loss,
        released=released.frequency_attention_loss,
        call=_call,
        inputs=feature_pair,
        floor=lambda shape: 5 * itemsize(shape) * shape.elements,
        shapes=MAPS,
        quick=STAGES[2:3],
    ),
)
