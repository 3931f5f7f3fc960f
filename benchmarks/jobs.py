"""What a run measures, job by job, in the order in which one wants to know it; and what compiles the kernels for it.

A part is a list of jobs that share a process: one that dies or hangs takes no other part along.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import add_ops

from .bench_host import measure_host
from .entry import REHEARSAL, STAGES, Entry, Provider, Shape, compiled_backend, itemsize, providers, variants
from .measure import growth, measure
from .memory import measure_extra_bytes
from .suite import ENTRIES, PRIMITIVES

BATCH = {"cpu": 16, "cuda": 144}
STEP_ROUNDS = {"cpu": 9, "cuda": 31}
HOST_ROUNDS = 51
FIRST, COMPILED, OTHERS = "by turns", "torch.compile", "reference and released"
"""What is timed together: on the CPU everything in the first turns, on a GPU the last two after all shapes."""


class Job(NamedTuple):
    """``kind`` is one of the three above, or "step", "host", "switches", "growth"; ``name`` an entry's."""

    kind: str
    name: str = ""
    shape: Shape | None = None

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part)


class Part(NamedTuple):
    """``seconds`` at most, which hold on a GPU."""

    name: str
    seconds: float
    jobs: list[Job]


def batched(shape: Shape, device: torch.device) -> Shape:
    """With the batch of the device; in a rehearsal far smaller."""
    if not REHEARSAL:
        return shape._replace(batch=BATCH[device.type])
    small = {"channels": 6, "height": 5, "width": 4, "views": 2, "bins": 3, "points": 20, "dim": 6, "projections": 3}
    sizes = {key: min(getattr(shape, key), most) for key, most in small.items() if key in shape._fields}
    return shape._replace(batch=2, **sizes)


def shapes(entry: Entry, device: torch.device, quick: bool) -> list[Shape]:
    """What the entry is measured at: on a GPU the primitives in several dtypes and layouts."""
    chosen = [
        batched(shape, device) for shape in (entry.quick[:1] if REHEARSAL else entry.quick if quick else entry.shapes)
    ]
    if compiled_backend(device) == "triton" and entry.name in PRIMITIVES:
        chosen = [variant for shape in chosen for variant in variants(shape)]
    return list(dict.fromkeys(chosen))


def parts(device: torch.device, quick: bool) -> list[Part]:
    """Everything, our kernels and plain PyTorch first."""
    on_gpu = compiled_backend(device) == "triton"
    turns = {
        name: [Job(FIRST, name, shape) for shape in shapes(entry, device, quick)] for name, entry in ENTRIES.items()
    }
    found = [Part(name, 60, turns[name]) for name in PRIMITIVES]
    found.append(Part("training step", 30, [Job("step")]))
    if not on_gpu:
        found.append(Part("host cost", 30, [Job("host")]))
    else:
        found.append(Part("switches", 20, [Job("switches")]))
        compiled = [
            Job(COMPILED, name, batched(shape, device)) for name in PRIMITIVES for shape in ENTRIES[name].compiled
        ]
        found.append(Part(COMPILED, 70, compiled[:1] if REHEARSAL else compiled))
    found.append(Part("losses", 30, [job for name, jobs in turns.items() if name not in PRIMITIVES for job in jobs]))
    if on_gpu:
        usual = [job for name in PRIMITIVES for job in turns[name] if job.shape == variants(job.shape)[0]]
        found.append(Part(OTHERS, 45, [job._replace(kind=OTHERS) for job in usual]))
    if not quick:
        found.append(Part("growth", 45, [Job("growth", name) for name in PRIMITIVES]))
    return found


SWITCHED = STAGES[::3]
"""Where the switches of the view histogram are tried."""


def candidates(job: Job, device: torch.device, quick: bool) -> list[Provider]:
    entry, ours = ENTRIES[job.name], compiled_backend(device)
    on_gpu, first = ours == "triton", {ours, "plain", *entry.rivals}
    compiled = job.kind == COMPILED or (not on_gpu and not quick and job.shape._replace(batch=16) in entry.compiled)
    every = providers(entry, device, compiled=compiled)
    if job.kind == COMPILED:
        return [provider for provider in every if provider.name == "compile"]
    if on_gpu:
        return [provider for provider in every if (provider.name in first) == (job.kind == FIRST)]
    return every


def contenders(name: str, device: torch.device) -> list[Provider]:
    """The best of the package that is available here, and plain PyTorch."""
    every = {provider.name: provider for provider in providers(ENTRIES[name], device, compiled=False)}
    ours = every.get(compiled_backend(device), every["reference"])
    return [ours, *(every[rival] for rival in ("plain", *ENTRIES[name].rivals))]


def growing(entry: Entry, device: torch.device) -> dict[str, tuple[Shape, ...]]:
    """The shapes along each axis; in a rehearsal one axis."""
    if not REHEARSAL:
        return entry.growth
    one, other = (batched(shape, device)._replace(batch=i) for i, shape in enumerate(entry.growth["batch"][:2], 1))
    return {"batch": (one, other)}


def do(job: Job, device: torch.device, quick: bool, copy: float) -> dict[str, Any]:
    """Measure: ``{"rows": …}``, ``{"growth": …}`` or ``{"switches": …}``."""
    budget = 0.0 if REHEARSAL else 0.3 if quick or device.type == "cuda" else 1.0
    if job.kind == "step":
        from .bench_step import measure_step  # needs torchvision

        rounds = 1 if REHEARSAL else 3 if quick else STEP_ROUNDS[device.type]
        return {"rows": measure_step(device, 2 if REHEARSAL else BATCH[device.type], rounds)}
    if job.kind == "host":
        return {"rows": measure_host(1 if REHEARSAL else 11 if quick else HOST_ROUNDS)}
    if job.kind == "switches":
        from .switches import measure_switches

        return {"switches": measure_switches(device, [batched(shape, device) for shape in SWITCHED], budget)}
    entry = ENTRIES[job.name]
    if job.kind == "growth":
        found = growth(entry, growing(entry, device), contenders(job.name, device), device, min(budget, 0.2))
        return {"growth": {job.name: found}}
    rows = measure(entry, job.shape, candidates(job, device, quick), device, budget, copy)
    if job.name in PRIMITIVES and not quick:
        # Compiling takes memory itself, so "compile" has no figure.
        wanted = [row for row in rows if row.timing and row.provider != "compile"]
        extra = measure_extra_bytes([(entry, job.shape, row.provider) for row in wanted], device)
        for row, size in zip(wanted, extra, strict=True):
            row.extra_bytes = size
            row.extra_over_input = None if size is None else size / (itemsize(job.shape) * job.shape.elements)
    return {"rows": rows}


def warm(job: Job, device: torch.device) -> None:
    """Launch once what ``do`` will launch of ours, so that Triton has compiled it."""
    backend = compiled_backend(device)
    if job.kind == "step":
        from .bench_step import Steps

        steps = Steps(device, 2 if REHEARSAL else BATCH[device.type])
        steps.losses_alone(backend)
        steps.run(backend)
    elif job.kind == "switches":
        do(job, device, quick=True, copy=1.0)
    elif job.kind in (FIRST, "growth"):
        entry = ENTRIES[job.name]
        every = [job.shape] if job.kind == FIRST else sum(growing(entry, device).values(), ())
        for shape in dict.fromkeys(every):
            inputs = entry.inputs(shape, device)
            with add_ops.use_backend(backend):
                value = entry.call(entry.ours, inputs, shape)
                torch.autograd.grad(value, inputs[0], torch.randn_like(value))
