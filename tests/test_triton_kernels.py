"""The Triton kernels of views and of point sets beyond what every backend must show: float32 at awkward sizes.

Those of the spectral distance are in ``test_triton_spectrum.py``, what only a GPU shows is in ``test_triton_gpu.py``.
Without a GPU they run in Triton's interpreter, which shows indexing and algebra only.
"""

import pytest
import torch
from closeness import TENSOR_CORES, relative_error
from torch._subclasses import FakeTensorMode
from triton_checks import DEVICE, check, layouts, on_triton

import add_ops
from add_ops import _triton
from add_ops.multi_view.reference import view_bins
from add_ops.sliced_wasserstein.triton_kernels import sliced_scatter_kernel

__all__ = ["on_triton"]  # every test's fixture


@pytest.mark.parametrize(
    ("shape", "coordinates", "of_bins"),
    [
        ((1, 1, 1, 1), "index", (300, 1)),
        ((1, 1, 1, 1), "unit", (300, 1)),
        ((2, 7, 3, 5), "index", (1, 16, 33, 7)),
        ((2, 7, 3, 5), "unit", (1, 16, 33, 7)),
        ((17, 12, 4, 4), "index", (1, 16, 33, 7)),
        ((2, 11, 5, 7), "index", (1, 16, 33, 7)),
        ((2, 3, 2, 5), "index", (300,)),  # more than a program normalises at once
    ],
    ids=str,
)
def test_view_histogram_at_awkward_sizes(shape, coordinates, of_bins):
    views, features = add_ops.sample_views(5, device=DEVICE), torch.randn(shape, device=DEVICE)
    for x, bins in zip(layouts(features).values(), of_bins, strict=False):
        upstream = torch.randn(shape[0], 5, bins, device=DEVICE)
        if bins > 1 and features[0].numel() > 1:
            check(lambda x, m=bins: add_ops.multi_view_attention(x, views, m, coordinates=coordinates), x, upstream)
        else:  # all the mass in one bin, whatever the features
            torch.testing.assert_close(
                add_ops.multi_view_attention(x, views, bins).sum(2), torch.ones_like(upstream[..., 0])
            )


@pytest.mark.parametrize(("samples", "count"), [(70, 2), (9, 18)])
def test_more_samples_or_views_than_one_program_takes(samples, count):
    """Of samples 64 forward, 32 backward and 8 to normalise, of views 16 in a plan."""
    features, views = torch.randn(samples, 3, 2, 3, device=DEVICE), add_ops.sample_views(count, device=DEVICE)
    upstream = torch.randn(samples, count, 5, device=DEVICE)
    check(lambda x: add_ops.multi_view_attention(x, views, 5), features, upstream)


@pytest.mark.parametrize("shape", [(5, 6, 7), (32, 4, 8), (9, 17, 3)], ids=str)
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
    """Between (0, 0, 1) and (1, 0, 0), a box spans from one bin to dozens: two products of windows, of cut boxes."""
    features = torch.randn(1, 9, 3, 5, device=DEVICE)
    views, x = torch.cat([torch.eye(3), -torch.eye(3)[2:]]).to(DEVICE), layouts(features)[layout]
    check(lambda x: add_ops.multi_view_attention(x, views, 80), x, torch.randn(1, 4, 80, device=DEVICE))
    counts = add_ops.multi_view_attention(torch.ones_like(x), views, 80)[0] * x.numel()
    expected = torch.stack([row.bincount(minlength=80) for row in view_bins(x.shape[1:], views, 80, "index")])
    torch.testing.assert_close(counts, expected.float(), rtol=1e-5, atol=1e-2)


SETS = [  # (B, N, D, K); the interpreter takes a quarter of a second for every 1024 keys
    ((1, 1, 1, 1), torch.float32),
    ((3, 2, 1, 65), torch.float32),
    ((2, 33, 70, 3), torch.float32),
    ((2, 33, 70, 3), torch.bfloat16),
    ((2, 33, 70, 3), torch.float16),
    ((1, 65, 5, 17), torch.float32),
    ((1, 256, 33, 2), torch.float32),
    ((1, 257, 3, 3), torch.float32),
    ((2, 1025, 3, 3), torch.float32),
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
        one, other, third, fourth = (torch.empty(2, device=name) for name in ("cuda:1", "cuda:0", "cpu", "meta"))
    expected = "it runs on tensors of one device, and these are on cuda:0 and cuda:1"
    assert _triton.not_on_gpu(one, other, 3) == expected
    for elsewhere in (third, fourth):
        words = f"it runs on CUDA tensors, and a tensor is on {elsewhere.device}"
        assert _triton.not_on_gpu(one, elsewhere) == words
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
