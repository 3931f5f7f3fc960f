"""How every file of tests of the Triton kernels calls them: on which device, with which strides, against what."""

import pytest
import torch
from closeness import TENSOR_CORES, relative_error

import add_ops

if add_ops.backends()["triton"] != "available":
    pytest.skip(add_ops.backends()["triton"], allow_module_level=True)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DISTANCES = ("l2", "cosine", "gaussian")


@pytest.fixture(autouse=True)
def on_triton():
    with add_ops.use_backend("triton"):
        yield


def layouts(x):
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.mT.contiguous().mT,
        "sliced": x.repeat(1, 2, 1, 2)[:, ::2, :, : x.shape[3]],
    }


def values_and_gradient(primitive, x, upstream):
    x = x.detach().requires_grad_()
    values = primitive(x)
    return values.detach(), torch.autograd.grad(values, x, upstream.to(values.dtype))[0]


def check(primitive, x, upstream, allowed=0.0):
    """float32 or half precision by Triton against the reference in float64; ``allowed`` more than usual, of float32."""
    actual = values_and_gradient(primitive, x, upstream)
    with add_ops.use_backend("reference"):
        expected = values_and_gradient(primitive, x.double(), upstream)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and bool(other.any())
        assert relative_error(one, other) <= max(TENSOR_CORES[one.dtype], allowed if one.dtype == torch.float32 else 0)


def same_bits(results, others):
    return all(torch.equal(one, other) for one, other in zip(results, others, strict=True))
