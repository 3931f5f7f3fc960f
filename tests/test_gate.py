"""What must not pass in silence: a backend that is missing, and a kernel that became slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import add_ops
from benchmarks import runner
from benchmarks.measure import Row, Timing

ROOT = Path(__file__).parents[1]
WITHOUT = "import sys; sys.modules['add_ops._C'] = None; "


def run(*command, **environment):
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_a_required_backend_that_is_missing_fails_the_tests_by_name():
    code = (
        WITHOUT + "import pytest; sys.exit(pytest.main(['-q', 'tests/test_cpp_kernels.py', '-p', 'no:cacheprovider']))"
    )
    done = run(sys.executable, "-c", code, ADD_OPS_REQUIRE="cpp")
    assert done.returncode == 1
    assert (
        "ADD_OPS_REQUIRE: backend 'cpp' cannot run here: not built or not installed here" in done.stdout + done.stderr
    )


def test_the_gate_is_red_without_the_kernels(monkeypatch, capsys):
    monkeypatch.setattr(add_ops, "backends", lambda: {"cpp": "not built"})
    assert runner.gate(torch.device("cpu")) == 1
    assert (
        "RED: backend 'cpp' is not available here, so that nothing was measured: not built" in capsys.readouterr().out
    )


RECORDED = {  # by the shapes of the gate, on the slowest and on the fastest machine with this vector code
    "AVX512": {
        "spectral_distance": ((3.0, 3.9), (3.1, 4.8)),
        "view_histogram": ((5.6, 8.8), (4.6, 6.8)),
        "contrastive_loss": ((3.2, 3.5), (3.3, 3.6)),
        "project_and_sort": ((3.5, 4.6), (4.1, 5.6)),
    },
    "AVX2": {  # one machine
        "spectral_distance": ((3.0, 3.0), (3.0, 3.0)),
        "view_histogram": ((5.3, 5.3), (5.1, 5.1)),
        "contrastive_loss": ((2.2, 2.2), (2.6, 2.6)),
        "project_and_sort": ((2.3, 2.3), (2.4, 2.4)),
    },
}
SLOWEST, FASTEST = 0, 1


def gate_of(monkeypatch, code, machine, *speeds):
    """What the gate says where the n-th measurement of every shape finds the kernels ``speeds[n]`` as fast as recorded.

    The last measurement repeats.
    """
    turns = {}

    def measure(entry, shape, candidates, *rest, **more):
        turn = turns[entry.name, shape] = turns.get((entry.name, shape), -1) + 1
        recorded = RECORDED[code][entry.name][list(runner.GATE[code][entry.name]).index(shape)][machine]
        times = {"cpp": 1.0, "plain": recorded * speeds[min(turn, len(speeds) - 1)]}
        return [Row(entry.name, str(shape), name, {}, timing=Timing(t, t, t, 7)) for name, t in times.items()]

    monkeypatch.setattr(runner, "measure", measure)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: code)
    monkeypatch.setattr(add_ops, "backends", lambda: {"reference": "available", "cpp": "available"})
    return runner.gate(torch.device("cpu"))


@pytest.mark.parametrize("code", RECORDED)
def test_the_gate_notices_a_kernel_that_became_twice_as_slow(monkeypatch, capsys, code):
    assert gate_of(monkeypatch, code, SLOWEST, 1.0) == 0 and "BELOW" not in capsys.readouterr().out
    assert gate_of(monkeypatch, code, FASTEST, 0.5) == 1 and capsys.readouterr().out.count("BELOW") == 8


def test_a_neighbour_may_spoil_some_of_the_gates_measurements(monkeypatch):
    assert gate_of(monkeypatch, "AVX512", SLOWEST, 0.4, 0.3, 0.9) == 0
