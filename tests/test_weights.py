"""Weights that others saved: each format is made from a model, loaded back, and must give that model's very outputs."""

import collections
import pickle
import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from training.models import Detector, find_trained
from training.weights import load_into, read_weights


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


def without_counters(state):
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


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
    model = Detector("legacy_xception", weights=tmp_path / "xception.pth").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.backbone(images), xception(images))
    assert model.fit.unused == unused and not model.fit.missing and not model.fit.left_out and model.fit.head
    assert all(name in str(model.fit) for name in unused)


@pytest.mark.parametrize("zipped", [True, False])
def test_cadene_xception_with_flat_pointwise_kernels(xception, tmp_path, zipped):
    state = without_counters(xception.state_dict())
    state = {n: v[:, :, 0, 0] if n.endswith("pointwise.weight") else v for n, v in state.items()}
    assert sum(value.ndim == 2 for value in state.values()) == 35, "34 pointwise kernels and the head"
    state |= {"fc.weight": torch.rand(1000, 2048), "fc.bias": torch.rand(1000)}
    path = tmp_path / "xception-b5690688.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    model = Detector("legacy_xception", weights=path).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.backbone.forward_features(images), xception.forward_features(images))
    assert not model.fit.head and len(model.fit.left_out) == 2 and "fc.weight: (1000, 2048)" in model.fit.left_out[0]
    assert len(model.fit.missing) == 40 and all(n.endswith("num_batches_tracked") for n in model.fit.missing)
    with pytest.raises(ValueError, match="no two-class head"):
        find_trained(path, "legacy_xception")[0].load()


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
    model = Detector("resnet18", weights=tmp_path / "a.pth").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[2], source(images), rtol=1e-5, atol=1e-5)
    assert model.fit.complete


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_resnet_without_its_head(tmp_path, name):
    source = scrambled(getattr(torchvision.models, name)())
    save_file(source.state_dict(), tmp_path / "resnet.safetensors")
    model = Detector(name, weights=tmp_path / "resnet.safetensors").eval()
    own, head = model.backbone.state_dict(), {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, own[n]) for n, value in source.state_dict().items() if n not in head)
    source.fc = model.backbone.fc
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[2], source(images), rtol=1e-4, atol=1e-4)
    assert {text.partition(":")[0] for text in model.fit.left_out} == head and not model.fit.head


def test_names_of_the_head_follow_the_model(tmp_path):
    source = scrambled(timm.create_model("test_byobnet", num_classes=2))  # its head is called head.fc
    state = {n.replace("head.fc.", "last_linear."): v for n, v in source.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    model = timm.create_model("test_byobnet", num_classes=2).eval()
    fit = load_into(model, tmp_path / "a.pth")
    images = torch.randn(1, 3, 32, 32)
    assert fit.complete and torch.equal(model(images), source(images))


def test_a_missing_or_misshapen_tensor_is_refused_by_name(tmp_path):
    state = timm.create_model("test_byobnet", num_classes=2).state_dict()
    name = next(iter(state))
    for broken in ({n: v for n, v in state.items() if n != name}, state | {name: torch.zeros(7)}):
        torch.save(broken, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=f"1 tensors are missing or of another shape: {name}"):
            Detector("test_byobnet", weights=tmp_path / "a.pth")


class Dangerous:
    def __reduce__(self):
        return (open, (Dangerous.target, "w"))


def test_nothing_in_a_file_is_run(tmp_path):
    Dangerous.target = str(tmp_path / "written")
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Dangerous()}, tmp_path / "a.pth")
    assert list(read_weights(tmp_path / "a.pth")) == ["a"]
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("text.pth", b"hello"),
        ("empty.pth", b""),
        ("text.safetensors", b"hello"),
        ("zip.pth", b"PK\x05\x06" + bytes(18)),
        ("number.pth", 3),
        ("nothing.pth", {"epoch": 1}),
        ("model.pth", nn.Linear(1, 1)),
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
