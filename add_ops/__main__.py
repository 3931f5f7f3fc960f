"""``python -m add_ops``: what is installed, which backend answers where, and a self-test of every primitive here.

Exits with 1 if a result differs from the float64 reference, or no device could be tested.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import add_ops

from . import _dispatch
from ._output import outliving_readers

TOLERANCE = 1e-5


def _self_test(device: str) -> dict[str, tuple[float, str, list[str]]]:
    """Relative L2 error of each primitive's float32 values and gradients against the float64 reference.

    Also the backend that answered, and of each operator that the reference answered instead, why.
    """
    generator = torch.Generator().manual_seed(0)
    features, teacher = torch.randn(2, 2, 6, 8, 8, generator=generator)
    views = add_ops.sample_views(3, generator=generator)
    projections = add_ops.sample_projections(6, 3, generator=generator)
    ops, labels = torch.ops.add_ops, torch.tensor([0, 1])
    primitives = {
        "spectral_distance": lambda x: add_ops.spectral_distance(x, teacher.to(x)),
        "attention_sum": lambda x: ops.attention_sum(x[:, 0].square(), 0.5, 6, "none")[0],
        "view_histogram": lambda x: add_ops.multi_view_attention(x, views.to(x.device), 4),
        "contrastive_loss": lambda x: ops.contrastive_loss(
            x.flatten(2), teacher.to(x).flatten(2), labels.to(x.device), 2.0, 1.0, 1.0, 150.0
        ),
        "project_and_sort": lambda x: add_ops.project_and_sort(x.flatten(2).mT, projections.to(x))[0],
        "quantile_distance": lambda x: add_ops.sliced_wasserstein(
            x.flatten(2).mT, teacher.to(x).flatten(2).mT[:, :40], projections.to(x)
        ),
    }

    def run(primitive: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        values = primitive(x)
        (grad,) = torch.autograd.grad(values.square().sum(), x)
        return torch.cat([values.detach().flatten(), grad.flatten()]).cpu().double()

    errors = {}
    for name, primitive in primitives.items():
        actual = run(primitive, features.to(device))
        answered = {operator: _dispatch.answered(operator) for operator in (name, f"{name}_backward")}
        reasons = [f"{operator}: reference, as {reason}" for operator, (_, reason) in answered.items() if reason]
        with add_ops.use_backend("reference"):
            expected = run(primitive, features.double())
        errors[name] = float((actual - expected).norm() / expected.norm()), answered[name][0], reasons
    return errors


@outliving_readers()
def main() -> int:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    print(f"add_ops {add_ops.__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(", ".join(f"{package} {installed(package)}" for package in ("torch", "triton", "numpy")))
    print(f"\nbackend in force: {_dispatch.chosen()}")
    for name, status in add_ops.backends().items():
        print(f"  {name:<10} {status}")
    answered = failed = False
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        print(f"\n{device:<20} {'answered by':<12} error against the float64 reference")
        try:
            errors = _self_test(device)
        except RuntimeError as refusal:  # a backend that was asked for by name does not run on every device
            if _dispatch.chosen() == "auto":
                raise
            print(f"  {refusal}")
            continue
        answered = True
        for name, (error, backend, reasons) in errors.items():
            passed = error <= TOLERANCE
            failed |= not passed
            verdict = "ok" if passed else f"WRONG (above {TOLERANCE:.0e})"
            print(f"  {name:<18} {backend:<12} {error:.1e} {verdict}", *reasons, sep="\n    ")
    return int(failed or not answered)


if __name__ == "__main__":
    sys.exit(main())
