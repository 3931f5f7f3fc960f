"""Unequal and weighted point sets, slice by slice: every backend against POT, hand-made cases and repeated points."""

import pytest
import torch
from closeness import assert_close
from torch.autograd import gradcheck

from add_ops import SlicedWassersteinLoss, backends, max_sliced_wasserstein, sample_projections, sliced_wasserstein
from add_ops.sliced_wasserstein import reference

INTERPRETED = not torch.cuda.is_available()
FAST = [b for b, status in backends().items() if status == "available" and (b, INTERPRETED) != ("triton", True)]
fast = pytest.mark.parametrize("backend", FAST, indirect=True)
"""Without Triton's interpreter, which would sort for minutes: the comparison of quantiles has no Triton kernel."""
SIZES = [(1, 1), (1, 9), (5, 7), (64, 64), (100, 33), (30, 60), (257, 400)]
SIDES = [(False, False), (True, False), (False, True), (True, True)]
graphs = pytest.mark.parametrize(
    ("backend", "sides"),
    [(b, sides) for i, b in enumerate(FAST) for sides in (SIDES[-1:] if i else SIDES)],
    ids=str,
    indirect=["backend"],
)
"""A graph calls operators, whoever answers them."""


def random_weights(batch, points):
    weights = torch.rand(batch, points, dtype=torch.float64)
    if points > 2:
        weights[:, ::3] = 0
    return weights / weights.sum(1, keepdim=True)


def case(sizes, sides, batch=2, dim=3):
    sets = [torch.randn(batch, n, dim, dtype=torch.float64, requires_grad=True) for n in sizes]
    weights = [random_weights(batch, n) if weighted else None for n, weighted in zip(sizes, sides, strict=True)]
    return *sets, sample_projections(dim, 4).double(), dict(zip(("x_weights", "y_weights"), weights, strict=True))


def pot(x, y, theta, p, **weights):
    ot, slices = pytest.importorskip("ot"), []
    for b in range(len(x)):
        lines = [(points[b].detach() @ theta).numpy() for points in (x, y)]
        slices.append(ot.wasserstein_1d(*lines, *(None if w is None else w[b].numpy() for w in weights.values()), p=p))
    return torch.stack([torch.as_tensor(values) for values in slices])


@fast
@pytest.mark.parametrize("sides", SIDES, ids=["none", "x", "y", "both"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_every_slice_agrees_with_pot(backend, sizes, sides, p):
    x, y, theta, weights = case(sizes, sides)
    expected = pot(x, y, theta, p, **weights)
    assert_close(sliced_wasserstein(x, y, theta, p=p, **weights, reduction="none"), expected)
    assert_close(sliced_wasserstein(x, y, theta, p=p, **weights), expected.mean(1))


@fast
@pytest.mark.parametrize("p", [1, 2])
def test_agreement_with_pots_sliced_distance(backend, p):
    ot = pytest.importorskip("ot")
    x, y, theta, weights = case((40, 25), (True, True), batch=1)
    arrays = [tensor.detach().numpy() for tensor in (x[0], y[0], weights["x_weights"][0], weights["y_weights"][0])]
    expected = ot.sliced_wasserstein_distance(*arrays, projections=theta.numpy(), p=p)
    assert_close(sliced_wasserstein(x, y, theta, p=p, **weights), torch.tensor([expected**p]))


@fast
@pytest.mark.parametrize(("p", "metric"), [(1, "cityblock"), (2, "sqeuclidean")])
def test_agreement_with_pots_optimal_plan(backend, p, metric):
    ot = pytest.importorskip("ot")
    x, y, _, weights = case((12, 9), (True, True), batch=1, dim=1)
    expected = ot.emd2_1d(*(t.detach().numpy()[0] for t in (x, y)), *(w.numpy()[0] for w in weights.values()), metric)
    actual = sliced_wasserstein(x, y, torch.ones(1, 1), p=p, **weights)
    assert_close(actual, torch.as_tensor([expected], dtype=torch.float64))


def line(*values):
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_by_hand(backend, dtype):
    one, weights = torch.ones(1, 1), torch.tensor([[0.25, 0.75]])
    cases = [
        # {0, 3} against {1}: both halves against 1
        (line(0, 3), line(1), 2, {}, (1 + 4) / 2),
        # {0, 3} against {0, 1, 2}: steps of 1/3, 1/6, 1/6, 1/3 with gaps 0, 1, 2, 1
        (line(3, 0), line(1, 0, 2), 1, {}, (1 + 2) / 6 + 1 / 3),
        # 1/4 at 4 and 3/4 at 0 against {0, 4} in halves: 1/4 of the mass moves from 4 to 0
        (line(4, 0), line(0, 4), 2, {"x_weights": weights}, 0.25 * 16),
        (line(0, 4), line(4, 0), 2, {"y_weights": weights}, 0.25 * 16),
        # ties within and between the sets: equal measures
        (line(1, 1, 2, 2), line(2, 1), 3, {}, 0),
        (line(0, 4), line(4, 4, 0, 4), 2, {"x_weights": weights}, 0),
        (line(7), line(5), 3, {"x_weights": torch.ones(1, 1), "y_weights": torch.ones(1, 1)}, 8),
    ]
    for x, y, p, options, expected in cases:
        options = {name: value.to(dtype) for name, value in options.items()}
        actual = sliced_wasserstein(x.to(dtype), y.to(dtype), one, p=p, **options)
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        assert abs(actual.item() - expected) <= 4 * torch.finfo(actual.dtype).eps


def test_gradient_by_hand(backend):
    """{0, 3} against {0, 1, 2}: 0|0 of width 1/3, 0|1 and 3|1 of 1/6, 3|2 of 1/3; d(gap²) = 2·gap."""
    x, y = line(3, 0).requires_grad_(), line(1, 0, 2).requires_grad_()
    grads = torch.autograd.grad(sliced_wasserstein(x, y, torch.ones(1, 1)), (x, y))
    assert_close(grads[0].flatten(), torch.tensor([2 * 2 / 6 + 2 / 3, -2 / 6], dtype=torch.float64))
    assert_close(grads[1].flatten(), torch.tensor([2 / 6 - 4 / 6, 0, -2 / 3], dtype=torch.float64))


def test_whole_numbers_of_copies_are_weights(backend):
    """Point n with weight c/12 is c points out of 12, for values and gradients."""
    copies = torch.tensor([3, 0, 4, 5])
    x, y = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 12, 3).double()
    theta, weights = sample_projections(3, 5), copies.double().expand(2, -1) / 12
    spread = sliced_wasserstein(x.repeat_interleave(copies, 1), y, theta)
    weighted = sliced_wasserstein(x, y, theta, x_weights=weights)
    twice = sliced_wasserstein(x, y.repeat(1, 2, 1), theta, x_weights=weights)
    for other in (weighted, twice):
        assert_close(other, spread)
        assert_close(*(torch.autograd.grad(d.sum(), x, retain_graph=True)[0] for d in (other, spread)))


def test_a_point_of_weight_zero_changes_nothing_whatever_it_is(backend):
    x, y, theta, _ = case((6, 9), (False, False))
    padded = torch.cat(
        [x.detach(), torch.tensor([torch.nan, torch.inf, -torch.inf, 5.0]).double().expand(2, 3, 4).mT], 1
    )
    padded.requires_grad_()
    weights = torch.cat([torch.full((2, 6), 1 / 6, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)], 1)
    plain, masked = sliced_wasserstein(x, y, theta), sliced_wasserstein(padded, y, theta, x_weights=weights)
    assert_close(masked, plain)
    grad, expected = torch.autograd.grad(masked.sum(), padded)[0], torch.autograd.grad(plain.sum(), x)[0]
    assert_close(grad[:, :6], expected)
    assert (grad[:, 6:] == 0).all()
    assert sliced_wasserstein(padded, y, theta).isnan().all()


@fast
@pytest.mark.parametrize("sides", SIDES, ids=["none", "x", "y", "both"])
@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_gradcheck(backend, sides, p):
    x, y, theta, weights = case((4, 5), sides, dim=2)
    assert gradcheck(lambda a, b: sliced_wasserstein(a, b, theta, p=p, **weights, reduction="none"), (x, y))
    distances = (sliced_wasserstein(x, other, theta, p=p, **weights) for other in (y.detach(), y))
    alone, both = (torch.autograd.grad(distance.sum(), x)[0] for distance in distances)
    assert torch.equal(alone, both)


@fast
@pytest.mark.parametrize("sides", SIDES, ids=["none", "x", "y", "both"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_and_strides(backend, dtype, sides):
    """Equal to the float64 result of the same rounded numbers."""
    x, y, theta, weights = case((40, 25), sides)
    theta = theta.float()
    x, y = ((points.detach() + shift).to(dtype).mT.contiguous().mT for points, shift in ((x, 0), (y, 1)))
    weights = {name: None if value is None else value.to(dtype) for name, value in weights.items()}
    exact = {
        name: None if value is None else value.double() / value.double().sum(1, keepdim=True)
        for name, value in weights.items()
    }
    results = []
    for points, options in (((x, y), weights), ((x.double(), y.double()), exact)):
        points = [p.clone().requires_grad_() for p in points]
        value = sliced_wasserstein(*points, theta, **options)
        results.append((value, *torch.autograd.grad(value, points, torch.tensor([0.5, -2.0]).to(value.dtype))))
    assert results[0][0].dtype == torch.float32 and results[0][1].dtype == dtype
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@fast
@pytest.mark.parametrize("sizes", [(5, 5), (7, 3)], ids=str)
def test_reductions_of_function_and_module(backend, sizes):
    x, y, theta, weights = case(sizes, (True, False))
    for options in ({}, weights):
        slices = sliced_wasserstein(x, y, theta, **options, reduction="none")
        assert slices.shape == (2, 4)
        assert_close(sliced_wasserstein(x, y, theta, **options), slices.mean(1))
        for reduction, over_batch in (
            ("none", lambda v: v),
            ("mean", lambda v: v.mean(0)),
            ("sum", lambda v: v.sum(0)),
        ):
            for kept in ("mean", "none"):
                draw = torch.Generator().manual_seed(4)
                loss = SlicedWassersteinLoss(projections=4, reduction=reduction, generator=draw, slice_reduction=kept)(
                    x, y, **options
                )
                theta = sample_projections(3, 4, generator=torch.Generator().manual_seed(4))
                expected = sliced_wasserstein(x, y, theta.to(x.device), **options, reduction=kept)
                torch.testing.assert_close(loss, over_batch(expected))


def test_an_empty_batch(backend):
    x, y = torch.zeros(0, 5, 3, requires_grad=True), torch.zeros(0, 4, 3)
    theta, weights = sample_projections(3, 2), {"x_weights": torch.zeros(0, 5), "y_weights": torch.zeros(0, 4)}
    for options in ({}, weights):
        assert sliced_wasserstein(x, y, theta, **options).shape == (0,)
        assert sliced_wasserstein(x, y, theta, **options, reduction="none").shape == (0, 2)
        loss = SlicedWassersteinLoss()(x, y, **options)
        loss.backward()
        assert loss == 0 and x.grad.shape == x.shape


@graphs
def test_compiled_equals_eager_and_autocast_changes_nothing(backend, sides):
    x, y, theta, weights = case((12, 9), sides)
    torch.compiler.reset()
    compiled = torch.compile(sliced_wasserstein, fullgraph=True, backend="aot_eager")
    results = [f(x, y, theta, **weights) for f in (sliced_wasserstein, compiled)]
    assert torch.equal(*results)
    for points in (x, y):
        assert torch.equal(*(torch.autograd.grad(r.sum(), points, retain_graph=True)[0] for r in results))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sliced_wasserstein(x, y, theta, **weights), results[0])


@graphs
def test_opcheck_and_no_second_derivatives(backend, sides):
    x, y, theta, weights = case((6, 4), sides)
    sets = [torch.ops.add_ops.project_and_sort(points.detach(), theta) for points in (x, y)]
    args = [*(part[0].requires_grad_() for part in sets), *(part[1] for part in sets), *weights.values(), 2.0]
    torch.library.opcheck(torch.ops.add_ops.quantile_distance, args)
    grad = torch.randn(2, 4, dtype=torch.float64)
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    torch.library.opcheck(torch.ops.add_ops.quantile_distance_backward, (grad, *args))
    (first,) = torch.autograd.grad(sliced_wasserstein(x, y, theta, **weights).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize("sides", SIDES, ids=["none", "x", "y", "both"])
@pytest.mark.parametrize("p", [1.0, 2.0])  # torch's pow of other exponents rounds by the place in memory
def test_what_does_not_fit_the_budget_is_done_in_parts_with_the_same_bits(sides, p, monkeypatch):
    x, y, theta, weights = case((70, 50), sides, batch=3)
    x, y, theta = x.float().detach(), y.float().detach(), theta.float()
    values = [torch.ops.add_ops.project_and_sort(points, theta) for points in (x, y)]
    args = [*(v[0] for v in values), *(v[1] for v in values), *weights.values(), p]
    grad, results = torch.randn(3, 4), []
    for budget in (2**22, 400, 1):
        monkeypatch.setattr(reference, "BUDGET", budget)
        seen = [rows.stop - rows.start for rows, *_ in reference._steps(*args[:-1])]
        assert (len(seen), max(seen)) == {2**22: (1, 12), 400: (4, 3), 1: (6, 2)}[budget]
        results.append((reference.quantile_distance(*args), *reference.quantile_distance_backward(grad, *args)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@fast
def test_the_max_sliced_distance_finds_the_best_direction(backend):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 60, 3), torch.randn(2, 45, 3) * torch.tensor([1.0, 3.0, 1.0])
    x.requires_grad_()
    distance, direction = max_sliced_wasserstein(x, y, generator=generator)
    every = sliced_wasserstein(x.detach(), y, sample_projections(3, 5000), reduction="none").amax(1)
    start = sliced_wasserstein(
        x.detach(), y, sample_projections(3, 50, generator=generator.manual_seed(0)).to(x.device), reduction="none"
    ).amax(1)
    assert (distance >= 0.998 * every).all() and (distance >= start).all() and (distance > start).any()
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(2))
    along = torch.stack([sliced_wasserstein(x[b : b + 1], y[b : b + 1], direction[b, :, None])[0] for b in range(2)])
    torch.testing.assert_close(distance, along)
    torch.testing.assert_close(*(torch.autograd.grad(d.sum(), x)[0] for d in (distance, along)))


@fast
def test_the_max_sliced_distance_of_weighted_sets_in_many_dimensions(backend):
    """Two clouds that differ along one axis of 40 only: random directions are nearly orthogonal to it."""
    x, y = torch.randn(1, 200, 40) * 0.1, torch.randn(1, 150, 40) * 0.1
    y[..., 7] += 5
    x[:, 100:] = 1e3  # of weight 0
    weights = torch.cat([torch.full((1, 100), 0.01), torch.zeros(1, 100)], 1)
    distance, direction = max_sliced_wasserstein(x, y, x_weights=weights, num_projections=5, sampling="orthogonal")
    assert direction[0, 7].abs() > 0.99 and 24 < distance.item() < 27


X, Y, P, W = torch.zeros(2, 5, 3), torch.zeros(2, 4, 3), torch.eye(3), torch.full((2, 5), 0.2)
BAD = [
    (
        {"x_weights": W[:, :4]},
        ValueError,
        r"x_weights: expected one weight per point of x, shape \(2, 5\), got \(2, 4\)",
    ),
    ({"y_weights": W}, ValueError, r"y_weights: expected one weight per point of y, shape \(2, 4\), got \(2, 5\)"),
    ({"x_weights": W[0]}, ValueError, r"x_weights: expected shape \(B, N\), got \(5,\)"),
    ({"x_weights": W.long()}, TypeError, r"x_weights: expected float16, bfloat16, float32 or float64, got torch.int64"),
    ({"x_weights": W.tolist()}, TypeError, r"x_weights: expected a tensor, got list"),
    ({"x_weights": W.to("meta")}, ValueError, r"x_weights: expected device cpu, that of x, got meta"),
    ({"x_weights": W.clone().requires_grad_()}, ValueError, r"x_weights: expected a tensor without gradient"),
    ({"x_weights": 2 * W}, ValueError, r"x_weights: expected rows that sum to 1, got a sum of 2\.0"),
    ({"x_weights": 0 * W}, ValueError, r"x_weights: expected rows that sum to 1, got a sum of 0\.0"),
    ({"x_weights": W * torch.tensor([-1, 3, 1, 1, 1])}, ValueError, r"x_weights: expected weights >= 0, got -0\.2"),
    ({"x_weights": W * torch.nan}, ValueError, r"x_weights: expected weights >= 0, got nan"),
    ({"x_weights": W * torch.inf}, ValueError, r"x_weights: expected rows that sum to 1, got a sum of inf"),
    ({"reduction": "sum"}, ValueError, r"reduction: expected one of 'mean', 'none', got 'sum'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[m[:45] for *_, m in BAD])
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        sliced_wasserstein(X, Y, P, **options)


def test_bad_options_of_the_others_are_named():
    with pytest.raises(ValueError, match=r"slice_reduction: expected one of 'mean', 'none', got 'sum'"):
        SlicedWassersteinLoss(slice_reduction="sum")
    with pytest.raises(ValueError, match=r"steps: expected an integer >= 1, got 0"):
        max_sliced_wasserstein(X, Y, steps=0)
    with pytest.raises(ValueError, match=r"y: expected shape \(2, M, 3\) as that of x, got \(2, 4, 2\)"):
        max_sliced_wasserstein(X, Y[..., :2])
