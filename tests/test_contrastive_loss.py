"""The operator contrastive_loss by itself, and what labels may be; test_multi_view.py has the loss it is part of."""

import math

import pytest
import torch

from add_ops import multi_view_loss, sample_views


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_a_nan_is_seen_in_all_of_its_row(backend, p):
    """Nothing is known of it then, and a scaler of gradients has to see that."""
    student, teacher = torch.randn(2, 5, 3, 4)
    student[1, 0, 3] = math.nan
    student.requires_grad_()
    loss = torch.ops.add_ops.contrastive_loss(student, teacher, torch.tensor([0, 1, 0, 1, 1]), p, 2.0, 3.0, 9.0)
    unknown = torch.autograd.grad(loss, student)[0].isnan()
    assert loss.isnan() and unknown[1, 0].all() and unknown.sum() == 4


def test_pairs_without_a_view_or_a_bin_are_at_no_distance(backend):
    for shape in ((3, 0, 4), (3, 2, 0)):
        student = torch.randn(shape, requires_grad=True)
        loss = torch.ops.add_ops.contrastive_loss(student, student.detach(), torch.zeros(3).long(), 2.0, 2.0, 3.0, 9.0)
        assert loss == 0 and torch.autograd.grad(loss, student)[0].shape == shape


LABELS = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize("pairs", ["all", "sampled"])
def test_labels_of_any_integer(backend, dtype, pairs):
    """Eagerly, under torch.func and compiled; made in inference mode; overwritten before the gradient is asked for."""
    student, teacher, views = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3), sample_views(2)
    numbers = torch.tensor([0, 1, 1, 0])

    def loss(student, labels):
        torch.manual_seed(3)
        return multi_view_loss(student, teacher, labels, views=views, margin=0.2, pairs=pairs)

    expected = torch.func.grad(loss)(student, numbers)
    torch.testing.assert_close(torch.func.grad(loss)(student, numbers.to(dtype)), expected)
    with torch.inference_mode():
        labels = numbers.to(dtype)
    student.requires_grad_()
    torch.compiler.reset()
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        torch.testing.assert_close(torch.autograd.grad(function(student, numbers.to(dtype)), student)[0], expected)
    value = loss(student, labels)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected)
    value = loss(student, labels := numbers.to(dtype, copy=True))
    labels.zero_()
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected)


def test_opcheck(backend):
    rows = (*torch.randn(2, 3, 4, 5).unbind(), torch.tensor([0, 1, 0]), 2.0, 1.0, 0.5, 9.0)
    torch.library.opcheck(torch.ops.add_ops.contrastive_loss, (rows[0].requires_grad_(), *rows[1:]))
    torch.library.opcheck(torch.ops.add_ops.contrastive_loss_backward, (torch.rand(()), rows[0].detach(), *rows[1:]))
