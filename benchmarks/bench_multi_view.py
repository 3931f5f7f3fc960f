"""View histogram and multi-view attention loss; 12 views, drawn anew inside every timed call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import add_ops

from . import plain, released
from .bench_frequency_attention import BASE, GROWTH, feature_pair
from .entry import MAPS, SLICES, STAGES, Entry, Maps, Slices, itemsize


def _features(shape: Maps, device: torch.device) -> tuple[Tensor]:
    return (shape.random(device).requires_grad_(),)


def _labelled_pair(shape: Maps, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return *feature_pair(shape, device), torch.arange(shape.batch, device=device) % 2


def _histogram(function: Callable[..., Tensor], inputs: tuple[Tensor], shape: Maps) -> Tensor:
    views = add_ops.sample_views(shape.views, device=inputs[0].device)
    return function(inputs[0], views, max(shape.channels // 2, 1))


def _loss(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], shape: Maps) -> Tensor:
    return function(*inputs, views=add_ops.sample_views(shape.views, device=inputs[0].device))


def _slices(shape: Slices, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.arange(shape.batch, device=device) % 2
    return shape.random(device).requires_grad_(), shape.random(device), labels


def _contrastive_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return torch.ops.add_ops.contrastive_loss(student, teacher, labels, 2.0, 100.0, 50.0, 0.012)


ENTRIES = (
    Entry(
        name="view_histogram",
        ours=add_ops.multi_view_attention,
        plain=plain.view_histogram,
        released=released.view_histogram,
        call=_histogram,
        inputs=_features,
        floor=lambda shape: 3 * itemsize(shape) * shape.elements,  # read forward and backward, write the gradient
        shapes=MAPS,
        quick=STAGES[2:],
        compiled=(STAGES[0], STAGES[2]),
        growth={**GROWTH, "views": tuple(BASE._replace(views=count) for count in (4, 12, 36))},
    ),
    Entry(
        name="contrastive_loss",
        ours=_contrastive_loss,
        plain=plain.contrastive_loss,
        released=None,
        call=lambda function, inputs, shape: function(*inputs),
        inputs=_slices,
        floor=lambda shape: 5 * itemsize(shape) * shape.elements,  # read both forward and backward, write the gradient
        shapes=SLICES,
        quick=SLICES[2:3],
    ),
    Entry(
        name="multi_view_loss",
        ours=add_ops.multi_view_loss,
        plain=plain.multi_view_loss,
        released=released.multi_view_loss,
        call=_loss,
        inputs=_labelled_pair,
        floor=lambda shape: 4 * itemsize(shape) * shape.elements,  # the teacher's features are only read once
        shapes=STAGES,
        quick=STAGES[2:3],
    ),
)
