"""Eager calls go without the dispatcher: same numbers, and whoever has to see an operator does."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import add_ops
from add_ops import _dispatch

LABELS, VIEWS, THETA = torch.tensor([0, 1, 0]), add_ops.sample_views(3), add_ops.sample_projections(4, 5)
LOSSES = {
    "spectral_distance": lambda s, t: add_ops.spectral_distance(s, t, distance="cosine").sum(),
    "frequency_attention_loss": add_ops.frequency_attention_loss,
    "multi_view_attention": lambda s, t: (
        add_ops.multi_view_attention(s, VIEWS.to(s.device), 4)[..., 0] * t.sum()
    ).sum(),
    "multi_view_loss": lambda s, t: add_ops.multi_view_loss(
        s, t, LABELS.to(s.device), views=VIEWS.to(s.device), margin=0.3
    ),
    "project_and_sort": lambda s, t: (add_ops.project_and_sort(s.flatten(2).mT, THETA.to(s.device))[0] * t.sum()).sum(),
    "sliced_wasserstein": lambda s, t: add_ops.sliced_wasserstein(
        s.flatten(2).mT, t.flatten(2).mT[:, :9], THETA.to(s.device)
    ).sum(),
}


def pair():
    return tuple(torch.randn(3, 4, 3, 5, requires_grad=True) for _ in "st")


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_as_through_the_dispatcher(backend, name, monkeypatch):
    maps, results = pair(), []
    for plain in (_dispatch.plain, lambda *args: False):
        monkeypatch.setattr(_dispatch, "plain", plain)
        loss = LOSSES[name](*maps)
        results.append([loss, *torch.autograd.grad(loss, maps)])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    with torch.no_grad():
        assert not LOSSES[name](*maps).requires_grad


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names.add(func.name())
        return func(*args, **(kwargs or {}))


names = set()
OPERATORS = {
    "frequency_attention_loss": "spectral_distance",
    "multi_view_loss": "contrastive_loss",
    "multi_view_attention": "view_histogram",
    "sliced_wasserstein": "project_and_sort",
}


@pytest.mark.parametrize("name", OPERATORS)
def test_modes_and_tracers_see_the_operators(name):
    wanted = {f"add_ops::{OPERATORS[name]}", f"add_ops::{OPERATORS[name]}_backward"}
    maps = pair()
    names.clear()
    with Seen():
        torch.autograd.grad(LOSSES[name](*maps), maps)
    assert wanted <= names

    def gradients(*maps):
        return torch.autograd.grad(LOSSES[name](*maps), maps)

    graph = make_fx(gradients)(*maps)
    assert wanted <= {node.target.name() for node in graph.graph.nodes if hasattr(node.target, "name")}
    assert all(map(torch.equal, graph(*maps), gradients(*maps)))
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.add_ops, OPERATORS[name]).default.tags
    meta = [x.to("meta") for x in maps]
    assert add_ops.spectral_distance(*meta).shape == (3, 3, 5) and add_ops.spectral_distance(*meta).is_meta


@pytest.mark.filterwarnings("ignore")  # it is deprecated, and speaks of every comparison
def test_a_traced_graph_has_the_operator_and_no_constant_in_its_place():
    student, teacher = (x.detach() for x in pair())
    traced = torch.jit.trace(lambda s: add_ops.spectral_distance(s, teacher), student, check_trace=False)
    assert "add_ops::spectral_distance" in str(traced.graph)
    assert torch.equal(traced(2 * student), add_ops.spectral_distance(2 * student, teacher))


def test_plain_tensors_go_without_the_dispatcher():
    x = torch.zeros(1)
    assert _dispatch.plain(x, torch.nn.Parameter(x), "l2", 1.0) and not _dispatch.plain(x, x.to("meta"))


def test_a_sign_that_is_not_in_the_memory_counts(backend):
    maps, results = [torch.randn(1, 4, 2, 5, dtype=torch.complex64).conj().imag for _ in "st"], []
    for given in (maps, [x.resolve_neg() for x in maps]):
        given = [x.detach().requires_grad_() for x in given]
        loss = LOSSES["project_and_sort"](*given)
        results.append([loss, *torch.autograd.grad(loss, given)])
    assert maps[0].is_neg()
    torch.testing.assert_close(*results)


def test_a_subclass_of_a_tensor_sees_the_operators():
    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            names.add(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    names.clear()
    student, teacher = (x.detach().as_subclass(Logged) for x in pair())
    add_ops.frequency_attention_loss(student, teacher)
    assert any("spectral_distance" in name for name in names)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_gradient_after_the_block_is_by_the_backend_of_its_forward(backend, name):
    maps = pair()
    loss = LOSSES[name](*maps)
    other = "reference" if backend != "reference" else "cpp"
    if add_ops.backends().get(other, "available") != "available":
        pytest.skip("one backend only")
    with add_ops.use_backend(other):
        torch.autograd.grad(loss, maps[0])
    assert _dispatch.answered(f"{OPERATORS[name]}_backward")[0] == backend


def test_second_derivatives_of_the_loss_are_refused_by_name():
    maps = pair()
    (grad,) = torch.autograd.grad(LOSSES["frequency_attention_loss"](*maps), maps[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"spectral_distance_backward .*no second derivatives"):
        grad.sum().backward()


OF_ANY_SIZE = {
    "sum": lambda s, t, labels: add_ops.frequency_attention_loss(s, t),
    "mean": lambda s, t, labels: add_ops.frequency_attention_loss(s, t, reduction="mean"),
    "none": lambda s, t, labels: add_ops.frequency_attention_loss(s, t, reduction="none").sum(),
    "bins": lambda s, t, labels: add_ops.multi_view_loss(s, t, labels, views=VIEWS),
    "wasserstein": lambda s, t, labels: add_ops.multi_view_loss(s, t, labels, views=VIEWS, distance="wasserstein", p=1),
    "unlabelled": lambda s, t, labels: add_ops.multi_view_loss(s, t, views=VIEWS),
    "sliced": lambda s, t, labels: add_ops.sliced_wasserstein(s.flatten(2).mT, t.flatten(2).mT, THETA).sum(),
}


def batch_of(size, height):
    return *(torch.randn(size, 4, height, 5) for _ in "st"), torch.arange(size) % 2


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_one_compilation_serves_all_sizes(name, dynamic):
    """A number that is computed of shapes would be a constant in an operator's arguments, compiled anew for each."""
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(OF_ANY_SIZE[name], fullgraph=True, dynamic=dynamic, backend=counter)
    for size in range(3, 15):
        batch = batch_of(size, size + 2)
        torch.testing.assert_close(compiled(*batch), OF_ANY_SIZE[name](*batch))
    assert counter.frame_count <= 2


DRAWN = {
    "views": add_ops.MultiViewLoss(sampling="quasi"),
    "sampled": add_ops.MultiViewLoss(pairs="sampled", slicing="points", p=1),
    "projections": add_ops.SlicedWassersteinLoss(sampling="orthogonal"),
    "both": add_ops.ADDLoss([1.0], [1.0]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_numbers_are_drawn_for_symbolic_sizes(name):
    def loss(student, teacher, labels):
        if name == "both":
            return DRAWN[name]([student], [teacher], labels)
        if name == "projections":
            return DRAWN[name](student.flatten(2).mT, teacher.flatten(2).mT)
        return DRAWN[name](student, teacher, labels)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    for size in (3, 6):
        values = []
        batch = batch_of(size, size)
        for function in (loss, compiled):
            torch.manual_seed(size)
            values.append(function(*batch))
        torch.testing.assert_close(*values)


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_a_batch_of_any_size_is_exported(name):
    class Loss(torch.nn.Module):
        def forward(self, student, teacher, labels):
            return OF_ANY_SIZE[name](student, teacher, labels)

    any_size = {0: torch.export.Dim("batch", max=20)}
    shapes = {"student": any_size, "teacher": any_size, "labels": any_size}
    exported = torch.export.export(Loss(), batch_of(4, 3), dynamic_shapes=shapes).module()
    for size in (2, 7):
        batch = batch_of(size, 3)
        torch.testing.assert_close(exported(*batch), OF_ANY_SIZE[name](*batch))
