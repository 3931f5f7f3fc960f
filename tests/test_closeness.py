import closeness
import pytest
import torch
from closeness import TENSOR_CORES, TOLERANCE, assert_close, tolerance
from torch._subclasses import FakeTensorMode


@pytest.mark.parametrize("allowed", [TOLERANCE, TENSOR_CORES], ids=["exact", "tensor cores"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_wrong_tensors_fail_every_tolerance_and_rounding_passes(dtype, allowed, monkeypatch):
    monkeypatch.setattr(closeness, "TOLERANCE", allowed)
    expected = torch.randn(8, 50, dtype=torch.float64)
    assert_close(expected.to(dtype), expected)
    one_wrong = expected.clone()
    one_wrong[3, 7] += 1
    poisoned = expected.clone()
    poisoned[0, 0] = torch.nan
    for wrong in (torch.zeros_like(expected), -expected, 1.02 * expected, expected.flip(0), one_wrong, poisoned):
        with pytest.raises(AssertionError):
            assert_close(wrong.to(dtype), expected)


def test_only_float32_on_a_gpu_may_lose_to_tensor_cores():
    with FakeTensorMode():
        for device, float32 in (("cpu", 1e-6), ("cuda", 5e-6)):
            found = {dtype: tolerance(torch.empty(1, dtype=dtype, device=device)) for dtype in TOLERANCE}
            assert found == TOLERANCE | {torch.float32: float32}


def test_a_zero_or_nan_expectation_and_another_shape_are_refused():
    with pytest.raises(AssertionError, match="not all zero"):
        assert_close(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError, match="finite"):
        assert_close(torch.full((3,), torch.nan), torch.full((3,), torch.nan))
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(3), torch.ones(3, 1))


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(1000).isnan().all()
