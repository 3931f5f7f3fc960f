"""Calls the C++ kernels of ``csrc/project_and_sort.cpp``; the projection itself is torch's matrix product."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _dispatch
from .._cpp import kernels, not_on_cpu, threads, view
from .reference import permutation_dtype, project, unproject


def project_and_sort(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    values = project(points, projections)
    permutation = torch.empty_like(values, dtype=permutation_dtype(points.shape[1]))
    rows = values.shape[0] * values.shape[1], values.shape[2]
    kernels.sort_with_index(view(values.view(rows)), view(permutation.view(rows)), threads(values.numel()))
    return values, permutation


def project_and_sort_backward(grad: Tensor, permutation: Tensor, projections: Tensor) -> Tensor:
    grad = grad.contiguous()
    unsorted = torch.empty_like(grad)
    rows = grad.shape[0] * grad.shape[1], grad.shape[2]
    arrays = (view(tensor.view(rows)) for tensor in (grad, permutation.contiguous(), unsorted))
    kernels.scatter_by_index(*arrays, threads(grad.numel()))
    return unproject(unsorted, projections)


def _rows(*tensors: Tensor) -> list[np.ndarray]:
    return [view(tensor.flatten(0, 1).contiguous()) for tensor in tensors]


def quantile_distance(x: Tensor, y: Tensor, x_order: Tensor, y_order: Tensor, *weights_and_p: Any) -> Tensor:
    *weights, p = weights_and_p
    result = x.new_empty(x.shape[:2])
    weights = [None if of_points is None else view(of_points.contiguous()) for of_points in weights]
    kernels.quantile_distance(
        *_rows(x, y, x_order, y_order), *weights, p, view(result.view(-1)), threads(x.numel() + y.numel())
    )
    return result


def quantile_distance_backward(
    grad: Tensor, x: Tensor, y: Tensor, x_order: Tensor, y_order: Tensor, *weights_and_p: Any
) -> tuple[Tensor, Tensor]:
    *weights, p = weights_and_p
    gradients = x.new_empty(x.shape), y.new_empty(y.shape)
    weights = [None if of_points is None else view(of_points.contiguous()) for of_points in weights]
    grad = view(grad.flatten().contiguous())
    arguments = *_rows(x, y, x_order, y_order), *weights, p, *_rows(*gradients)
    kernels.quantile_distance_backward(grad, *arguments, threads(x.numel() + y.numel()))
    return gradients


_dispatch.implement("project_and_sort", "cpp", project_and_sort, not_on_cpu)
_dispatch.implement("project_and_sort_backward", "cpp", project_and_sort_backward, not_on_cpu)
_dispatch.implement("quantile_distance", "cpp", quantile_distance, not_on_cpu)
_dispatch.implement("quantile_distance_backward", "cpp", quantile_distance_backward, not_on_cpu)
