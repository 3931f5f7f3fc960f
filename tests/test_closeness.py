import pytest
import torch
from closeness import TOLERANCE, assert_close


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_wrong_tensors_fail_every_tolerance_and_rounding_passes(dtype):
    expected = torch.randn(8, 50, dtype=torch.float64)
    assert_close(expected.to(dtype), expected)
    one_wrong = expected.clone()
    one_wrong[3, 7] += 1
    poisoned = expected.clone()
    poisoned[0, 0] = torch.nan
    for wrong in (torch.zeros_like(expected), -expected, 1.02 * expected, expected.flip(0), one_wrong, poisoned):
        with pytest.raises(AssertionError):
            assert_close(wrong.to(dtype), expected)


def test_a_zero_or_nan_expectation_and_another_shape_are_refused():
    with pytest.raises(AssertionError, match="not all zero"):
        assert_close(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError, match="finite"):
        assert_close(torch.full((3,), torch.nan), torch.full((3,), torch.nan))
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(3), torch.ones(3, 1))


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(1000).isnan().all()
