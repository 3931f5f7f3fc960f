"""What the rooms' ``triton_kernels.py`` share: where the kernels can run, and how one is launched.

The kernels run on CUDA tensors; under ``TRITON_INTERPRET=1`` Triton's interpreter also runs them, slowly, on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _dispatch

INTERPRETED: bool = triton.knobs.runtime.interpret
OPTIONS = {"enable_fp_fusion": True}
"""Of a launch that says nothing else: a product and a sum may become one instruction, whatever Triton's default is."""


def unavailable() -> str | None:
    """The reason why no Triton kernel can run on this machine as it stands, or None."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA device (with TRITON_INTERPRET=1 the kernels run, slowly, on the CPU)"


def not_on_gpu(*args: Any) -> str | None:
    """The reason why the Triton kernels cannot take these arguments, or None where they can."""
    devices = {argument.device.type for argument in args if isinstance(argument, Tensor)}
    wanted = devices <= {"cpu"} if INTERPRETED else devices <= {"cuda"}
    if wanted:
        return None
    return f"it runs on CUDA tensors, and a tensor is on {sorted(devices - {'cuda'} or devices)[0]}"


def capability(device: torch.device) -> int:
    """The compute capability of a CUDA device, such as 90; an H100's where there is none."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run ``kernel[grid](*args, **options)`` on the device of its tensors and that device's current stream.

    Every launch of the package goes through here; the ahead-of-time check records them by replacing this function.
    """
    device = next(argument for argument in args if isinstance(argument, Tensor)).device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **OPTIONS | options)


@triton.jit
def split(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """float32 for tensor cores that multiply tf32: ``high + low == x`` exactly, and ``high`` is a tf32 number.

    The lower 13 bits of the pattern are what tf32 does not have. Of ``low`` a tensor core reads the first 11 bits at
    least, so that high·high + high·low + low·high loses about 2⁻²⁰. An infinite ``x`` has no ``low``: it is NaN.
    """
    high = (x.to(tl.int32, bitcast=True) & -(2**13)).to(tl.float32, bitcast=True)
    return high, x - high


_dispatch.check("triton", unavailable)
