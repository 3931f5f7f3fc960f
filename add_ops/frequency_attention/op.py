"""The operators ``spectral_distance`` and ``attention_sum``, of which the frequency attention loss is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import WIDE_FLOATS, accumulation, count, floating, number, one_of, operand, same_device, shaped
from .._module import FunctionModule
from . import reference

DISTANCES = ("l2", "cosine", "gaussian")
NORMS = ("forward", "backward", "ortho")
REDUCTIONS = ("sum", "mean", "none")


def _fake(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> Tensor:
    return student.new_empty((student.shape[0], *student.shape[2:]), dtype=accumulation(student, teacher))


def _fake_backward(grad: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student)


def _check(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> None:
    floating("student", student, "B C H W")
    shaped("teacher", teacher, student.shape)
    one_of("distance", distance, DISTANCES)
    number("sigma", sigma, above=0)
    one_of("norm", norm, NORMS)


def _check_backward(grad: Tensor, student: Tensor, *rest: Any) -> None:
    _check(student, *rest)
    batch, _, height, width = student.shape
    shaped("grad", grad, (batch, height, width))


_dispatch.define(
    "spectral_distance(Tensor student, Tensor teacher, str distance, float sigma, str norm) -> Tensor",
    reference.spectral_distance,
    _fake,
    _check,
)
_dispatch.define(
    "spectral_distance_backward(Tensor grad, Tensor student, Tensor teacher, str distance, float sigma, str norm)"
    " -> Tensor",
    reference.spectral_distance_backward,
    _fake_backward,
    _check_backward,
)
_dispatch.refuse_double_backward("spectral_distance_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, *ctx.options = inputs
    ctx.save_for_backward(student, teacher)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher = ctx.saved_tensors
    needs_student, needs_teacher = ctx.needs_input_grad[:2]
    name = "spectral_distance_backward"
    grad_student = _dispatch.call(name, grad, student, teacher, *ctx.options) if needs_student else None
    grad_teacher = _dispatch.call(name, grad, teacher, student, *ctx.options) if needs_teacher else None
    return grad_student, grad_teacher, None, None, None


_dispatch.differentiate("spectral_distance", _backward, _setup_context)


def _fake_sum(distance: Tensor, gamma: float, channels: int, reduction: str) -> tuple[Tensor, Tensor]:
    loss = distance.new_empty(distance.shape[:1] if reduction == "none" else ())
    return loss, distance.new_empty(distance.shape)


def _check_sum(distance: Tensor, gamma: float, channels: int, reduction: str) -> None:
    operand("distance", distance, "B H W", WIDE_FLOATS)
    number("gamma", gamma)
    count("channels", channels)
    one_of("reduction", reduction, REDUCTIONS)


_dispatch.define(
    "attention_sum(Tensor distance, float gamma, SymInt channels, str reduction) -> (Tensor loss, Tensor slope)",
    reference.attention_sum,
    _fake_sum,
    _check_sum,
)


def _setup_sum_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _sum_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return grad.view(-1, 1, 1) * ctx.saved_tensors[0], None, None, None


_dispatch.differentiate("attention_sum", _sum_backward, _setup_sum_context)


def spectral_distance(
    student: Tensor, teacher: Tensor, *, distance: str = "l2", sigma: float = 1.0, norm: str = "forward"
) -> Tensor:
    """Channel mean of the distance between the 2-D spectra of two feature maps (Le & Woo 2022, frequency attention).

    ``"l2"`` is ``|F_S - F_T|²``; ``"cosine"`` is ``1 - Re(F_S·conj F_T)/(|F_S|·|F_T|)``, 1 with gradient 0 where either
    coefficient is exactly 0; ``"gaussian"`` is ``1 - exp(-|F_S - F_T|²/(2·sigma²))``, with ``F = fft2(x, norm=norm)``.

    Args:
        student, teacher: ``(B, C, H, W)``, float16, bfloat16, float32 or float64, any strides; either, both or neither
            may require a gradient.
        distance: ``"l2"``, ``"cosine"`` or ``"gaussian"``.
        sigma: width of the gaussian, > 0, in units of the spectrum.
        norm: scale of the DFT, torch.fft's words: ``"forward"`` (1/HW), ``"ortho"`` (1/sqrt(HW)), ``"backward"`` (1).

    Returns:
        ``(B, H, W)``, float32 or the wider input dtype; entry ``[b, 0, 0]`` is the constant (DC) coefficient.

    Raises:
        TypeError: an input is not a dense floating-point tensor.
        ValueError: shapes or devices differ, a word is unknown, or ``sigma`` is not a positive number.
    """
    _check_public(student, teacher, distance, sigma, norm)
    return _dispatch.call("spectral_distance", student, teacher, distance, sigma, norm)


def _check_public(student: Tensor, teacher: Tensor, distance: str, sigma: float, norm: str) -> None:
    floating("student", student, "B C H W")
    floating("teacher", teacher, "B C H W")
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: expected the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}")
    same_device("teacher", teacher, "student", student)
    one_of("distance", distance, DISTANCES)
    number("sigma", sigma, above=0)
    one_of("norm", norm, NORMS)


def frequency_attention_map(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float = 1.0,
    distance: str = "l2",
    sigma: float = 1.0,
    norm: str = "forward",
) -> Tensor:
    """Attention of every frequency, ``w = exp(gamma · mean_c d)``: how far the student is from the teacher there.

    The exponent is clamped at 80 (700 in float64). No gradient flows through the map.

    Args:
        student, teacher, distance, sigma, norm: as in :func:`spectral_distance`.
        gamma: sharpness of the attention, any finite number.

    Returns:
        ``(B, H, W)``, float32 or the wider input dtype, without gradient.

    Raises:
        TypeError, ValueError: as :func:`spectral_distance`; also where ``gamma`` is not a finite number.
    """
    number("gamma", gamma)
    _check_public(student, teacher, distance, sigma, norm)
    arguments = student.detach(), teacher.detach(), distance, sigma, norm
    return reference.attention(_dispatch.call("spectral_distance", *arguments), gamma)


def frequency_attention_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float = 1.0,
    distance: str = "l2",
    sigma: float = 1.0,
    norm: str = "forward",
    reduction: str = "sum",
) -> Tensor:
    """Frequency attention distillation loss ``mean_b Σ_{c,u,v} w·d`` (Le & Woo 2022).

    The attention ``w`` is :func:`frequency_attention_map`, constant in the gradient. A sample whose loss exceeds the
    range of the dtype counts as half its largest number and has gradient 0; one with an infinite or NaN element is NaN.
    An empty batch gives 0.

    Args:
        student, teacher, gamma, distance, sigma, norm: as in :func:`frequency_attention_map`.
        reduction: over channels and frequencies, ``"sum"`` or ``"mean"``, then the mean over the batch; ``"none"`` is
            the sum, kept per sample.

    Returns:
        A scalar, or ``(B,)`` for ``"none"``; float32 or the wider input dtype.

    Raises:
        TypeError, ValueError: as :func:`frequency_attention_map`; also where ``reduction`` is unknown.
    """
    one_of("reduction", reduction, REDUCTIONS)
    number("gamma", gamma)
    _check_public(student, teacher, distance, sigma, norm)
    mean_distance = _dispatch.call("spectral_distance", student, teacher, distance, sigma, norm)
    return _dispatch.call("attention_sum", mean_distance, float(gamma), student.shape[1], reduction)[0]


class FrequencyAttentionLoss(FunctionModule):
    """:func:`frequency_attention_loss` as a module: same options, ``forward(student, teacher)``."""

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        distance: str = "l2",
        sigma: float = 1.0,
        norm: str = "forward",
        reduction: str = "sum",
    ) -> None:
        super().__init__(
            gamma=number("gamma", gamma),
            distance=one_of("distance", distance, DISTANCES),
            sigma=number("sigma", sigma, above=0),
            norm=one_of("norm", norm, NORMS),
            reduction=one_of("reduction", reduction, REDUCTIONS),
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return frequency_attention_loss(student, teacher, **self.options)


_dispatch.load("cpp", "add_ops.frequency_attention.cpp_kernels")
_dispatch.load("triton", "add_ops.frequency_attention.triton_kernels")
