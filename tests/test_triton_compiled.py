"""The Triton kernels compiled by ``ahead_of_time.py`` for GPUs that need not be there, and what it remembers."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_checks import on_triton

import add_ops

__all__ = ["on_triton"]  # every test's fixture

HERE = Path(__file__).parent
ROOMS = ("frequency_attention", "multi_view", "sliced_wasserstein")
TRITONS = {"the installed Triton": None, "Triton 3.6": Path(sys.prefix) / "triton-3.6"}


def ahead_of_time(triton, *arguments):
    path = TRITONS[triton]
    if path is not None and not path.exists():
        pytest.skip(f"{path} does not exist; make test-slow installs it")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(path or "")
    command = [sys.executable, HERE / "ahead_of_time.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)  # so that processes share them
@pytest.mark.parametrize("triton", TRITONS)
def test_the_kernels_compile_within_the_budget_of_every_architecture(triton, room):
    done = ahead_of_time(triton, "--room", room)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [line for line in done.stdout.splitlines() if line.startswith("sm_")]
    assert {line.partition(" ")[0] for line in compiled} == {"sm_80", "sm_90", "sm_100"}
    own = [  # each has a kernel, or is torch's
        operator
        for (operator, backend), (launcher, _) in add_ops._dispatch._kernels.items()
        if backend == "triton" and f".{room}." in launcher.__module__ and not launcher.__module__.endswith(".reference")
    ]
    assert own and all(f"\n{operator}: " in done.stdout for operator in own)


def test_a_kernel_is_remembered_by_its_source_and_arguments_and_judged_anew(tmp_path, monkeypatch, capsys):
    import ahead_of_time

    taken = ahead_of_time.Taken(registers=64, stack=0, local=0, warps=4, stages=2, shared=2**10, seconds=1.0)
    monkeypatch.setattr(ahead_of_time, "compiled", lambda kernel, grid, args, options: taken)
    monkeypatch.setattr(ahead_of_time._triton, "launch", None)  # which compile_all replaces
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = SimpleNamespace(__name__="kernel", cache_key="one", params=[])
    x = torch.empty(8, device="meta")

    def launch(case, compiler):
        compiler.capability = case.capability
        ahead_of_time._triton.launch(kernel, (1,), x, 3, BLOCK=16)

    monkeypatch.setattr(ahead_of_time, "launch", launch)
    cases = [ahead_of_time.Case("multi_view", None, capability=number) for number in (80, 90)]

    def counts(afresh=False):
        refused = ahead_of_time.compile_all(cases, afresh)
        said = capsys.readouterr().out
        assert said.count("REFUSED") == len(refused) and "2 cases, 2 launches" in said
        return len(refused), *map(int, re.search(r"(\d+) kernels compiled, (\d+) remembered", said).groups())

    assert [counts(), counts(), counts(afresh=True)] == [(0, 2, 0), (0, 0, 2), (0, 2, 0)]
    monkeypatch.setitem(ahead_of_time.SHARED, 80, 2**10 - 1)
    assert counts() == (1, 0, 2)
    kernel.cache_key = "two"
    assert [counts(), counts()] == [(1, 2, 0), (1, 0, 2)]
    x = x.half()
    assert counts() == (1, 2, 0)


@pytest.mark.slow
def test_kernels_over_the_budget_are_refused():
    done = ahead_of_time("the installed Triton", "--self-test")
    assert done.returncode == 0 and done.stdout.count("REFUSED") >= 6, done.stdout + done.stderr
