"""The Triton kernels compiled by ``ahead_of_time.py`` for GPUs that need not be there, and what it remembers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_checks import on_triton

import add_ops

__all__ = ["on_triton"]  # every test's fixture

HERE = Path(__file__).parent
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
@pytest.mark.parametrize("triton", TRITONS)
def test_the_kernels_compile_within_the_budget_of_every_architecture(triton):
    done = ahead_of_time(triton)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [line for line in done.stdout.splitlines() if line.startswith("sm_")]
    assert {line.partition(" ")[0] for line in compiled} == {"sm_80", "sm_90", "sm_100"}
    for (operator, backend), (launcher, _) in add_ops._dispatch._kernels.items():  # each has a kernel, or is torch's
        own = backend == "triton" and not launcher.__module__.endswith(".reference")
        assert not own or f"\n{operator}: " in done.stdout


def test_only_what_passed_with_the_same_sources_is_remembered(tmp_path, monkeypatch, capsys):
    import ahead_of_time

    def launch(case, compiler):
        compiler.say(f"compiled {case.capability}")
        compiler.launches["primitive"] += 1
        if case.capability == 100:
            compiler.refused.append("too much")

    source = tmp_path / "kernels.py"
    source.write_text("one")
    monkeypatch.setattr(ahead_of_time._triton, "launch", None)  # which compile_all replaces
    monkeypatch.setattr(ahead_of_time, "launch", launch)
    monkeypatch.setattr(ahead_of_time, "sources", lambda room: [source])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cases = [ahead_of_time.Case("multi_view", None, capability=number) for number in (90, 100)]

    def passed_before(afresh=False):
        assert ahead_of_time.compile_all(cases, afresh) == ["too much"]
        said = capsys.readouterr().out
        assert "compiled 90" in said and "compiled 100" in said and "primitive: 2 launches" in said
        return "1 of 2 cases had passed before" in said

    assert [passed_before(), passed_before(), passed_before(afresh=True)] == [False, True, False]
    source.write_text("two")
    assert [passed_before(), passed_before()] == [False, True]


@pytest.mark.slow
def test_kernels_over_the_budget_are_refused():
    done = ahead_of_time("the installed Triton", "--self-test")
    assert done.returncode == 0 and done.stdout.count("REFUSED") >= 6, done.stdout + done.stderr
