"""Which backend answers, and how a user finds out."""

import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch.autograd import forward_ad

import add_ops
from add_ops import __main__, _dispatch

BUILT = [name for name, status in add_ops.backends().items() if status == "available"]


@pytest.fixture
def kernels():
    """What a test registers is forgotten after it."""
    tables = _dispatch._kernels, _dispatch._missing, _dispatch._hindrances
    saved = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, saved, strict=True):
        table.clear(), table.update(before)


@pytest.fixture
def scratch_operator(kernels):
    """An operator of the tests' own: the reference adds 1, a registered backend 10, and refuses negative input."""
    if not hasattr(torch.ops.add_ops, "scratch"):
        _dispatch.define("scratch(Tensor x) -> Tensor", lambda x: x + 1, torch.empty_like)
    _dispatch.implement("scratch", "cpp", lambda x: x + 10, lambda x: "x is negative" if bool((x < 0).any()) else None)
    return torch.ops.add_ops.scratch


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
    _dispatch.implement("scratch", "cpp", lambda x: x + 10)
    found = add_ops.backends()
    assert list(found) == ["reference", "cpp", "triton"] and found["reference"] == found["cpp"] == "available"


def test_a_backend_is_asked_each_time_whether_it_can_run(scratch_operator):
    reasons = ["it rains"]
    _dispatch.check("cpp", lambda: reasons[0] if reasons else None)
    assert add_ops.backends()["cpp"] == "it rains"
    with pytest.raises(RuntimeError, match=r"backend 'cpp' is not available: it rains$"):
        add_ops.use_backend("cpp").__enter__()
    reasons.clear()
    with add_ops.use_backend("cpp"):
        assert scratch_operator(torch.zeros(())) == 10


def test_an_operator_without_a_kernel_is_the_references(scratch_operator):
    _dispatch._kernels.pop(("scratch", "cpp"))
    assert scratch_operator(torch.zeros(())) == 1
    assert _dispatch.answered("scratch") == ("reference", "not implemented")
    with add_ops.use_backend("cpp"), pytest.raises(RuntimeError, match=r"add_ops::scratch here: not implemented$"):
        scratch_operator(torch.zeros(()))
    _dispatch.load("cpp", "add_ops.kernels_of_nobody")
    assert scratch_operator(torch.zeros(())) == 1
    assert re.match(r"not built or not installed here \(", _dispatch.answered("scratch")[1])


def test_autocast_is_off_inside_of_an_operator(scratch_operator):
    seen = []
    _dispatch.implement("scratch", "cpp", lambda x: seen.append(torch.is_autocast_enabled("cpu")) or x + 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert scratch_operator(torch.zeros(())) == 10 and torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_the_block_ends_after_an_error():
    with pytest.raises(KeyError), add_ops.use_backend("reference"):
        raise KeyError
    assert _dispatch.chosen() == "auto"


def test_the_block_is_of_its_own_thread(scratch_operator):
    """Two blocks that overlap in time, of which the first to begin ends first."""
    inside, both, left, zero = threading.Event(), threading.Event(), threading.Event(), torch.zeros(())
    found = {}

    def first():
        with add_ops.use_backend("reference"):
            inside.set()
            both.wait(10)
            found["first"] = scratch_operator(zero).item()
        left.set()

    def second():
        inside.wait(10)
        with add_ops.use_backend("cpp"):
            both.set()
            left.wait(10)
            found["second"] = scratch_operator(zero).item(), _dispatch.chosen()
        found["after"] = _dispatch.chosen()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"first": 1, "second": (10, "cpp"), "after": "auto"} and _dispatch.chosen() == "auto"


@pytest.mark.parametrize("elsewhere", ["after the block", "in another block", "in another thread"])
def test_a_gradient_is_computed_by_the_backend_of_its_forward(elsewhere):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with add_ops.use_backend("reference"):
        loss = add_ops.frequency_attention_loss(x, torch.randn(2, 3, 4, 4))
    _dispatch._answered.clear()
    if elsewhere == "after the block":
        loss.backward()
    elif elsewhere == "in another block":
        with add_ops.use_backend(BUILT[-1]):
            loss.backward()
            assert _dispatch.chosen() == BUILT[-1]
    else:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert _dispatch.answered("spectral_distance_backward") == ("reference", "")
    assert "spectral_distance_backward" in _dispatch._answered and _dispatch.chosen() == "auto"


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


def self_test(capsys):
    """Exit status, who answered each primitive on the CPU with which error and verdict, and all that was printed."""
    status, printed = __main__.main(), capsys.readouterr().out
    table = printed.partition("\ncpu ")[2].partition("\ncuda ")[0]
    rows = [line.split(maxsplit=3) for line in table.splitlines() if line.endswith(" ok") or " WRONG " in line]
    return status, {name: (backend, float(error), verdict) for name, backend, error, verdict in rows}, printed


PRIMITIVES = ["spectral_distance", "attention_sum", "view_histogram", "contrastive_loss"]
PRIMITIVES += ["project_and_sort", "quantile_distance"]
OPERATORS = [name + end for name in PRIMITIVES for end in ("", "_backward") if name + end != "attention_sum_backward"]


def test_the_self_test_says_what_is_installed_and_who_answered(capsys, monkeypatch):
    def version(package):
        if package == "triton":
            raise __main__.PackageNotFoundError
        return f"1.2.{package}"

    monkeypatch.setattr(__main__, "version", version)
    with add_ops.use_backend("reference"):
        status, rows, printed = self_test(capsys)
        assert self_test(capsys) == (status, rows, printed), "it draws the same numbers each time"
    assert status == 0 and list(rows) == PRIMITIVES
    assert all(backend == "reference" and 0 < error < 1e-5 for backend, error, _ in rows.values())
    assert printed.startswith(f"add_ops {add_ops.__version__}, Python 3.")
    assert "\ntorch 1.2.torch, triton not installed, numpy 1.2.numpy\n" in printed
    assert "\nbackend in force: reference\n" in printed
    for name, words in add_ops.backends().items():
        assert re.search(f"^ +{name} +{re.escape(words)}$", printed, re.M)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_the_self_test_notices_a_wrong_kernel(kernels, capsys, operator, factor):
    def wrong(*args):
        found = _dispatch._references[operator](*args)
        return found * factor if isinstance(found, torch.Tensor) else (found[0] * factor, *found[1:])

    _dispatch.implement(operator, "cpp", wrong)
    status, rows, _ = self_test(capsys)
    assert status == 1 and list(rows) == PRIMITIVES
    noticed = [name for name, (*_, verdict) in rows.items() if verdict == "WRONG (above 1e-05)"]
    primitive = operator.removesuffix("_backward")
    assert noticed == [name for name in PRIMITIVES if name == primitive or (primitive, name) == tuple(PRIMITIVES[-2:])]


def test_the_self_test_says_why_the_reference_answered(kernels, capsys):
    _dispatch.implement("project_and_sort_backward", "cpp", None, lambda *_: "it is told to")
    status, rows, printed = self_test(capsys)
    assert status == 0 and list(rows) == PRIMITIVES
    assert "\n    project_and_sort_backward: reference, as it is told to" in printed
    with add_ops.use_backend("cpp"):  # which then has no answer on any device
        status, rows, printed = self_test(capsys)
    assert status == 1 and not rows and "backend 'cpp' was asked for but cannot run add_ops::" in printed


def test_the_self_test_does_not_hide_an_error(kernels):
    def broken(*_):
        raise RuntimeError("illegal memory access")

    _dispatch.implement("project_and_sort", "cpp", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        __main__.main()


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
        assert _dispatch.answered("scratch") == ("reference", "no such kernel image")
        with warnings.catch_warnings(action="error"):
            assert scratch_operator(zero) == 1 and len(calls) == 2  # it is not tried again
        assert _dispatch.answered("scratch") == ("reference", "no such kernel image")
    finally:
        _dispatch._failed.clear()


def test_who_answered_and_why(scratch_operator):
    assert _dispatch.answered("never called") == ("reference", "")
    for value, answered in ((0.0, ("cpp", "")), (-1.0, ("reference", "x is negative"))):
        scratch_operator(torch.tensor(value))
        assert _dispatch.answered("scratch") == answered
    _dispatch._select("scratch", "mps", ())  # a device that no backend is for
    assert _dispatch.answered("scratch") == ("reference", "")


@pytest.mark.parametrize("name", BUILT)
def test_forward_mode_is_refused_by_name(name):
    x, ones = torch.randn(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    teacher, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 1, 1])
    views, theta = add_ops.sample_views(2), add_ops.sample_projections(3, 2)

    def by_hand(primitive):
        with forward_ad.dual_level():
            return primitive(forward_ad.make_dual(x, ones))

    primitives = {
        "spectral_distance": lambda x: add_ops.spectral_distance(x, teacher),
        "attention_sum": lambda x: torch.ops.add_ops.attention_sum(x[0], 1.0, 3, "none")[0],
        "view_histogram": lambda x: torch.ops.add_ops.view_histogram(x, views, 2, "index")[0],
        "contrastive_loss": lambda x: torch.ops.add_ops.contrastive_loss(x[0], teacher[0], labels, 2.0, 1.0, 1.0, 0.1),
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


FUNCTIONS = {
    "frequency_attention_loss": lambda x, y: add_ops.frequency_attention_loss(x, y),
    "multi_view_loss": lambda x, y: add_ops.multi_view_loss(x, y, torch.tensor([0, 1, 1]), views=torch.eye(3)),
    "points": lambda x, y: add_ops.multi_view_loss(x, y, views=torch.eye(4), slicing="points"),
    "sliced_wasserstein": lambda x, y: add_ops.sliced_wasserstein(x.flatten(2).mT, y.flatten(2).mT, torch.eye(4)).sum(),
    "unequal": lambda x, y: add_ops.sliced_wasserstein(x.flatten(2).mT, y[..., 1:].flatten(2).mT, torch.eye(4)).sum(),
    "view_histogram": lambda x, y: add_ops.multi_view_attention(x, torch.eye(3), 4).square().sum(),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", [name for name in BUILT if name != "triton"])
def test_transforms_of_torch_func(name, function):
    x, y = torch.randn(2, 3, 4, 5, 6)

    def loss(x):
        return FUNCTIONS[function](x, y)

    def with_autograd(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    several = torch.stack((x, 2 * x))
    expected = with_autograd(x)
    with add_ops.use_backend(name):
        for transformed in (torch.func.grad, torch.func.jacrev):
            torch.testing.assert_close(transformed(loss)(x), expected)
        value, pull_back = torch.func.vjp(loss, x)
        torch.testing.assert_close((value, pull_back(2 * torch.ones(()))[0]), (loss(x), 2 * expected))
        torch.testing.assert_close(torch.func.vmap(loss)(several), torch.stack((loss(x), loss(2 * x))))
        each = torch.func.vmap(torch.func.grad(loss))(several)
        torch.testing.assert_close(each, torch.stack([with_autograd(x) for x in several]))
        with pytest.raises(NotImplementedError, match="_backward is a gradient and is not differentiable itself"):
            torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)


def test_the_longest_direction_is_not_sought_inside_of_a_transform():
    with pytest.raises(NotImplementedError, match="max_sliced_wasserstein takes gradient steps of its own"):
        torch.func.grad(lambda x: add_ops.max_sliced_wasserstein(x, 2 * x.detach())[0].sum())(torch.randn(2, 5, 3))
