"""Files of weights that are damaged, hostile or something else: refused in one helpful line, or read all the same."""

import json
import pickle
import tarfile
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from training.models import detector, weights
from training.models.detector import Detector
from training.models.weights import AVERAGED, load_into, read_metadata, read_torch, read_weights

NAME = "stem.conv.weight"  # the first of test_byobnet


def network(seed=2, classes=2):
    torch.manual_seed(seed)
    return timm.create_model("test_byobnet", num_classes=classes).eval()


@pytest.fixture(scope="module")
def small():
    return network()


def loaded(path, **options):
    model = network(seed=9)
    return model, load_into(model, path, **options)


def holds(model, source):
    """Whether all that a file of ``source`` could have brought is there."""
    own = model.state_dict()
    return all(torch.equal(own[name], value) for name, value in source.state_dict().items())


def before(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def refusal(path, **options):
    with pytest.raises(ValueError, match=r"weights|prefix") as caught:
        loaded(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (lambda v: v * float("nan"), "values that are not finite"),
        (lambda v: v.double() * 1e300, "values that are not finite"),
        (lambda v: (v * 100).to(torch.int8), "int8, not floats"),
        (lambda v: v > 0, "bool, not floats"),
        (lambda v: v + 1j, "complex64, not floats"),
        (lambda v: v.to(torch.float8_e4m3fn), "float8_e4m3fn, not floats"),
        (lambda v: v.to(torch.float32).to(torch.uint16), "uint16, not floats"),
        (lambda v: torch.quantize_per_tensor(v.float(), 0.1, 0, torch.qint8), "qint8, not floats"),
        (lambda v: v.to_sparse(), "sparse, not dense"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_no_finite_floats_is_refused_by_name(small, tmp_path, odd, said):
    state = small.state_dict()
    assert NAME in state
    torch.save(state | {NAME: odd(state[NAME])}, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert f"1 tensors missing or of another shape or kind: {NAME}: {said}" in message


def test_a_head_that_is_not_finite_is_refused_too(small, tmp_path):
    bias = {"head.fc.bias": torch.tensor([0.0, float("inf")])}
    torch.save(small.state_dict() | bias, tmp_path / "a.pth")
    assert "head.fc.bias: values that are not finite" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_of_floats_are_the_same_numbers(small, tmp_path, dtype):
    state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in small.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    model, fit = loaded(tmp_path / "a.pth")
    assert fit.complete and all(torch.equal(v, state[n].to(v.dtype)) for n, v in model.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_odd_tensors_beside_the_weights_do_not_matter(small, tmp_path, zipped):
    odd = {
        "uint16": torch.ones(3, dtype=torch.uint16),
        "float8": torch.ones(3).to(torch.float8_e5m2),
        "sparse": torch.eye(3).to_sparse(),
        "storage": torch.ones(3).untyped_storage(),
        "nan": torch.full((3,), float("nan")),
    }
    torch.save(
        {"state_dict": small.state_dict(), "odd": odd}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped
    )
    model, fit = loaded(tmp_path / "a.pth")
    assert holds(model, small) and fit.complete
    assert torch.equal(read_weights(tmp_path / "a.pth")["odd.uint16"], odd["uint16"])


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_tensors_are_counted_before_they_are_read(tmp_path, monkeypatch, save):
    save({f"a{i}": torch.zeros(1) for i in range(30)}, tmp_path / "a")
    assert len(read_weights(tmp_path / "a")) == 30
    monkeypatch.setattr(weights, "MOST_TENSORS", 29)
    for name in ("load_file", "tarfile"):  # nor is anything else looked at
        monkeypatch.setattr(weights, name, None)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"^weights .*: expected .*, got: 3\d tensors, more than 29$"):
        read_weights(tmp_path / "a")


def test_a_bit_that_fell_over_in_a_zip_is_seen(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "a.pth")
    contents = bytearray((tmp_path / "a.pth").read_bytes())
    position = contents.index(small.state_dict()[NAME].numpy().tobytes()) + 1
    contents[position] ^= 4
    (tmp_path / "a.pth").write_bytes(contents)
    assert "a damaged file: a/data/" in refusal(tmp_path / "a.pth")


def test_a_zip_that_torch_wrote_without_sums_is_read(small, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(small.state_dict(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert holds(loaded(tmp_path / "a.pth")[0], small)


# ------------------------------------------------------------------------------------------------------ which network


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("encoder_q", "encoder_k"), 0),
        (("teacher", "student"), 0),
        (("student", "teacher"), 0),
        (("model", "emaModel"), 1),
        (("model", "modelEMA"), 1),
        (("EMAModel", "model"), 0),
    ],
)
def test_the_averaged_or_the_first_of_a_file_is_taken_and_prefix_takes_the_other(tmp_path, names, taken):
    networks = [network(seed) for seed in (4, 5)]
    torch.save({n: model.state_dict() for n, model in zip(names, networks, strict=True)}, tmp_path / "a.pth")
    model, fit = loaded(tmp_path / "a.pth")
    assert holds(model, networks[taken]) and fit.prefix == f"{names[taken]}."
    assert f"not those under '{names[1 - taken]}.', which fit as well: prefix= takes another" in str(fit)
    for given in (names[1 - taken], f"{names[1 - taken]}."):
        model, fit = loaded(tmp_path / "a.pth", prefix=given)
        assert holds(model, networks[1 - taken]) and fit.complete and "as well" not in str(fit)
    assert Detector("test_byobnet", 64, weights=tmp_path / "a.pth", prefix=given).fit.prefix == given
    assert f"prefix: expected one of the file's, '{names[0]}.', '{names[1]}.'" in refusal(
        tmp_path / "a.pth", prefix="c"
    )


def test_words_that_only_contain_ema_are_not_averaged():
    assert not any(map(AVERAGED.search, ("schema.", "emails.", "SCHEMA.", "swapped.", "cinema.net.")))


def test_averaged_parameters_without_the_statistics_are_passed_over_and_named(small, tmp_path):
    averaged = dict(network(4).named_parameters())
    torch.save({"model": small.state_dict(), "model_ema": averaged}, tmp_path / "a.pth")
    model, fit = loaded(tmp_path / "a.pth")
    assert holds(model, small)
    assert f"not the averaged ones under 'model_ema.': {len(averaged)} fit, not {fit.total}" in str(fit)
    assert "running_mean" in refusal(tmp_path / "a.pth", prefix="model_ema")


class Shared(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.features = nn.Sequential(model.stem, model.stages)
        self.backbone = model


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_module_with_shared_parts(small, tmp_path, zipped):
    torch.save(Shared(small), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    model, fit = loaded(tmp_path / "a.pth")
    assert holds(model, small) and fit.prefix == "backbone." and not fit.missing


def test_parts_that_are_shared_without_end_come_to_an_end(small, tmp_path):
    bomb = []
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save({"a": bomb, "net": small.state_dict()}, tmp_path / "a.pth")
    assert holds(loaded(tmp_path / "a.pth")[0], small)


# ---------------------------------------------------------------------------------------------------------- image size


def test_positions_of_another_image_size_are_resampled_as_timm_does_it(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=96, depth=1)
    nn.init.normal_(source.pos_embed)
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=64, depth=1)
    fit = load_into(model, tmp_path / "a.pth")
    source.set_input_size((64, 64))
    torch.testing.assert_close(model.pos_embed, source.pos_embed)
    assert "trained at another image size of 96 px, resampled: pos_embed" in str(fit) and fit.complete


def test_positions_that_timm_cannot_resample_are_refused_with_the_size(tmp_path):
    options = {"num_classes": 2, "depth": 1, "depth_token_only": 1}
    torch.save(timm.create_model("cait_xxs24_224", img_size=96, **options).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"pos_embed: \(1, 36, 192\), .* \(1, 16, 192\); trained .* size of 96 px"):
        load_into(timm.create_model("cait_xxs24_224", img_size=64, **options), tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------------- other things


def a_zip(path, inner):
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "best.pth")


def a_tar(path, inner, mode="w"):
    with tarfile.open(path, mode) as archive:
        archive.add(inner, "best.pth")


def numpy_state(path, model):
    torch.save({name: value.numpy() for name, value in model.state_dict().items()}, path)


WRITE = {
    "LFS": (lambda p, _: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "git lfs pull"),
    "page": (lambda p, _: p.write_text("\n<!DOCTYPE html><html>"), "a page of the web, not the file"),
    "JSON": (lambda p, _: p.write_text(json.dumps({"metadata": {}, "weight_map": {}}, indent=2)), "JSON, not weights"),
    "text": (lambda p, _: p.write_text("train: 3\n"), "text, not weights"),
    "pickle": (lambda p, m: p.write_bytes(pickle.dumps(m.state_dict())), "a plain pickle: .* torch.save"),
    "arrays": (lambda p, m: p.write_bytes(pickle.dumps({"a": m.state_dict()[NAME].numpy()})), "a plain pickle"),
    "NumPy": (numpy_state, "found none; arrays of NumPy .* torch.from_numpy"),
    "zip": (lambda p, _: a_zip(p, p.with_name("good")), "an archive of best.pth: unpack it"),
    "tar": (lambda p, _: a_tar(p, p.with_name("good")), "an archive: unpack it"),
    "tar.gz": (lambda p, _: a_tar(p, p.with_name("good"), "w:gz"), "an archive: unpack it"),
    "half a zip": (lambda p, _: p.write_bytes(p.with_name("good").read_bytes()[:5000]), "not downloaded to its end"),
}


@pytest.mark.parametrize("kind", WRITE)
def test_what_is_taken_for_weights_is_called_by_its_name(small, tmp_path, kind):
    write, said = WRITE[kind]
    torch.save(small.state_dict(), tmp_path / "good")
    write(tmp_path / "a.pth", small)
    with pytest.raises(ValueError, match=rf"^weights .*a\.pth: expected .*{said}"):
        loaded(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"__metadata__": {"a": "b"}}, {"a": "b"}),
        ({}, {}),
        ({"__metadata__": "x"}, {}),
        ({"__metadata__": ["x"]}, {}),
        ({"__metadata__": {"a": 1}}, {}),
        (["x"], {}),
        ('{"a":' * 9999, {}),
        ('{"__metadata__"', {}),
    ],
)
def test_metadata_are_words_or_none(tmp_path, header, told):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    for length in (len(text), 0, 2**63):
        (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + text)
        assert read_metadata(tmp_path / "a") == (told if length == len(text) else {})
    torch.save({}, tmp_path / "a")
    assert read_metadata(tmp_path / "a") == {}


def test_names_of_a_file_reach_no_terminal(small, tmp_path):
    state = before(small.state_dict(), "a\n\x1b[2J.")
    torch.save(
        state | {"a\n\x1b[2J.b\r" + "x" * 5000: torch.ones(1), "a\n\x1b[2J.\ud800": torch.ones(1)}, tmp_path / "a"
    )
    model, fit = loaded(tmp_path / "a")
    assert holds(model, small) and len(fit.unused) == 2
    lines = str(fit).split("\n")
    assert len(lines) == 2 and all(map(str.isprintable, lines)) and len(lines[1]) < 400 and r"\x1b[2J" in lines[0]
    save_file({f"\x1b{'y' * 999}.{n}": v[:0].clone() for n, v in small.state_dict().items() if v.ndim}, tmp_path / "b")
    message = refusal(tmp_path / "b")
    assert message.isprintable() and len(message) < 1500 and len(refusal(tmp_path / "a", prefix="\n" * 999)) < 900


def test_pretrained_without_a_network_names_the_way_out(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("We couldn't connect to the hub\nand more")
        return create(name, **options)

    monkeypatch.setattr(detector.timm, "create_model", offline)
    with pytest.raises(
        ValueError, match=r"no pretrained weights of 'test_byobnet'.*weights=FILE.*couldn't connect"
    ) as e:
        Detector("test_byobnet", 64, pretrained=True)
    assert "\n" not in str(e.value)


def test_a_storage_is_its_bytes(tmp_path):
    torch.save({"a": torch.ones(2).untyped_storage()}, tmp_path / "a")
    assert bytes(read_torch(tmp_path / "a")["a"].untyped()) == torch.ones(2).numpy().tobytes()
