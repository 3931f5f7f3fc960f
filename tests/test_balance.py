"""training/models/balance.py, and what it gives whoever trains a new backbone at a new size."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from test_training import without_pictures

from training.config import Config
from training.fit import new_accelerator, new_model
from training.models.balance import Balance
from training.models.checkpoints import Progress, load_checkpoint, save_checkpoint
from training.models.distillers import DISTILLERS
from training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def accelerator() -> Accelerator:
    return new_accelerator(Config())


def terms_of(step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two kinds at very different scales, and the cross-entropy, of a batch."""
    values = {"frequency/layer2": 1e6 * (step + 1), "frequency/layer3": 3e6, "multi_view/layer2": 1e-3 * (step + 2)}
    return {name: torch.tensor(value) for name, value in values.items()}, torch.tensor(0.5 + 0.1 * step)


def test_every_kind_starts_at_its_share_of_the_cross_entropy_and_keeps_its_factor(accelerator):
    balance = Balance(4.0, 3, accelerator)
    for step in range(3):
        assert balance.factors == {}
        terms, cross_entropy = terms_of(step)
        scaled = balance(terms, cross_entropy)
        assert float(scaled["multi_view/layer2"]) == pytest.approx(2 * float(cross_entropy))
        both = scaled["frequency/layer2"] + scaled["frequency/layer3"]
        assert float(both) == pytest.approx(2 * float(cross_entropy))
        assert float(scaled["frequency/layer3"] / scaled["frequency/layer2"]) == pytest.approx(3 / (step + 1))
        found = balance.step()
    mean_cross_entropy = (0.5 + 0.6 + 0.7) / 3
    assert found == balance.factors
    assert balance.factors["frequency"] == pytest.approx(2 * mean_cross_entropy / (5e6))
    assert balance.factors["multi_view"] == pytest.approx(2 * mean_cross_entropy / 3e-3)
    before = dict(balance.factors)
    terms, cross_entropy = terms_of(9)
    scaled = balance(terms, cross_entropy)
    assert float(scaled["frequency/layer3"]) == pytest.approx(3e6 * before["frequency"])
    assert balance.step() == {} and balance.factors == before


def test_no_balance_changes_no_bit(accelerator):
    terms, cross_entropy = terms_of(0)
    balance = Balance(0.0, 1, accelerator)
    assert balance(terms, cross_entropy) is terms
    assert balance.step() == {} and balance.factors == {}


def test_batches_without_terms_are_not_measured(accelerator):
    balance = Balance(1.0, 2, accelerator)
    assert balance({}, torch.tensor(0.7)) == {}
    assert balance.step() == {}
    assert balance.step() == {}, "nothing was seen: it measures on"
    zero = {"kd": torch.tensor(0.0)}
    assert balance(zero, torch.tensor(0.7))["kd"] == 0
    balance.step()
    assert balance.step() == {}, "a term of 0 has no scale: it measures on"
    balance({"kd": torch.tensor(2.0)}, torch.tensor(0.7))
    balance.step()
    assert balance.step() == {"kd": pytest.approx(1.4 / 2.0)}


def test_gradients_are_those_of_the_scaled_terms_alone(accelerator):
    weight = torch.tensor(3.0, requires_grad=True)
    cross_entropy = torch.tensor(2.0, requires_grad=True)
    term = Balance(1.0, 5, accelerator)({"kd": weight**2}, cross_entropy)["kd"]
    term.backward()
    assert float(weight.grad) == pytest.approx(2 / 9 * 6)  # the factor 2 / 9 is a constant
    assert cross_entropy.grad is None


# The paper's weights on networks, sizes and precisions that they were not made for.
NETWORKS = {
    "resnet18": 64,
    "resnet50": 64,
    "legacy_xception": 96,
    "efficientnet_b0": 128,
    "deit_tiny_patch16_224": 64,
}


LARGE = ("resnet50", "legacy_xception")  # tens of seconds on one thread


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] if name in LARGE or dtype == torch.bfloat16 else [])
        for name in NETWORKS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_terms_are_of_the_size_of_cross_entropy_for_any_network(name, precision, accelerator):
    size = NETWORKS[name]
    config = Config(image_size=size, balance=1.0, balance_steps=4)
    teacher, student = (new_model(replace(config, seed=seed), name, accelerator.device) for seed in range(2))
    generator = torch.Generator().manual_seed(2)

    def images() -> torch.Tensor:
        return torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8, generator=generator)

    with torch.no_grad():
        for _ in range(3):  # a trained teacher has seen images: its batch statistics are theirs
            teacher.train()(teacher.pixels(images()))
    teacher.eval()
    distiller = DISTILLERS["add"](config, student.channels, teacher.channels)
    balance = Balance(config.balance, config.balance_steps, accelerator)
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], 2e-4)
    cross_entropies, totals = [], {"frequency": [], "multi_view": []}
    for _ in range(8):
        raw, labels = images(), torch.tensor([0, 1, 0, 1])
        compressed = raw.float().unflatten(1, (-1, 2)).mean(2, keepdim=True).expand(-1, -1, 2, -1, -1).flatten(1, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            features, _, logits = student(student.pixels(compressed))
            with torch.no_grad():
                targets, _, teacher_logits = teacher(teacher.pixels(raw))
        targets = [target.float() for target in targets]
        cross_entropy = F.cross_entropy(logits.float(), labels)
        terms = balance(distiller(features, targets, logits, teacher_logits.float(), labels), cross_entropy)
        loss = cross_entropy + sum(terms.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        assert math.isfinite(loss.item())
        cross_entropies.append(cross_entropy.item())
        for kind, values in totals.items():
            values.append(sum(term for key, term in terms.items() if key.startswith(kind)).item())
    assert set(balance.factors) == {"frequency", "multi_view"}
    for kind, values in totals.items():
        ratio = sum(values[4:]) / sum(cross_entropies[4:])
        assert 0.1 < ratio < 10, f"{kind} is {ratio:.3g} times cross-entropy after balancing, expected about 0.5"


TINY = {
    "image_size": 32,
    "teacher_model": "test_byobnet",
    "student_model": "test_byobnet",
    "student_from_teacher": False,
    "train_clips": 16,
    "val_clips": 8,
    "test_clips": 8,
    "batch_size": 8,
    "epochs": 1,
    "teacher_epochs": 1,
    "balance": 1.0,
    "balance_steps": 3,
    "log_every": 1,
    "students": ["add", "kd"],
    "bootstrap": 10,
}


@without_pictures()
def test_factors_are_logged_printed_and_kept(tmp_path, accelerator, capsys):
    folder = train(Config(out=str(tmp_path), cache=str(tmp_path / "cache"), **TINY))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    factors = {row["model"]: row for row in rows if any(key.startswith("factor/") for key in row)}
    assert set(factors) == {"add", "kd"} and all(row["step"] == 3 for row in factors.values())
    assert set(factors["add"]) == {"model", "step", "factor/frequency", "factor/multi_view"}
    printed = capsys.readouterr().out
    assert f"frequency × {factors['add']['factor/frequency']:.3g}" in printed
    first = next(row for row in rows if row["model"] == "kd" and row["step"] == 1)
    assert first["kd"] == pytest.approx(first["cross_entropy"], rel=1e-5)


def test_a_checkpoint_taken_while_measuring_goes_on_with_the_same_factors(tmp_path, accelerator):
    config = Config(name="x", out=str(tmp_path))
    model = new_model(Config(image_size=32), "test_byobnet", accelerator.device)
    optimizer = torch.optim.Adam(model.parameters())
    parts = {
        "model": model,
        "distiller": torch.nn.Identity(),
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
    }

    def measured(interrupted_after: int) -> dict[str, float]:
        balance = Balance(2.0, 4, accelerator)
        for step in range(4):
            balance(*terms_of(step))
            balance.step()
            if step == interrupted_after:
                folder = tmp_path / str(interrupted_after)
                save_checkpoint(folder, accelerator, config, Progress(step=step + 1), parts | {"balance": balance})
                balance = Balance(2.0, 4, accelerator)
                load_checkpoint(next(folder.glob("checkpoint-*")), accelerator, parts | {"balance": balance})
        return balance.factors

    assert len({json.dumps(measured(after)) for after in (0, 2, 3, 99)}) == 1
