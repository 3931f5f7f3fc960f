"""What the rooms' ``cpp_kernels.py`` share: the compiled module, and tensors as the NumPy views that it takes.

Importing this fails where the package was installed without a compiler; the reference then answers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

kernels = import_module("add_ops._C")  # where it is missing, "from . import" would speak of a circular import


def view(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's memory as an array of the same strides; bfloat16, which NumPy lacks, as its bits in uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True)


def not_on_cpu(*args: Any) -> str | None:
    """The reason why the C++ kernels cannot take these arguments, or None where they can."""
    for argument in args:
        if isinstance(argument, Tensor) and not argument.is_cpu:
            return f"it runs on the CPU, and a tensor is on {argument.device.type}"
    return None


FEW = 2**12
"""Elements below which one thread does the work: to wake another takes longer. Results do not depend on it."""


def threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= FEW else 1
