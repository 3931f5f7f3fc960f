"""``python -m benchmarks.warm``: compiles the kernels that the benchmarks on a GPU launch, several at a time.

One process compiles one kernel after the other, for a second or more each; Triton's cache serves all processes.
"""

from __future__ import annotations

from multiprocessing import get_context

import torch

import add_ops

from .entry import Shape
from .runner import BATCH
from .suite import ENTRIES, PRIMITIVES

PROCESSES = 6


def run(name: str, shape: Shape) -> None:
    """Forward and backward of the entry called ``name``, once."""
    entry, device = ENTRIES[name], torch.device("cuda")
    inputs = entry.inputs(shape, device)
    with add_ops.use_backend("triton"):
        value = entry.call(entry.ours, inputs, shape)
        torch.autograd.grad(value, inputs[0], torch.randn_like(value))
    torch.cuda.synchronize()


def main() -> None:
    jobs = [(name, shape._replace(batch=BATCH["cuda"])) for name in PRIMITIVES for shape in ENTRIES[name].shapes]
    with get_context("spawn").Pool(PROCESSES) as pool:
        pool.starmap(run, jobs, chunksize=1)
    print(f"compiled what {len(jobs)} shapes launch")


if __name__ == "__main__":
    main()
