"""The C++ kernels beyond what every backend must show: each instruction set, any number of threads, every codelet."""

import itertools
import math

import numpy as np
import pytest
import torch
from closeness import relative_error

import add_ops

if add_ops.backends()["cpp"] != "available":
    pytest.skip(add_ops.backends()["cpp"], allow_module_level=True)

from add_ops import _C, _cpp, _dispatch

MAP, GRADIENT = 1e-6, 5e-7
SIDES = [(4, 4), (7, 7), (8, 8), (14, 14), (16, 16), (28, 28), (31, 31), (32, 32), (56, 56), (64, 64)]
RECTANGLES = [(4, 8), (7, 14), (16, 56), (31, 32), (112, 60), (2, 128)]
OTHERS = [(1, 1), (1, 37), (3, 5), (13, 17), (30, 45), (97, 2)]
MAPS = [(1, 5, 3, 4), (3, 64, 4, 4), (17, 30, 7, 7), (16, 33, 16, 16), (5, 9, 31, 31), (2, 12, 56, 40)]
MANY = [*itertools.product([(3, 70, 4, 4), (2, 150, 9, 7), (1, 600, 8, 8)], ["l2", "cosine"])]
MANY += [((16, 136, 34, 34), "l2"), ((2, 136, 34, 34), "cosine")]  # two blocks in a chunk: 32 channels, of float64 16


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def capability(request, monkeypatch):
    monkeypatch.setenv("ADD_OPS_CPU_CAPABILITY", request.param)
    try:
        assert _C.cpu_capability() == request.param
    except ValueError as error:
        pytest.skip(str(error))
    with add_ops.use_backend("cpp"):
        yield request.param


def layouts(x):
    return {"contiguous": x, "channels_last": x.contiguous(memory_format=torch.channels_last), "strided": x.mT}


def reference(primitive, x, upstream):
    """Values and gradient in float64 by the reference."""
    x = x.detach().double().requires_grad_()
    with add_ops.use_backend("reference"):
        values = primitive(x)
        return values, torch.autograd.grad(values, x, upstream.double())[0]


def check(primitive, x, upstream):
    x = x.detach().requires_grad_()
    values = primitive(x)
    (grad,) = torch.autograd.grad(values, x, upstream.to(values.dtype))
    expected, expected_grad = reference(primitive, x, upstream)
    assert relative_error(values, expected) <= MAP
    assert relative_error(grad, expected_grad) <= GRADIENT


@pytest.mark.parametrize("distance", ["l2", "gaussian"])
@pytest.mark.parametrize("size", SIDES + RECTANGLES + OTHERS, ids=str)
def test_spectral_distance_at_every_side(capability, size, distance):
    features, teacher = torch.randn(2, 2, 19, *size)
    weights = 10 ** (6 * torch.rand(2, *size))  # as large as exp(gamma m) becomes
    for layout, x in layouts(features).items():
        other, upstream = (teacher.mT, weights.mT) if layout == "strided" else (teacher, weights)
        check(lambda x, t=other: add_ops.spectral_distance(x, t.to(x.dtype), distance=distance, sigma=0.1), x, upstream)


@pytest.mark.parametrize(("shape", "distance"), MANY, ids=str)
def test_spectral_distance_over_many_channels(capability, shape, distance):
    # Several groups of channels in a block, several blocks in a chunk, the last cut short; then channels with gaps.
    features, teacher, upstream = torch.randn(shape), torch.randn(shape), torch.randn(shape[0], *shape[2:])
    check(lambda x: add_ops.spectral_distance(x, teacher.to(x.dtype), distance=distance), features, upstream)
    sparse, other = features[:, ::2], teacher[:, 1::2]
    check(lambda x: add_ops.spectral_distance(x, other.to(x.dtype), distance=distance), sparse, upstream)


@pytest.mark.parametrize("coordinates", ["index", "unit"])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_view_histogram(capability, shape, coordinates):
    views, features = add_ops.sample_views(12), torch.randn(shape)
    for x in layouts(features).values():
        for bins in (1, 16, 300):
            upstream = torch.randn(shape[0], 12, bins)
            if bins > 1:
                check(lambda x, m=bins: add_ops.multi_view_attention(x, views, m, coordinates=coordinates), x, upstream)
            else:
                torch.testing.assert_close(add_ops.multi_view_attention(x, views, 1), torch.ones(shape[0], 12, 1))


@pytest.mark.parametrize("points", [1, 2, 63, 64, 96, 97, 256, 1024, 3136, 40000])
def test_project_and_sort(capability, points):
    # Whole numbers project without rounding: float32 and float64 agree on the order, ties included.
    x, theta = torch.randint(-(2**12), 2**12, (2, points, 3)).float(), torch.randint(-3, 4, (3, 5)).float()
    check(lambda x: add_ops.project_and_sort(x, theta)[0], x, torch.randn(2, 5, points))


@pytest.mark.parametrize("index", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("points", [*range(1, 20), 255, 256, 257, 1000, 1023, 1024, 1025])
def test_rows_side_by_side_sort_as_alone(capability, points, index):
    """Any number of rows of any length, ties, zeros, NaN and infinities: as NumPy's stable sort, bit for bit."""
    for rows in (1, 3, 4, 8, 11, 12, 17):
        values = (2 * torch.randn(rows, points)).round() / 2
        for special in (-0.0, math.nan, math.inf, -math.inf, 1e-42):
            values[torch.rand(rows, points) < 0.04] = special
        order = torch.from_numpy(np.argsort(values.numpy(), axis=1, kind="stable"))
        result, found = values.clone(), torch.empty(rows, points, dtype=index)
        _C.sort_with_index(result.numpy(), found.numpy(), 2)
        assert torch.equal(found.long(), order)
        torch.testing.assert_close(result, values.gather(1, order) + 0.0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weighted", [(), ("x_weights",), ("x_weights", "y_weights")], ids=len)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_quantile_distance(capability, p, weighted, monkeypatch):
    """Against the reference in float64, and the same bits for any number of threads."""
    monkeypatch.setattr(_cpp, "FEW", 0)
    # Whole numbers project without rounding, and shifted sets have no gap that rounding could turn round.
    x, y = torch.randint(-(2**12), 2**12, (3, 130, 3)).float(), torch.randint(-(2**12), 2**12, (3, 77, 3)) + 2.0**14
    theta = torch.tensor([[1.0, 2, 0, 3], [1, 0, 1, 1], [1, 1, 3, 0]])
    sizes = {"x_weights": 130, "y_weights": 77}
    weights = {name: torch.rand(3, sizes[name]).double() for name in weighted}
    weights = {name: value / value.sum(1, keepdim=True) for name, value in weights.items()}

    def distance(x):
        return add_ops.sliced_wasserstein(x, y.to(x.dtype), theta, p=p, **weights, reduction="none")

    check(distance, x, torch.randn(3, 4))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            points = x.clone().requires_grad_()
            results.append((value := distance(points), *torch.autograd.grad(value.sum(), points)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


# No tile of student rows, no pair of teacher rows and no vector of bins is full in all of them; two have two items.
PAIRS = [(1, 1, 1), (2, 3, 5), (5, 2, 16), (8, 1, 17), (17, 2, 33), (34, 3, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_contrastive_loss(capability, p, dtype, monkeypatch):
    """Against the reference in float64, and the same bits for any number of threads."""
    monkeypatch.setattr(_cpp, "FEW", 0)
    before = torch.get_num_threads()
    for shape in PAIRS:
        student, teacher = torch.randn(2, *shape, dtype=dtype)
        labels, margin = torch.arange(shape[0]) % 3, 1.5 * shape[2]  # about the distances

        def loss(x, y=teacher, labels=labels, margin=margin):
            return torch.ops.add_ops.contrastive_loss(x, y.to(x.dtype), labels, p, 2.0, 3.0, margin)

        check(loss, student, torch.tensor(0.7))
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                x = student.clone().requires_grad_()
                results.append((value := loss(x), *torch.autograd.grad(value, x)))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("gamma", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_sum(capability, dtype, gamma):
    """Every length of a row's rest, and exponents of all sizes, against the reference in float64."""
    for pixels in range(1, 20):
        distance = 10 ** torch.linspace(-9, 1.4, 3 * pixels, dtype=dtype).view(3, 1, pixels)
        check(lambda x: torch.ops.add_ops.attention_sum(x, gamma, 3, "none")[0], distance, torch.randn(3))
    # Beyond the range: exponents are limited above and vanish below, and a sum that leaves it has no slope.
    limit, most = (80.0, 3e38) if dtype == torch.float32 else (700.0, 1e308)
    for value in (limit / 2, 2 * limit, 1e6, most):
        distance = torch.tensor([[[value, 0.0, value]]], dtype=dtype, requires_grad=True)
        loss, slope = torch.ops.add_ops.attention_sum(distance, gamma, 3, "none")
        with add_ops.use_backend("reference"):
            expected = torch.ops.add_ops.attention_sum(distance, gamma, 3, "none")
        torch.testing.assert_close((loss, slope), expected)
        assert torch.equal(torch.autograd.grad(loss, distance)[0], slope)


@pytest.mark.parametrize("shape", [(1, 40, 8, 8), (3, 67, 31, 31), (16, 50, 14, 14), (2, 130, 32, 32)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(capability, shape, monkeypatch):
    monkeypatch.setattr(_cpp, "FEW", 0)
    features, teacher, upstream = torch.randn(shape), torch.randn(shape), torch.randn(shape[0], *shape[2:])
    views, histogram_upstream = add_ops.sample_views(12), torch.randn(shape[0], 12, 20)
    theta = add_ops.sample_projections(shape[1], 8)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = features.clone().requires_grad_()
            spectrum = add_ops.spectral_distance(x, teacher)
            attention = add_ops.multi_view_attention(x, views, 20)
            grads = torch.autograd.grad(spectrum, x, upstream) + torch.autograd.grad(attention, x, histogram_upstream)
            values, permutation = _sorted(features.flatten(2).mT @ theta, threads)
            results.append((spectrum, attention, *grads, values, permutation))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _sorted(projected, threads):
    """The kernel alone: the matrix product before it is torch's."""
    values = projected.mT.flatten(0, 1).contiguous()
    permutation = torch.empty(values.shape, dtype=torch.int16)
    _C.sort_with_index(values.numpy(), permutation.numpy(), threads)
    return values, permutation


@pytest.mark.parametrize("word", ["sse9", "AVX2"])
def test_an_unknown_capability_is_named(monkeypatch, word):
    monkeypatch.setenv("ADD_OPS_CPU_CAPABILITY", word)
    features, views = torch.ones(1, 2, 3, 4), add_ops.sample_views(1)
    with pytest.raises(ValueError, match=f"ADD_OPS_CPU_CAPABILITY: expected baseline, avx2 or avx512, got '{word}'"):
        add_ops.multi_view_attention(features, views, 2)


def test_a_tensor_elsewhere_is_named():
    here, there = torch.empty(1), torch.empty(1, device="meta")
    assert _cpp.not_on_cpu(here, None, there, 3) == "it runs on the CPU, and a tensor is on meta"
    assert _cpp.not_on_cpu(here, None, 3) is None


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 65521), "it takes prime factors up to 256, and a side of 65521 has 65521"),
        ((514, 1), "it takes prime factors up to 256, and a side of 514 has 257"),
        ((4097, 4097), "it takes at most 16777216 pixels, not 4097×4097"),
        ((251, 6), ""),
    ],
    ids=str,
)
def test_a_side_without_a_good_transform_is_the_references(size, reason):
    batch = 0 if max(size) == 4097 else 1
    x = torch.randn(batch, 2, *size, requires_grad=True)
    gradient = torch.autograd.grad(add_ops.spectral_distance(x, torch.zeros_like(x)).sum(), x)[0]
    assert gradient.isfinite().all() and bool(gradient.any()) == bool(batch)
    for name in ("spectral_distance", "spectral_distance_backward"):
        assert _dispatch.answered(name) == (("reference", reason) if reason else ("cpp", ""))
    if reason:
        with add_ops.use_backend("cpp"), pytest.raises(RuntimeError, match=reason):
            add_ops.spectral_distance(x, x)
