"""The precision of the tensor cores, emulated: what Triton's interpreter, which multiplies in float32, cannot show.

The kernels themselves run in the interpreter; only ``tl.dot`` is replaced. A tensor core rounds float32 to tf32, that
is to 10 bits of mantissa, multiplies exactly and adds in float32. ``tf32x3`` gives it the halves hi = tf32(x) and
lo = tf32(x - hi) and adds lo·hi + hi·lo + hi·hi. Kernels that halve their factors themselves (``_triton.split``) ask
for plain tf32 of each product, to which a tensor core is given the pattern as it is: it may not round but drop bits.
Of the sum of eight products and what went before, it may drop bits as well; so it does here.
"""

import numpy as np
import pytest
import torch
from closeness import TENSOR_CORES, relative_error

import add_ops

triton = pytest.importorskip("triton")
if add_ops.backends()["triton"] != "available" or torch.cuda.is_available():
    pytest.skip("needs Triton in its interpreter", allow_module_level=True)

from triton._C.libtriton.ir import INPUT_PRECISION  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from add_ops import _triton  # noqa: E402

BOUND = TENSOR_CORES[torch.float32]
SHAPES = [(2, 40, 4, 4), (1, 40, 8, 8), (1, 12, 16, 16), (1, 6, 7, 13), (1, 2, 32, 32), (1, 3, 40, 20), (1, 2, 9, 60)]
SCALED = [*((shape, 1.0) for shape in SHAPES), *((shape, scale) for shape in SHAPES[1:4:2] for scale in (1e-6, 1e4))]


def tf32(x):
    """Float32 rounded to the nearest number of 10 bits of mantissa, ties away from zero."""
    return ((x.astype(np.float32).view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def dropped(x):
    """Float32 without the lower 13 bits of its mantissa."""
    return (x.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32)


def summed(a, b, total):
    """``total + a @ b`` of tf32 numbers, eight products at a time, of whose sum float32 keeps the first 24 bits."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], 8):
        exact = total + a[..., k : k + 8] @ b[..., k : k + 8, :]
        total = (exact.view(np.int64) & -(2**29)).view(np.float64)
    return total.astype(np.float32)


def product(a, b, precision, total):
    """``total + a @ b`` as a tensor core gives it."""
    if precision == INPUT_PRECISION.IEEE:
        return np.matmul(a, b) + total
    if precision == INPUT_PRECISION.TF32:
        return summed(dropped(a), dropped(b), total)
    assert precision == INPUT_PRECISION.TF32x3
    high_a, high_b = tf32(a), tf32(b)
    total = summed(tf32(a - high_a), high_b, total)
    return summed(high_a, high_b, summed(high_a, tf32(b - high_b), total))


@pytest.fixture
def tensor_cores(monkeypatch):
    """Make ``tl.dot`` of float32 a tensor core's. ``tensor_cores.split = False`` leaves plain tf32: of tf32x3, and of
    halves, where the higher one is then the whole number, of which bits are dropped, and the lower one is zero.
    """

    class Cores:
        split = True
        products = 0

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.data.dtype != np.float32:  # float64, and halves, whose products are exact
            return interpret(self, a, b, d, input_precision, max_num_imprecise_acc)
        if not Cores.split and input_precision == INPUT_PRECISION.TF32x3:
            input_precision = INPUT_PRECISION.TF32
        Cores.products += 1
        return interpreter.TensorHandle(product(a.data, b.data, input_precision, d.data), d.dtype.scalar)

    def split(x):
        return halves(x) if Cores.split else (x, x - x)

    interpret, halves = interpreter.InterpreterBuilder.create_dot, _triton.split
    monkeypatch.setattr(_triton, "split", split)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    with add_ops.use_backend("triton"):
        yield Cores


def errors(primitive, x, upstream):
    """Of values and gradient, against the reference in float64."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = x.to(dtype).requires_grad_()
        with add_ops.use_backend(backend):
            values = primitive(inputs)
            results.append((values, torch.autograd.grad(values, inputs, upstream.to(dtype))[0]))
    return [relative_error(one, other) for one, other in zip(*results, strict=True)]


def test_the_emulation_by_hand():
    assert tf32(np.array([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -3e-6], np.float32)).tolist() == [
        1 + 2**-10,
        1 + 2**-10,
        1,
        -(2**-19) * (1 + round((3e-6 * 2**19 - 1) * 2**10) / 2**10),
    ]
    a, b = (np.full((1, 1), value, np.float32) for value in (1 + 2**-12, 3.0))
    assert product(a, b, INPUT_PRECISION.TF32, 0) == 3
    assert product(a, b, INPUT_PRECISION.TF32x3, 0) == 3 + 3 * 2**-12
    ones = np.full((1, 9), 1, np.float32)  # eight of 2⁻²⁶ are the last bit of 1, and the ninth is dropped
    assert summed(ones, ones.T * 2**-26, np.float32(1)) == 1 + 2**-23
    assert summed(ones, ones.T * 1.9 * 2**-27, np.float32(1)) == 1


@pytest.mark.parametrize(("shape", "scale"), SCALED, ids=str)
def test_spectral_distance(tensor_cores, shape, scale):
    student, teacher = scale * torch.randn(2, *shape)
    weights = 10 ** (6 * torch.rand(shape[0], *shape[2:]))  # as large as exp(gamma m) becomes

    def primitive(x):
        return add_ops.spectral_distance(x, teacher.to(x.dtype))

    assert max(errors(primitive, student, weights)) <= BOUND and tensor_cores.products
    tensor_cores.split = False
    assert min(errors(primitive, student, weights)) > BOUND


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_view_histogram(tensor_cores, scale):
    features, views = scale * torch.randn(2, 40, 4, 4), add_ops.sample_views(3)
    upstream = torch.randn(2, 3, 20)
    assert max(errors(lambda x: add_ops.multi_view_attention(x, views, 20), features, upstream)) <= BOUND


@pytest.mark.parametrize(("points", "scale"), [(40, 1e-6), (40, 1.0), (40, 1e4), (70, 1.0)])
def test_project_and_sort(tensor_cores, points, scale):
    """The gradient of the sum of squares: which of two near points comes first, float32 does not know."""
    x, theta = scale * torch.randn(1, points, 200), add_ops.sample_projections(200, 3)

    def primitive(x):
        return add_ops.project_and_sort(x, theta)[0]

    def errors_of_both():
        upstream = primitive(x)
        return errors(primitive, x, upstream)

    assert max(errors_of_both()) <= BOUND and tensor_cores.products
    tensor_cores.split = False
    assert min(errors_of_both()) > BOUND
