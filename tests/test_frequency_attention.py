"""The room frequency_attention: every backend against the definition in float64."""

import itertools
import math

import pytest
import torch
from closeness import assert_close, relative_error
from torch.autograd import gradcheck

from add_ops import (
    FrequencyAttentionLoss,
    backends,
    frequency_attention_loss,
    frequency_attention_map,
    spectral_distance,
)

DISTANCES = ("l2", "cosine", "gaussian")
BACKENDS = [name for name, status in backends().items() if status == "available"]
COMPILED = [(BACKENDS[0], distance) for distance in DISTANCES]  # a graph calls operators, whoever answers them
COMPILED += [(backend, "l2") for backend in BACKENDS[1:]]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")
LAID_OUT = [  # every two of the three together; in Triton's interpreter, which is slow, not every three
    (backend, DISTANCES[i], DTYPES[j], LAYOUTS[k])
    for backend in BACKENDS
    for i, j, k in itertools.product(range(3), range(4), range(4))
    if backend != "triton" or torch.cuda.is_available() or (i + j + k) % 3 == 0
]
SHAPES = [
    (2, 3, 1, 1),
    (1, 1, 1, 6),
    (2, 4, 4, 4),
    (3, 5, 7, 7),
    (2, 3, 5, 8),
    (2, 7, 13, 11),
    (1, 2, 31, 31),
    (2, 2, 28, 56),
]


def dft(x, norm="forward"):
    """The definition: explicit DFT matrices, no FFT."""

    def matrix(n):
        index = torch.arange(n, dtype=torch.float64)
        return torch.exp(-2j * math.pi * index[:, None] * index / n)

    height, width = x.shape[-2:]
    scale = {"forward": 1 / (height * width), "ortho": (height * width) ** -0.5, "backward": 1.0}[norm]
    return scale * (matrix(height) @ x.to(torch.complex128) @ matrix(width))


def definition(student, teacher, distance, sigma=1.0, norm="forward"):
    """Channel mean of d, differentiable by autograd, in float64."""
    s, t = dft(student.double(), norm), dft(teacher.double(), norm)
    power = (s - t).real ** 2 + (s - t).imag ** 2
    if distance == "l2":
        return power.mean(1)
    if distance == "gaussian":
        return (1 - torch.exp(-power / (2 * sigma**2))).mean(1)
    length = lambda z: (z.real**2 + z.imag**2).sqrt()  # noqa: E731
    return (1 - (s * t.conj()).real / (length(s) * length(t))).mean(1)


def pair(shape, dtype=torch.float64, layout="contiguous"):
    tensors = torch.randn(2, *shape, dtype=torch.float64).to(dtype).unbind(0)
    change = {
        "contiguous": lambda x: x.clone(),
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda x: x.repeat(1, 2, 1, 2)[:, ::2, :, : x.shape[3]],
    }[layout]
    return [change(x) for x in tensors]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_equal_the_definition(backend, shape, distance):
    student, teacher = pair(shape)
    upstream = torch.randn(shape[0], *shape[2:], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (student, teacher)]
    expected = definition(*inputs, distance, 0.3)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    actual = spectral_distance(*inputs, distance=distance, sigma=0.3)
    assert_close(actual, expected)
    for grad, wanted in zip(torch.autograd.grad(actual, inputs, upstream), expected_grads, strict=True):
        if bool(wanted.abs().max() > 1e-12):
            assert relative_error(grad, wanted) <= 1e-11
        else:  # the cosine of real coefficients is +-1: its gradient vanishes on a 1x1 map
            assert grad.abs().max() <= 1e-12


@pytest.mark.parametrize(("backend", "distance", "dtype", "layout"), LAID_OUT, ids=str, indirect=["backend"])
def test_dtypes_and_layouts(backend, distance, dtype, layout):
    student, teacher = pair((2, 10, 7, 8), dtype, layout)
    student.requires_grad_()
    upstream = torch.randn(2, 7, 8).double()
    reference = student.detach().double().requires_grad_()
    expected = definition(reference, teacher, distance)
    (expected_grad,) = torch.autograd.grad(expected, reference, upstream)
    actual = spectral_distance(student, teacher, distance=distance)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual, expected)
    (grad,) = torch.autograd.grad(actual, student, upstream.to(actual.dtype))
    assert grad.dtype == dtype and grad.stride() == torch.empty_like(student).stride()
    if distance == "cosine" and dtype == torch.float32:  # 1/|F| amplifies the rounding of small coefficients
        assert relative_error(grad, expected_grad) <= 2e-5
    else:
        assert_close(grad, expected_grad)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.float32, torch.float64)], ids=str)
def test_maps_of_two_dtypes(backend, dtypes):
    student, teacher = (x.to(dtype) for x, dtype in zip(pair((2, 3, 4, 6)), dtypes, strict=True))
    student.requires_grad_()
    reference = student.detach().double().requires_grad_()
    expected = definition(reference, teacher.double(), "l2")
    actual = spectral_distance(student, teacher)
    assert actual.dtype == torch.promote_types(*dtypes)
    assert_close(actual, expected)
    (grad,) = torch.autograd.grad(actual.sum(), student)
    assert_close(grad, torch.autograd.grad(expected.sum(), reference)[0])


def test_small_differences_are_not_lost_in_the_gaussian_distance(backend):
    """1 − exp(−x) of x about 1e-11 is 0 in float32."""
    student = torch.randn(2, 3, 4, 5)
    teacher = student + 1e-5 * torch.randn(2, 3, 4, 5)
    gap = dft(student.double() - teacher.double())
    expected = -torch.expm1(-(gap.real**2 + gap.imag**2) / (2 * 0.5**2)).mean(1)
    assert_close(spectral_distance(student, teacher, distance="gaussian", sigma=0.5), expected)


@pytest.mark.parametrize("norm", ["forward", "ortho", "backward"])
def test_norms_are_those_of_torch_fft(backend, norm):
    student, teacher = pair((2, 3, 4, 6))
    student.requires_grad_()
    upstream = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = definition(student, teacher, "l2", norm=norm)
    actual = spectral_distance(student, teacher, norm=norm)
    assert_close(actual, expected)
    assert_close(*(torch.autograd.grad(x, student, upstream)[0] for x in (actual, expected)))


def test_worked_out_by_hand(backend):
    """F([[a, b]]) = [(a+b)/2, (a-b)/2]; with S - T = [[3, 1]]: |F|² = [4, 1]."""
    student = torch.tensor([[[[5.0, 1.0]]]], requires_grad=True)
    teacher = torch.tensor([[[[2.0, 0.0]]]])
    assert spectral_distance(student, teacher).tolist() == [[[4.0, 1.0]]]
    weights = torch.tensor([[[4.0, 1.0]]]).exp()
    torch.testing.assert_close(frequency_attention_map(student, teacher), weights)
    loss = frequency_attention_loss(student, teacher)
    torch.testing.assert_close(loss, 4 * weights[0, 0, 0] + weights[0, 0, 1])
    loss.backward()  # 2/(HW)² Re(Fᴴ(w·F(S-T))) with unscaled F = [4, 2]: ½·[4w₀ + 2w₁, 4w₀ - 2w₁]
    w0, w1 = weights.flatten().tolist()
    torch.testing.assert_close(student.grad, torch.tensor([[[[2 * w0 + w1, 2 * w0 - w1]]]]))
    # cosine of real coefficients: S -> [3, 2], T -> [1, 1], same signs: distance 0; gaussian: 1 - exp(-d/2)
    assert spectral_distance(student, teacher, distance="cosine").abs().max() <= 1e-6
    torch.testing.assert_close(
        spectral_distance(student, teacher, distance="gaussian"), 1 - torch.tensor([[[4.0, 1.0]]]).div(-2).exp()
    )


def test_reductions(backend):
    student, teacher = pair((3, 4, 5, 6))
    distance = definition(student, teacher, "l2")
    per_sample = 4 * (distance * (0.7 * distance).exp()).sum((1, 2))
    assert_close(frequency_attention_loss(student, teacher, gamma=0.7, reduction="none"), per_sample)
    assert_close(frequency_attention_loss(student, teacher, gamma=0.7), per_sample.mean())
    assert_close(frequency_attention_loss(student, teacher, gamma=0.7, reduction="mean"), per_sample.mean() / 120)
    module = FrequencyAttentionLoss(gamma=0.7, reduction="mean")
    assert_close(module(student, teacher), per_sample.mean() / 120)


def test_parseval_and_shift_invariance(backend):
    student, teacher = pair((2, 3, 7, 8))
    spatial = (student - teacher).square().mean(1).sum((1, 2))
    assert_close(spectral_distance(student, teacher, norm="ortho").sum((1, 2)), spatial)
    shifted = [x.roll((2, 5), (2, 3)) for x in (student, teacher)]
    assert_close(spectral_distance(*shifted), spectral_distance(student, teacher))


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_map_is_symmetric_and_carries_no_gradient(backend, distance):
    student, teacher = (x.requires_grad_() for x in pair((2, 3, 5, 6)))
    attention = frequency_attention_map(student, teacher, gamma=0.5, distance=distance)
    assert not attention.requires_grad
    assert_close(attention, (0.5 * definition(student, teacher, distance)).exp())
    assert_close(attention.flip(1, 2).roll((1, 1), (1, 2)), attention)


def test_the_cosine_of_a_zero_coefficient_is_one_with_gradient_zero(backend):
    zero, teacher = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    distance = spectral_distance(zero, teacher, distance="cosine")
    assert (distance == 1).all()
    for grad in torch.autograd.grad(distance.sum(), (zero, teacher)):
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_input_never_gives_inf_or_nan(backend, dtype):
    student, teacher = (1e4 * x for x in pair((3, 4, 8, 8), dtype))
    student.requires_grad_()
    attention = frequency_attention_map(student, teacher)
    assert torch.isfinite(attention).all() and attention.max() > 1e30
    loss = frequency_attention_loss(student, teacher, gamma=5.0)
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True), (False, False)], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck_for_either_both_or_neither_input(backend, distance, needs):
    inputs = [x.requires_grad_(n) for x, n in zip(pair((2, 2, 2, 3)), needs, strict=True)]
    if not any(needs):
        assert not frequency_attention_loss(*inputs, distance=distance).requires_grad
        return
    assert gradcheck(lambda s, t: spectral_distance(s, t, distance=distance, sigma=0.8, norm="ortho"), inputs)


def test_the_gradient_of_the_loss_holds_the_attention_constant(backend):
    student, teacher = pair((2, 3, 4, 5))
    student.requires_grad_()
    weights = frequency_attention_map(student, teacher)
    for distance, sigma in (("l2", 1.0), ("gaussian", 0.5)):
        weights = frequency_attention_map(student, teacher, distance=distance, sigma=sigma)
        frozen = 3 * (weights * definition(student, teacher, distance, sigma)).sum() / 2
        loss = frequency_attention_loss(student, teacher, distance=distance, sigma=sigma)
        assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, frozen)))


def test_an_empty_batch_gives_zero(backend):
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    assert spectral_distance(student, student).shape == (0, 4, 4)
    loss = frequency_attention_loss(student, student.detach())
    loss.backward()
    assert loss == 0 and student.grad.shape == student.shape


def test_autocast_keeps_float32_accumulation(backend):
    student, teacher = pair((2, 5, 8, 8), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = spectral_distance(student, teacher)
    assert_close(actual, definition(student, teacher, "l2"))


@pytest.mark.parametrize(("backend", "distance"), COMPILED, indirect=["backend"])
def test_compiled_equals_eager(backend, distance):
    student, teacher = pair((2, 3, 4, 4), torch.float32)
    student.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(frequency_attention_loss, fullgraph=True, backend="aot_eager")
    losses = [f(student, teacher, distance=distance) for f in (frequency_attention_loss, compiled)]
    assert losses[0] == losses[1]
    grads = [torch.autograd.grad(loss, student)[0] for loss in losses]
    assert torch.equal(*grads)


@pytest.mark.parametrize(("backend", "distance"), COMPILED, indirect=["backend"])
def test_opcheck(backend, distance):
    student, teacher = (x.requires_grad_() for x in pair((2, 3, 4, 5), torch.float32, "channels_last"))
    ops = torch.ops.add_ops
    torch.library.opcheck(ops.spectral_distance, (student, teacher, distance, 1.0, "forward"))
    grad = torch.randn(2, 4, 5)
    args = (grad, student.detach(), teacher.detach(), distance, 1.0, "forward")
    torch.library.opcheck(ops.spectral_distance_backward, args)
    for reduction in ("sum", "none"):
        torch.library.opcheck(ops.attention_sum, (torch.rand(2, 5, 4).mT.requires_grad_(), 1.0, 3, reduction))


def test_second_derivatives_are_refused(backend):
    student, teacher = pair((1, 2, 3, 3))
    student.requires_grad_()
    (grad,) = torch.autograd.grad(spectral_distance(student, teacher).sum(), student, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


X = torch.zeros(2, 3, 4, 5)
BAD = [
    ((X[0], X), {}, ValueError, r"student: expected shape \(B, C, H, W\), got \(3, 4, 5\)"),
    ((X, X[:, :2]), {}, ValueError, r"teacher: expected the student's shape \(2, 3, 4, 5\), got \(2, 2, 4, 5\)"),
    ((X[:, :0], X[:, :0]), {}, ValueError, r"student: expected .* only the first size 0 at most, got \(2, 0, 4, 5\)"),
    ((X.long(), X), {}, TypeError, r"student: expected float16, bfloat16, float32 or float64, got torch.int64"),
    ((X, X.to(torch.complex64)), {}, TypeError, r"teacher: expected float16.* got torch.complex64"),
    ((X, X.to(torch.float8_e5m2)), {}, TypeError, r"teacher: expected float16.* got torch.float8_e5m2"),
    ((X.to_sparse(), X), {}, TypeError, r"student: expected a dense tensor, got layout torch.sparse_coo"),
    ((X.numpy(), X), {}, TypeError, r"student: expected a tensor, got ndarray"),
    ((X, X.to("meta")), {}, ValueError, r"teacher: expected device cpu, that of student, got meta"),
    ((X, X), {"distance": "l1"}, ValueError, r"distance: expected one of 'l2', 'cosine', 'gaussian', got 'l1'"),
    ((X, X), {"norm": "unit"}, ValueError, r"norm: expected one of 'forward', 'backward', 'ortho', got 'unit'"),
    ((X, X), {"reduction": "max"}, ValueError, r"reduction: expected one of 'sum', 'mean', 'none', got 'max'"),
    ((X, X), {"sigma": 0.0}, ValueError, r"sigma: expected a finite number > 0, got 0.0"),
    ((X, X), {"gamma": float("nan")}, ValueError, r"gamma: expected a finite number, got nan"),
    ((X, X), {"gamma": "1"}, TypeError, r"gamma: expected a number, got str"),
    ((X, X), {"gamma": True}, TypeError, r"gamma: expected a number, got bool"),
    ((X, X), {"sigma": torch.ones(())}, TypeError, r"sigma: expected a number, got Tensor"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[m[:30] for *_, m in BAD])
def test_bad_input_is_named(args, options, error, message):
    with pytest.raises(error, match=message):
        frequency_attention_loss(*args, **options)
