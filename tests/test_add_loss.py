"""ADDLoss: the weighted sum over layers."""

import pytest
import torch
from closeness import assert_close

from add_ops import ADDLoss, FrequencyAttentionLoss, MultiViewLoss, frequency_attention_loss, multi_view_loss


def features(*channels):
    return [torch.randn(4, c, 16 // c, 5, dtype=torch.float64, requires_grad=True) for c in channels]


def test_the_sum_of_weighted_terms(backend):
    student, teacher, labels = features(4, 8), features(4, 8), torch.tensor([0, 1, 1, 0])
    views = MultiViewLoss(generator=torch.Generator().manual_seed(1))
    loss = ADDLoss([2, 0], [0, 3], multi_view=views, frequency_scale=0.5, multi_view_scale=7)
    terms = loss.terms(student, teacher, labels)
    expected = {
        "frequency/layer1": frequency_attention_loss(student[0], teacher[0]),
        "multi_view/layer2": 21
        * multi_view_loss(student[1], teacher[1], labels, generator=torch.Generator().manual_seed(1)),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert_close(terms[name], value)
    views.generator.manual_seed(1)
    assert_close(loss(student, teacher, labels), sum(expected.values()))


def test_the_defaults_are_the_published_weights(backend):
    student, teacher, labels = features(2, 4, 8, 16), features(2, 4, 8, 16), torch.tensor([0, 1, 1, 0])
    terms = ADDLoss().terms(student, teacher, labels)
    assert set(terms) == {f"{term}/layer{n}" for term in ("frequency", "multi_view") for n in (2, 3, 4)}
    assert_close(terms["frequency/layer4"], 0.25 * frequency_attention_loss(student[3], teacher[3]))


def test_a_layer_of_weight_zero_costs_nothing(backend):
    student, teacher = features(4), features(4)
    total = ADDLoss([0, 1], [0, 1])([None, *student], [None, *teacher])
    total.backward()
    assert total.ndim == 0 and student[0].grad.abs().sum() > 0


def test_gradients_reach_student_and_teacher(backend):
    student, teacher = features(4), features(4)
    loss = ADDLoss([1], [1], frequency=FrequencyAttentionLoss(distance="gaussian"), multi_view=MultiViewLoss(bins=4))
    loss(student, teacher, torch.tensor([0, 1, 1, 0])).backward()
    assert student[0].grad.abs().sum() > 0 and teacher[0].grad.abs().sum() > 0


def test_compiled_equals_eager(backend):
    student, teacher, labels = features(4, 8), features(4, 8), torch.tensor([0, 1, 1, 0])
    loss = ADDLoss([1, 1], [1, 1])
    torch.compiler.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(function(student, teacher, labels))
    torch.testing.assert_close(*results)


def test_bad_weights_and_layers_are_named():
    with pytest.raises(ValueError, match=r"multi_view_weights: expected one weight for each of the 2 layers.*got 1"):
        ADDLoss([1, 2], [1])
    with pytest.raises(ValueError, match="frequency_weights: expected a finite number >= 0, got -1"):
        ADDLoss([-1], [1])
    with pytest.raises(ValueError, match="frequency_weights: expected a weight above 0"):
        ADDLoss([0], [0])
    with pytest.raises(ValueError, match="teacher_features: expected 1 layers, got 2"):
        ADDLoss([1], [0])(features(4), features(4, 4))
    with pytest.raises(ValueError, match=r"layer 1: teacher: expected the student's shape \(4, 4, 4, 5\)"):
        ADDLoss([1], [0])(features(4), features(8))
    with pytest.raises(TypeError, match="layer 1: student: expected a tensor, got NoneType"):
        ADDLoss([1], [0])([None], features(4))
