"""ADDLoss: the weighted sum over layers, and the adapters it owns."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close

from add_ops import ADDLoss, FrequencyAttentionLoss, MultiViewLoss, frequency_attention_loss, multi_view_loss
from add_ops.add_loss import Adapter

LABELS = torch.tensor([0, 1, 1, 0])
STUDENT, TEACHER = ((2, 6), (4, 8), (8, 4)), ((3, 6), (6, 4), (8, 5))  # channels and side of three layers
CHANNELS = {"student_channels": [2, 4, 8], "teacher_channels": [3, 6, 8]}


def features(*channels):
    return [torch.randn(4, c, 16 // c, 5, dtype=torch.float64, requires_grad=True) for c in channels]


def maps(shapes, dtype=torch.float64):
    return [torch.randn(4, c, side, side, dtype=dtype, requires_grad=True) for c, side in shapes]


def adapted(loss, layer, student, teacher):
    """The same adaptation, written out: channels by a matrix, sizes by interpolation."""
    weight = loss.state_dict().get(f"adapters.layer{layer}.weight")
    if weight is not None:
        student = torch.einsum("ts,bshw->bthw", weight[:, :, 0, 0].to(student.dtype), student)
    return F.interpolate(student, teacher.shape[2:], mode="bilinear") if student.shape != teacher.shape else student


@pytest.mark.parametrize(
    ("frequency", "multi_view"),
    [
        ({"gamma": 3.0, "reduction": "mean"}, {"p": 1.5, "gamma": 7.0, "eta": 3.0, "margin": 0.4, "views": 5}),
        ({"gamma": -2.0, "norm": "ortho"}, {"p": 1, "gamma": 0, "eta": 2.0, "margin": 0.9, "pairs": "sampled"}),
        ({"distance": "cosine"}, {"eta": 0, "bins": 3, "coordinates": "unit"}),
        ({"distance": "gaussian", "sigma": 0.3}, {"bins": 4, "distance": "wasserstein", "margin": 0.1}),
        ({}, {"p": 3, "slicing": "points", "margin": 5.0, "gamma": 0.5}),
    ],
)
def test_each_term_is_its_function_times_scale_and_weight(backend, frequency, multi_view):
    student, teacher, labels = features(4, 8, 2), features(4, 8, 2), torch.tensor([0, 1, 1, 0])
    views = MultiViewLoss(**multi_view, generator=torch.Generator().manual_seed(1))
    options = {"frequency": FrequencyAttentionLoss(**frequency), "multi_view": views}
    loss = ADDLoss([2, 0, 0.5], [0, 3, 0.25], **options, frequency_scale=0.3, multi_view_scale=7)
    terms = loss.terms(student, teacher, labels)
    drawn = torch.Generator().manual_seed(1)
    fr = [frequency_attention_loss(s, t, **frequency) for s, t in zip(student, teacher, strict=True)]
    mv = [multi_view_loss(student[i], teacher[i], labels, **multi_view, generator=drawn) for i in (1, 2)]
    expected = {
        "frequency/layer1": 0.6 * fr[0],
        "multi_view/layer2": 21 * mv[0],
        "frequency/layer3": 0.15 * fr[2],
        "multi_view/layer3": 1.75 * mv[1],
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert_close(terms[name], value)
    views.generator.manual_seed(1)
    assert_close(loss(student, teacher, labels), sum(expected.values()))


def test_the_defaults_are_the_published_weights():
    student, teacher = features(2, 4, 8, 16), features(2, 4, 8, 16)
    terms = ADDLoss(frequency=lambda s, t: torch.ones(()), multi_view=lambda s, t, _: torch.ones(())).terms(
        student, teacher, LABELS
    )
    assert terms == {
        **{"frequency/layer2": 1, "frequency/layer3": 2, "frequency/layer4": 0.25},
        **{"multi_view/layer2": 8, "multi_view/layer3": 40, "multi_view/layer4": 32},
    }


def test_the_default_losses_are_the_published_ones():
    student, teacher = features(2, 4, 8, 16), features(2, 4, 8, 16)
    torch.manual_seed(3)
    terms = ADDLoss().terms(student, teacher, LABELS)
    frequency = frequency_attention_loss(student[3], teacher[3], gamma=1, distance="l2", reduction="sum")
    assert_close(terms["frequency/layer4"], 0.25 * frequency)
    torch.manual_seed(3)
    published = {"views": 12, "p": 2, "gamma": 100, "eta": 50, "margin": 0.012}
    multi_view = multi_view_loss(student[1], teacher[1], LABELS, **published, slicing="grid", pairs="all")
    assert_close(terms["multi_view/layer2"], 8 * multi_view)


def test_labels_reach_the_contrastive_part():
    student, teacher = features(4), features(4)
    terms = []
    for labels in (None, LABELS, 1 - LABELS, torch.tensor([0, 0, 1, 1])):
        views = MultiViewLoss(margin=1.0, generator=torch.Generator().manual_seed(1))
        terms.append(ADDLoss([0], [1], multi_view=views)(student, teacher, labels).item())
    assert terms[0] < terms[1] == terms[2] != terms[3]


def test_one_class_with_sampled_pairs_keeps_the_attracting_part():
    student, teacher = ([x[:1].detach().expand(4, -1, -1, -1)] for x in (features(4)[0], features(4)[0]))

    def term(labels, **options):  # all samples are alike: whichever positive is drawn, its distance is D
        options |= {"margin": 0.5, "generator": torch.Generator().manual_seed(1)}
        views = MultiViewLoss(**options, pairs="sampled")
        return ADDLoss([0], [1], multi_view=views, multi_view_scale=1)(student, teacher, labels)

    distance = term(None, gamma=1)
    assert distance > 0
    for labels in (torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)):
        assert_close(term(labels, gamma=3, eta=5), (3 + 2 * 5) * distance)


def test_a_layer_of_weight_zero_costs_nothing(backend):
    student, teacher = features(4), features(4)
    for channels in ({}, {"student_channels": [9, 4], "teacher_channels": [7, 4]}):
        loss = ADDLoss([0, 1], [0, 1], **channels)
        assert not list(loss.parameters())
        total = loss([None, *student], [None, *teacher])
        student[0].grad = None
        total.backward()
        assert total.ndim == 0 and student[0].grad.abs().sum() > 0


def test_gradients_reach_student_and_teacher(backend):
    student, teacher = features(4), features(4)
    loss = ADDLoss([1], [1], frequency=FrequencyAttentionLoss(distance="gaussian"), multi_view=MultiViewLoss(bins=4))
    loss(student, teacher, torch.tensor([0, 1, 1, 0])).backward()
    assert student[0].grad.abs().sum() > 0 and teacher[0].grad.abs().sum() > 0


@pytest.mark.parametrize("slicing", ["grid", "points"])
def test_maps_of_other_shapes_are_adapted_for_the_terms_that_need_it(slicing):
    student, teacher = maps(STUDENT), maps(TEACHER)
    views = MultiViewLoss(slicing=slicing, margin=0.5, generator=torch.Generator().manual_seed(1))
    loss = ADDLoss([1, 0, 2], [1, 2, 3], **CHANNELS, multi_view=views, multi_view_scale=1)
    terms = loss.terms(student, teacher, LABELS)
    expected, drawn = {}, torch.Generator().manual_seed(1)
    for n, (s, t) in enumerate(zip(student, teacher, strict=True), 1):
        same = adapted(loss, n, s, t)
        if n != 2:
            expected[f"frequency/layer{n}"] = {1: 1, 3: 2}[n] * frequency_attention_loss(same, t)
        options = {"slicing": slicing, "margin": 0.5, "generator": drawn}
        expected[f"multi_view/layer{n}"] = n * multi_view_loss(same if slicing == "points" else s, t, LABELS, **options)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert_close(terms[name], value)
    sum(terms.values()).backward()
    trained = {name: parameter.grad for name, parameter in loss.named_parameters()}
    assert list(trained) == [f"adapters.layer{n}.weight" for n in ((1,) if slicing == "grid" else (1, 2))]
    assert all(grad.abs().sum() > 0 for grad in trained.values()) and all(s.grad.abs().sum() > 0 for s in student)


def test_adapters_start_as_convolutions_drawn_layer_by_layer():
    torch.manual_seed(5)
    loss = ADDLoss([1, 1, 1], [0, 0, 0], student_channels=[2, 4, 4], teacher_channels=[3, 4, 6])
    torch.manual_seed(5)
    expected = {n: torch.nn.Conv2d(s, t, 1, bias=False).weight for n, s, t in ((1, 2, 3), (3, 4, 6))}
    assert list(loss.state_dict()) == [f"adapters.layer{n}.weight" for n in expected]
    assert all(torch.equal(loss.adapters[f"layer{n}"].weight, weight) for n, weight in expected.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_adapted_within_and_outside_of_autocast(dtype):
    student, teacher = maps(STUDENT[:1], dtype), maps(TEACHER[:1], dtype)
    loss = ADDLoss([1], [0], student_channels=[2], teacher_channels=[3])
    outside = loss(student, teacher)
    assert_close(
        outside, frequency_attention_loss(adapted(loss, 1, student[0].double(), teacher[0]), teacher[0].double())
    )
    with torch.autocast("cpu", dtype):
        within = loss(student, teacher)
    assert outside.dtype == within.dtype == torch.float32
    torch.testing.assert_close(within, outside, rtol=0.02, atol=0)


def test_an_empty_batch_gives_zero_through_the_adapters():
    student, teacher = ([x[:0] for x in maps(shapes)] for shapes in (STUDENT, TEACHER))
    assert ADDLoss([1, 1, 1], [1, 1, 1], **CHANNELS)(student, teacher, LABELS[:0]) == 0


def test_compiled_equals_eager(backend):
    student, teacher, labels = maps(STUDENT[:2]), maps(TEACHER[:2]), torch.tensor([0, 1, 1, 0])
    loss = ADDLoss([1, 0], [0, 1], student_channels=[2, 4], teacher_channels=[3, 6])
    torch.compiler.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(function(student, teacher, labels))
    torch.testing.assert_close(*results)


def test_what_it_is_made_of_is_shown():
    shown = repr(ADDLoss([0, 1], [1, 0], student_channels=[2, 3], teacher_channels=[4, 5], frequency_scale=0.5))
    assert "frequency_weights=[0, 1], multi_view_weights=[1, 0], frequency_scale=0.5, multi_view_scale=16.0" in shown
    assert "(layer2): Adapter(student_channels=3, teacher_channels=5)" in shown and "layer1" not in shown


def test_bad_weights_and_layers_are_named():
    with pytest.raises(ValueError, match=r"multi_view_weights: expected one number for each of the 2 layers.*got 1"):
        ADDLoss([1, 2], [1])
    with pytest.raises(TypeError, match="frequency_weights: expected one number per layer, got int"):
        ADDLoss(1, [1])
    with pytest.raises(ValueError, match="frequency_weights: expected a finite number >= 0, got -1"):
        ADDLoss([-1], [1])
    with pytest.raises(ValueError, match="multi_view_weights: expected a finite number >= 0, got nan"):
        ADDLoss([1], [float("nan")])
    with pytest.raises(TypeError, match="multi_view_weights: expected a number, got bool"):
        ADDLoss([1], [True])
    for name in ("frequency_scale", "multi_view_scale"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number >= 0, got -1"):
            ADDLoss([1], [1], **{name: -1})
    for weights, scales in (([[0], [0]], {}), ([[1], [0]], {"frequency_scale": 0})):
        with pytest.raises(ValueError, match=r"^frequency_weights: expected a scaled weight above 0"):
            ADDLoss(*weights, **scales)
    for name, counts in (("student_features", (3, 1)), ("teacher_features", (1, 3))):
        with pytest.raises(ValueError, match=f"^{name}: expected 1 layers, got 3"):
            ADDLoss([1], [0])(*(features(*[4] * count) for count in counts))
    with pytest.raises(ValueError, match=r"layer 1: teacher: expected the student's shape \(4, 4, 4, 5\)"):
        ADDLoss([1], [0])(features(4), features(8))
    with pytest.raises(TypeError, match="layer 1: student: expected a tensor, got NoneType"):
        ADDLoss([1], [0])([None], features(4))


def test_bad_channels_are_named():
    for student, teacher, error, message in (
        ([2, 3], None, TypeError, "teacher_channels: expected one number per layer, got NoneType"),
        (None, [2, 3], TypeError, "student_channels: expected one number per layer, got NoneType"),
        ([2], [2, 3], ValueError, "student_channels: expected one number for each of the 2 layers.*got 1"),
        ([2, 3], [2, 3, 4], ValueError, "teacher_channels: expected one number for each of the 2 layers.*got 3"),
        ([2, 0], [2, 3], ValueError, "student_channels: expected an integer >= 1, got 0"),
        ([2, True], [2, 3], TypeError, "student_channels: expected an integer >= 1, got bool"),
        ([2, 3], [2, 3.0], TypeError, "teacher_channels: expected an integer >= 1, got float"),
    ):
        with pytest.raises(error, match=message):
            ADDLoss([1, 0], [1, 0], student_channels=student, teacher_channels=teacher)
    loss = ADDLoss([0, 1], [1, 0], student_channels=[9, 4], teacher_channels=[9, 8])
    for student, teacher, message in (
        (8, 8, "layer 2: student: expected 4 channels, see student_channels, got 8"),
        (4, 2, "layer 2: teacher: expected 8 channels, see teacher_channels, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(features(8, student), features(4, teacher))
    with pytest.raises(TypeError, match="layer 2: student: expected a tensor, got NoneType"):
        loss([features(4)[0], None], features(4, 8))
    with pytest.raises(ValueError, match=r"student: expected shape \(B, C, H, W\), got \(4, 4\)"):
        Adapter(4, 8)(torch.randn(4, 4), torch.randn(4, 8, 2, 2))
