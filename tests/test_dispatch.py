"""Which backend answers, and how a user finds out."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch.autograd import forward_ad

import add_ops
from add_ops import _dispatch

BUILT = [name for name, status in add_ops.backends().items() if status == "available"]


@pytest.fixture
def scratch_operator():
    """An operator of the tests' own: the reference adds 1, a registered backend 10, and refuses negative input."""
    if not hasattr(torch.ops.add_ops, "scratch"):
        _dispatch.define("scratch(Tensor x) -> Tensor", lambda x: x + 1, torch.empty_like)
    saved = dict(_dispatch._kernels), dict(_dispatch._missing)
    _dispatch.implement("scratch", "cpp", lambda x: x + 10, lambda x: "x is negative" if bool((x < 0).any()) else None)
    yield torch.ops.add_ops.scratch
    _dispatch._kernels.clear(), _dispatch._kernels.update(saved[0])
    _dispatch._missing.clear(), _dispatch._missing.update(saved[1])


def test_auto_asks_the_compiled_backend_and_falls_back_where_it_cannot(scratch_operator):
    zero = torch.zeros(())
    assert scratch_operator(zero) == 10 and scratch_operator(zero - 5) == -4
    with add_ops.use_backend("reference"):
        assert scratch_operator(zero) == 1
        with add_ops.use_backend("cpp"):
            assert scratch_operator(zero) == 10
        assert _dispatch.chosen() == "reference"
    assert scratch_operator(zero) == 10


def test_a_forced_backend_says_why_it_cannot(scratch_operator):
    with add_ops.use_backend("cpp"), pytest.raises(RuntimeError, match=r"'cpp'.*add_ops::scratch here: x is negative"):
        scratch_operator(torch.tensor(-1.0))


def test_a_missing_backend_says_why(scratch_operator):
    _dispatch.load("cpp", "add_ops.kernels_of_nobody")
    reason = r"not built or not installed here \(No module named 'add_ops.kernels_of_nobody'\)"
    assert re.fullmatch(reason, add_ops.backends()["cpp"])
    with pytest.raises(RuntimeError, match=f"backend 'cpp' is not available: {reason}"):
        add_ops.use_backend("cpp").__enter__()


def test_the_block_ends_after_an_error():
    with pytest.raises(KeyError), add_ops.use_backend("reference"):
        raise KeyError
    assert _dispatch.chosen() == "auto"


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="name: expected one of 'auto', 'reference', 'cpp', 'triton', got 'cuda'"):
        add_ops.use_backend("cuda").__enter__()


def run(arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", ["auto", *BUILT])
def test_the_command_reports_and_tests_itself(name):
    done = run(["-m", "add_ops"], ADD_OPS_BACKEND=name)
    assert done.returncode == 0, done.stderr
    assert f"backend in force: {name}" in done.stdout and f"torch {torch.__version__.partition('+')[0]}" in done.stdout
    answering = {line.split()[1] for line in done.stdout.splitlines() if line.endswith(" ok")}
    assert answering == {name} if name != "auto" else answering <= set(BUILT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_triton_without_a_gpu_says_why():
    pytest.importorskip("triton")
    done = run(["-m", "add_ops"], ADD_OPS_BACKEND="triton", TRITON_INTERPRET="0")
    assert done.returncode == 1 and not done.stderr
    assert re.search(
        "triton +no CUDA device \\(with TRITON_INTERPRET=1 the kernels run, slowly, on the CPU\\)", done.stdout
    )
    assert "add_ops::spectral_distance here: it runs on CUDA tensors, and a tensor is on cpu" in done.stdout


def test_the_self_test_does_not_hide_an_error():
    code = """
import sys
import warnings
from add_ops import __main__, _dispatch
def broken(points, projections):
    raise RuntimeError("illegal memory access")
_dispatch.implement("project_and_sort", "cpp", broken)
sys.exit(__main__.main())
"""
    done = run(["-c", code], ADD_OPS_BACKEND="auto")
    assert done.returncode == 1 and "illegal memory access" in done.stderr


def test_the_self_test_notices_a_wrong_kernel():
    code = """
import sys
import warnings
from add_ops import __main__, _dispatch
from add_ops.sliced_wasserstein import reference as r
def doubled(points, projections):
    values, permutation = r.project_and_sort(points, projections)
    return 2 * values, permutation
_dispatch.implement("project_and_sort", "cpp", doubled)
sys.exit(__main__.main())
"""
    done = run(["-c", code], ADD_OPS_BACKEND="auto")
    assert done.returncode == 1 and "WRONG" in done.stdout


def test_the_environment_sets_the_backend_and_an_unknown_word_is_named():
    done = run(["-c", "import add_ops"], ADD_OPS_BACKEND="fast")
    assert "ADD_OPS_BACKEND: expected one of 'auto', 'reference', 'cpp', 'triton', got 'fast'" in done.stderr


def test_importing_needs_neither_triton_nor_a_compiler():
    code = "import sys; sys.modules['triton'] = None; sys.modules['add_ops._C'] = None; import add_ops, torch; "
    code += "print(add_ops.frequency_attention_loss(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item())"
    done = run(["-c", code], ADD_OPS_BACKEND="auto")
    assert done.returncode == 0 and float(done.stdout) == pytest.approx(torch.e), done.stderr


def test_a_kernel_that_does_not_start_is_answered_by_the_reference_with_one_warning(scratch_operator):
    calls = []

    def broken(x):
        calls.append(x)
        raise _dispatch.LaunchError("no such kernel image")

    _dispatch.implement("scratch", "cpp", broken)
    zero = torch.zeros(())
    with add_ops.use_backend("cpp"), pytest.raises(_dispatch.LaunchError, match="no such kernel image"):
        scratch_operator(zero)
    try:
        with pytest.warns(
            RuntimeWarning, match="scratch is answered by the reference from now on: no such kernel image"
        ):
            assert scratch_operator(zero) == 1
        with warnings.catch_warnings(action="error"):
            assert scratch_operator(zero) == 1 and len(calls) == 2  # it is not tried again
        assert _dispatch.answered("scratch") == ("reference", "no such kernel image")
    finally:
        _dispatch._failed.clear()


def test_who_answered_and_why(scratch_operator):
    for value, answered in ((0.0, ("cpp", "")), (-1.0, ("reference", "x is negative"))):
        scratch_operator(torch.tensor(value))
        assert _dispatch.answered("scratch") == answered


@pytest.mark.parametrize("name", BUILT)
def test_forward_mode_is_refused_by_name(name):
    x, ones = torch.randn(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    teacher, views, theta = torch.randn(2, 3, 4, 4), add_ops.sample_views(2), add_ops.sample_projections(3, 2)

    def by_hand(primitive):
        with forward_ad.dual_level():
            return primitive(forward_ad.make_dual(x, ones))

    primitives = {
        "spectral_distance": lambda x: add_ops.spectral_distance(x, teacher),
        "view_histogram": lambda x: torch.ops.add_ops.view_histogram(x, views, 2, "index")[0],
        "project_and_sort": lambda x: add_ops.project_and_sort(x.flatten(2).mT, theta)[0],
    }
    ways = (
        by_hand,
        lambda primitive: torch.func.jvp(primitive, (x,), (ones,)),
        lambda primitive: torch.func.jacfwd(primitive)(x),
    )
    with add_ops.use_backend(name):
        for operator, primitive in primitives.items():
            for way in ways:
                with pytest.raises(NotImplementedError, match=f"add_ops::{operator} has no forward-mode derivative"):
                    way(primitive)
            assert primitive(x).isfinite().all()  # outside of it, all is as before
