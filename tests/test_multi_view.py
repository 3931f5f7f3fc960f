"""The room multi_view: every backend against the definition, bins by plain Python integers."""

import itertools
import math

import pytest
import torch
from closeness import assert_close
from torch.autograd import gradcheck

from add_ops import MultiViewLoss, backends, multi_view_attention, multi_view_loss, sample_views, use_backend
from add_ops.multi_view.reference import view_bins

GRIDS = [(1, 1, 1), (1, 1, 5), (4, 1, 1), (8, 4, 4), (5, 7, 3), (13, 6, 5)]
OPTIONS = [
    {},
    {"pairs": "sampled"},
    {"coordinates": "unit", "p": 1},
    {"p": 3, "bins": 5},
    {"distance": "wasserstein"},
    {"distance": "wasserstein", "p": 1},
    {"distance": "wasserstein", "pairs": "sampled", "p": 1.5},
    {"slicing": "points"},
    {"slicing": "points", "pairs": "sampled", "p": 1},
]
BACKENDS = [name for name, status in backends().items() if status == "available"]
LOSSES = [(BACKENDS[0], options) for options in OPTIONS]
OTHERS = ({}, {"slicing": "points"}, {"distance": "wasserstein", "p": 1})  # other options are torch's on every backend
LOSSES += [(backend, options) for backend in BACKENDS[1:] for options in OTHERS]


def python_bins(shape, view, bins, coordinates):
    """The integer rule of the method, one position at a time."""
    steps = [float(v) for v in view]
    if coordinates == "unit":
        steps = [2 * s / (length - 1) if length > 1 else 0.0 for s, length in zip(steps, shape, strict=True)]
    extent = 0.0
    for step, length in zip(steps, shape, strict=True):
        extent += abs(step) * (length - 1)
    q = [round(step / extent * 2**30) if extent else 0 for step in steps]
    top = sum(abs(qi) * (length - 1) for qi, length in zip(q, shape, strict=True))
    result = []
    for n in itertools.product(*(range(length) for length in shape)):
        t = sum(qi * ni - min(qi, 0) * (length - 1) for qi, ni, length in zip(q, n, shape, strict=True))
        result.append(t * bins // (top + 1))
    return result


def definition(features, views, bins, coordinates="index"):
    """Attention vectors in float64, differentiable by autograd, from the Python bins."""
    x = features.double().flatten(1)
    total = x.square().sum(1, keepdim=True)
    mass = x.square() / torch.where(total > 0, total, 1)
    index = torch.tensor([python_bins(features.shape[1:], view, bins, coordinates) for view in views.tolist()])
    one_hot = torch.nn.functional.one_hot(index, bins).double()  # (K, C*H*W, M)
    return torch.einsum("bn,knm->bkm", mass, one_hot)


@pytest.mark.parametrize("coordinates", ["index", "unit"])
@pytest.mark.parametrize("shape", GRIDS, ids=str)
@pytest.mark.parametrize("bins", [1, 2, 7, 1000])
def test_bins_follow_the_integer_rule(shape, bins, coordinates):
    axes = torch.eye(3)
    views = torch.cat([sample_views(8), axes, -axes, torch.full((1, 3), 3**-0.5)])
    actual = view_bins(shape, views, bins, coordinates)
    assert actual.tolist() == [python_bins(shape, view, bins, coordinates) for view in views.tolist()]


def test_bins_worked_out_by_hand():
    """A 4x1x1 grid along its own axis in 2 bins: positions 0, 1 | 2, 3; reversed, the other way round."""
    views = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0]])
    assert view_bins((4, 1, 1), views, 2, "index").tolist() == [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    features = torch.tensor([1.0, 2.0, 2.0, 4.0]).reshape(1, 4, 1, 1)
    expected = torch.tensor([[[5, 20], [20, 5], [25, 0]]]) / 25
    torch.testing.assert_close(multi_view_attention(features, views, 2), expected)


@pytest.mark.parametrize("coordinates", ["index", "unit"])
@pytest.mark.parametrize("bins", [1, 3, 40])
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_forward_and_backward_equal_the_definition(backend, shape, bins, coordinates):
    features = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    views = sample_views(5)
    upstream = torch.randn(3, 5, bins, dtype=torch.float64)
    expected = definition(features, views, bins, coordinates)
    actual = multi_view_attention(features, views, bins, coordinates=coordinates)
    assert_close(actual, expected)
    grad, wanted = (torch.autograd.grad(x, features, upstream)[0] for x in (actual, expected))
    if bool(wanted.abs().max() > 1e-12):
        assert_close(grad, wanted)
    else:  # one bin, or one position, holds all the mass whatever the features
        assert grad.abs().max() <= 1e-12


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_layouts(backend, dtype, layout):
    features = torch.randn(2, 6, 3, 5, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        features = features.transpose(1, 3)
    features.requires_grad_()
    views, upstream = sample_views(4), torch.randn(2, 4, 6).double()
    exact = features.detach().double().requires_grad_()
    expected = definition(exact, views, 6)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream)
    actual = multi_view_attention(features, views, 6)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual, expected)
    (grad,) = torch.autograd.grad(actual, features, upstream.to(actual.dtype))
    assert grad.dtype == dtype and grad.stride() == torch.empty_like(features).stride()
    assert_close(grad, expected_grad)


def test_rows_sum_to_one_and_a_reversed_view_mirrors_the_bins(backend):
    features, views = torch.randn(3, 12, 5, 7, dtype=torch.float64), sample_views(6)
    attention = multi_view_attention(features, views, 9)
    torch.testing.assert_close(attention.sum(2), torch.ones(3, 6, dtype=torch.float64))
    # A position on an edge falls to its right in both directions: a mirror needs a grid without such a position.
    even = view_bins((12, 5, 7), views, 9, "index") + view_bins((12, 5, 7), -views, 9, "index") == 8
    features = features * even.all(0).reshape(12, 5, 7)
    assert even.double().mean() > 0.9
    assert_close(multi_view_attention(features, -views, 9).flip(2), multi_view_attention(features, views, 9))


def test_more_bins_than_any_backend_expects():
    features, views = torch.randn(2, 3, 2, 2, requires_grad=True), sample_views(2)
    attention = multi_view_attention(features, views, 2**20 + 1)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 2))
    (grad,) = torch.autograd.grad(attention.square().sum(), features)
    assert torch.isfinite(grad).all() and (grad != 0).any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_an_all_zero_sample_has_no_mass_and_extreme_scales_do_not_matter(backend, scale):
    features, views = torch.randn(3, 4, 3, 3), sample_views(3)
    expected = multi_view_attention(features, views, 4)
    features = features * scale
    features[1] = 0
    features.requires_grad_()
    attention = multi_view_attention(features, views, 4)
    assert (attention[1] == 0).all()
    torch.testing.assert_close(attention[[0, 2]], expected[[0, 2]])
    (grad,) = torch.autograd.grad(attention[..., 0].sum(), features)
    assert (grad[1] == 0).all() and torch.isfinite(grad).all() and (grad[0] != 0).any()


def naive_loss(a_s, a_t, labels, p, gamma, eta, margin, distance):
    """The loss in loops; W_p^p by POT."""

    def d(x, y):
        if distance == "bins":
            return (x - y).abs().pow(p).sum()
        ot = pytest.importorskip("ot")
        positions = (torch.arange(len(x), dtype=x.dtype) / len(x)).numpy()
        return torch.tensor(ot.wasserstein_1d(positions, positions, x.numpy(), y.numpy(), p=p))

    views, batch = a_s.shape[1], a_s.shape[0]
    total = 0.0
    for k in range(views):
        total += gamma * sum(d(a_s[b, k], a_t[b, k]) for b in range(batch)) / batch
        for x, y in ((a_s, a_t), (a_t, a_s)):
            near = [d(x[i, k], y[j, k]) for i in range(batch) for j in range(batch) if labels[i] == labels[j]]
            far = [d(x[i, k], y[j, k]) for i in range(batch) for j in range(batch) if labels[i] != labels[j]]
            total += eta * sum(near) / len(near)
            total += eta * sum(max(0.0, margin - v) for v in far) / len(far) if far else 0.0
    return total / views


@pytest.mark.parametrize(("distance", "p"), [("bins", 1), ("bins", 2), ("wasserstein", 1), ("wasserstein", 2)])
@pytest.mark.parametrize("labels", [[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 2, 3, 4]], ids=str)
def test_all_pairs_equal_loops_over_pairs(backend, labels, distance, p):
    student = torch.randn(5, 6, 4, 4, dtype=torch.float64)
    teacher = student + 0.3 * torch.randn(5, 6, 4, 4, dtype=torch.float64)
    views = sample_views(3)
    attention = [definition(x, views, 3) for x in (student, teacher)]
    expected = naive_loss(*attention, labels, p, 7.0, 3.0, 0.05, distance)
    actual = multi_view_loss(
        student, teacher, torch.tensor(labels), views=views, p=p, gamma=7.0, eta=3.0, margin=0.05, distance=distance
    )
    assert_close(actual, expected)


def test_pairs_that_are_nearly_equal_keep_their_distance_in_float32(backend):
    """As of trained maps: distances of 1e-9 between vectors of length 1, in a batch that is worth a matrix product."""
    student = torch.randn(1, 8, 4, 4) + 1e-4 * torch.randn(32, 8, 4, 4)
    teacher, views, labels = student + 1e-4 * torch.randn(32, 8, 4, 4), sample_views(3), torch.arange(32) % 2
    x, y = (definition(maps, views, 4) for maps in (student, teacher))
    every = (x[:, None] - y).square().sum(3).mean(2)
    near = every[labels[:, None] == labels].mean()
    actual = multi_view_loss(student, teacher, labels, views=views, bins=4, gamma=0.0, eta=1.0, margin=0.0)
    assert 1e-10 < near < 1e-7
    torch.testing.assert_close(actual.double(), 2 * near, rtol=1e-3, atol=0)


def test_teacher_and_student_may_differ_in_channels_and_size(backend):
    """The default number of bins is gcd(12, 8) // 2 = 2; with gcd 1 it is 1."""
    student, teacher, views = torch.randn(2, 12, 5, 7).double(), torch.randn(2, 8, 3, 4).double(), sample_views(4)
    expected = 100 * (definition(student, views, 2) - definition(teacher, views, 2)).square().sum(2).mean()
    assert_close(multi_view_loss(student, teacher, views=views), expected)
    assert multi_view_loss(student[:, :3], teacher, views=views).abs() <= 1e-20


def test_without_labels_the_contrastive_term_is_dropped(backend):
    student, teacher, views = torch.randn(4, 8, 3, 3).double(), torch.randn(4, 8, 3, 3).double(), sample_views(4)
    labels = torch.tensor([0, 1, 0, 1])
    assert_close(
        multi_view_loss(student, teacher, views=views), multi_view_loss(student, teacher, labels, views=views, eta=0.0)
    )
    assert multi_view_loss(student, teacher, labels, views=views) > multi_view_loss(student, teacher, views=views)


def test_sampled_pairs_average_to_all_pairs():  # what is drawn does not depend on the backend
    student, teacher, views = torch.randn(6, 8, 3, 3), torch.randn(6, 8, 3, 3), sample_views(4)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    loss = lambda **k: multi_view_loss(student, teacher, labels, views=views, gamma=0.0, margin=0.2, **k)  # noqa: E731
    sampled = torch.stack([loss(pairs="sampled") for _ in range(400)])
    error = (sampled.mean() - loss()).abs()
    assert sampled.std() > 0 and error < 4 * sampled.std() / 20


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]], ids=str)
def test_sampled_pairs_with_one_class_or_no_positives_but_itself(backend, labels):
    student, teacher, views = torch.randn(4, 8, 3, 3).double(), torch.randn(4, 8, 3, 3).double(), sample_views(2)
    labels = torch.tensor(labels)
    options = {"views": views, "margin": 0.0}
    sampled = multi_view_loss(student, teacher, labels, pairs="sampled", **options)
    assert torch.isfinite(sampled)
    if labels.unique().numel() == 4:  # the only positive is the sample itself
        assert_close(sampled, multi_view_loss(student, teacher, labels, **options))


def test_points_slicing_is_the_sliced_wasserstein_distance(backend):
    student, teacher = torch.randn(3, 5, 4, 4).double(), torch.randn(3, 5, 4, 4).double()
    projections = torch.nn.functional.normalize(torch.randn(5, 7), dim=0)
    ot, expected = pytest.importorskip("ot"), 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = s.flatten(1).T.numpy(), t.flatten(1).T.numpy()
        expected += ot.sliced_wasserstein_distance(s, t, projections=projections.double().numpy(), p=2) ** 2
    # D sums over the 16 sorted points, the distance averages
    actual = multi_view_loss(student, teacher, slicing="points", views=projections, gamma=1 / 16)
    assert_close(actual, torch.as_tensor(expected / 3))


@pytest.mark.parametrize(("backend", "options"), LOSSES, ids=str, indirect=["backend"])
def test_gradcheck_of_the_loss(backend, options):
    student, teacher = (torch.randn(3, 4, 1, 3, dtype=torch.float64, requires_grad=True) for _ in "st")
    labels = torch.tensor([0, 1, 0])
    views = torch.nn.functional.normalize(torch.randn(4, 3), dim=0) if "slicing" in options else sample_views(3)

    def loss(s, t):
        generator = torch.Generator().manual_seed(5)
        return multi_view_loss(s, t, labels, views=views, margin=0.5, generator=generator, **options)

    assert gradcheck(loss, (student, teacher))
    alone, both = (torch.autograd.grad(loss(student, t), student)[0] for t in (teacher.detach(), teacher))
    assert torch.equal(alone, both)
    assert not loss(student.detach(), teacher.detach()).requires_grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_empty_batch_gives_zero(backend, options):
    student = torch.zeros(0, 4, 3, 3, requires_grad=True)
    loss = multi_view_loss(student, student.detach(), torch.zeros(0, dtype=torch.long), **options)
    loss.backward()
    assert loss == 0 and student.grad.shape == student.shape


@pytest.mark.parametrize(("backend", "options"), LOSSES, ids=str, indirect=["backend"])
def test_compiled_equals_eager(backend, options):
    student, teacher = torch.randn(4, 6, 3, 3, requires_grad=True), torch.randn(4, 6, 3, 3)
    labels = torch.tensor([0, 1, 0, 1])
    views = torch.nn.functional.normalize(torch.randn(6, 3), dim=0) if "slicing" in options else sample_views(3)
    torch.compiler.reset()
    results = []
    for function in (multi_view_loss, torch.compile(multi_view_loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        loss = function(student, teacher, labels, views=views, margin=0.2, **options)
        results.append((loss, torch.autograd.grad(loss, student)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dtypes_may_differ(backend, options):
    """As of a student under autocast: the wider one counts, on either side, with labels and without."""
    student, teacher = torch.randn(2, 4, 6, 3, 3)
    views = torch.nn.functional.normalize(torch.randn(6, 3), dim=0) if "slicing" in options else sample_views(3)
    for labels in (None, torch.tensor([0, 1, 0, 1])):
        for pair in ((student, teacher.double()), (student.double(), teacher), (student.half(), teacher)):
            losses = []
            for maps in (pair, [x.double() for x in pair]):
                torch.manual_seed(3)
                losses.append(multi_view_loss(*maps, labels, views=views, margin=0.2, **options))
            assert losses[0].dtype == torch.promote_types(pair[0].dtype, pair[1].dtype)
            torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)


def test_autocast_changes_nothing(backend):
    student, teacher = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    labels, views = torch.tensor([0, 1, 0, 1]), sample_views(3)
    plain = multi_view_loss(student, teacher, labels, views=views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(multi_view_loss(student, teacher, labels, views=views), plain)


def test_opcheck(backend):
    features = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    views = sample_views(3)
    torch.library.opcheck(torch.ops.add_ops.view_histogram, (features, views, 4, "unit"))
    attention, energy = torch.ops.add_ops.view_histogram(features.detach(), views, 4, "unit")
    args = (torch.randn_like(attention), features.detach(), views, attention, energy, "unit")
    torch.library.opcheck(torch.ops.add_ops.view_histogram_backward, args)


def test_second_derivatives_are_refused(backend):
    features = torch.randn(1, 2, 3, 3, requires_grad=True)
    attention = multi_view_attention(features, sample_views(2), 3)
    (grad,) = torch.autograd.grad(attention.square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


def test_views_are_unit_uniform_and_reproducible():
    views = sample_views(20000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(views.norm(dim=1), torch.ones(20000))
    assert views.mean(0).abs().max() < 0.02
    torch.testing.assert_close(views.T @ views / 20000, torch.eye(3) / 3, atol=0.01, rtol=0)
    assert torch.equal(views[:5], sample_views(20000, generator=torch.Generator().manual_seed(1))[:5])


def test_the_module_draws_new_views_from_its_generator():
    student, teacher = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    module = MultiViewLoss(views=2, generator=torch.Generator().manual_seed(0))
    first, second = module(student, teacher), module(student, teacher)
    module.generator.manual_seed(0)
    assert first != second and module(student, teacher) == first
    with use_backend("reference"):
        module.generator.manual_seed(0)
        torch.testing.assert_close(module(student, teacher), first)


X = torch.zeros(2, 4, 3, 3)
L = torch.tensor([0, 1])
BAD = [
    ((X[0], X), {}, ValueError, r"student: expected shape \(B, C, H, W\), got \(4, 3, 3\)"),
    ((X, X[:1]), {}, ValueError, r"teacher: expected the student's batch size 2, got 1"),
    ((X, X.int()), {}, TypeError, r"teacher: expected float16, bfloat16, float32 or float64, got torch.int32"),
    ((X.to(torch.float8_e4m3fn), X), {}, TypeError, r"student: expected float16.* or float64, got torch.float8_e4m3fn"),
    ((X, X.to_sparse()), {}, TypeError, r"teacher: expected a dense tensor, got layout torch.sparse_coo"),
    ((X, X.to("meta")), {}, ValueError, r"teacher: expected device cpu, that of student, got meta"),
    ((X, X, L.float()), {}, TypeError, r"labels: expected an integer or boolean tensor, got torch.float32"),
    ((X, X, [0, 1]), {}, TypeError, r"labels: expected an integer or boolean tensor, got list"),
    ((X, X, L[:, None]), {}, ValueError, r"labels: expected shape \(2,\), got \(2, 1\)"),
    ((X, X), {"bins": 0}, ValueError, r"bins: expected an integer >= 1, got 0"),
    ((X, X), {"bins": 2.0}, TypeError, r"bins: expected an integer >= 1, got float"),
    ((X, X), {"bins": True}, TypeError, r"bins: expected an integer >= 1, got bool"),
    ((X, X), {"views": True}, TypeError, r"views: expected an integer >= 1, got bool"),
    ((X, X), {"margin": True}, TypeError, r"margin: expected a number, got bool"),
    ((X, X), {"views": 1.01 * torch.eye(3)}, ValueError, r"views: expected unit vectors, got lengths \[1.0[01]"),
    ((X, X), {"views": 0.99 * torch.eye(3)}, ValueError, r"views: expected unit vectors, got lengths \[0.9"),
    ((X, X), {"views": 0}, ValueError, r"views: expected an integer >= 1, got 0"),
    ((X, X), {"views": torch.eye(3)[:, :2]}, ValueError, r"views: expected shape \(K, 3\) with K >= 1, got \(3, 2\)"),
    ((X, X), {"views": torch.eye(3).long()}, TypeError, r"views: expected a float32 or float64 tensor, got"),
    ((X, X), {"views": 2 * torch.eye(3)}, ValueError, r"views: expected unit vectors, got lengths \[2.0, 2.0, 2.0\]"),
    ((X, X), {"views": torch.full((1, 3), math.nan)}, ValueError, r"views: expected unit vectors, got lengths \[nan\]"),
    ((X, X), {"views": torch.eye(3, requires_grad=True)}, ValueError, r"views: expected a tensor without gradient"),
    ((X, X), {"p": 0.5}, ValueError, r"p: expected a finite number >= 1, got 0.5"),
    ((X, X), {"gamma": -1.0}, ValueError, r"gamma: expected a finite number >= 0, got -1.0"),
    ((X, X), {"eta": math.inf}, ValueError, r"eta: expected a finite number >= 0, got inf"),
    ((X, X), {"margin": -0.1}, ValueError, r"margin: expected a finite number >= 0, got -0.1"),
    ((X, X), {"slicing": "x"}, ValueError, r"slicing: expected one of 'grid', 'points', got 'x'"),
    ((X, X), {"coordinates": "x"}, ValueError, r"coordinates: expected one of 'index', 'unit', got 'x'"),
    ((X, X), {"distance": "x"}, ValueError, r"distance: expected one of 'bins', 'wasserstein', got 'x'"),
    ((X, X), {"pairs": "x"}, ValueError, r"pairs: expected one of 'all', 'sampled', got 'x'"),
    ((X, X), {"slicing": "points", "bins": 2}, ValueError, r"bins: expected None with slicing='points'"),
    ((X, X), {"slicing": "points", "distance": "wasserstein"}, ValueError, r"distance: expected 'bins' with slicing"),
    ((X, X[:, :2]), {"slicing": "points"}, ValueError, r"teacher: expected the student's shape \(2, 4, 3, 3\)"),
    ((X, X), {"slicing": "points", "views": torch.eye(3)}, ValueError, r"views: expected shape \(4, K\) with K >= 1"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[m[:30] for *_, m in BAD])
def test_bad_input_is_named(args, options, error, message):
    with pytest.raises(error, match=message):
        multi_view_loss(*args, **options)
