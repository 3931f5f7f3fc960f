"""Random calls of every operator, by its public name, raw, and of the compiled module: each answers or raises.

``.ci/sanitize`` runs it with C++ kernels that were built for GCC's sanitizers, which end the process at the first byte
read or written outside of an array, undefined operation or race. Half of the cases have one argument broken.
``--seed S --cases 1`` repeats case S, whose number a failure prints.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import add_ops
from add_ops import _cpp
from add_ops._cpp import kernels, view

CAPABILITIES = ("baseline", "avx2", "avx512")
REFUSED = (ValueError, TypeError, RuntimeError)  # a MemoryError or an IndexError tells nobody what is wrong
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 65)
EXTREMES = (0.0, -0.0, 1e-45, 1e-200, 1e18, -3e38, 1e160, 1e308, float("inf"), float("-inf"), float("nan"))


class Draw:
    """Random arguments; ``seed`` gives the same ones again."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.random, name)

    def sizes(self, count: int, most: int = 20000) -> list[int]:
        while True:
            sizes = [self.choice(SIZES) for _ in range(count)]
            if self.random.random() < 0.05:
                sizes[self.randrange(count)] = 0
            if np.prod(sizes) <= most:
                return sizes

    def dtype(self) -> torch.dtype:
        return self.choice(FLOATS)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.randrange(6)
        if kind == 0:
            values = values.round()  # ties and zeros
        elif kind == 1:
            values *= 10.0 ** self.choice((-200, -30, 18, 30, 160))
        elif kind == 2:
            chosen = torch.rand(shape, generator=self.generator) < 0.05
            values = torch.where(chosen, self.choice(EXTREMES), values)
        return self.laid_out(values.to(dtype))

    def laid_out(self, x: Tensor) -> Tensor:
        kind = self.randrange(6)
        if kind == 0 and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if kind == 1 and x.ndim > 1:
            return x.mT.contiguous().mT
        if kind == 2:  # gaps, and an odd address
            return torch.stack((x, x), -1).flatten()[1:].as_strided(x.shape, [2 * step for step in strides(x)])
        if kind == 3 and x.ndim and x.shape[0]:
            return x[:1].expand(x.shape)
        return x

    def order(self, *shape: int) -> Tensor:
        dtype = torch.int16 if self.randrange(3) else torch.int32
        return torch.rand(shape, generator=self.generator).argsort(-1).to(dtype)

    def broken(self, value: Any) -> Any:
        """Another value in the place of an argument, often one of the wrong kind."""
        if isinstance(value, Tensor):
            ways: list[Callable[[], Any]] = [
                lambda: value[None],
                lambda: value.flatten(),
                lambda: value[..., :-1] if value.ndim else value,
                lambda: torch.cat((value, value)) if value.ndim else value,
                lambda: value.transpose(0, -1) if value.ndim else value,
                lambda: value.to(self.choice((torch.int16, torch.int64, torch.bool, torch.complex64, *FLOATS))),
                lambda: value.to(torch.float8_e5m2),
                lambda: value.to_sparse(),
                lambda: value.new_full(value.shape, self.choice(EXTREMES)) if value.is_floating_point() else value - 1,
                lambda: value * 1000 + 1,
            ]
            return self.choice(ways)()
        if isinstance(value, str):
            return "nobody"
        if isinstance(value, bool) or value is None:
            return 7
        return self.choice((0, -1, 2**62, 3.5) if isinstance(value, int) else (0.0, -1.0, *EXTREMES))


def strides(x: Tensor) -> tuple[int, ...]:
    return tuple(torch.empty(x.shape, device="meta").stride())


def spectral(draw: Draw) -> list[Any]:
    shape = draw.sizes(4)
    options = [draw.choice(("l2", "cosine", "gaussian")), 10.0 ** draw.uniform(-3, 3)]
    features = [draw.numbers(*shape, dtype=draw.dtype()) for _ in range(2)]
    return [*features, *options, draw.choice(("forward", "backward", "ortho"))]


def spectral_backward(draw: Draw) -> list[Any]:
    student, *rest = spectral(draw)
    shape = student.shape[0], *student.shape[2:]
    return [draw.numbers(*shape, dtype=draw.choice(FLOATS[:2])), student, *rest]


def histogram(draw: Draw) -> list[Any]:
    views = draw.numbers(draw.randrange(1, 5), 3, dtype=draw.choice(FLOATS[:2]))
    bins = draw.choice((1, 2, 3, 7, 16, 100, 1000))
    return [draw.numbers(*draw.sizes(4), dtype=draw.dtype()), views, bins, draw.choice(("index", "unit"))]


def histogram_backward(draw: Draw) -> list[Any]:
    features, views, bins, coordinates = histogram(draw)
    shape, dtype = (len(features), len(views), bins), torch.promote_types(features.dtype, torch.float32)
    grad, attention = (draw.numbers(*shape, dtype=dtype) for _ in range(2))
    return [grad, features, views, attention, draw.numbers(len(features), dtype=torch.float64), coordinates]


def sort(draw: Draw) -> list[Any]:
    batch, points, depth = draw.choice((0, 1, 2, 9)), draw.choice((0, 1, 5, 64, 129, 700, 2500)), draw.choice((1, 3))
    projections = draw.numbers(depth, draw.randrange(1, 10), dtype=draw.dtype())
    return [draw.numbers(batch, points, depth, dtype=draw.dtype()), projections]


def sort_backward(draw: Draw) -> list[Any]:
    batch, rows, points, depth = draw.choice((0, 1, 5)), draw.randrange(1, 9), draw.choice((0, 1, 8, 300)), 3
    grad = draw.numbers(batch, rows, points, dtype=draw.choice(FLOATS[:2]))
    return [grad, draw.order(batch, rows, points), draw.numbers(depth, rows, dtype=draw.dtype())]


def quantile(draw: Draw) -> list[Any]:
    batch, rows, dtype = draw.choice((0, 1, 3)), draw.randrange(1, 5), draw.choice(FLOATS[:2])
    points = [draw.choice((1, 2, 9, 40, 300)) for _ in range(2)]
    values = [draw.numbers(batch, rows, count, dtype=dtype).sort(-1).values for count in points]
    weights = [draw.numbers(batch, count, dtype=torch.float64) if draw.randrange(2) else None for count in points]
    return [*values, *(draw.order(batch, rows, count) for count in points), *weights, draw.choice((1.0, 2.0, 3.5))]


def quantile_backward(draw: Draw) -> list[Any]:
    x, *rest = quantile(draw)
    return [draw.numbers(*x.shape[:2], dtype=x.dtype), x, *rest]


def attended(draw: Draw) -> list[Any]:
    distance = draw.numbers(*draw.sizes(3), dtype=draw.choice(FLOATS[:2]))
    return [distance, draw.choice((0.0, 1.0, -3.0, 1e300)), draw.randrange(1, 99), draw.choice(("sum", "mean", "none"))]


def contrast(draw: Draw) -> list[Any]:
    shape, dtype = draw.sizes(3), draw.choice(FLOATS[:2])
    rows = [draw.numbers(*shape, dtype=dtype) for _ in range(2)]
    labels = torch.randint(-1, 2, shape[:1], generator=draw.generator)
    return [*rows, labels, draw.choice((1.0, 2.0, 3.5)), 1.0, 0.5, draw.choice((0.0, 0.1, 9.0))]


def contrast_backward(draw: Draw) -> list[Any]:
    student, *rest = contrast(draw)
    return [draw.numbers(dtype=student.dtype), student, *rest]


RAW = {
    "spectral_distance": spectral,
    "spectral_distance_backward": spectral_backward,
    "view_histogram": histogram,
    "view_histogram_backward": histogram_backward,
    "project_and_sort": sort,
    "project_and_sort_backward": sort_backward,
    "quantile_distance": quantile,
    "quantile_distance_backward": quantile_backward,
    "attention_sum": attended,
    "contrastive_loss": contrast,
    "contrastive_loss_backward": contrast_backward,
}


def differentiated(function: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> None:
    if isinstance(x, Tensor) and x.is_floating_point():
        x = x.detach().requires_grad_()
    value = function(x, *args, **options)
    if value.requires_grad:
        value.sum().backward()


def public(draw: Draw) -> tuple[Callable[..., Any], list[Any]]:
    shape = draw.sizes(4)
    student, teacher = (draw.numbers(*shape, dtype=draw.dtype()) for _ in range(2))
    kind = draw.randrange(3)
    if kind == 0:
        call = partial(add_ops.frequency_attention_loss, distance=draw.choice(("l2", "cosine", "gaussian")))
        return call, [student, teacher]
    if kind == 1:
        labels = torch.randint(0, 2, shape[:1], generator=draw.generator)
        options = {"distance": draw.choice(("bins", "wasserstein")), "pairs": draw.choice(("all", "sampled"))}
        call = partial(add_ops.multi_view_loss, views=3, bins=5, generator=draw.generator, **options)
        return call, [student, teacher, labels]
    points = [x.flatten(2).mT for x in (student, teacher)]
    projections = add_ops.sample_projections(max(shape[1], 1), 3, generator=draw.generator)
    return add_ops.sliced_wasserstein, [points[0], points[1][:, : draw.choice((3, 9999))], projections]


def compiled(draw: Draw) -> tuple[Callable[..., Any], list[Any]]:
    """A function of the compiled module with arrays that a tensor cannot be, and outputs of the right shape."""
    threads, kind = draw.choice((1, 2, 5)), draw.randrange(7)
    if kind == 0:
        student, teacher, distance, sigma, _ = spectral(draw)
        teacher = teacher.to(student.dtype)
        out = torch.empty(len(student), *student.shape[2:], dtype=torch.promote_types(student.dtype, torch.float32))
        function = kernels.spectral_distance
        arguments = [student, teacher, ("l2", "cosine", "gaussian").index(distance), sigma, 0.1, out, threads]
    elif kind == 1:
        features, views, bins, coordinates = histogram(draw)
        out = torch.empty(len(features), len(views), bins, dtype=torch.promote_types(features.dtype, torch.float32))
        energy = torch.empty(len(features), dtype=torch.float64)
        function = kernels.view_histogram
        arguments = [features, views.double().contiguous(), bins, coordinates == "unit", out, energy, threads]
    elif kind == 2:
        values = draw.numbers(draw.choice((0, 1, 9)), draw.choice((1, 7, 128, 1024, 3000))).contiguous()
        function, arguments = kernels.sort_with_index, [values, torch.empty(values.shape, dtype=torch.int16), threads]
    elif kind == 3:
        grad, order, _ = sort_backward(draw)
        grad, order = grad.flatten(0, 1).contiguous(), order.flatten(0, 1)
        function, arguments = kernels.scatter_by_index, [grad, order, torch.empty_like(grad), threads]
    elif kind == 4:
        distance, gamma, channels, _ = attended(draw)
        outputs = [torch.empty(shape, dtype=distance.dtype) for shape in (distance.shape[:1], distance.shape)]
        function = kernels.attention_sum
        arguments = [distance.contiguous(), gamma, 80.0, 0.1 * channels, 1e30, *outputs, threads]
    elif kind == 5:
        grad, student, teacher, labels, *options = contrast_backward(draw)
        rows = [student.contiguous(), teacher.contiguous(), labels]
        function = kernels.contrastive_loss_backward
        arguments = [grad, *rows, *options, torch.empty(student.shape, dtype=student.dtype), threads]
    else:
        *tensors, p = quantile(draw)
        rows = [x.flatten(0, 1).contiguous() for x in tensors[:4]]
        weights = [None if x is None else x.contiguous() for x in tensors[4:]]
        function = kernels.quantile_distance
        arguments = [*rows, *weights, p, torch.empty(len(rows[0]), dtype=rows[0].dtype), threads]
    return function, [view(x) if isinstance(x, Tensor) else x for x in arguments]


def broken_array(draw: Draw, array: np.ndarray) -> Any:
    kind = draw.randrange(6)
    if kind == 0:
        return array[..., None]
    if kind == 1:
        return array[::-1]
    if kind == 2:
        return array.astype(draw.choice((np.int64, np.float16, np.int16, np.uint16, np.complex64, ">f4", "U3", object)))
    if kind == 3:
        frozen = array.copy()
        frozen.setflags(write=False)
        return frozen
    if kind == 4:  # between the elements
        return np.frombuffer(b"\0" * (array.nbytes + 1), dtype=array.dtype, offset=1).reshape(array.shape)
    return np.concatenate((array, array)) if array.ndim else array


def run(seed: int) -> tuple[str, str]:
    """One case: which function, and whether it ``"answered"`` or ``"refused"``."""
    draw = Draw(seed)
    kind = draw.randrange(4)
    if kind == 0:
        function, arguments = public(draw)
        name = "public"
    elif kind == 1:
        function, arguments = compiled(draw)
        name = "compiled"
    else:
        name = draw.choice(list(RAW))
        function, arguments = getattr(torch.ops.add_ops, name), RAW[name](draw)
    if draw.randrange(2):
        at = draw.randrange(len(arguments))
        array = isinstance(arguments[at], np.ndarray)
        with suppress(RuntimeError, ValueError, IndexError):  # where it cannot be broken in this way
            arguments[at] = broken_array(draw, arguments[at]) if array else draw.broken(arguments[at])
    try:
        with add_ops.use_backend(draw.choice(("cpp", "cpp", "auto"))):
            differentiated(function, *arguments) if name == "public" else function(*arguments)
    except REFUSED:
        return name, "refused"
    except Exception:
        traceback.print_exc()
        sys.exit(f"case {seed}: --seed {seed} --cases 1 repeats it")
    return name, "answered"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--callers", type=int, default=1, help="threads that call at the same time")
    options = parser.parse_args()
    if (status := add_ops.backends()["cpp"]) != "available":
        sys.exit(f"the C++ kernels are {status}")
    print(f"the kernels of {kernels.__file__}", flush=True)
    torch.set_num_threads(3)  # of each kernel; the sanitizers need more than one
    _cpp.FEW = 0
    found: Counter[tuple[str, str]] = Counter()
    for capability in CAPABILITIES:
        os.environ["ADD_OPS_CPU_CAPABILITY"] = capability
        try:
            kernels.cpu_capability()
        except ValueError as error:
            print(f"NOT RUN: {error}", flush=True)
            continue
        seeds = range(options.seed, options.seed + options.cases)[CAPABILITIES.index(capability) :: len(CAPABILITIES)]
        if options.cases == 1:
            seeds = range(options.seed, options.seed + 1)
        with ThreadPoolExecutor(options.callers) as pool:
            found.update(pool.map(run, seeds))
        print(f"{capability}: {len(seeds)} cases from {options.seed} on", flush=True)
    for (name, outcome), count in sorted(found.items()):
        print(f"{name:28} {outcome:9} {count:6}")
    print(f"{found.total()} cases")
    answered = {name for name, outcome in found if outcome == "answered"}
    if options.cases > 1000 and not {*RAW, "public", "compiled"} <= answered:
        sys.exit("some operator answered nothing: the cases are no good")


if __name__ == "__main__":
    main()
