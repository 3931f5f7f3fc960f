"""The training scroll end to end, on a set so small that only the machinery is tested."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from closeness import relative_error
from torch.multiprocessing import start_processes

import add_ops
from training import fit as loop
from training import train as scroll
from training.config import Config
from training.models import checkpoints
from training.models.detector import Detector
from training.models.distillers import DISTILLERS, NoDistillation
from training.models.weights import read_weights
from training.report import page
from training.report.log import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("one_thread")

ON_CPUS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def tiny(cache: str, out: Path, **changes) -> Config:
    values = dict(
        name="tiny",
        out=str(out),
        cache=cache,
        image_size=32,
        train_clips=20,
        val_clips=8,
        test_clips=12,
        batch_size=8,
        student_model="test_byobnet",
        teacher_model="test_byobnet",
        epochs=1,
        teacher_epochs=1,
        validations_per_epoch=1,
        log_every=1,
        bootstrap=20,
        multi_view_weights=[0, 0, 1.0, 0],
        frequency_weights=[0, 1.0, 0, 0],
    )
    return Config(**(values | changes))


@contextmanager
def without_pictures() -> Iterator[None]:
    """Reports written inside have no pictures, which take longer than to train a network so small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_figures", lambda *_: {})
        yield


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_main_job_leaves_every_artefact(cache, tmp_path, capsys):
    config = tiny(cache, tmp_path)
    folder = scroll.train(config)
    results = json.loads((folder / "results.json").read_text())
    assert list(results["models"]) == ["teacher on raw", "teacher on compressed", "CE student", "ADD student"]
    for values in results["models"].values():
        assert set(values) == {"accuracy", "auc", "ap", "eer", "precision", "recall", "f1", "ece", "recall_at_1"}
        assert 0 <= values["auc"]["value"] <= 1 and values["auc"]["low"] is values["auc"]["high"] is None
    difference = results["differences"]["ADD student − CE student"]["auc"]
    gap = results["models"]["ADD student"]["auc"]["value"] - results["models"]["CE student"]["auc"]["value"]
    assert difference["value"] == pytest.approx(gap)
    page = (folder / "report.html").read_text()
    said = "The test split has 6 sources with reals and 6 with fakes; below 10 of either no interval is given."
    assert results["verdicts"][0] == said and "4 photographs" in results["verdicts"][1] and said in page
    assert "ADD student" in page and page.count("data:image/png;base64,") == 14
    assert page.index("The idea, on these frames") < page.index("Results on the test split")
    assert 'src="http' not in page and "<script" not in page, "the report must be self-contained"
    assert {path.stem for path in (folder / "figures").glob("*.png") if "dark" not in path.stem} == {
        "idea",
        "samples",
        "curves",
        "roc",
        "spectrum",
        "attention",
        "views",
    }
    for role in ("teacher", "none", "add"):
        assert (folder / role / "model.safetensors").exists() and len(list((folder / role).glob("checkpoint-*"))) <= 2
        assert list((folder / "tensorboard" / role).glob("events*"))
        assert not list((folder / role).glob(".*")), "temporary files were left behind"
    logged = set().union(*(row for row in rows(folder) if row["model"] == "add"))
    assert {"cross_entropy", "frequency/layer2", "multi_view/layer3", "loss", "lr", "val_auc"} <= logged
    assert not {name for name in logged if name.endswith(("layer1", "layer4"))}, "a weight of 0 must leave no term"
    assert "report.html" in capsys.readouterr().out
    teacher = (folder / "teacher" / "model.safetensors").rename(tmp_path / "teacher.safetensors")
    with without_pictures():
        scroll.train(tiny(cache, tmp_path, students=["none"], teacher_checkpoint=str(teacher)))
    assert not (folder / "teacher").exists(), "a given teacher is not trained"
    assert len(list(tmp_path.glob("tiny.*"))) == 1, "the earlier run must be moved aside, not overwritten"


@without_pictures()
def test_compiled_kernels_give_the_loss_curve_of_the_reference(cache, tmp_path):
    if add_ops.backends()["cpp"] != "available":
        pytest.skip("the C++ module is not built")
    curves = {}
    for backend in ("reference", "cpp"):
        with add_ops.use_backend(backend):
            folder = scroll.train(tiny(cache, tmp_path / backend, students=["add"], train_clips=40, epochs=2))
        curves[backend] = [row for row in rows(folder) if row["model"] == "add" and "loss" in row]
    terms = ("loss", "cross_entropy", "frequency/layer2", "multi_view/layer3")
    reference, compiled = (torch.tensor([[row[term] for term in terms] for row in curves[b]]) for b in curves)
    assert len(reference) == 20 and bool(reference[:, 2].std() > 0.01 * reference[:, 2].mean()), "a curve, not a line"
    assert relative_error(compiled, reference) < 1e-3  # rounding grows from step to step
    assert relative_error(compiled[0], reference[0]) < 1e-6


class Interrupted(Exception):
    pass


@contextmanager
def breaks_off(role: str, checkpoints: int) -> Iterator[None]:
    """A training inside ends right after it has written so many checkpoints of a model, and must."""
    save, saved = loop.save_checkpoint, []

    def save_then_stop(folder, *rest):
        save(folder, *rest)
        saved.append(folder.name)
        if saved.count(role) == checkpoints:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_then_stop)
        with pytest.raises(Interrupted):
            yield


@without_pictures()
def test_interrupted_and_resumed_equals_uninterrupted(cache, tmp_path):
    changes = dict(epochs=2, students=["add"], checkpoint_every=1, accumulate=2, train_clips=40, warmup_epochs=0.5)
    whole = scroll.train(tiny(cache, tmp_path / "a", **changes))
    with breaks_off("add", 7):  # within the second epoch
        scroll.train(tiny(cache, tmp_path / "b", **changes))
    torch.manual_seed(12345)  # whatever happened to the global generator in between
    resumed = scroll.train(tiny(cache, tmp_path / "b", resume=True, **changes))

    kept = [sorted((folder / "add").glob("checkpoint-*"))[-1] for folder in (whole, resumed)]
    assert kept[0].name == kept[1].name == "checkpoint-00000010"
    weights = [read_weights(path / "model.safetensors") for path in kept]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    states = [torch.load(path / "state.pt", weights_only=True)["optimizer"]["state"] for path in kept]
    assert all(torch.equal(value["exp_avg"], states[1][key]["exp_avg"]) for key, value in states[0].items())
    timeless = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(f)] for f in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]


class Poisoned(NoDistillation):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, student_features, *_):
        self.calls += 1
        ok = student_features[1].mean()
        return {"frequency/layer2": ok / 0 * 0 if self.calls == 3 else ok, "multi_view/layer3": ok}

    needs_teacher = True


def test_nan_loss_stops_and_names_term_and_step(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(DISTILLERS, "poisoned", lambda *_: Poisoned())
    config = tiny(cache, tmp_path, students=["poisoned"], log_every=100)
    with pytest.raises(NonFiniteLoss, match=r"step 3: frequency/layer2 = nan$"):
        scroll.train(config)
    assert not list((config.folder / "poisoned").glob("checkpoint-*")), "no checkpoint of a broken model"


def test_other_student_architecture_with_adapter(cache, tmp_path):
    config = tiny(
        cache, tmp_path, student_model="test_efficientnet", students=["add"], frequency_weights=[0, 1.0, 0.5, 0]
    )
    folder = scroll.train(config)
    student, checkpoint = Detector("test_efficientnet", 32), next((folder / "add").glob("checkpoint-*"))
    student.load_state_dict(read_weights(folder / "add" / "model.safetensors"))  # strict: no adapter was exported
    adapters = torch.load(checkpoint / "state.pt", weights_only=True)["distiller"]
    assert [tuple(value.shape) for value in adapters.values()] == [(64, 32, 1, 1), (128, 48, 1, 1)]


def _train_as_one_of_two(rank: int, config: Config) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    AcceleratorState._reset_state(reset_partial_state=True)  # what the tests before have settled
    with without_pictures():
        scroll.train(config)


def train_in_two_processes(config: Config) -> None:
    """As torchrun does, but for the imports, which take it far longer than to train a small network."""
    how = "spawn" if torch.accelerator.is_available() else "fork"
    with socket.create_server(("127.0.0.1", 0)) as free:
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    with mock.patch.dict(os.environ, about | ON_CPUS):
        start_processes(_train_as_one_of_two, (config,), nprocs=2, start_method=how)


def train_by_torchrun(config: Config) -> None:
    file = config.folder.parent / "ddp.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", scroll.__file__]
    environment = os.environ | ON_CPUS
    words = [*command, "--config", str(file)]
    done = subprocess.run(words, cwd=file.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@without_pictures()
@pytest.mark.parametrize("train", [train_in_two_processes, pytest.param(train_by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_the_model_of_one(cache, tmp_path, train):
    """Half the batch each: the samples, views and steps of one process, so that where nothing in the network or the
    loss depends on who shares a batch, the weights are the same but for rounding."""
    network = dict(teacher_model="test_convnext", student_model="test_convnext")  # normalises each position by itself
    changes = dict(students=["add"], contrast=0.0, warmup_epochs=0.5, test_clips=14, bootstrap=5) | network
    one, two = tiny(cache, tmp_path / "one", **changes), tiny(cache, tmp_path / "two", batch_size=4, **changes)
    scroll.train(one)
    train(two)
    checkpoint = checkpoints.last_checkpoint(two.folder / "add")
    assert {path.name for path in checkpoint.glob("rng-*")} == {"rng-0.pt", "rng-1.pt"}
    logged = [(row["model"], row["step"], "val_auc" in row) for row in rows(two.folder)]
    assert len(set(logged)) == len(logged) == len(rows(one.folder)), "the log is written once"
    assert json.loads((two.folder / "results.json").read_text())["models"]["ADD student"]["auc"]["value"] is not None
    for role in ("teacher", "add"):
        a, b = (read_weights(checkpoints.last_checkpoint(c.folder / role) / checkpoints.WEIGHTS) for c in (one, two))
        flat = [torch.cat([value.double().flatten() for value in weights.values()]) for weights in (a, b)]
        assert relative_error(flat[1], flat[0]) < 1e-5, role  # 1e-7; with views of their own 2e-3


def test_one_class_validation_is_refused(cache, tmp_path, monkeypatch):
    splits = scroll.load_splits(tiny(cache, tmp_path))
    splits["val"].labels = splits["val"].labels * 0
    monkeypatch.setattr(scroll, "load_splits", lambda _: splits)
    with pytest.raises(ValueError, match="validation split has one class"):
        scroll.train(tiny(cache, tmp_path))


def test_one_class_test_split_is_reported_as_undefined(cache, tmp_path, monkeypatch):
    splits = scroll.load_splits(tiny(cache, tmp_path))
    splits["test"].labels = splits["test"].labels * 0
    monkeypatch.setattr(scroll, "load_splits", lambda _: splits)
    monkeypatch.setattr(page.probe, "paired", lambda *_: ())  # so that only results are drawn, no features
    folder = scroll.train(tiny(cache, tmp_path, students=["none"]))
    results = json.loads((folder / "results.json").read_text())
    assert results["models"]["CE student"]["auc"]["value"] is None
    assert not math.isnan(results["models"]["CE student"]["accuracy"]["value"])
    assert "undefined" in (folder / "report.html").read_text()
