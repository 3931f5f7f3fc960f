"""Compiles the package's Triton kernels for GPUs that need not be here, and refuses what goes over the budget.

Every launcher runs on meta tensors of the shipped shapes at batch 144. Where it would launch a kernel, the kernel is
compiled as Triton would specialise it for these arguments (types, constexprs, divisibility by 16, ones), by way of a
driver that names a GPU and has none.

    python tests/ahead_of_time.py               every block table on sm_80, sm_90 and sm_100, the rest by turns
    python tests/ahead_of_time.py --all         every combination of shape, dtype, layout, distance and GPU (long)
    python tests/ahead_of_time.py --room ROOM   of one room only, of those that are chosen otherwise
    python tests/ahead_of_time.py --self-test   kernels that break the budget are refused

What a compiled kernel takes is remembered in ~/.cache/add_ops (or $XDG_CACHE_HOME/add_ops), and judged without
compiling it again while its source, Triton and the arguments are the same: a run that was cut short goes on. --afresh
compiles them all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from add_ops import _dispatch, _triton
from add_ops.frequency_attention.triton_kernels import _configuration
from benchmarks.entry import MAPS, POINTS, Maps, Points, Shape

BATCH, VIEWS, PROJECTIONS = 144, 12, 64
REGISTERS, CPU_SECONDS = 2**16, 30
"""Of all threads of one program together, and what compiling it may take."""
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program can have, by architecture."""
ROOMS = ("frequency_attention", "multi_view", "sliced_wasserstein")
SIDES = tuple(
    Maps(16, 64, *sides) for sides in ((64, 64), (37, 37), (48, 48), (17, 31), (40, 20), (3, 37), (64, 9), (5, 6))
)
"""More maps for the spectral distance: other sides, equal and not."""
DISTANCES = ("l2", "cosine", "gaussian")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Taken(NamedTuple):
    """What a compiled kernel takes of a GPU, and took to compile."""

    registers: int  # of a thread
    stack: int  # bytes, of spilled registers
    local: int  # bytes
    warps: int
    stages: int
    shared: int  # bytes
    seconds: float  # of a CPU


class Remembered:
    """What compiled kernels take, by their source, the version of Triton and what they were compiled for."""

    def __init__(self, afresh: bool = False) -> None:
        self.folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "add_ops" / "ahead_of_time"
        self.afresh, self.compiled = afresh, 0
        self.met: dict[Path, Taken] = {}

    def path(self, kernel: Any, *how: Any) -> Path:
        source = kernel.cache_key, [(p.name, p.do_not_specialize) for p in kernel.params]
        name = hashlib.sha256(repr((triton.__version__, source, how)).encode()).hexdigest()[:32]
        return self.folder / f"{name}.json"

    def load(self, path: Path) -> Taken | None:
        if path not in self.met and not self.afresh:
            with suppress(OSError, ValueError, TypeError):
                self.met[path] = Taken(**json.loads(path.read_text()))
        return self.met.get(path)

    def save(self, path: Path, taken: Taken) -> None:
        self.met[path], self.compiled = taken, self.compiled + 1
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(taken._asdict()))
        part.replace(path)


class Pretended:
    """A driver whose current GPU has the compute capability it was told; its number stands for the device, too."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def cpu_seconds() -> float:
    """Of this process and the assemblers that it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> dict[str, int]:
    """``{"REG": …, "STACK": …, "LOCAL": …}`` of the one function in ``cubin``; a spilled register lies on the stack.

    So does the frame of a function that calls another, as a division of float64 does. It holds nothing where no
    instruction reads or writes it, and is then not counted.
    """
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", cuobjdump("-res-usage", cubin))}
    if used["STACK"] and not re.search(r"\b(LDL|STL)\b", cuobjdump("-sass", cubin)):
        used["STACK"] = 0
    return used


def compiled(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Taken:
    start = cpu_seconds()
    found = kernel.warmup(*args, grid=grid, **options)
    used, seconds = usage(found.asm["cubin"]), round(cpu_seconds() - start, 1)
    data = found.metadata
    return Taken(used["REG"], used["STACK"], used["LOCAL"], data.num_warps, data.num_stages, data.shared, seconds)


def refusals(taken: Taken, capability: int) -> list[str]:
    """What of a compiled kernel goes over the budget."""
    registers, most = 32 * taken.warps * taken.registers, SHARED[capability]
    return [
        text
        for over, text in (
            (taken.stack + taken.local > 0, f"spills: {taken.stack} bytes of stack, {taken.local} local"),
            (registers > REGISTERS, f"{registers} registers of {REGISTERS}"),
            (taken.shared > most, f"{taken.shared} bytes of shared memory of {most}"),
            (taken.seconds > CPU_SECONDS, f"{taken.seconds:.0f} CPU seconds to compile, at most {CPU_SECONDS}"),
        )
        if over
    ]


def described(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    tensors = ", ".join(str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, Tensor))
    return f"{kernel.__name__}({tensors}; {', '.join(f'{name}={value}' for name, value in options.items())})"


class Compiler:
    """Stands in for ``_triton.launch``: compiles for ``capability`` what is not remembered, and judges it."""

    def __init__(self, remembered: Remembered | None = None) -> None:
        self.remembered = remembered or Remembered(afresh=True)
        self.capability, self.launcher = 90, ""
        self.launches: Counter[str] = Counter()
        self.taken: dict[str, Taken] = {}  # by launcher, of its first kernel
        self.said: dict[str, None] = {}
        self.refused: list[str] = []

    def say(self, line: str) -> None:
        if line not in self.said:
            print(line, flush=True)
        self.said[line] = None

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.launches[self.launcher] += 1
        triton.runtime.driver.set_active(Pretended(self.capability))
        line = f"sm_{self.capability} {described(kernel, args, options)}:"
        options = _triton.OPTIONS | options
        types = [x.dtype if isinstance(x, Tensor) else x for x in args]
        path = self.remembered.path(kernel, self.capability, types, options)
        if (taken := self.remembered.load(path)) is None:
            try:
                taken = compiled(kernel, grid, args, options)
            except Exception as error:  # whatever the compiler dies of
                self.say(f"{line} REFUSED does not compile: {type(error).__name__}: {error}")
                self.refused.append(f"{line} does not compile")
                return
            self.remembered.save(path, taken)
        self.taken.setdefault(self.launcher, taken)
        wrong = refusals(taken, self.capability)
        line += f" {taken.registers} registers, {taken.shared} bytes shared, {taken.seconds} s"
        self.say(" ".join([line, *(f"REFUSED {text}" for text in wrong)]))
        self.refused += [f"{line} {text}" for text in wrong]


class Case(NamedTuple):
    """What to compile: a room's primitive on maps of this shape, or on their pixels as points."""

    room: str
    shape: Shape
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    capability: int = 90
    distance: str = "l2"


LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = {ROOMS[0]: (*MAPS, *SIDES), ROOMS[1]: MAPS, ROOMS[2]: (*MAPS, *POINTS)}


def every_case() -> list[Case]:
    """All that is shipped; float64 goes to the reference."""
    cases = []
    for room, shapes in SHAPES.items():
        distances = DISTANCES if room == "frequency_attention" else DISTANCES[:1]
        cases += [Case(room, *each) for each in product(shapes, DTYPES, LAYOUTS, SHARED, distances)]
    return cases


def covering_cases() -> list[Case]:
    """Every shape, with dtypes, layouts and distances by turns; spectra for every GPU, the rest for one by turns."""
    cases = []
    for room, shapes in SHAPES.items():
        spectra = room == "frequency_attention"
        for (i, shape), (j, capability) in product(enumerate(shapes), enumerate(SHARED)):
            dtype, layout = DTYPES[(i + 2 * j) % 3], LAYOUTS[(i // 2 + j) % 2]
            if spectra or (i + j + i // 3) % 3 == 0:
                large = spectra and max(shape[2:4]) > 32  # whose cosine is the reference's
                distances = DISTANCES[::2] if large else DISTANCES if spectra else DISTANCES[:1]
                cases.append(Case(room, shape, dtype, layout, capability, distances[(i + j) % len(distances)]))
    return cases


def launch(case: Case, compiler: Compiler) -> None:
    """Call every registered launcher of the room, forward and backward, on meta tensors."""

    def run(name: str, *args: Any) -> Any:
        compiler.launcher = name
        compiler.taken.pop(name, None)
        return _dispatch._kernels[name, "triton"][0](*args)

    def features() -> Tensor:
        return torch.empty(BATCH, *case.shape[1:4], dtype=case.dtype, device="meta", memory_format=case.layout)

    compiler.capability = case.capability
    _triton.limits = lambda device: (case.capability, SHARED[case.capability])
    if case.room == "frequency_attention":
        student, teacher = features(), features()
        grad = torch.empty(BATCH, *case.shape[2:4], device="meta")
        for name, args in (("spectral_distance", ()), ("spectral_distance_backward", (grad,))):
            problem = (*case.shape[2:4], case.distance, bool(args), case.capability)
            chosen = _configuration(*problem, SHARED[case.capability])
            if isinstance(chosen, str):
                compiler.say(f"sm_{case.capability} {name}: the reference, {case.distance}: {chosen}")
                continue
            run(name, *args, student, teacher, case.distance, 1.0, "forward")
            if taken := compiler.taken.get(name):  # with a byte less than it takes, a kernel must not be chosen
                other = _configuration(*problem, taken.shared - 1)
                if not isinstance(other, str) and other["num_stages"] >= taken.stages:
                    compiler.refused.append(
                        f"sm_{case.capability} {name} of {case} takes {taken.shared} bytes, more than said"
                    )
    elif case.room == "multi_view":
        student, views = features(), torch.empty(VIEWS, 3, device="meta")
        out, energy = run("view_histogram", student, views, case.shape.channels // 2, "index")
        run("view_histogram_backward", out, student, views, out, energy, "index")
    else:
        if isinstance(case.shape, Points):
            points = torch.empty(BATCH, *case.shape[1:3], dtype=case.dtype, device="meta")
        else:
            points = features().flatten(2).mT
        projections = torch.empty(points.shape[2], PROJECTIONS, device="meta")
        values, order = run("project_and_sort", points, projections)
        run("project_and_sort_backward", values, order, projections)


def compile_all(cases: list[Case], afresh: bool) -> list[str]:
    """What goes over the budget."""
    remembered = Remembered(afresh)
    _triton.launch = compiler = Compiler(remembered)
    for case in cases:
        launch(case, compiler)
    total = compiler.launches.total()
    known = len(remembered.met) - remembered.compiled
    print(f"{len(cases)} cases, {total} launches: {remembered.compiled} kernels compiled, {known} remembered")
    print(*(f"{launcher}: {count} launches" for launcher, count in compiler.launches.items()), sep="\n")
    return list(dict.fromkeys(compiler.refused))


@triton.jit
def _spilling(x_ptr, SIZE: tl.constexpr):
    """Holds the whole of x in the registers of one warp."""
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(x_ptr + tl.arange(0, SIZE), x / tl.sum(x))


@triton.jit
def _greedy(x_ptr, steps, SIZE: tl.constexpr):
    """Keeps many tiles of both factors in shared memory at once."""
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        x = tl.load(x_ptr + 2 * step * SIZE * SIZE + index)
        y = tl.load(x_ptr + (2 * step + 1) * SIZE * SIZE + index)
        total = tl.dot(x, y, total)
    tl.store(x_ptr + index, total)


def self_test() -> bool:
    """Whether each bad kernel is refused, for the reason that it is made of, on every architecture."""
    compiler = Compiler()
    x = torch.empty(2**20, device="meta")
    for compiler.capability in SHARED:
        compiler(_spilling, (1,), x, SIZE=2**15, num_warps=1)
        compiler(_greedy, (1,), x.half(), 32, SIZE=128, num_warps=8, num_stages=6)
    wanted = [(sm, word) for word in ("_spilling.* spills", "_greedy.* of shared memory") for sm in SHARED]
    return all(any(re.match(f"sm_{sm} {word}", text) for text in compiler.refused) for sm, word in wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument("--room", choices=ROOMS, help="only what this room launches")
    parser.add_argument("--afresh", action="store_true", help="compile also what passed before")
    parser.add_argument("--self-test", action="store_true", help="exit with 0 if each of two bad kernels is refused")
    options = parser.parse_args()
    triton.knobs.compilation.always_compile = True  # the time is part of the budget
    print(f"triton {triton.__version__}")
    if options.self_test:
        return int(not self_test())
    cases = every_case() if options.all else covering_cases()
    refused = compile_all([case for case in cases if options.room in (None, case.room)], options.afresh)
    print(f"{len(refused)} over the budget", *refused, sep="\n")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
