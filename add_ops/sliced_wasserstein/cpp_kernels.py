"""Calls the C++ kernels of ``csrc/project_and_sort.cpp``; the projection itself is torch's matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._cpp import kernels, not_on_cpu, view
from .reference import permutation_dtype, project, unproject


def project_and_sort(points: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    values = project(points, projections)
    permutation = torch.empty_like(values, dtype=permutation_dtype(points.shape[1]))
    rows = values.shape[0] * values.shape[1], values.shape[2]
    kernels.sort_with_index(view(values.view(rows)), view(permutation.view(rows)), torch.get_num_threads())
    return values, permutation


def project_and_sort_backward(grad: Tensor, permutation: Tensor, projections: Tensor) -> Tensor:
    unsorted = torch.empty_like(grad)
    rows = grad.shape[0] * grad.shape[1], grad.shape[2]
    arrays = (view(tensor.view(rows)) for tensor in (grad, permutation, unsorted))
    kernels.scatter_by_index(*arrays, torch.get_num_threads())
    return unproject(unsorted, projections)


_dispatch.implement("project_and_sort", "cpp", project_and_sort, not_on_cpu)
_dispatch.implement("project_and_sort_backward", "cpp", project_and_sort_backward, not_on_cpu)
