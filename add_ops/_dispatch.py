"""Registers the primitives' implementations with torch's dispatcher; says which backend answers, and why.

Every operator has one reference in plain PyTorch, which answers anywhere. A compiled backend registers a kernel per
operator and answers for its own device type, unless ``use_backend`` or ``ADD_OPS_BACKEND`` names another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ._checks import one_of

BACKENDS = ("auto", "reference", "cpp", "triton")
AUTO = {"cpu": "cpp", "cuda": "triton"}
"""Which compiled backend "auto" asks first, by device type."""

library = torch.library.Library("add_ops", "DEF")

_references: dict[str, Callable[..., Any]] = {}
_kernels: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., str | None]]] = {}
_missing: dict[str, str] = {"cpp": "no kernels in this version", "triton": "no kernels in this version"}
_hindrances: dict[str, Callable[[], str | None]] = {}
_chosen = one_of("ADD_OPS_BACKEND", os.environ.get("ADD_OPS_BACKEND", "auto"), BACKENDS)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the operator ``add_ops::<schema>``, answered by ``reference`` until a backend implements it.

    Inside the operator autocast is off: the implementations choose their own accumulation type.
    """
    name = schema.partition("(")[0]
    _references[name] = reference

    def run(*args: Any) -> Any:
        device = next(argument for argument in args if isinstance(argument, Tensor)).device.type
        kernel = _select(name, device, args)
        if not torch.is_autocast_enabled(device):  # entering the context costs as much as a small map
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"add_ops::{name}", fake, lib=library)


def refuse_double_backward(name: str) -> None:
    """Make differentiating the backward operator ``name`` an error instead of a silent zero."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"add_ops::{name} is a gradient and is not differentiable itself: no second derivatives"
        )

    torch.library.register_autograd(f"add_ops::{name}", refuse, lib=library)


def implement(
    name: str, backend: str, kernel: Callable[..., Any], unsupported: Callable[..., str | None] = lambda *args: None
) -> None:
    """Let ``backend`` answer for operator ``name`` wherever ``unsupported(*args)`` gives no reason against it."""
    _kernels[name, backend] = (kernel, unsupported)
    _missing.pop(backend, None)


def check(backend: str, hindrance: Callable[[], str | None]) -> None:
    """Ask ``hindrance()`` whenever ``backend`` is asked for: why it cannot run here as things stand, or None."""
    _hindrances[backend] = hindrance


def _hindrance(backend: str) -> str | None:
    return _missing.get(backend) or _hindrances.get(backend, lambda: None)()


def load(backend: str, module: str) -> None:
    """Import ``module``, which registers kernels of ``backend``; where it cannot be imported, remember why."""
    try:
        import_module(module)
    except ImportError as error:
        _missing[backend] = f"not built or not installed here ({error})"


def _select(name: str, device: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    backend = AUTO.get(device, "reference") if _chosen == "auto" else _chosen
    if backend == "reference":
        return _references[name]
    if (name, backend) in _kernels:
        kernel, unsupported = _kernels[name, backend]
        reason = unsupported(*args)
        if reason is None:
            return kernel
    else:
        reason = _missing.get(backend, "not implemented")
    if _chosen == "auto":
        return _references[name]
    raise RuntimeError(f"backend {backend!r} was asked for but cannot run add_ops::{name} here: {reason}")


def answers(device: str) -> dict[str, str]:
    """The backend that answers first for each operator on ``device`` (``"cpu"``, ``"cuda"``, …) as things stand."""
    backend = AUTO.get(device, "reference") if _chosen == "auto" else _chosen
    return {name: backend if (name, backend) in _kernels else "reference" for name in _references}


def chosen() -> str:
    """The backend in force: that of the innermost ``use_backend``, else of ``ADD_OPS_BACKEND``, else ``"auto"``."""
    return _chosen


def backends() -> dict[str, str]:
    """Say of every backend whether it is available here.

    Returns:
        ``{"reference": "available", "cpp": …, "triton": …}``; the value is ``"available"`` or the reason why not.
    """
    return {name: _hindrance(name) or "available" for name in BACKENDS[1:]}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every ``add_ops`` operator inside the block, in all threads of the process, on one backend.

    Args:
        name: ``"auto"`` (the compiled backend of the tensor's device where it can run, else the reference),
            ``"reference"``, ``"cpp"`` or ``"triton"``. The environment variable ``ADD_OPS_BACKEND`` sets the default.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: the backend is not available on this machine, or meets an input it cannot run.
    """
    global _chosen
    one_of("name", name, BACKENDS)
    if reason := _hindrance(name):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous
