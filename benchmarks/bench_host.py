"""What a loss costs on the host: forward + backward of its module on so small an input that only the calls count.

On the CPU, whatever device the rest is measured on, in processor time of the calling thread, so that a neighbour who
takes the core does not count, and as a ratio to ``torch.nn.functional.mse_loss`` in the same run. A turn is many calls
of one loss after the other: caches are warm, which is hardest on the ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import add_ops

from .measure import Row, Timing, checked

NAME, RIVAL, SHAPE, CALLS = "host_cost", "mse_loss", (1, 4, 4, 4), 20


def losses() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each loss by the name of its function, as a function of the student's features."""
    generator = torch.Generator().manual_seed(0)
    teacher, labels = torch.randn(SHAPE, generator=generator), torch.zeros(SHAPE[0], dtype=torch.long)
    sliced = add_ops.SlicedWassersteinLoss()
    return {
        RIVAL: lambda x: F.mse_loss(x, teacher.to(x.dtype)),
        "frequency_attention_loss": lambda x: add_ops.frequency_attention_loss(x, teacher.to(x.dtype)),
        "multi_view_loss": lambda x: add_ops.multi_view_loss(x, teacher.to(x.dtype), labels),
        "sliced_wasserstein": lambda x: sliced(x.flatten(2).mT, teacher.to(x.dtype).flatten(2).mT),
    }


def measure_host(rounds: int) -> list[Row]:
    """A row per loss, :data:`RIVAL` first; the timing is of one call."""
    student = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def run(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(x)
        return value.detach(), *torch.autograd.grad(value, x)

    def check(loss: Callable[[Tensor], Tensor]) -> list[float]:
        torch.manual_seed(2)
        actual = run(loss, student.clone().requires_grad_())
        torch.manual_seed(2)
        with add_ops.use_backend("reference"):
            expected = run(loss, student.double().requires_grad_())
        return checked(zip(actual, expected, strict=True))

    x = student.clone().requires_grad_()
    rows = {name: Row(NAME, "×".join(map(str, SHAPE)), name, {"batch": SHAPE[0]}) for name in losses()}
    passed = {name: loss for name, loss in losses().items() if rows[name].check(lambda loss=loss: check(loss))}
    seconds: dict[str, list[float]] = {name: [] for name in passed}
    for _ in range(rounds):
        for name, loss in passed.items():
            run(loss, x)
            start = time.thread_time()
            for _ in range(CALLS):
                run(loss, x)
            seconds[name].append((time.thread_time() - start) / CALLS)
    for name in passed:
        rows[name].timing = Timing.of(seconds[name])
    return list(rows.values())


def host_ratio(rows: list[Row], name: str) -> float | None:
    """How many times longer a call of the loss ``name`` takes than one of :data:`RIVAL`."""
    times = {row.provider: row.timing.p50 for row in rows if row.entry == NAME and row.timing}
    return times[name] / times[RIVAL] if {name, RIVAL} <= times.keys() else None
