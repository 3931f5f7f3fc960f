"""Weights that others saved: each format is made from a model, loaded back, and must give that model's very outputs."""

import collections
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from training.models.detector import Detector
from training.models.weights import load_into, read_torch, read_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def scrambled(model: nn.Module) -> nn.Module:
    """No tensor keeps the value that every new model has, so that one not loaded shows in the outputs."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01 * torch.randn_like(value))
    return model.eval()


@pytest.fixture(scope="module")
def xception():
    torch.manual_seed(1)
    return scrambled(timm.create_model("legacy_xception", num_classes=2))


def renamed(state, head, prefix=""):
    return {prefix + re.sub(r"^fc\.", f"{head}.", name): value for name, value in state.items()}


def deepfakebench(state):
    extra = {"backbone.adjust_channel.0.weight": torch.rand(512, 2048, 1, 1), "loss_func.centre": torch.rand(3)}
    return renamed(state, "last_linear", "backbone.") | extra, list(extra)


def faceforensics(state):
    return renamed(state, "last_linear.1", "model."), []


def data_parallel(state):
    return {"epoch": 3, "state_dict": renamed(state, "last_linear", "module.backbone.")}, []


@pytest.mark.parametrize("foreign", [deepfakebench, faceforensics, data_parallel])
def test_xception_of_other_projects_gives_the_same_outputs(xception, tmp_path, foreign):
    contents, unused = foreign(xception.state_dict())
    torch.save(contents, tmp_path / "xception.pth")
    model = Detector("legacy_xception", 64, weights=tmp_path / "xception.pth").eval()
    assert same_outputs(model.backbone, xception)
    assert model.fit.unused == unused and not model.fit.missing and not model.fit.left_out and model.fit.head
    assert all(name in str(model.fit) for name in unused)


@pytest.mark.parametrize("zipped", [True, False])
def test_cadene_xception_with_flat_pointwise_kernels(xception, tmp_path, zipped):
    state = {n: v for n, v in xception.state_dict().items() if not n.endswith("num_batches_tracked")}
    state = {n: v[:, :, 0, 0] if n.endswith("pointwise.weight") else v for n, v in state.items()}
    assert sum(value.ndim == 2 for value in state.values()) == 35, "34 pointwise kernels and the head"
    state |= {"fc.weight": torch.rand(1000, 2048), "fc.bias": torch.rand(1000)}
    path = tmp_path / "xception-b5690688.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    model = Detector("legacy_xception", 64, weights=path).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.backbone.forward_features(images), xception.forward_features(images))
    assert not model.fit.head and len(model.fit.left_out) == 2 and "fc.weight: (1000, 2048)" in model.fit.left_out[0]
    assert len(model.fit.missing) == 40 and all(n.endswith("num_batches_tracked") for n in model.fit.missing)


def test_released_add_resnet_with_its_scheduler_pickled_whole(tmp_path):
    source = scrambled(torchvision.models.resnet18(num_classes=2))
    optimizer = torch.optim.Adam(source.parameters())
    source(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, 10)
    # Then, the scheduler's state held a bound method, and with it the scheduler, the optimiser and its defaultdict.
    state = {"epoch": 1, "state_dict": source.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"lr_scheduler": scheduler.state_dict() | {"anneal_func": scheduler.get_lr}}, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)
    model = Detector("resnet18", 64, weights=tmp_path / "a.pth").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[2], source(images), rtol=1e-5, atol=1e-5)
    assert model.fit.complete


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_resnet_without_its_head(tmp_path, name):
    source = scrambled(getattr(torchvision.models, name)())
    save_file(source.state_dict(), tmp_path / "resnet.safetensors")
    model = Detector(name, 64, weights=tmp_path / "resnet.safetensors").eval()
    own, head = model.backbone.state_dict(), {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, own[n]) for n, value in source.state_dict().items() if n not in head)
    source.fc = model.backbone.fc
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[2], source(images), rtol=1e-4, atol=1e-4)
    assert {text.partition(":")[0] for text in model.fit.left_out} == head and not model.fit.head


def test_names_of_the_head_follow_the_model(small, tmp_path):
    state = {n.replace("head.fc.", "last_linear."): v for n, v in small.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    model, fit = loaded(tmp_path / "a.pth")
    assert fit.complete and same_outputs(model, small)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(2)
    return scrambled(timm.create_model("test_byobnet", num_classes=2))


def same_outputs(model, source):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return torch.equal(model(images), source(images))


def loaded(path, **options):
    model = timm.create_model("test_byobnet", num_classes=2).eval()
    return model, load_into(model, path, **options)


def other(name="test_byobnet", classes=2):
    torch.manual_seed(3)
    return scrambled(timm.create_model(name, num_classes=classes))


def before(state, prefix):
    return {prefix + name: value for name, value in state.items()}


class Hyperparameters:
    """As Lightning pickles them beside the weights: of a class that the reader does not have."""

    def __init__(self):
        self.lr, self.steps = 1e-3, {1, 2}


def cyclic(model):
    contents = {"state_dict": model.state_dict(), "epochs": []}
    contents["epochs"].append(contents)
    return contents


WORDS = ("net", "network", "model_ema", "state_dict_ema", "params", "weights")
KINDS = {
    "with an accuracy": lambda m: {"state_dict": m.state_dict(), "best_acc1": torch.tensor(91.5)},
    **{word: lambda m, word=word: {word: m.state_dict(), "epoch": 3, "args": Hyperparameters()} for word in WORDS},
    "Lightning": lambda m: {
        "state_dict": before(m.state_dict(), "net.model."),
        "hyper_parameters": Hyperparameters(),
        "callbacks": {Hyperparameters: {"best": torch.tensor(0.9)}},
    },
    "optimiser first": lambda m: {
        "optimizer": {"state": {i: {"exp_avg": p} for i, p in enumerate(m.parameters())}},
        "model": m.state_dict(),
    },
    "compiled": lambda m: torch.compile(m).state_dict(),
    "compiled within DataParallel": lambda m: before(m.state_dict(), "module._orig_mod."),
    "one stage compiled": lambda m: {
        name.replace("stages.1.", "stages.1._orig_mod."): value for name, value in m.state_dict().items()
    },
    "FSDP": lambda m: before(
        {n.replace("stages.2.", "stages.2._checkpoint_wrapped_module."): v for n, v in m.state_dict().items()},
        "_fsdp_wrapped_module.",
    ),
    "DataParallel": lambda m: nn.DataParallel(m).state_dict(),
    "AveragedModel": lambda m: torch.optim.swa_utils.AveragedModel(m).state_dict(),
    "beside a larger network": lambda m: {"netG": other(name="test_resnet").state_dict(), "netD": m.state_dict()},
    "beside its like without a head": lambda m: {"a": other(classes=0).state_dict(), "detector": m.state_dict()},
    "a list": lambda m: [3, m.state_dict()],
    "a tuple in a dictionary": lambda m: {"models": (m.state_dict(), None)},
    "a defaultdict": lambda m: collections.defaultdict(list, m.state_dict()),
    "the whole model": lambda m: m,
    "the whole model in DataParallel, with its optimiser": lambda m: {
        "optimizer": torch.optim.SGD(m.parameters(), 0.1),
        "model": nn.DataParallel(m),
    },
    "holding itself": cyclic,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_wraps_the_weights_they_give_the_same_outputs(small, tmp_path, kind, zipped):
    torch.save(KINDS[kind](small), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    model, fit = loaded(tmp_path / "a.pth")
    assert same_outputs(model, small) and fit.head and fit.loaded == fit.total
    assert fit.unused == (["n_averaged"] if kind == "AveragedModel" else []) and not fit.missing
    assert str(fit).splitlines()[0].endswith("its class 1 is fake")


def test_a_whole_model_whose_classes_are_gone(small, tmp_path):
    torch.save(small, tmp_path / "a.p", _use_new_zipfile_serialization=False)
    contents = (tmp_path / "a.p").read_bytes().replace(b"timm.models.byobnet", b"gone.models.byobnet")
    (tmp_path / "a.p").write_bytes(contents)
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "a.p", weights_only=False)
    model, fit = loaded(tmp_path / "a.p")
    assert same_outputs(model, small) and fit.complete


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(small, tmp_path, protocol):
    torch.save({"net": small.state_dict(), "hash": b"\xff"}, tmp_path / "a.pth", pickle_protocol=protocol)
    assert same_outputs(loaded(tmp_path / "a.pth")[0], small)
    assert read_torch(tmp_path / "a.pth")["hash"] == b"\xff"


def test_a_format_is_told_by_its_content_not_by_the_ending(small, tmp_path):
    save_file(small.state_dict(), tmp_path / "a.pth")
    torch.save(small.state_dict(), tmp_path / "a.safetensors")
    torch.save(small.state_dict(), tmp_path / "b.safetensors", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "a.safetensors", "b.safetensors"):
        model, fit = loaded(tmp_path / name)
        assert same_outputs(model, small) and fit.complete


@pytest.mark.parametrize(
    ("left", "taken", "said"),
    [
        ("state_dict", "state_dict_ema", "; averaged weights; not those under 'state_dict.', which fit as well"),
        ("model", "model_ema", "; averaged weights; not those under 'model.', which fit as well"),
        ("net", "ema.module", "; averaged weights; not those under 'net.', which fit as well"),
        ("a", "averaged_model", "; averaged weights; not those under 'a.', which fit as well"),
        ("teacher", "net", "'net.'; not those under 'teacher.', which fit as well"),
    ],
)
def test_of_networks_that_fit_equally_the_averaged_or_shortest_is_taken_and_said(small, tmp_path, left, taken, said):
    torch.save(before(other().state_dict(), f"{left}.") | before(small.state_dict(), f"{taken}."), tmp_path / "a.pth")
    model, fit = loaded(tmp_path / "a.pth")
    assert same_outputs(model, small) and said in str(fit)


@pytest.mark.parametrize("prefix", ["backbone.", "module.model.backbone."])
def test_a_head_beside_its_backbone(small, tmp_path, prefix):
    state = {n: v for n, v in small.state_dict().items() if not n.startswith("head.fc.")}
    outer = prefix.removesuffix("backbone.")
    head = {f"{outer}classifier.{kind}": small.state_dict()[f"head.fc.{kind}"] for kind in ("weight", "bias")}
    torch.save(before(state, prefix) | head, tmp_path / "a.pth")
    model, fit = loaded(tmp_path / "a.pth")
    assert same_outputs(model, small) and fit.complete and f"the head is {outer}classifier.weight" in str(fit)


def test_a_head_of_two_layers_is_left_out(small, tmp_path):
    state = {n: v for n, v in small.state_dict().items() if not n.startswith("head.fc.")}
    width = small.num_features
    hidden = {"fc.0.weight": torch.rand(width, width), "fc.0.bias": torch.rand(width)}
    torch.save(state | hidden | {"fc.2.weight": torch.rand(2, width), "fc.2.bias": torch.rand(2)}, tmp_path / "a.pth")
    fit = loaded(tmp_path / "a.pth")[1]
    assert not fit.head and len(fit.left_out) == 4 and "fc.2.weight" in str(fit)


@pytest.mark.parametrize("name", ["test_byobnet", "dla46x_c"])  # a linear head and a convolution
@pytest.mark.parametrize("one_output", [True, False])
@pytest.mark.parametrize("fake_class", [0, 1])
def test_class_1_is_fake_ever_after(tmp_path, name, one_output, fake_class):
    source = other(name=name, classes=1 if one_output else 2)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = timm.create_model(name, num_classes=2).eval()
    fit = load_into(model, tmp_path / "a.pth", fake_class=fake_class)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs, ours = source(images), model(images).softmax(1)
    if one_output:
        of_their_1 = theirs[:, 0].sigmoid()
        assumed = f"the one output is high for {('reals', 'fakes')[fake_class]}"
    else:
        of_their_1, assumed = theirs.softmax(1)[:, 1], f"its class {fake_class} is fake"
    torch.testing.assert_close(ours[:, 1], of_their_1 if fake_class else 1 - of_their_1, rtol=1e-5, atol=1e-6)
    assert fit.head and assumed in str(fit).splitlines()[0]


def test_a_missing_or_misshapen_tensor_is_refused_by_name(tmp_path):
    state = timm.create_model("test_byobnet", num_classes=2).state_dict()
    name = next(iter(state))
    for broken in ({n: v for n, v in state.items() if n != name}, state | {name: torch.zeros(7)}):
        torch.save(broken, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=f"1 tensors missing or of another shape or kind: {name}"):
            Detector("test_byobnet", 64, weights=tmp_path / "a.pth")


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "attack",
    [
        lambda path: Calls(open, path, "w"),
        lambda path: Calls(os.system, f"touch {path}"),
        lambda path: Calls(eval, f"open({path!r}, 'w')"),
        lambda path: Calls(getattr(Path(path), "touch")),  # noqa: B009 - which is pickled as a call of getattr
        lambda path: Calls(torch.save, 1, path),
    ],
)
def test_nothing_in_a_file_is_run(tmp_path, attack, zipped):
    written = tmp_path / "written"
    contents = {"state_dict": {"a": torch.ones(1)}, "extra": attack(str(written))}
    torch.save(contents, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert list(read_weights(tmp_path / "a.pth")) == ["state_dict.a"]
    assert not written.exists()


@pytest.mark.parametrize("target", [b"torch._utils\n_rebuild_tensor_v2", b"collections\nCounter"])
def test_a_file_changes_nothing_that_it_may_call(tmp_path, target):
    magic, version, system = (pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    attributes = pickle.dumps((None, {"__defaults__": (7,)}), 2)[:-1]
    attack = b"\x80\x02c" + target + b"\n" + attributes[2:] + b"b."
    (tmp_path / "a.pth").write_bytes(magic + version + system + attack + pickle.dumps([], 2))
    with pytest.raises(ValueError, match="a state for a function"):
        read_weights(tmp_path / "a.pth")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,) and not hasattr(collections.Counter, "__defaults__")


def test_tensors_with_attributes_are_tensors(tmp_path):
    value = torch.arange(3.0)
    value.tag = "first"
    torch.save({"a": value}, tmp_path / "a.pth")
    assert torch.equal(read_weights(tmp_path / "a.pth")["a"], value)


def test_a_script_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl"):
            file.writestr(f"a/{name}", pickle.dumps({}))
        file.writestr("a/version", "3")
    with pytest.raises(ValueError, match=r"a\.pt: expected .* got: a TorchScript program"):
        read_weights(tmp_path / "a.pt")


def test_plain_contents_come_back_as_they_were(tmp_path):
    contents = {
        "step": 3,
        "best": -float("inf"),
        "none": None,
        "words": ["a", ("é", 1 + 2j)],
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "no bytes": b"",
        "milestones": collections.Counter([30, 30, 60]),
        "default": collections.defaultdict(list, {1: [2]}),
        "ordered": collections.OrderedDict(a=1),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "rng": torch.arange(5, dtype=torch.uint8),
    }
    torch.save(contents, tmp_path / "a.pt")
    read = read_torch(tmp_path / "a.pt")
    assert torch.equal(read.pop("rng"), contents.pop("rng")) and read == contents
    assert {k: type(v) for k, v in read.items()} == {k: type(v) for k, v in contents.items()}


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("text.pth", b"hello"),
        ("empty.pth", b""),
        ("text.safetensors", b"hello"),
        ("zip.pth", b"PK\x05\x06" + bytes(18)),
        ("number.pth", 3),
        ("nothing.pth", {"epoch": 1}),
        ("page.pth", b"<!DOCTYPE html>"),
        ("counts.pth", collections.Counter("abc")),
    ],
)
def test_a_file_without_weights_is_refused(tmp_path, name, contents):
    path = tmp_path / name
    path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
    with pytest.raises(ValueError, match=rf"weights .*{name}: expected"):
        read_weights(path)
    with pytest.raises(ValueError, match="no file"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="fake_class: expected 0 or 1, got 2"):
        loaded(path, fake_class=2)
