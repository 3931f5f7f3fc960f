"""Argument checks shared by the rooms: each names the argument, what was expected and what was got."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

WIDE_FLOATS = (torch.float32, torch.float64)
FLOATS = (torch.float16, torch.bfloat16, *WIDE_FLOATS)


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
        not -math.inf < value < math.inf  # as math.isfinite, which torch.compile does not know of a symbolic number
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


def operand(name: str, value: Tensor, dims: str, dtypes: Collection[torch.dtype] = FLOATS) -> None:
    """What an operator asks of a tensor, whoever calls it: a dense one of shape ``dims`` ("B C H W"), any sizes."""
    if value.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{name}: expected {expected}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.ndim != dims.count(" ") + 1:
        raise ValueError(f"{name}: expected shape ({dims.replace(' ', ', ')}), got {tuple(value.shape)}")


def shaped(name: str, value: Tensor, shape: Sequence[int], dtypes: Collection[torch.dtype] = FLOATS) -> None:
    """The same of a tensor whose shape the others determine."""
    if value.shape != shape or value.dtype not in dtypes or value.layout != torch.strided:
        operand(name, value, " ".join(map(str, shape)), dtypes)
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")


def floating(name: str, value: Tensor, dims: str) -> Tensor:
    """A dense real floating-point tensor of shape ``dims`` ("B C H W"), of which only the first may be empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    operand(name, value, dims)
    if 0 in value.shape[1:]:
        expected = f"({dims.replace(' ', ', ')}) with only the first size 0 at most"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
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
