"""The room sliced_wasserstein: every backend against torch.sort in float64 and against POT."""

import pytest
import torch
from closeness import assert_close
from torch.autograd import gradcheck

from add_ops import SlicedWassersteinLoss, project_and_sort, sample_projections, sliced_wasserstein
from add_ops.sliced_wasserstein import op

INTERPRETED = not torch.cuda.is_available()
SIZES = [(2, 1, 1, 1), (1, 2, 3, 5), (3, 17, 4, 7), (2, 64, 8, 5), (2, 257, 3, 3), (1, 1000, 2, 2), (1, 3136, 4, 2)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_backward_equal_the_definition(backend, size):
    batch, points, dim, projections = size
    x = torch.randn(batch, points, dim, dtype=torch.float64, requires_grad=True)
    theta = sample_projections(dim, projections)
    projected = (x @ theta.double()).transpose(1, 2)
    expected, order = projected.sort(dim=-1, stable=True)
    values, permutation = project_and_sort(x, theta)
    assert_close(values, expected)
    assert permutation.dtype == torch.int64 and torch.equal(permutation, order)
    upstream = torch.randn_like(values)
    assert_close(*(torch.autograd.grad(v, x, upstream)[0] for v in (values, expected)))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_strides(backend, dtype, strided):
    x = torch.randn(2, 40, 6, dtype=torch.float64).to(dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x
    x.requires_grad_()
    theta, upstream = sample_projections(6, 5), torch.randn(2, 5, 40).double()
    exact = x.detach().double().requires_grad_()
    expected = (exact @ theta.double()).transpose(1, 2).sort(-1).values
    values, permutation = project_and_sort(x, theta)
    assert values.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(values, expected)
    assert torch.equal(permutation.sort(-1).values, torch.arange(40).expand(2, 5, 40))
    (grad,) = torch.autograd.grad(values, x, upstream.to(values.dtype))
    assert grad.dtype == dtype
    assert_close(grad, torch.autograd.grad(expected, exact, upstream)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_keep_their_order_and_nan_sorts_last(backend, dtype):
    x = torch.randint(-2, 3, (3, 500, 1)).to(dtype)
    x[x == 0] *= torch.where(torch.rand(int((x == 0).sum())) < 0.5, -1.0, 1.0).to(dtype)  # both zeros
    x[0, 3] = torch.nan
    x[1, 7], x[1, 400] = torch.inf, -torch.inf
    values, permutation = project_and_sort(x, torch.ones(1, 1))
    expected, order = x.transpose(1, 2).sort(dim=-1, stable=True)
    assert torch.equal(permutation, order)
    torch.testing.assert_close(values, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("points", [2**15, 2**15 + 1])
def test_the_permutation_survives_its_narrow_storage(backend, points, monkeypatch):
    if backend == "triton" and INTERPRETED:  # a thousand programs of its interpreter, which project onto 1
        from add_ops.sliced_wasserstein import triton_kernels

        monkeypatch.setattr(triton_kernels, "_project", lambda matrix, x, out: out.copy_(matrix @ x))
    x = torch.randperm(points).float().reshape(1, points, 1).requires_grad_()
    values, permutation = project_and_sort(x, torch.ones(1, 1))
    assert torch.equal(x.detach().flatten()[permutation.flatten()], values.detach().flatten())
    assert torch.equal(values.detach().flatten(), torch.arange(points).float())
    weights = torch.rand(points)
    (grad,) = torch.autograd.grad((values.flatten() * weights).sum(), x)
    assert torch.equal(grad.flatten(), weights[x.detach().flatten().long()])


@pytest.mark.parametrize("p", [1, 2, 3])
def test_agreement_with_pot(backend, p):
    ot = pytest.importorskip("ot")
    x, y = torch.randn(3, 50, 4).double(), torch.randn(3, 50, 4).double() + 1
    theta = torch.nn.functional.normalize(torch.randn(4, 20, dtype=torch.float64), dim=0)
    expected = [
        ot.sliced_wasserstein_distance(a.numpy(), b.numpy(), projections=theta.numpy(), p=p) ** p
        for a, b in zip(x, y, strict=True)
    ]
    assert_close(sliced_wasserstein(x, y, theta, p=p), torch.tensor(expected))


def test_one_dimension_by_hand_equal_sets_and_symmetry(backend):
    """{0, 3, 1} against {2, 2, 5}: sorted 0 1 3 and 2 2 5, differences 2 1 2."""
    x, y, one = torch.tensor([[[0.0], [3], [1]]]), torch.tensor([[[2.0], [2], [5]]]), torch.ones(1, 1)
    assert sliced_wasserstein(x, y, one).item() == 3
    assert sliced_wasserstein(y, x, one, p=1).item() == pytest.approx(5 / 3)
    assert sliced_wasserstein(x, x[:, [2, 0, 1]], one).item() == 0
    assert sliced_wasserstein(x, x[:, [2, 0, 1]] + 1, one, p=3).item() == 1


@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_gradcheck(backend, p):
    x, y = (torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in "xy")
    theta = sample_projections(3, 4)
    assert gradcheck(lambda a, b: sliced_wasserstein(a, b, theta, p=p), (x, y))
    assert gradcheck(lambda a: project_and_sort(a, theta)[0], (x,))


def test_an_empty_batch(backend):
    x = torch.zeros(0, 5, 3, requires_grad=True)
    assert sliced_wasserstein(x, x, sample_projections(3, 2)).shape == (0,)
    loss = SlicedWassersteinLoss()(x, x.detach())
    loss.backward()
    assert loss == 0 and x.grad.shape == x.shape


def test_the_module_reduces_and_draws_fresh_projections():
    x, y = torch.randn(4, 9, 3), torch.randn(4, 9, 3)

    def run(reduction):
        return SlicedWassersteinLoss(projections=8, reduction=reduction, generator=torch.Generator().manual_seed(2))(
            x, y
        )

    assert run("none").shape == (4,) and run("none").min() > 0
    torch.testing.assert_close(run("mean"), run("none").mean())
    torch.testing.assert_close(run("sum"), run("none").sum())
    module = SlicedWassersteinLoss(projections=8)
    assert module(x, y) != module(x, y)


def test_projections_are_unit_columns():
    theta = sample_projections(6, 1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theta.norm(dim=0), torch.ones(1000))
    torch.testing.assert_close(theta @ theta.T / 1000, torch.eye(6) / 6, atol=0.03, rtol=0)


def test_compiled_equals_eager_and_autocast_changes_nothing(backend):
    x, y, theta = torch.randn(2, 30, 4, requires_grad=True), torch.randn(2, 30, 4), sample_projections(4, 6)
    torch.compiler.reset()
    compiled = torch.compile(sliced_wasserstein, fullgraph=True, backend="aot_eager")
    results = [f(x, y, theta) for f in (sliced_wasserstein, compiled)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(r.sum(), x)[0] for r in results))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sliced_wasserstein(x, y, theta), results[0])


def test_many_slices_are_worked_off_in_parts_with_the_same_bits(backend, monkeypatch):
    """Whole numbers, so that no sum is rounded and the order of the parts cannot show."""
    x, y = (torch.randint(-9, 9, (2, 16, 3)).double().requires_grad_() for _ in range(2))
    theta, upstream = torch.randint(-4, 5, (3, 4)).double(), torch.randint(-4, 5, (2,)).double()
    weights = {"x_weights": torch.full((2, 16), 1 / 16, dtype=torch.float64)}

    def results(function, kept, **options):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            distance = function(x, y, theta, **options)
        return distance.detach(), *torch.autograd.grad(distance, (x, y), upstream)

    torch._dynamo.reset()
    for options in ({}, weights):
        whole, parts = [], []
        expected = results(sliced_wasserstein, whole, **options)
        with monkeypatch.context() as few:
            few.setattr(op, "STREAMED", 2 * 16 * 3)  # a part is one direction
            found = results(sliced_wasserstein, parts, **options)
            if not options:
                compiled = torch.compile(sliced_wasserstein, fullgraph=True, backend="aot_eager")
                assert all(map(torch.equal, results(compiled, []), expected))
        assert all(map(torch.equal, found, expected))
        kept = [any(len(shape) == 3 and shape[2] == 16 for shape in shapes) for shapes in (whole, parts)]
        assert kept == [True, False], "the sorted values are kept for the backward pass"


def test_opcheck(backend):
    x, theta = torch.randn(2, 6, 3, requires_grad=True), sample_projections(3, 4)
    torch.library.opcheck(torch.ops.add_ops.project_and_sort, (x, theta))
    values, permutation = torch.ops.add_ops.project_and_sort(x.detach(), theta)
    torch.library.opcheck(torch.ops.add_ops.project_and_sort_backward, (torch.randn_like(values), permutation, theta))


def test_second_derivatives_are_refused(backend):
    x = torch.randn(1, 5, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(project_and_sort(x, sample_projections(2, 3))[0].pow(3).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


X, P = torch.zeros(2, 5, 3), torch.eye(3)
BAD = [
    ((X[0], X, P), {}, ValueError, r"x: expected shape \(B, N, D\), got \(5, 3\)"),
    ((X, X[:1], P), {}, ValueError, r"y: expected shape \(2, M, 3\) as that of x, got \(1, 5, 3\)"),
    ((X, X[..., :2], P), {}, ValueError, r"y: expected shape \(2, M, 3\) as that of x, got \(2, 5, 2\)"),
    ((X, X, P[:2]), {}, ValueError, r"projections: expected shape \(3, K\) with K >= 1, got \(2, 3\)"),
    ((X, X, P[:, :0]), {}, ValueError, r"projections: expected shape \(D, K\) with only the first size 0"),
    ((X, X, P.long()), {}, TypeError, r"projections: expected float16, bfloat16, float32 or float64, got torch.int64"),
    ((X, X, P.to("meta")), {}, ValueError, r"projections: expected device cpu, that of x, got meta"),
    ((X, X, P.clone().requires_grad_()), {}, ValueError, r"projections: expected a tensor without gradient"),
    ((X, X.to("meta"), P), {}, ValueError, r"y: expected device cpu, that of x, got meta"),
    ((X, X, P), {"p": 0}, ValueError, r"p: expected a finite number >= 1, got 0"),
    ((X, X, P), {"p": True}, TypeError, r"p: expected a number, got bool"),
    ((X, X.to_sparse(), P), {}, TypeError, r"y: expected a dense tensor, got layout torch.sparse_coo"),
    ((X.to(torch.float8_e4m3fn), X, P), {}, TypeError, r"x: expected float16.* got torch.float8_e4m3fn"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[m[:30] for *_, m in BAD])
def test_bad_input_is_named(args, options, error, message):
    with pytest.raises(error, match=message):
        sliced_wasserstein(*args, **options)


def test_bad_numbers_of_projections_are_named():
    with pytest.raises(ValueError, match=r"num_projections: expected an integer >= 1, got 0"):
        sample_projections(3, 0)
    with pytest.raises(TypeError, match=r"dim: expected an integer >= 1, got float"):
        sample_projections(3.0, 1)
