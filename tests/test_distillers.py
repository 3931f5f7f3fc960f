"""The baselines against their definitions, written out again with loops and NumPy."""

import math

import numpy as np
import pytest
import torch
from closeness import relative_error

from add_ops import frequency_attention_loss, multi_view_loss
from training.config import Config
from training.models.distillers import DISTILLERS, NonLocal

CHANNELS = [3, 4, 5, 6]
SIDES = [8, 4, 4, 2]


@pytest.fixture
def features():
    make = lambda: [torch.randn(2, c, side, side) for c, side in zip(CHANNELS, SIDES, strict=True)]  # noqa: E731
    return make(), make(), torch.randn(2, 2), torch.randn(2, 2), torch.tensor([0, 1])


def terms(name, features, **changes):
    return DISTILLERS[name](Config(**changes), CHANNELS, CHANNELS)(*features)


def close(actual, expected):
    assert relative_error(actual, torch.as_tensor(expected)) < 1e-5


def test_knowledge_distillation_is_the_softened_divergence(features):
    student, teacher = (logits.double().div(4).exp().numpy() for logits in features[2:4])
    p, q = (x / x.sum(1, keepdims=True) for x in (teacher, student))
    close(terms("kd", features)["kd"], 16 * (p * np.log(p / q)).sum(1).mean())


def test_fitnet_is_the_error_of_the_second_stage(features):
    close(terms("fitnet", features)["fitnet"], 100 * (features[0][1] - features[1][1]).double().pow(2).mean())


def test_attention_transfer_compares_maps_of_unit_length(features):
    found = terms("at", features)
    assert list(found) == ["at/layer2", "at/layer3", "at/layer4"]
    for stage, value in zip((1, 2, 3), found.values(), strict=True):
        maps = []
        for side in features[:2]:
            energy = (side[stage].double().numpy() ** 2).mean(1).reshape(2, -1)
            maps.append(energy / np.sqrt((energy**2).sum(1, keepdims=True)))
        close(value, 1000 * ((maps[0] - maps[1]) ** 2).mean())


def test_non_local_response_is_a_softmax_over_pixels():
    image = torch.randn(1, 3, 2, 2)
    pixels = image[0].flatten(1).T.double().numpy()  # (4, 3)
    expected = np.zeros((4, 3))
    for i in range(4):
        weights = np.array([math.exp(pixels[i] @ pixels[j] / math.sqrt(3)) for j in range(4)])
        expected[i] = sum(weights[j] / weights.sum() * pixels[j] for j in range(4))
    close(NonLocal.response(image)[0], expected)


def test_non_local_is_the_error_of_the_responses(features):
    found = terms("nl", features)
    assert list(found) == ["nl/layer2", "nl/layer3", "nl/layer4"]
    student, teacher = (NonLocal.response(side[2]).double() for side in features[:2])
    close(found["nl/layer3"], (student - teacher).pow(2).mean())


def test_focal_frequency_weighs_by_the_distance_itself(features):
    found = terms("ffl", features)
    for stage, value in zip((1, 2, 3), found.values(), strict=True):
        gap = np.fft.fft2((features[0][stage] - features[1][stage]).double().numpy(), norm="ortho")
        distance = np.abs(gap)
        close(value, (distance / distance.max((2, 3), keepdims=True) * distance**2).mean())


SLICES = [{"bins": 2, "coordinates": "unit", "sampling": "quasi"}, {"slicing": "points", "sampling": "orthogonal"}]


@pytest.mark.parametrize("slices", SLICES, ids=["grid", "points"])
def test_add_takes_every_number_from_the_configuration(features, slices):
    scales = {"frequency_scale": 0.5, "multi_view_scale": 3.0}
    weights = {"frequency_weights": [0.0, 3.0, 0.0, 0.5], "multi_view_weights": [2.0, 0.0, 0.0, 0.25]}
    multi_view = {"views": 3, "margin": 0.7} | slices
    renamed = {"frequency_gamma": -2.0, "distance": "gaussian", "attention_gamma": 7.0, "contrast": 5.0}
    torch.manual_seed(1)
    found = terms("add", features, **scales, **weights, **multi_view, **renamed)
    torch.manual_seed(1)
    student, teacher, *_, labels = features
    fr = [frequency_attention_loss(student[i], teacher[i], gamma=-2.0, distance="gaussian") for i in (1, 3)]
    mv = [multi_view_loss(student[i], teacher[i], labels, **multi_view, gamma=7.0, eta=5.0) for i in (0, 3)]
    expected = {"multi_view/layer1": 6 * mv[0], "frequency/layer2": 1.5 * fr[0]}
    expected |= {"frequency/layer4": 0.25 * fr[1], "multi_view/layer4": 0.75 * mv[1]}
    assert list(found) == list(expected)
    for name, value in expected.items():
        close(found[name], value)


def test_add_without_any_weight_is_refused():
    with pytest.raises(ValueError, match="frequency_weights: expected a scaled weight above 0"):
        DISTILLERS["fr"](Config(frequency_weights=[0.0] * 4), CHANNELS, CHANNELS)


def test_an_even_spread_of_views_needs_three_dimensions():
    with pytest.raises(ValueError, match="sampling: quasi goes with slicing=grid"):
        Config(slicing="points", sampling="quasi")


def test_the_halves_of_add_are_its_terms(features):
    torch.manual_seed(1)
    whole = terms("add", features)
    torch.manual_seed(1)
    halves = terms("fr", features), terms("mv", features)
    assert {name.split("/")[0] for name in halves[0]} == {"frequency"}
    assert {name.split("/")[0] for name in halves[1]} == {"multi_view"}
    assert set(whole) == set(halves[0]) | set(halves[1])
    assert all(torch.equal(whole[name], value) for half in halves for name, value in half.items())


@pytest.mark.parametrize("name", [name for name in DISTILLERS if name != "none"])
def test_a_student_of_another_shape_is_adapted_and_learns(name):
    student = [torch.randn(4, c, s, s, requires_grad=True) for c, s in ((2, 8), (6, 6), (7, 3), (8, 2))]
    teacher = [torch.randn(4, c, s, s) for c, s in zip(CHANNELS, SIDES, strict=True)]
    logits, labels = torch.randn(4, 2, requires_grad=True), torch.tensor([0, 1, 0, 1])
    distiller = DISTILLERS[name](Config(), [2, 6, 7, 8], CHANNELS)
    assert distiller.needs_teacher
    found = distiller(student, teacher, logits, torch.randn(4, 2), labels)
    assert all(value.ndim == 0 and value > 0 for value in found.values())
    sum(found.values()).backward()
    assert all(parameter.grad.any() for parameter in distiller.parameters())
    assert logits.grad.any() if name == "kd" else student[1].grad.any()
