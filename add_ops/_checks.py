"""Argument checks shared by the rooms: each names the argument, what was expected and what was got."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def number(name: str, value: float, *, at_least: float | None = None, above: float | None = None) -> float:
    """A finite Python number within its bound."""
    if isinstance(value, Tensor) or not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    bound = f" >= {at_least}" if at_least is not None else f" > {above}" if above is not None else ""
    if (
        not math.isfinite(value)
        or (at_least is not None and value < at_least)
        or (above is not None and value <= above)
    ):
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}")
    return value


def count(name: str, value: int) -> int:
    """A whole number of at least 1 (symbolic sizes under ``torch.compile`` included)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer >= 1, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    return value


def floating(name: str, value: Tensor, dims: str) -> Tensor:
    """A dense real floating-point tensor of shape ``dims`` ("B C H W"), of which only the first may be empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point() or value.dtype.itemsize == 1:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    shape = "(" + ", ".join(dims.split()) + ")"
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.ndim != len(dims.split()):
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if any(size == 0 for size in value.shape[1:]):
        raise ValueError(f"{name}: expected shape {shape} with only the first size 0 at most, got {tuple(value.shape)}")
    return value


def same_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(f"{name}: expected device {reference.device}, that of {reference_name}, got {value.device}")


def constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient, got requires_grad=True; pass {name}.detach()")


def accumulation(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of ``tensors``, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
