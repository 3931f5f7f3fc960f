"""What one row of the suite is: shapes, an entry (a public function and its rivals), and a provider (one of them)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import add_ops

REHEARSAL = os.environ.get("ADD_OPS_REHEARSAL") == "1"
"""What a GPU would be asked is asked of the CPU: the same code on tiny shapes, by Triton's interpreter."""


class Maps(NamedTuple):
    """Feature maps (B, C, H, W), seen under some views."""

    batch: int
    channels: int
    height: int
    width: int
    views: int = 12
    dtype: str = "float32"
    layout: str = "contiguous"

    def __str__(self) -> str:
        usual = self._field_defaults
        others = [getattr(self, name) for name in ("dtype", "layout") if getattr(self, name) != usual[name]]
        return ", ".join([f"{self.channels}×{self.height}×{self.width}", *others])

    @property
    def elements(self) -> int:
        return self.batch * self.channels * self.height * self.width

    def random(self, device: torch.device) -> Tensor:
        """(B, C, H, W), normally distributed."""
        layout = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return torch.randn(self[:4], device=device, dtype=getattr(torch, self.dtype)).contiguous(memory_format=layout)


class Points(NamedTuple):
    """Point sets (B, N, D), projected on some directions."""

    batch: int
    points: int
    dim: int
    projections: int = 64
    dtype: str = "float32"

    def __str__(self) -> str:
        usual = self.dtype == self._field_defaults["dtype"]
        return f"N {self.points}, D {self.dim}" + ("" if usual else f", {self.dtype}")

    @property
    def elements(self) -> int:
        return self.batch * self.points * self.dim

    def random(self, device: torch.device) -> Tensor:
        """(B, N, D), normally distributed."""
        return torch.randn(self[:3], device=device, dtype=getattr(torch, self.dtype))


class Slices(NamedTuple):
    """Attention vectors (B, K, M)."""

    batch: int
    bins: int
    views: int = 12
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"M {self.bins}"

    @property
    def elements(self) -> int:
        return self.batch * self.views * self.bins

    def random(self, device: torch.device) -> Tensor:
        """(B, K, M), each row of sum 1."""
        mass = torch.rand(self.batch, self.views, self.bins, device=device, dtype=getattr(torch, self.dtype))
        return mass / mass.sum(2, keepdim=True)


Shape = Maps | Points | Slices


def itemsize(shape: Shape) -> int:
    """Bytes of an element."""
    return getattr(torch, shape.dtype).itemsize


def variants(shape: Shape) -> list[Shape]:
    """The dtypes and layouts that a GPU trains in, float32 and contiguous first."""
    layouts = [{"layout": name} for name in ("contiguous", "channels_last")] if isinstance(shape, Maps) else [{}]
    return [shape._replace(dtype=dtype, **layout) for dtype in ("float32", "bfloat16") for layout in layouts]


# The tapped layers of ResNet50 at 128 px, Xception's exit, a prime, and ResNet50 at 224 px.
STAGES = tuple(Maps(16, 256 << stage, 32 >> stage, 32 >> stage) for stage in range(4))
LARGER_STAGES = tuple(Maps(16, 256 << stage, 56 >> stage, 56 >> stage) for stage in range(4))
MAPS = (*STAGES, Maps(16, 728, 8, 8), Maps(16, 256, 31, 31), *LARGER_STAGES)
SLICES = tuple(Slices(16, stage.channels // 2) for stage in STAGES)
POINTS = tuple(Points(16, n, dim) for dim in (64, 256) for n in (64, 256, 1024, 3136))


@dataclass(frozen=True)
class Entry:
    """A function of the package, measured forward + backward through its public call against rivals of equal signature.

    ``call(function, inputs, shape)`` adapts the signature; ``inputs(shape, device)`` gives tensors of which the first
    requires the gradient; ``floor(shape)`` are the bytes that forward and backward must move; ``rivals`` are other ways
    in plain PyTorch, each the best one at some shapes.
    """

    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    released: Callable[..., Any] | None
    call: Callable[[Callable[..., Any], tuple[Tensor, ...], Any], Tensor]
    inputs: Callable[[Any, torch.device], tuple[Tensor, ...]]
    floor: Callable[[Any], int]
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    compiled: tuple[Shape, ...] = ()
    growth: dict[str, tuple[Shape, ...]] = field(default_factory=dict)
    upstream: Callable[[Tensor], Tensor] = torch.randn_like
    rivals: dict[str, Callable[..., Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """One way to compute an entry; ``backend`` names the package's own, None is anybody else's."""

    name: str
    function: Callable[..., Any]
    backend: str | None = None

    def run(self, entry: Entry, inputs: tuple[Tensor, ...], shape: Shape, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward: the value, and the gradient of ``sum(value · upstream)`` for the first input."""
        chosen: AbstractContextManager[None] = add_ops.use_backend(self.backend) if self.backend else nullcontext()
        with chosen:
            value = entry.call(self.function, inputs, shape)
            (gradient,) = torch.autograd.grad(value, inputs[0], upstream)
        return value.detach(), gradient


def compiled_backend(device: torch.device) -> str:
    """The package's backend that is meant for ``device``."""
    return "triton" if device.type == "cuda" or REHEARSAL else "cpp"


def providers(entry: Entry, device: torch.device, *, compiled: bool) -> list[Provider]:
    """All that can compute ``entry`` here; with ``compiled`` also ``torch.compile``."""
    available = [name for name in ("reference", compiled_backend(device)) if add_ops.backends()[name] == "available"]
    found = [Provider(name, entry.ours, name) for name in available]
    found += [Provider(name, function) for name, function in {"plain": entry.plain, **entry.rivals}.items()]
    if compiled:
        torch.compiler.reset()
        found.append(Provider("compile", torch.compile(entry.plain)))
    if entry.released is not None:
        found.append(Provider("released", entry.released))
    return found
