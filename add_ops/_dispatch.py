"""Registers the primitives' implementations with torch's dispatcher; says which backend answers, and why.

Every operator has one reference in plain PyTorch, which answers anywhere. A compiled backend registers a kernel per
operator and answers for its own device type, unless ``use_backend`` or ``ADD_OPS_BACKEND`` names another one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._checks import one_of

BACKENDS = ("auto", "reference", "cpp", "triton")
AUTO = {"cpu": "cpp", "cuda": "triton"}
"""Which compiled backend "auto" asks first, by device type."""

library = torch.library.Library("add_ops", "DEF")

_references: dict[str, Callable[..., Any]] = {}
_runs: dict[str, Callable[..., Any]] = {}
_eager: dict[str, type[torch.autograd.Function]] = {}
_kernels: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., str | None]]] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}
_missing: dict[str, str] = {"cpp": "no kernels in this version", "triton": "no kernels in this version"}
_hindrances: dict[str, Callable[[], str | None]] = {}
_failed: dict[str, str] = {}
_answered: dict[str, tuple[str, str]] = {}
_default = one_of("ADD_OPS_BACKEND", os.environ.get("ADD_OPS_BACKEND", "auto"), BACKENDS)
_chosen: ContextVar[str] = ContextVar("add_ops backend", default=_default)


class LaunchError(RuntimeError):
    """A kernel could not be compiled or launched, and has computed nothing."""


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None] = lambda *args: None,
) -> None:
    """Define the operator ``add_ops::<schema>``, answered by ``reference`` until a backend implements it.

    ``check(*args)`` comes before every backend: the operator can be called by hand, and no implementation may touch
    memory that its arguments do not have. Values, such as places in an order, are checked where they are read.

    Inside the operator autocast is off: the implementations choose their own accumulation type.
    """
    name = schema.partition("(")[0]
    _references[name] = reference

    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0:  # torch.func's tangents cannot be seen from here, and would be lost
            raise NotImplementedError(
                f"add_ops::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize; forward_ad), and"
                " is refused inside of one; use reverse mode, torch.autograd.grad or backward"
            )
        device = "cpu" if args[0].is_cpu else args[0].device.type  # the object is dearer than many an operation
        kernel = _select(name, device, args)
        if not torch.is_autocast_enabled(device):  # entering the context costs as much as a small map
            return _call(name, kernel, args)
        with torch.autocast(device, enabled=False):
            return _call(name, kernel, args)

    def checked(*args: Any) -> Any:
        check(*args)
        return run(*args)

    _runs[name] = run
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"add_ops::{name}", fake, lib=library)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the gradient of operator ``name``; it runs on the backend of its forward, in whichever thread."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = chosen()
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Tensor) -> Any:
        token = _chosen.set(ctx.backend)  # threads of autograd's own know nothing of use_backend
        try:
            return backward(ctx, *grads)
        finally:
            _chosen.reset(token)

    _register_gradient(name, run, remember)


def refuse_double_backward(name: str) -> None:
    """Make differentiating the backward operator ``name`` an error instead of a silent zero."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"add_ops::{name} is a gradient and is not differentiable itself: no second derivatives"
        )

    _register_gradient(name, refuse, lambda ctx, inputs, output: None)


def _register_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    torch.library.register_autograd(f"add_ops::{name}", backward, setup_context=setup_context, lib=library)
    methods = {
        "forward": lambda *args: getattr(torch.ops.add_ops, name)(*args),
        "setup_context": setup_context,
        "backward": backward,
    }
    static = {key: staticmethod(method) for key, method in methods.items()}
    _functions[name] = type(name, (torch.autograd.Function,), {"generate_vmap_rule": True, **static})

    def forward(ctx: Any, *args: Any) -> Any:
        output = _runs[name](*args)
        setup_context(ctx, args, output)
        return output

    static["forward"] = staticmethod(forward)
    _eager[name] = type(name, (torch.autograd.Function,), {key: static[key] for key in ("forward", "backward")})


def call(name: str, *args: Any) -> Any:
    """The operator ``name``, also inside of torch.func's transforms, which operators' own gradients do not know.

    ``args`` are checked already. Plain tensors in eager mode go without the dispatcher: for operators in Python it and
    its autograd take several times as long as a kernel does on a small map.
    """
    if plain(*args):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return _eager[name].apply(*args)
        return _runs[name](*args)
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        return _functions[name].apply(*args)
    return getattr(torch.ops.add_ops, name)(*args)


def plain(*args: Any) -> bool:
    """Whether no tracer, mode, transform or subclass of a tensor has to see what is done with ``args``.

    Nor is one the negative of its memory, as the imaginary part of a conjugate is.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    for x in args:
        if isinstance(x, Tensor) and (
            type(x) not in (Tensor, torch.nn.Parameter) or x.is_neg() or not (x.is_cpu or x.is_cuda)
        ):
            return False
    return True


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
    wanted = _chosen.get()
    backend = AUTO.get(device, "reference") if wanted == "auto" else wanted
    if backend == "reference":
        _answered[name] = backend, ""
        return _references[name]
    if (name, backend) in _kernels:
        kernel, unsupported = _kernels[name, backend]
        reason = (wanted == "auto" and _failed.get(name)) or unsupported(*args)
        if reason is None:
            _answered[name] = backend, ""
            return kernel
    else:
        reason = _missing.get(backend, "not implemented")
    if wanted == "auto":
        _answered[name] = "reference", reason
        return _references[name]
    raise RuntimeError(f"backend {backend!r} was asked for but cannot run add_ops::{name} here: {reason}")


def _call(name: str, kernel: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return kernel(*args)
    except LaunchError as error:
        if chosen() != "auto":
            raise
        _failed[name] = str(error)
        _answered[name] = "reference", str(error)
        warnings.warn(
            f"add_ops::{name} is answered by the reference from now on: {error}", RuntimeWarning, stacklevel=2
        )
        return _references[name](*args)


def answered(name: str) -> tuple[str, str]:
    """Who answered the operator ``name`` last; and, of the reference under "auto", why no kernel did, or ``""``."""
    return _answered.get(name, ("reference", ""))


def chosen() -> str:
    """The backend in force: that of the innermost ``use_backend``, else of ``ADD_OPS_BACKEND``, else ``"auto"``."""
    return _chosen.get()


def backends() -> dict[str, str]:
    """Say of every backend whether it is available here.

    Returns:
        ``{"reference": "available", "cpp": …, "triton": …}``; the value is ``"available"`` or the reason why not.
    """
    return {name: _hindrance(name) or "available" for name in BACKENDS[1:]}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every ``add_ops`` operator inside the block on one backend, in this thread or task alone.

    A gradient is computed by the backend in force where its forward ran, in whichever thread, inside or after the
    block; under ``torch.compile`` by the one in force where the compiled code runs.

    Args:
        name: ``"auto"`` (the compiled backend of the tensor's device where it can run, else the reference),
            ``"reference"``, ``"cpp"`` or ``"triton"``. The environment variable ``ADD_OPS_BACKEND`` sets the default.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: the backend is not available on this machine, or meets an input it cannot run.
    """
    one_of("name", name, BACKENDS)
    if reason := _hindrance(name):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)
