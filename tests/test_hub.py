"""Models for and from the Hugging Face Hub, without a network: a folder that looks like a repository of it."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from training import export
from training.config import Config
from training.models import hub
from training.models.checkpoints import find_one_trained, save_weights
from training.models.detector import Detector

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one student and what it measured."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    (folder / "add").mkdir(parents=True)
    config = Config(name="tiny", image_size=32, student_model="test_byobnet", teacher_model="test_byobnet")
    (folder / "config.yaml").write_text(config.to_yaml())
    save_weights(Detector("test_byobnet", 32), folder / "add" / "model.safetensors")
    known, unknown = {"value": 0.9, "low": 0.85, "high": 0.93}, {"value": 0.25, "low": None, "high": None}
    models = {"ADD student": {"auc": known, "accuracy": unknown, "eer": {"value": None, "low": None, "high": None}}}
    said = {
        "models": models,
        "verdicts": ["It is so."],
        "facts": {"Finished": "2026-11-30 12:00", "Device": "2 threads"},
    }
    (folder / "results.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def repository(run, tmp_path, capsys):
    assert export.main([str(run / "add"), "--hub_folder", str(tmp_path / "repository")]) == 0
    assert "hf upload" in capsys.readouterr().out
    return tmp_path / "repository"


def same(trained, run) -> bool:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    first, second = trained.load(), find_one_trained(run / "add").load()
    with torch.no_grad():
        return torch.equal(first(first.pixels(images))[2], second(second.pixels(images))[2])


def test_the_folder_has_weights_configuration_and_card(repository, run):
    assert {path.name for path in repository.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    config = json.loads((repository / "config.json").read_text())
    assert config["architecture"] == "test_byobnet" and config["label_names"] == ["real", "fake"]
    assert config["image_size"] == 32 and config["mean"] == [0.5] * 3 and config["trained_on"] == "c40"
    text = (repository / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert card.data.library_name == "timm" and "deepfake-detection" in card.data.tags
    assert "| ADD student | 0.900 [0.850, 0.930] | 0.250 | – |" in text and "It is so." in text and "2026-11-30" in text
    assert "Method: add." in text and "A score is no proof." in text and "quality c40" in text
    assert same(find_one_trained(repository), run), "the folder is a checkpoint as it lies"


def test_a_model_on_the_hub_is_a_checkpoint(repository, run, monkeypatch):
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        return str(repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(find_one_trained("hf://some-body/a.model"), run)
    assert same(find_one_trained("hf://some-body/a.model@v1"), run)
    only = ["model.safetensors", "config.json"]
    assert asked == [("some-body/a.model", None, only), ("some-body/a.model", "v1", only)]


@pytest.mark.parametrize("address", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf://a b/c"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match=r"checkpoint hf://.*: expected hf://user/name or hf://user/name@revision"):
        hub.local(address)


def test_what_cannot_be_fetched_is_one_line(monkeypatch, tmp_path, capsys):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("No network.\nMore about it.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert export.main(["hf://a/b", "--out", str(tmp_path / "x.onnx")]) == 2
    assert capsys.readouterr().err == "error: checkpoint hf://a/b: cannot be fetched: No network.\n"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(
        ValueError, match=r"checkpoint hf://a/b: expected model\.safetensors in the repository, found none"
    ):
        hub.local("hf://a/b")


def test_a_model_without_figures_says_so(repository, tmp_path):
    again = tmp_path / "again"
    assert export.main([str(repository / "model.safetensors"), "--hub_folder", str(again)]) == 0
    assert "Nothing was measured where this model comes from." in (again / "README.md").read_text()


@pytest.mark.parametrize(
    "odd",
    [
        [],
        {},
        {"models": {}},
        {"models": ["a"]},
        {"models": {"a": {"auc": {}}}},
        {"models": {"a": {"auc": "x"}}},
        {"models": {"a": {"auc": {"value": 10**400, "low": None}}}},
    ],
)
def test_results_of_another_form_are_none(odd, run, tmp_path):
    shutil.copytree(run, mine := tmp_path / "run")
    (mine / "results.json").write_text(json.dumps(odd))
    assert export.main([str(mine / "add"), "--hub_folder", str(tmp_path / "out")]) == 0
    assert "Nothing was measured where this model comes from." in (tmp_path / "out" / "README.md").read_text()


def test_words_of_a_run_are_no_markup_of_a_card(run, tmp_path):
    shutil.copytree(run, mine := tmp_path / "run")
    found = json.loads((mine / "results.json").read_text())
    found |= {"models": {"<b>|a\n": found["models"].popitem()[1]}, "verdicts": ["<script>"]}
    (mine / "results.json").write_text(json.dumps(found))
    assert export.main([str(mine / "add"), "--hub_folder", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| &lt;b&gt;\\|a\\n | 0.900 [0.850, 0.930] |" in text and "<" not in text
