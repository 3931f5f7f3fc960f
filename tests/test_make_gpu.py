"""``make gpu`` without a GPU: all of it on tiny shapes, so that no slip of the pen costs the time of a rented one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
ROOT = Path(__file__).parents[1]

BREAKS = """
import pytest, torch

broken = False

def synchronize():
    if broken:
        raise RuntimeError("an illegal memory access was encountered")

torch.cuda.synchronize, torch.cuda.is_available = synchronize, lambda: True

def test_one_that_breaks_its_context():
    global broken
    broken = True
    raise RuntimeError("the first to see it")

@pytest.mark.parametrize("number", range(4))
def test_others(number):
    assert not broken
"""

LAUNCHES = """
import torch
from add_ops import _triton
from benchmarks.jobs import COMPILED, OTHERS, do, parts, warm

def recorded(run):
    found, launch = set(), _triton.launch

    def record(kernel, grid, *args, **options):
        of_args = [str(x.dtype) if isinstance(x, torch.Tensor) else x for x in args]
        found.add(f"{kernel.__name__} {of_args} {sorted(options.items())}")
        launch(kernel, grid, *args, **options)

    _triton.launch = record
    run()
    _triton.launch = launch
    return found

device, warmed, launched = torch.device("cpu"), set(), set()
jobs = [job for part in parts(device, False) for job in part.jobs if job.kind not in (COMPILED, OTHERS)]
for job in jobs:
    warmed |= recorded(lambda: warm(job, device))
    launched |= recorded(lambda: do(job, device, False, 1.0))
assert len(launched) > 20, launched
assert launched <= warmed, launched - warmed
"""


def run(*command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_rehearsal_of_all_of_it(tmp_path):
    done = run(".ci/gpu", ADD_OPS_REHEARSAL="1", PYTHON=sys.executable, OUT=str(tmp_path))
    assert done.returncode == 0 and "0 stages failed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("NOT RUN: ") == 2  # compute-sanitizer's two tools
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 8 and "gpu.log" in files and sum(name.endswith("-cpu.png") for name in files) == 3
    assert (tmp_path / "gpu.log").read_text().splitlines()[-1] == "0 stages failed"
    (results,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert results["rehearsal"] and not results["left_out"] and len(results["growth"]) == 3
    assert {line["switch"] for line in results["switches"]} == {"histogram registers", "host overhead"}
    timed = {(row["entry"], row["provider"]) for row in results["rows"] if row["timing"]}
    assert len(timed) == len({(row["entry"], row["provider"]) for row in results["rows"]})
    for primitive, rivals in (
        ("spectral_distance", ("plain", "products", "compile", "reference", "released")),
        ("view_histogram", ("plain", "reference", "released")),
        ("project_and_sort", ("plain", "packed", "reference")),
    ):
        assert {(primitive, provider) for provider in ("triton", *rivals)} <= timed
        ours = [row["sizes"] for row in results["rows"] if (row["entry"], row["provider"]) == (primitive, "triton")]
        assert {sizes["dtype"] for sizes in ours} == {"float32", "bfloat16"}
        assert {sizes.get("layout") for sizes in ours} in ({"contiguous", "channels_last"}, {None})


def test_the_warm_up_launches_all_that_the_benchmarks_launch():
    done = run(sys.executable, "-c", LAUNCHES, ADD_OPS_REHEARSAL="1", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_an_illegal_access_ends_with_its_test(tmp_path):
    (tmp_path / "test_breaks.py").write_text(BREAKS)
    command = [sys.executable, "-m", "pytest", "-p", "gpu_tests", "-n", "1", "-p", "no:cacheprovider", str(tmp_path)]
    done = run(*command, PYTHONPATH=str(ROOT / ".ci"))
    assert "RuntimeError: the first to see it" in done.stdout and "4 passed" in done.stdout, done.stdout
    assert done.stdout.index("the first to see it") < done.stdout.index("short test summary")
    assert "crashed while running" in done.stdout and done.stdout.count("test_others") == 0
