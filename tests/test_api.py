"""The public functions and their modules: one name each, the same options, and what a module shows and keeps."""

import copy
import inspect

import pytest
import torch

import add_ops
from add_ops import ADDLoss, FrequencyAttentionLoss, MultiViewLoss, SlicedWassersteinLoss

TWINS = {
    FrequencyAttentionLoss: add_ops.frequency_attention_loss,
    MultiViewLoss: add_ops.multi_view_loss,
    SlicedWassersteinLoss: add_ops.sliced_wasserstein,
}
VIEWS, PROJECTIONS = add_ops.sample_views(5), add_ops.sample_projections(4, 6)
FUNCTIONS = [getattr(add_ops, name) for name in add_ops.__all__ if inspect.isfunction(getattr(add_ops, name))]


def options(function):
    """Name and default of every option: what can only be given by name."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


@pytest.mark.parametrize("module", TWINS)
def test_a_module_takes_what_its_function_takes(module):
    function, taken = TWINS[module], options(module.__init__)
    assert all(p.kind == p.KEYWORD_ONLY for p in list(inspect.signature(module.__init__).parameters.values())[1:])
    called = inspect.signature(module.forward).parameters
    wanted = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    if module is SlicedWassersteinLoss:  # its own reduction is over the batch, and it may draw what the function needs
        wanted["slice_reduction"] = wanted.pop("reduction")
        wanted["projections"] = 50
    for name, default in wanted.items():
        if name in called:
            assert called[name].default == default and name not in taken
        else:
            assert taken[name] == default
    extra = taken.keys() - wanted.keys()
    assert extra == ({"reduction", "sampling", "generator"} if module is SlicedWassersteinLoss else set())


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_options_go_by_name(function):
    """Only what is computed with stands before them: an argument with a default is an option, or the labels."""
    parameters = inspect.signature(function).parameters.values()
    optional = [p.name for p in parameters if p.default is not p.empty and p.kind != p.KEYWORD_ONLY]
    assert optional == (["labels"] if function is add_ops.multi_view_loss else [])


def test_a_public_function_has_one_name():
    assert len(set(FUNCTIONS)) == len(FUNCTIONS) and all(getattr(add_ops, f.__name__) is f for f in FUNCTIONS)
    assert not hasattr(add_ops, "view_histogram")  # the operator's name; the function is multi_view_attention


OTHERS = {
    "gamma": 0.5,
    "distance": "gaussian",
    "sigma": 0.25,
    "norm": "ortho",
    "reduction": "none",
    "views": 3,
    "bins": 2,
    "p": 1.5,
    "eta": 3.0,
    "margin": 0.5,
    "coordinates": "unit",
    "pairs": "sampled",
    "sampling": "orthogonal",
    "projections": 7,
    "slice_reduction": "none",
    "slicing": "points",
}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m in TWINS for n in options(m.__init__) if n != "generator"])
def test_every_option_is_shown_and_reaches_the_function(module, name):
    """A module made from what another one shows gives the same, and not what the default gives."""
    value = "wasserstein" if module is MultiViewLoss and name == "distance" else OTHERS[name]
    shown = repr(module(**{name: value}))
    again = eval(shown, {module.__name__: module})
    assert repr(again) == shown != repr(module())
    x, y = torch.randn(2, 4, 8, 3, 3)
    args = [x.flatten(2), y.flatten(2)] if module is SlicedWassersteinLoss else [x, y]
    args += [torch.tensor([0, 1, 0, 1])] * (module is MultiViewLoss)
    results = []
    for loss in (module(**{name: value}), again, module()):
        torch.manual_seed(2)
        results.append(loss(*args))
    assert torch.equal(results[0], results[1])
    if not (module is FrequencyAttentionLoss and name == "sigma"):  # which l2 has no use for
        assert results[0].shape != results[2].shape or not torch.equal(results[0], results[2])


def test_sigma_reaches_the_gaussian():
    maps = torch.randn(2, 2, 3, 4, 4)
    losses = [FrequencyAttentionLoss(distance="gaussian", sigma=sigma)(*maps) for sigma in (1.0, 0.1)]
    assert losses[1] > 2 * losses[0] > 0


def test_the_weighted_sum_shows_what_it_was_made_of():
    given = {"frequency_scale": 0.5, "multi_view_scale": 3.0, "student_channels": [2, 3], "teacher_channels": [4, 5]}
    first = repr(ADDLoss([0, 1.0], [1.0, 0], **given)).splitlines()[1].strip()
    assert repr(eval(f"ADDLoss({first})")).splitlines()[1].strip() == first
    assert all(f"{name}={value}" in first for name, value in given.items())
    assert "frequency_weights=[0, 1.0], multi_view_weights=[1.0, 0]" in first


@pytest.mark.parametrize(
    ("module", "name", "value", "options"),
    [
        (MultiViewLoss, "views", VIEWS, {}),
        (MultiViewLoss, "views", PROJECTIONS, {"slicing": "points"}),
        (SlicedWassersteinLoss, "projections", PROJECTIONS, {}),
    ],
    ids=["grid", "points", "sliced"],
)
def test_a_given_tensor_becomes_a_buffer(module, name, value, options):
    x, y = torch.randn(2, 2, 4, 3, 3)
    if module is SlicedWassersteinLoss:
        x, y = (maps.flatten(2).mT for maps in (x, y))
    loss = module(**{name: value}, **options)
    function = TWINS[module]
    expected = function(x, y, value) if module is SlicedWassersteinLoss else function(x, y, views=value, **options)
    assert torch.equal(loss(x, y), expected.mean() if module is SlicedWassersteinLoss else expected)
    assert torch.equal(loss(x, y), loss(x, y))  # nothing is drawn
    assert f"{name}=<torch.float32 {tuple(value.shape)}>" in repr(loss)

    other = module(**{name: torch.nn.functional.normalize(torch.randn_like(value), dim=-1)}, **options)
    assert not torch.equal(other(x, y), loss(x, y))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(x, y), loss(x, y)) and torch.equal(copy.deepcopy(loss)(x, y), loss(x, y))
    assert not list(loss.parameters()) and getattr(loss.to("meta"), name).device.type == "meta"
    moved = getattr(module(**{name: value}, **options).to("meta", torch.bfloat16), name)
    assert (moved.device.type, moved.dtype) == ("meta", torch.float32)
    assert getattr(other.bfloat16(), name).dtype == torch.float32 and torch.equal(getattr(other, name), value)
    assert torch.equal(other(x, y), expected.mean() if module is SlicedWassersteinLoss else expected)


def test_no_tensor_no_state():
    for module in (MultiViewLoss(views=3), SlicedWassersteinLoss(projections=3), FrequencyAttentionLoss()):
        assert not module.state_dict()


def test_a_generator_is_shown():
    assert "generator=<generator on cpu>" in repr(MultiViewLoss(generator=torch.Generator()))


BAD = [
    (MultiViewLoss, {"views": [1, 0, 0]}, TypeError, "views: expected an integer >= 1, got list"),
    (MultiViewLoss, {"views": torch.eye(4)}, ValueError, r"views: expected shape \(K, 3\) with K >= 1, got \(4, 4\)"),
    (MultiViewLoss, {"views": 2 * torch.eye(3)}, ValueError, "views: expected unit vectors, got lengths"),
    (MultiViewLoss, {"views": torch.eye(3).half()}, TypeError, "views: expected a float32 or float64 tensor"),
    (MultiViewLoss, {"views": torch.ones(3), "slicing": "points"}, ValueError, r"views: expected shape \(D, K\)"),
    (MultiViewLoss, {"bins": 2, "slicing": "points"}, ValueError, "bins: expected None with slicing='points'"),
    (MultiViewLoss, {"bins": 0}, ValueError, "bins: expected an integer >= 1, got 0"),
    (SlicedWassersteinLoss, {"projections": 0}, ValueError, "projections: expected an integer >= 1, got 0"),
    (SlicedWassersteinLoss, {"projections": torch.ones(3)}, ValueError, r"projections: expected shape \(D, K\)"),
    (SlicedWassersteinLoss, {"projections": torch.eye(3, requires_grad=True)}, ValueError, "without gradient"),
]


@pytest.mark.parametrize(("module", "options", "error", "message"), BAD, ids=[m[:30] for *_, m in BAD])
def test_bad_options_are_named_at_once(module, options, error, message):
    with pytest.raises(error, match=message):
        module(**options)
