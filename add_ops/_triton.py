"""What the rooms' ``triton_kernels.py`` share: where the kernels can run, and how one is launched.

The kernels run on CUDA tensors; under ``TRITON_INTERPRET=1`` Triton's interpreter also runs them, slowly, on the CPU.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from shutil import which
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _dispatch

INTERPRETED: bool = triton.knobs.runtime.interpret
OPTIONS = {"enable_fp_fusion": True}
"""Of a launch that says nothing else: a product and a sum may become one instruction, whatever Triton's default is."""


OLDEST = 80
"""The compute capability from which on tensor cores multiply tf32 and bfloat16."""


@cache
def unavailable() -> str | None:
    """The reason why no Triton kernel can run on this machine as it stands, or None."""
    if INTERPRETED:
        return None
    if torch.version.hip:
        return "the kernels are for CUDA, and this torch is for ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device (with TRITON_INTERPRET=1 the kernels run, slowly, on the CPU)"
    if not (os.environ.get("CC") or which("gcc") or which("clang") or triton.knobs.build.impl):
        return "Triton's launcher needs a C compiler: gcc or clang on the PATH, or the variable CC"
    return None


def not_on_gpu(*args: Any) -> str | None:
    """The reason why the Triton kernels cannot take these arguments, or None where they can."""
    devices = {argument.device for argument in args if isinstance(argument, Tensor)}
    types = {device.type for device in devices}
    if not types <= {"cpu" if INTERPRETED else "cuda"}:
        return f"it runs on CUDA tensors, and a tensor is on {sorted(types - {'cuda'} or types)[0]}"
    if len(devices) > 1:
        return f"it runs on tensors of one device, and these are on {' and '.join(sorted(map(str, devices)))}"
    for device in devices:
        if (found := limits(device)[0]) < OLDEST:
            return f"it needs a GPU of compute capability {OLDEST / 10}, and {device} has {found / 10}"
    return unavailable()


@cache
def limits(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability, such as 90, and the bytes of shared memory that one program can have.

    Where there is no GPU, an H100's.
    """
    if device.type != "cuda":
        return 90, 227 * 1024
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.shared_memory_per_block_optin


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run ``kernel[grid](*args, **options)`` on the device of its tensors and that device's current stream.

    A kernel that does not compile or start raises ``LaunchError``: under "auto" the reference then answers.
    Every launch of the package goes through here; the ahead-of-time check records them by replacing this function.
    """
    device = next(argument for argument in args if isinstance(argument, Tensor)).device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*args, **OPTIONS | options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler and the driver die of
        reason = f"{kernel.__name__} does not compile or start on {device}: {type(error).__name__}: {error}"
        raise _dispatch.LaunchError(reason) from error


@triton.jit
def split(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """float32 for tensor cores that multiply tf32: ``high + low == x`` exactly, and ``high`` is a tf32 number.

    The lower 13 bits of the pattern are what tf32 does not have. Of ``low`` a tensor core reads the first 11 bits at
    least, so that high·high + high·low + low·high loses about 2⁻²⁰. An infinite ``x`` has no ``low``: it is NaN.
    """
    high = (x.to(tl.int32, bitcast=True) & -(2**13)).to(tl.float32, bitcast=True)
    return high, x - high


_dispatch.check("triton", unavailable)
