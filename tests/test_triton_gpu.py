"""What only a GPU shows of the Triton kernels: determinism, graphs, no waiting, tensor cores, large tensors."""

from functools import partial

import pytest
import torch
from closeness import TENSOR_CORES, relative_error
from triton_checks import DEVICE, DISTANCES, ON_GPU, check, on_triton, same_bits

import add_ops

__all__ = ["on_triton"]  # every test's fixture

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


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


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")  # of float32, which is what the kernels take
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_in_float32(name):
    primitive, x = primitives((1, 4, 1, 3), device=DEVICE)[name]
    check = partial(torch.autograd.gradcheck, inputs=x.requires_grad_(), eps=1e-3, rtol=1e-2, atol=5e-4)
    assert check(primitive)
    assert not check(lambda x: primitive(x + 0.05 * x.detach()), raise_exception=False)  # off by a twentieth


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 16, 20, 40], ids=["HW 64", "HW 256", "HW 400", "HW 1600"])
def test_the_same_bits_ten_times(name, size):
    primitive, x = primitives((6, 32, size, size))[name]
    if "cosine" in name and size > 32:
        pytest.skip("is the reference's")
    first = run(primitive, x)
    assert all(same_bits(run(primitive, x), first) for _ in range(10))


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


@pytest.mark.parametrize("name", NAMES)
def test_compiled_without_graph_breaks(name):
    primitive, x = primitives()[name]
    torch.compiler.reset()
    for one, other in zip(run(torch.compile(primitive, fullgraph=True), x), run(primitive, x), strict=True):
        assert relative_error(one, other) <= 1e-6


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_another_device_than_the_current_one(name):
    first, second = (run(*primitives(device=f"cuda:{index}")[name]) for index in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert other.device.index == 1 and relative_error(other.to(one.device), one) <= 1e-6


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


@pytest.mark.parametrize("name", NAMES)
def test_more_than_2_to_the_31_elements(name):
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free memory")
    primitive, x = primitives((2**31 // (256 * 32 * 32) + 33, 256, 32, 32), torch.bfloat16)[name]
    for whole, last in zip(run(primitive, x), run(primitive, x[-1:]), strict=True):
        assert relative_error(whole[-1:], last) <= TENSOR_CORES[last.dtype]
