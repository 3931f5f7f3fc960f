"""The examples run as they stand."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from skimage import io

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch, one_thread):
    """Runs an example on something small, in this process; returns its globals and its picture."""

    def run(name: str, *arguments: str) -> tuple[dict, np.ndarray]:
        monkeypatch.setattr(sys, "argv", [name, *arguments, str(tmp_path / "result.png")])
        return runpy.run_path(str(EXAMPLES / name)), io.imread(tmp_path / "result.png")

    return run


def test_colour_transfer_brings_the_colours_together(example, tmp_path, capsys):
    generator = np.random.default_rng(0)
    for name, offset, size in (("picture.png", 0, (40, 60, 3)), ("colours.png", 120, (30, 30, 3))):
        picture = generator.integers(0, 100, size, dtype=np.uint8) + np.uint8(offset)
        io.imsave(tmp_path / name, picture, check_contrast=False)
    _, picture = example("colour_transfer.py", str(tmp_path / "picture.png"), str(tmp_path / "colours.png"))
    distances = [float(value) for value in re.findall(r"distance (\S+)", capsys.readouterr().out)]
    assert len(distances) == 4 and distances[0] > 0.1 and distances[-1] < 0.1 * distances[0]
    assert picture.ndim == 3


def all_learn(distil) -> bool:
    gradients = [parameter.grad for parameter in distil.adapters.parameters()]
    return bool(gradients) and all(gradient.abs().sum() > 0 for gradient in gradients)


def test_any_two_timm_networks_are_distilled(example):
    found, picture = example("distil_timm.py", "test_resnet", "test_byobnet", "2")
    assert len(found["history"]) == 3 and all(min(values) > 0 for values in found["history"].values())
    assert found["history"]["student: ADD, scaled"][0] == pytest.approx(1)
    assert all_learn(found["distil"]) and picture.std() > 0


def test_a_task_of_timm_distils_and_keeps_to_what_timm_asks_of_it(example):
    found, picture = example("timm_task.py", "test_resnet", "test_byobnet", "2")
    task, row = found["task"], found["history"][-1]
    terms = {name: value for name, value in row.items() if "/" in name}
    assert len(terms) == 6 and all(value > 0 for value in terms.values()) and picture.std() > 0
    assert row["loss"] == pytest.approx(row["task_loss"] + 1e-3 * sum(terms.values()), rel=1e-5)
    student, distil = task.trainable_module.student, task.trainable_module.projection
    assert all_learn(distil) and all(parameter.grad is None for parameter in task.teacher.parameters())
    assert task.get_eval_model() is student and not task.teacher.training
    assert task.get_checkpoint_state()["task_state"]["projection"].keys() == distil.state_dict().keys()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert 30 <= len(path.read_text().splitlines()) <= 60


def test_a_models_attention_and_gap_are_drawn(example):
    found, picture = example("look_inside.py", "test_resnet", "", "")
    assert len(found["maps"]) == 4 and picture.std() > 0
    line = found["axes"][-1].lines[0].get_ydata()
    assert (line >= 0).all() and line[-1] > line[0], "JPEG takes high frequencies"
