"""The raw operators ``torch.ops.add_ops.*``: whatever they are given, one answer or one refusal on every backend."""

import math

import pytest
import torch
from closeness import assert_close

import add_ops

OPS = torch.ops.add_ops
HALF, NARROW, INT = torch.float16, torch.int16, torch.int64


def valid(name):
    """Arguments of the operator ``name`` that it takes, by name."""
    features, teacher = torch.randn(2, 2, 3, 4, 5)
    points, weights = torch.randn(2, 5, 3), torch.full((2, 5), 0.2, dtype=torch.float64)
    theta, views = torch.randn(3, 4), add_ops.sample_views(2)
    options = {"distance": "l2", "sigma": 1.0, "norm": "forward"}
    order = torch.rand(2, 4, 5).argsort().to(NARROW)
    sides = {"x": torch.randn(2, 4, 5), "y": torch.randn(2, 4, 5), "x_order": order, "y_order": order}
    sides |= {"x_weights": weights, "y_weights": weights, "p": 2.0}
    histogram = {"features": features, "views": views}
    pairs = {"student": features[0], "teacher": teacher[0], "labels": torch.tensor([0, 1, 0]), "p": 2.0}
    pairs |= {"gamma": 1.0, "eta": 0.5, "margin": 9.0}
    made = {"attention": torch.rand(2, 2, 6), "energy": torch.rand(2).double(), "coordinates": "index"}
    return {
        "spectral_distance": {"student": features, "teacher": teacher} | options,
        "spectral_distance_backward": {"grad": torch.rand(2, 4, 5), "student": features, "teacher": teacher} | options,
        "attention_sum": {"distance": torch.rand(2, 4, 5), "gamma": 1.0, "channels": 3, "reduction": "sum"},
        "contrastive_loss": pairs,
        "contrastive_loss_backward": {"grad": torch.rand(())} | pairs,
        "view_histogram": histogram | {"bins": 6, "coordinates": "unit"},
        "view_histogram_backward": {"grad": torch.rand(2, 2, 6)} | histogram | made,
        "project_and_sort": {"points": points, "projections": theta},
        "project_and_sort_backward": {"grad": torch.rand(2, 4, 5), "permutation": order, "projections": theta},
        "quantile_distance": sides,
        "quantile_distance_backward": {"grad": torch.rand(2, 4)} | sides,
    }[name]


OPERATORS = [
    *("spectral_distance", "view_histogram", "project_and_sort", "quantile_distance"),
    *("spectral_distance_backward", "view_histogram_backward", "project_and_sort_backward"),
    *("quantile_distance_backward", "attention_sum", "contrastive_loss", "contrastive_loss_backward"),
]


@pytest.mark.parametrize("name", OPERATORS)
def test_no_tensor_of_another_shape_or_dtype_reaches_memory(backend, name):
    arguments = valid(name)
    getattr(OPS, name)(*arguments.values())
    for key, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        dtype = torch.complex64 if value.is_floating_point() else torch.float32
        for wrong in (value[None], value[..., None], value.to(dtype), value.to_sparse()):
            with pytest.raises((ValueError, TypeError), match="expected"):
                getattr(OPS, name)(*(arguments | {key: wrong}).values())


REFUSED = [
    ("spectral_distance", "teacher", torch.ones(2, 3, 4), ValueError, r"expected shape \(2, 3, 4, 5\), got"),
    ("spectral_distance", "student", torch.ones(2, 3, 4, 5, dtype=INT), TypeError, "expected .*, got torch.int64"),
    ("spectral_distance", "distance", "L2", ValueError, "expected one of 'l2', 'cosine', 'gaussian', got 'L2'"),
    ("spectral_distance", "norm", "none", ValueError, "expected one of 'forward', 'backward', 'ortho', got 'none'"),
    ("spectral_distance", "sigma", math.nan, ValueError, "expected a finite number > 0, got nan"),
    ("spectral_distance_backward", "grad", torch.ones(2, 4), ValueError, r"expected shape \(2, 4, 5\), got \(2, 4\)"),
    ("view_histogram", "views", torch.ones(2, 4), ValueError, r"expected shape \(2, 3\), got \(2, 4\)"),
    ("view_histogram", "bins", -1, ValueError, "expected an integer >= 1, got -1"),
    ("view_histogram", "coordinates", "pixel", ValueError, "expected one of 'index', 'unit', got 'pixel'"),
    ("view_histogram_backward", "energy", torch.ones(2), TypeError, "expected float64, got torch.float32"),
    ("view_histogram_backward", "grad", torch.ones(2, 2, 7), ValueError, r"expected shape \(2, 2, 6\), got"),
    ("project_and_sort", "projections", torch.ones(4, 4), ValueError, r"expected shape \(3, 4\), got \(4, 4\)"),
    ("project_and_sort_backward", "permutation", torch.zeros(2, 5, 4, dtype=NARROW), ValueError, r"expected shape"),
    ("project_and_sort_backward", "permutation", torch.zeros(2, 4, 5, dtype=INT), TypeError, "expected int16 or int32"),
    ("project_and_sort_backward", "grad", torch.ones(2, 4, 5, dtype=HALF), TypeError, "expected float32 or float64"),
    ("quantile_distance", "y", torch.ones(2, 4, 5).double(), TypeError, "expected float32, got torch.float64"),
    ("quantile_distance", "y", torch.ones(2, 4, 0), ValueError, "expected at least one value in a row"),
    ("quantile_distance", "x_weights", torch.ones(2, 4).double(), ValueError, r"expected shape \(2, 5\), got \(2, 4\)"),
    ("quantile_distance", "p", 0.5, ValueError, "expected a finite number >= 1, got 0.5"),
    ("attention_sum", "distance", torch.ones(2, 4, 5, dtype=HALF), TypeError, "expected float32 or float64, got"),
    ("attention_sum", "gamma", math.inf, ValueError, "expected a finite number, got inf"),
    ("attention_sum", "channels", 0, ValueError, "expected an integer >= 1, got 0"),
    ("attention_sum", "reduction", "max", ValueError, "expected one of 'sum', 'mean', 'none', got 'max'"),
    ("contrastive_loss", "student", torch.ones(3, 4), ValueError, r"expected shape \(B, K, M\), got \(3, 4\)"),
    ("contrastive_loss", "student", torch.ones(3, 4, 5, dtype=HALF), TypeError, "expected float32 or float64, got"),
    ("contrastive_loss", "teacher", torch.ones(3, 4, 6), ValueError, r"expected shape \(3, 4, 5\), got \(3, 4, 6\)"),
    ("contrastive_loss", "teacher", torch.ones(3, 4, 5).double(), TypeError, "expected float32, got torch.float64"),
    ("contrastive_loss", "labels", torch.ones(2, dtype=INT), ValueError, r"expected shape \(3,\), got \(2,\)"),
    ("contrastive_loss", "labels", torch.ones(3), TypeError, "expected int64, got torch.float32"),
    ("contrastive_loss", "p", 0.5, ValueError, "expected a finite number >= 1, got 0.5"),
    ("contrastive_loss", "margin", math.nan, ValueError, "expected a finite number >= 0, got nan"),
    ("contrastive_loss_backward", "grad", torch.ones(3), ValueError, r"expected shape \(\), got \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value", "error", "message"), REFUSED)
def test_what_is_refused_says_why(backend, name, key, value, error, message):
    if isinstance(value, torch.Tensor):
        value = value.to(torch.get_default_device())
    with pytest.raises(error, match=f"{key}: {message}"):
        getattr(OPS, name)(*(valid(name) | {key: value}).values())


@pytest.fixture(params=["reference", *(["cpp"] if add_ops.backends()["cpp"] == "available" else [])])
def on_cpu(request):
    """Those that read values on the CPU: a GPU would have to be waited for."""
    with add_ops.use_backend(request.param):
        yield


@pytest.mark.parametrize("place", [-1, 5, 2**15 - 1, -(2**15)])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_no_place_outside_of_a_row_is_touched(on_cpu, place, dtype):
    for name, keys in (
        ("project_and_sort_backward", ("permutation",)),
        ("quantile_distance", ("x_order", "y_order")),
        ("quantile_distance_backward", ("x_order", "y_order")),
    ):
        for key in keys:
            order = valid(name)[key].to(dtype, copy=True)
            order[1, 3, 2] = place
            with pytest.raises(ValueError, match=f"{key}: expected a permutation of 0 to 4 in each row"):
                getattr(OPS, name)(*(valid(name) | {key: order}).values())


@pytest.mark.parametrize("coordinates", ["index", "unit"])
@pytest.mark.parametrize("component", [math.inf, math.nan, 1e308])
def test_views_whose_steps_overflow_are_refused(on_cpu, component, coordinates):
    views = torch.tensor([[1.0, 0, 0], [0, component, -component]], dtype=torch.float64)
    for name in ("view_histogram", "view_histogram_backward"):
        with pytest.raises(ValueError, match="views: expected finite numbers of at most 1e"):
            getattr(OPS, name)(*(valid(name) | {"views": views, "coordinates": coordinates}).values())


def test_a_view_along_an_axis_of_one_has_bins_all_the_same(backend):
    """Its step there, a quotient of 1e200 in units that no integer has, moves no position."""
    views = torch.tensor([[1.0, 1e-200, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    attention = add_ops.multi_view_attention(torch.randn(2, 1, 4, 5), views, 4)
    assert torch.equal(attention[:, 0], attention[:, 1])


# --- Extremes: an infinite or NaN input makes a loss that is not finite; finite numbers keep their meaning at any size.
def weighted(x, y):
    weights = torch.tensor([[0.5, 0.25, 0.25] + [0] * 17] * len(x)).to(x.device)
    points = x.flatten(2).mT, y.flatten(2).mT
    theta = torch.eye(3, device=x.device)
    return add_ops.sliced_wasserstein(*points, theta, x_weights=weights, y_weights=weights)


LOSSES = {
    **{
        distance: lambda x, y, d=distance: add_ops.frequency_attention_loss(x, y, distance=d, reduction="none")
        for distance in ("l2", "cosine", "gaussian")
    },
    "bins": lambda x, y: multi_view(x, y, bins=4),
    "wasserstein": lambda x, y: multi_view(x, y, bins=4, distance="wasserstein"),
    "pairs": lambda x, y: multi_view(x, y, bins=4, labels=torch.zeros(1, dtype=INT, device=x.device)),
    "points": lambda x, y: multi_view(x, y, views=torch.eye(3, device=x.device), slicing="points"),
    "sliced": lambda x, y: add_ops.sliced_wasserstein(x.flatten(2).mT, y.flatten(2).mT, torch.eye(3, device=x.device)),
    "weighted": weighted,
}


def multi_view(x, y, **options):
    """Of every sample alone: (B,)."""
    options = {"views": add_ops.sample_views(2, generator=torch.Generator().manual_seed(0)).to(x.device)} | options
    return torch.stack([add_ops.multi_view_loss(*pair, **options) for pair in zip(x.split(1), y.split(1), strict=True)])


INTERPRETED = "triton" if not torch.cuda.is_available() else None
SAME_KERNELS = ("pairs", "wasserstein", "points", "weighted")  # as "bins" and "sliced": Triton's interpreter is slow
CASES = [
    (backend, loss)
    for backend, status in add_ops.backends().items()
    for loss in LOSSES
    if status == "available" and not (backend == INTERPRETED and loss in SAME_KERNELS)
]


@pytest.mark.parametrize(("backend", "loss"), CASES, indirect=["backend"])
def test_a_sample_that_is_not_finite_has_a_loss_that_is_not(backend, loss):
    for side in range(2):
        pair = [torch.randn(5, 3, 4, 5) for _ in range(2)]
        pair[side][1:4, 2, 0, 1] = torch.tensor([math.inf, -math.inf, math.nan])
        x = pair[0].requires_grad_()
        per_sample = LOSSES[loss](x, pair[1])
        assert per_sample.isfinite().tolist() == [True, False, False, False, True]
        (gradient,) = torch.autograd.grad(per_sample.sum(), x)
        assert gradient[::4].isfinite().all()
        assert side or not gradient[1:4].flatten(1).isfinite().all(1).any()


@pytest.mark.parametrize(
    ("dtype", "exponent"), [(torch.float32, 60), (torch.float32, -60), (torch.float64, 530), (torch.float64, -660)]
)
def test_a_power_of_two_changes_no_meaning(backend, dtype, exponent):
    x, y, scale = *torch.randn(2, 2, 3, 4, 5, dtype=dtype), 2.0**exponent
    views = add_ops.sample_views(2)
    for distance in ("cosine", "gaussian") if dtype == torch.float32 else ("cosine",):
        sigmas = (0.3, 0.3 * scale) if distance == "gaussian" else (1.0, 1.0)
        values, scaled = (
            add_ops.spectral_distance(a, b, distance=distance, sigma=sigma)
            for a, b, sigma in zip((x, x * scale), (y, y * scale), sigmas, strict=True)
        )
        assert_close(scaled, values.double())
    assert_close(add_ops.multi_view_attention(x * scale, views, 4), add_ops.multi_view_attention(x, views, 4).double())
    if abs(exponent) < 100:
        assert_close(
            add_ops.spectral_distance(x * scale, y * scale) / scale / scale, add_ops.spectral_distance(x, y).double()
        )
        sets = [z.flatten(2).mT for z in (x, y[..., :4])]
        near, far = (
            add_ops.sliced_wasserstein(*(z * factor for z in sets), torch.eye(3, dtype=dtype)) for factor in (1, scale)
        )
        assert_close(far / scale / scale, near.double())


@pytest.mark.parametrize("distance", ["cosine", "gaussian"])
def test_a_channel_does_not_disturb_a_smaller_one(backend, distance):
    """Nor one that is not there: kernels transform several channels at once."""
    x, y = torch.randn(2, 2, 13, 9, 9)
    x[:, 3], y[:, 3] = 1e12 * x[:, 3], 1e12 * y[:, 3]
    options = {"distance": distance, "sigma": 1e-3, "norm": "backward"}
    with add_ops.use_backend("reference"):
        single = [
            add_ops.spectral_distance(a.double(), b.double(), **options)
            for a, b in zip(x.split(1, 1), y.split(1, 1), strict=True)
        ]
    assert_close(add_ops.spectral_distance(x, y, **options), torch.stack(single).mean(0))
