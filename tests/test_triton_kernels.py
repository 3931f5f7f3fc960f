"""The Triton kernels beyond what every backend must show: float32 at awkward sizes, and what only a GPU can show.

Those of the spectral distance have a file of their own, ``test_triton_spectrum.py``.

Without a GPU they run in Triton's interpreter, which shows indexing and algebra only; ``ahead_of_time.py`` compiles
them. Tests marked ``gpu`` need a CUDA device.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from closeness import TENSOR_CORES, relative_error
from torch._subclasses import FakeTensorMode

import add_ops
from add_ops.multi_view.reference import view_bins

if add_ops.backends()["triton"] != "available":
    pytest.skip(add_ops.backends()["triton"], allow_module_level=True)

from add_ops import _triton
from add_ops.sliced_wasserstein.triton_kernels import sliced_scatter_kernel

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
DISTANCES = ("l2", "cosine", "gaussian")
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def on_triton():
    with add_ops.use_backend("triton"):
        yield


def layouts(x):
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.mT.contiguous().mT,
        "sliced": x.repeat(1, 2, 1, 2)[:, ::2, :, : x.shape[3]],
    }


def values_and_gradient(primitive, x, upstream):
    x = x.detach().requires_grad_()
    values = primitive(x)
    return values.detach(), torch.autograd.grad(values, x, upstream.to(values.dtype))[0]


def check(primitive, x, upstream, allowed=0.0):
    """float32 or half precision by Triton against the reference in float64; ``allowed`` more than usual, of float32."""
    actual = values_and_gradient(primitive, x, upstream)
    with add_ops.use_backend("reference"):
        expected = values_and_gradient(primitive, x.double(), upstream)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and bool(other.any())
        assert relative_error(one, other) <= max(TENSOR_CORES[one.dtype], allowed if one.dtype == torch.float32 else 0)


def same_bits(results, others):
    return all(torch.equal(one, other) for one, other in zip(results, others, strict=True))


# --- without a GPU, too ---


@pytest.mark.parametrize(
    ("shape", "coordinates"),
    [
        ((1, 1, 1, 1), "index"),
        ((1, 1, 1, 1), "unit"),
        ((2, 7, 3, 5), "index"),
        ((2, 7, 3, 5), "unit"),
        ((17, 12, 4, 4), "index"),
        ((2, 19, 5, 7), "index"),
    ],
    ids=str,
)
def test_view_histogram_at_awkward_sizes(shape, coordinates):
    views, features = add_ops.sample_views(5, device=DEVICE), torch.randn(shape, device=DEVICE)
    for layout, bins in (("contiguous", 1), ("channels_last", 16), ("transposed", 33), ("sliced", 300)):
        x, upstream = layouts(features)[layout], torch.randn(shape[0], 5, bins, device=DEVICE)
        if bins > 1 and features[0].numel() > 1:
            check(lambda x, m=bins: add_ops.multi_view_attention(x, views, m, coordinates=coordinates), x, upstream)
        else:  # all the mass in one bin, whatever the features
            torch.testing.assert_close(
                add_ops.multi_view_attention(x, views, bins).sum(2), torch.ones_like(upstream[..., 0])
            )


def test_more_samples_and_views_than_one_program_takes():
    """Of samples 64 forward and 32 backward, of views 16 in a plan."""
    features, views = torch.randn(70, 3, 2, 3, device=DEVICE), add_ops.sample_views(18, device=DEVICE)
    check(lambda x: add_ops.multi_view_attention(x, views, 5), features, torch.randn(70, 18, 5, device=DEVICE))


@pytest.mark.parametrize("shape", [(5, 6, 7), (32, 8, 8), (9, 31, 3)], ids=str)
def test_every_position_is_in_the_bin_of_the_reference(shape):
    """Ones: a bin's mass counts its positions, and a single one in another bin shows."""
    views, positions = add_ops.sample_views(6, device=DEVICE), shape[0] * shape[1] * shape[2]
    for bins in (3, 40):
        index = view_bins(shape, views, bins, "index")
        expected = torch.stack([row.bincount(minlength=bins) for row in index])
        counts = add_ops.multi_view_attention(torch.ones(1, *shape, device=DEVICE), views, bins)[0] * positions
        torch.testing.assert_close(counts, expected.float(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_boxes_of_many_windows_and_views_along_one_axis(layout):
    """Between (0, 0, 1) and (1, 0, 0), a box spans from one bin to dozens; no size is a multiple of a box."""
    features = torch.randn(1, 19, 3, 11, device=DEVICE)
    views, x = torch.cat([torch.eye(3), -torch.eye(3)[2:]]).to(DEVICE), layouts(features)[layout]
    check(lambda x: add_ops.multi_view_attention(x, views, 60), x, torch.randn(1, 4, 60, device=DEVICE))
    counts = add_ops.multi_view_attention(torch.ones_like(x), views, 60)[0] * x.numel()
    expected = torch.stack([row.bincount(minlength=60) for row in view_bins(x.shape[1:], views, 60, "index")])
    torch.testing.assert_close(counts, expected.float(), rtol=1e-5, atol=1e-2)


SETS = [  # (B, N, D, K); the interpreter takes a quarter of a second for every 1024 keys
    ((1, 1, 1, 1), torch.float32),
    ((3, 2, 1, 17), torch.float32),
    ((2, 33, 70, 3), torch.float32),
    ((2, 33, 70, 3), torch.bfloat16),
    ((2, 33, 70, 3), torch.float16),
    ((1, 65, 5, 17), torch.float32),
    ((1, 256, 33, 2), torch.float32),
    ((1, 257, 3, 3), torch.float32),
    ((2, 1025, 3, 65), torch.float32),
]


@pytest.mark.parametrize(("size", "dtype"), SETS, ids=str)
def test_project_and_sort_at_awkward_sizes(size, dtype):
    batch, points, dim, directions = size
    # Whole numbers project without rounding: every dtype agrees on the order, ties included.
    x = torch.randint(-(2**7), 2**7, (batch, dim, points, 2), device=DEVICE).to(dtype)[..., 0].mT
    theta = torch.randint(-3, 4, (dim, directions), device=DEVICE).float()
    theta[0] += theta.abs().sum(0) == 0
    upstream = torch.randn(batch, directions, points, device=DEVICE)
    for points_as in (x, x.contiguous()) if points < 64 else (x,):
        points_as = points_as.detach().requires_grad_()
        values, order = add_ops.project_and_sort(points_as, theta)
        expected = (points_as.double() @ theta.double()).mT.sort(dim=2, stable=True)
        assert torch.equal(values.double(), expected.values) and torch.equal(order, expected.indices)
        grads = [torch.autograd.grad(v, points_as, upstream.to(v.dtype))[0] for v in (values, expected.values)]
        assert relative_error(*grads) <= TENSOR_CORES[dtype]


@pytest.mark.parametrize("samples", [1, 2])
def test_sets_that_are_sorted_a_few_samples_at_a_time(samples, monkeypatch):
    """Above SORTED points torch sorts CHUNK keys at once: three chunks, the last one not full, or a sample each."""
    from add_ops.sliced_wasserstein import triton_kernels

    monkeypatch.setattr(triton_kernels, "SORTED", 16)
    monkeypatch.setattr(triton_kernels, "CHUNK", samples * 4 * 20 - (samples == 1))
    x = torch.randint(-9, 10, (5, 20, 4), device=DEVICE).float()
    theta = torch.tensor([[1.0, 2, 0], [0, 1, 3], [1, 0, 0], [2, 0, 1]], device=DEVICE)
    values, order = add_ops.project_and_sort(x, theta)
    expected = (x @ theta).mT.sort(dim=2, stable=True)
    assert torch.equal(values, expected.values) and torch.equal(order, expected.indices)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_a_place_outside_of_its_row_is_not_written_to(dtype):
    """A GPU is not waited for to refuse it, as the CPU does: the value is left out, and all others are in place."""
    memory, order = torch.full((5, 5), -7.0, device=DEVICE), torch.arange(5, device=DEVICE, dtype=dtype).repeat(3, 1)
    order[0, 1], order[1, 3], order[2, 0], order[2, 4] = -1, 5, -(2**15), 2**15 - 1
    values = torch.arange(1.0, 16, device=DEVICE).view(3, 5)
    _triton.launch(sliced_scatter_kernel, (1,), values, order, memory[1:4], 3, 5, BLOCK_R=4, BLOCK_N=8)
    assert torch.equal(memory[1:4], values.where((order >= 0) & (order < 5), -7)) and bool((memory[::4] == -7).all())


def test_tensors_of_two_devices_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "unavailable", lambda: None)
    monkeypatch.setattr(_triton, "limits", lambda device: (90, 227 * 1024))
    with FakeTensorMode():
        one, other, third = (torch.empty(2, device=name) for name in ("cuda:1", "cuda:0", "cpu"))
    expected = "it runs on tensors of one device, and these are on cuda:0 and cuda:1"
    assert _triton.not_on_gpu(one, other, 3) == expected
    assert _triton.not_on_gpu(one, third) == "it runs on CUDA tensors, and a tensor is on cpu"
    assert _triton.not_on_gpu(one, one, 3) is None


@pytest.mark.parametrize("points", [60, 300])
def test_the_order_of_equal_zero_infinite_and_undefined_points(points):
    x = torch.randint(-1, 2, (4, points, 1), device=DEVICE).float()
    x[:, ::2] *= -1  # both zeros
    x[1, 3], x[1, 5], x[2, 7], x[2, 20], x[2, 21] = torch.nan, -torch.nan, torch.inf, -torch.inf, torch.inf
    x[3, :4, 0] = torch.tensor([1e-45, -1e-45, 1e-38, -1e-38], device=DEVICE)  # the smallest there are
    values, order = add_ops.project_and_sort(x, torch.ones(1, 1, device=DEVICE))
    expected = x[[0, 1, 2]].mT.sort(dim=2, stable=True)
    assert torch.equal(order[:3], expected.indices)
    torch.testing.assert_close(values[:3], expected.values, equal_nan=True, rtol=0, atol=0)
    assert bool((values[3].diff() >= 0).all())


# --- compiled without a GPU ---

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


# --- on a GPU only ---


def primitives(shape=(6, 32, 16, 16), dtype=torch.float32, device="cuda"):
    """``{name: (primitive, its input)}``, channels_last; every call of a primitive has the same other arguments."""
    generator = torch.Generator(device).manual_seed(1)
    student, teacher = (
        torch.randn(shape, dtype=dtype, device=device, generator=generator).contiguous(
            memory_format=torch.channels_last
        )
        for _ in "st"
    )
    views = add_ops.sample_views(12, generator=generator, device=device)
    theta = add_ops.sample_projections(shape[1], 8, generator=generator, device=device)

    def spectrum(distance):
        return lambda x: add_ops.spectral_distance(x, teacher[-len(x) :], distance=distance)  # the last samples, or all

    found = {f"spectral_distance {distance}": (spectrum(distance), student) for distance in DISTANCES}
    found["view_histogram"] = (lambda x: add_ops.multi_view_attention(x, views, shape[1] // 2), student)
    found["project_and_sort"] = (lambda x: add_ops.project_and_sort(x, theta)[0], student.flatten(2).mT)
    return found


NAMES = [*(f"spectral_distance {distance}" for distance in DISTANCES), "view_histogram", "project_and_sort"]


def run(primitive, x):
    """Values and gradient, of an upstream gradient that follows from the values."""
    x = x.detach().requires_grad_()
    values = primitive(x)
    return values.detach(), torch.autograd.grad(values.square().sum(), x)[0]


@gpu
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")  # of float32, which is what the kernels take
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_in_float32(name):
    primitive, x = primitives((1, 4, 1, 3), device=DEVICE)[name]
    check = partial(torch.autograd.gradcheck, inputs=x.requires_grad_(), eps=1e-3, rtol=1e-2, atol=5e-4)
    assert check(primitive)
    assert not check(lambda x: primitive(x + 0.05 * x.detach()), raise_exception=False)  # off by a twentieth


@gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 16, 20, 40], ids=["HW 64", "HW 256", "HW 400", "HW 1600"])
def test_the_same_bits_ten_times(name, size):
    primitive, x = primitives((6, 32, size, size))[name]
    if "cosine" in name and size > 32:
        pytest.skip("is the reference's")
    first = run(primitive, x)
    assert all(same_bits(run(primitive, x), first) for _ in range(10))


@gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 20, 40], ids=["HW 64", "HW 400", "HW 1600"])
def test_cuda_graphs_replay_on_new_input(name, size):
    primitive, x = primitives((6, 32, size, size))[name]
    if "cosine" in name and size > 32:
        pytest.skip("is the reference's")
    other = torch.randn_like(x)
    expected = run(primitive, other)
    static, graph, stream = x.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(primitive, static)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = run(primitive, static)
    static.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, expected)


@gpu
@pytest.mark.parametrize("name", NAMES)
def test_compiled_without_graph_breaks(name):
    primitive, x = primitives()[name]
    torch.compiler.reset()
    for one, other in zip(run(torch.compile(primitive, fullgraph=True), x), run(primitive, x), strict=True):
        assert relative_error(one, other) <= 1e-6


@gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_host_does_not_wait(name):
    primitive, x = primitives()[name]
    run(primitive, x)  # compiles, and copies tables of constants
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(primitive, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_the_precision_of_products_change_no_bit(name, dtype):
    primitive, x = primitives()[name]
    expected = run(primitive, x)
    with torch.autocast("cuda", dtype=dtype):
        values = primitive(x.detach())
    assert torch.equal(values, expected[0])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert same_bits(run(primitive, x), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_another_device_than_the_current_one(name):
    first, second = (run(*primitives(device=f"cuda:{index}")[name]) for index in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert other.device.index == 1 and relative_error(other.to(one.device), one) <= 1e-6


@gpu
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("side", [4, 8, 16, 31, 32, 37, 56, 64])
def test_tensor_cores_keep_the_precision_of_float32(side, scale):
    student, teacher = scale * torch.randn(2, 4, 256, side, side, device="cuda")
    weights = 10 ** (6 * torch.rand(4, side, side, device="cuda"))
    check(lambda x: add_ops.spectral_distance(x, teacher.to(x.dtype)), student, weights)
    views = add_ops.sample_views(12, device="cuda")
    check(lambda x: add_ops.multi_view_attention(x, views, 128), student, torch.randn(4, 12, 128, device="cuda"))
    points, theta = student.flatten(2).mT, add_ops.sample_projections(256, 8, device="cuda")
    values, order = add_ops.project_and_sort(points, theta)
    projected = (points.double() @ theta.double()).mT
    assert relative_error(values, projected.sort(dim=2).values) <= TENSOR_CORES[values.dtype]
    assert relative_error(projected.gather(2, order), projected.sort(dim=2).values) <= TENSOR_CORES[values.dtype]


@gpu
@pytest.mark.parametrize("name", NAMES)
def test_more_than_2_to_the_31_elements(name):
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free memory")
    primitive, x = primitives((2**31 // (256 * 32 * 32) + 33, 256, 32, 32), torch.bfloat16)[name]
    for whole, last in zip(run(primitive, x), run(primitive, x[-1:]), strict=True):
        assert relative_error(whole[-1:], last) <= TENSOR_CORES[last.dtype]
