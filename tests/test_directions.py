"""Random directions: unit, orthogonal or even where that is asked for, uniform each, and unbiased together."""

import math

import pytest
import torch

from add_ops import MultiViewLoss, SlicedWassersteinLoss, multi_view_loss, sample_projections, sample_views
from add_ops import sliced_wasserstein as distance
from add_ops.multi_view import pairs

SAMPLINGS = ["uniform", "orthogonal", "quasi"]
SHAPES = [(1, 1), (1, 4), (2, 1), (2, 5), (3, 1), (3, 2), (3, 3), (3, 12), (3, 100), (5, 12), (40, 7), (40, 90)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(dim, number_of, sampling, seed=0):
    return sample_projections(dim, number_of, sampling=sampling, generator=seeded(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_unit_float32_and_reproducible_under_any_default_dtype(sampling, dtype):
    for dim, number_of in SHAPES:
        if sampling == "quasi" and dim != 3:
            continue
        expected = draw(dim, number_of, sampling)
        torch.set_default_dtype(dtype)
        try:
            theta = draw(dim, number_of, sampling)
        finally:
            torch.set_default_dtype(torch.float32)
        assert theta.shape == (dim, number_of) and theta.dtype == torch.float32 and theta.is_contiguous()
        assert (theta.double().norm(dim=0) - 1).abs().max() < 1e-6
        assert torch.equal(theta, expected)
        assert number_of == 1 or not torch.equal(theta, draw(dim, number_of, sampling, seed=1))


def test_uniform_directions_are_normalised_gaussians():
    gaussians = torch.randn(7, 5, generator=seeded(3))
    assert torch.equal(draw(5, 7, "uniform", 3), torch.nn.functional.normalize(gaussians, dim=1).t())
    gaussians = torch.randn(9, 3, generator=seeded(3))
    assert torch.equal(sample_views(9, generator=seeded(3)), torch.nn.functional.normalize(gaussians, dim=1))


@pytest.mark.parametrize(("dim", "number_of"), [s for s in SHAPES if s[0] > 1])
def test_orthogonal_directions_are_orthogonal_by_blocks_of_the_dimension(dim, number_of):
    for block in draw(dim, number_of, "orthogonal").double().t().split(dim):
        assert (block @ block.t() - torch.eye(len(block))).abs().max() < 1e-6
    if number_of > dim:
        assert (draw(dim, number_of, "orthogonal")[:, 0] @ draw(dim, number_of, "orthogonal")[:, dim]).abs() > 1e-4


def test_quasi_directions_are_even():
    """The caps of an even covering by K points have an angle of about sqrt(4π / K); random points come far closer."""
    number_of = 200
    for sampling, even in (("quasi", True), ("uniform", False)):
        views = sample_views(number_of, sampling=sampling, generator=seeded()).double()
        nearest = (views @ views.t() - 2 * torch.eye(number_of)).amax(1).acos()
        assert (nearest.min() > 0.7 * math.sqrt(4 * math.pi / number_of)) == even
    assert views.mean(0).norm() > 10 * sample_views(number_of, sampling="quasi").mean(0).norm()


def largest_gap(sample):
    """Kolmogorov-Smirnov statistic, times sqrt(n), against the uniform distribution on [-1, 1]."""
    levels = (sample.double().sort().values + 1) / 2
    steps = torch.arange(len(sample) + 1) / len(sample)
    return float(torch.maximum((levels - steps[:-1]).abs(), (levels - steps[1:]).abs()).max()) * math.sqrt(len(sample))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("which", [0, 1, 4])
def test_every_direction_alone_is_uniform(sampling, which):
    """On the sphere of R³ any coordinate, along any axis, is uniform on [-1, 1] (Archimedes)."""
    generator = seeded(which)
    drawn = torch.stack([sample_views(5, sampling=sampling, generator=generator)[which] for _ in range(500)])
    for axis in (*torch.eye(3), torch.tensor([0.6, 0.0, -0.8])):
        assert largest_gap(drawn @ axis) < 1.95  # exceeded with probability 0.001
    assert largest_gap((drawn @ torch.eye(3)[0]) * 0.7) > 1.95


@pytest.mark.parametrize("sampling", ["orthogonal", "quasi"])
@pytest.mark.parametrize(("dim", "number_of"), [(3, 1), (3, 4), (3, 12), (1, 3), (6, 6), (6, 8)])
def test_unbiased_and_not_noisier(sampling, dim, number_of):
    if sampling == "quasi" and dim != 3:
        return
    x = torch.randn(1, 12, dim, generator=seeded(5)) * torch.linspace(0.2, 2, dim)
    y = torch.randn(1, 12, dim, generator=seeded(6)) + 0.5
    exact = distance(x, y, draw(dim, 50_000, "uniform", 9), reduction="none")[0]
    generator, spread = seeded(1), {}
    for name in ("uniform", sampling):
        values = torch.stack(
            [
                distance(x, y, sample_projections(dim, number_of, sampling=name, generator=generator))[0]
                for _ in range(200)
            ]
        )
        spread[name] = float(values.std())
        error = math.hypot(spread[name] / math.sqrt(200), float(exact.std()) / math.sqrt(50_000))
        assert abs(float(values.mean() - exact.mean())) <= 4 * error + 1e-5
    if number_of > 1 and dim > 1:
        assert spread[sampling] < (0.6 if sampling == "quasi" else 0.95) * spread["uniform"]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_losses_draw_by_their_sampling(sampling):
    x, y = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    loss = SlicedWassersteinLoss(projections=4, sampling=sampling, generator=seeded(2))
    expected = distance(x, y, draw(3, 4, sampling, 2)).mean()
    assert torch.equal(loss(x, y), expected) and f"sampling='{sampling}'" in repr(loss)
    maps = torch.randn(2, 2, 3, 4, 4)
    for slicing in ("grid", "points"):
        views = sample_views(5, sampling=sampling, generator=seeded(2))
        expected = multi_view_loss(*maps, views=views if slicing == "grid" else views.t(), slicing=slicing)
        options = {"views": 5, "slicing": slicing, "sampling": sampling}
        assert torch.equal(multi_view_loss(*maps, **options, generator=seeded(2)), expected)
        assert torch.equal(MultiViewLoss(**options, generator=seeded(2))(*maps), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_sampled_pairs_are_drawn_finely_under_any_default_dtype(dtype):
    """In bfloat16 a random number has 8 bits: among 1000 columns the first of many equal ones would always win."""
    mask = torch.ones(200, 1000, dtype=torch.bool)
    torch.set_default_dtype(dtype)
    try:
        drawn = pairs.draw(mask, seeded())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, pairs.draw(mask, seeded())) and drawn.double().mean() > 400


def test_bad_words_and_dimensions_are_named():
    words = r"sampling: expected one of 'uniform', 'orthogonal', 'quasi', got 'halton'"
    quasi = r"sampling: expected 'uniform' or 'orthogonal' unless D = 3, got 'quasi' for D = 4"
    x = torch.zeros(2, 4, 3, 3)
    draws = (lambda **o: sample_views(2, **o), lambda **o: sample_projections(2, 2, **o))
    for make in (*draws, SlicedWassersteinLoss, MultiViewLoss):
        with pytest.raises(ValueError, match=words):
            make(sampling="halton")
    with pytest.raises(ValueError, match=words):
        multi_view_loss(x, x, sampling="halton")
    with pytest.raises(ValueError, match=quasi):
        sample_projections(4, 2, sampling="quasi")
    with pytest.raises(ValueError, match=quasi):
        SlicedWassersteinLoss(projections=2, sampling="quasi")(torch.zeros(1, 5, 4), torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match=quasi):
        MultiViewLoss(slicing="points", sampling="quasi")(x, x)
