"""The loop that trains a model: what it shows to whom, when it stops, what it keeps; on networks that take notes."""

import json
import math
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from training import fit as loop
from training.config import Config
from training.data.loader import Split
from training.models.distillers import DISTILLERS, NoDistillation
from training.models.weights import read_weights
from training.report.log import Log, NonFiniteLoss, read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

RAW = np.random.default_rng(0).integers(0, 100, (16, 8, 8, 3), dtype=np.uint8)
PLACE = {image.tobytes(): index for index, image in enumerate(RAW)}  # what a raw picture shows, by its pixels


def splits() -> dict[str, Split]:
    """Pixels tell the quality: 0…99 raw, 100…199 c40."""
    twins = np.arange(16) // 2
    return {name: Split({"raw": RAW, "c40": RAW + 100}, np.arange(16) % 2, twins, twins) for name in ("train", "val")}


class Network(nn.Module):
    """What the loop asks of a detector; notes the images, and before each training step its own weights."""

    channels, name, image_size, mean, std = (2, 2, 2, 2), "none", 8, (0.5,) * 3, (0.5,) * 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone, self.head = nn.Conv2d(3, 2, 1), nn.Linear(2, 2)
        self.learnt, self.judged, self.weights, self.modes = [], [], [], set()

    def pixels(self, images):
        self.modes.add((self.training, torch.is_grad_enabled()))
        (self.learnt if torch.is_grad_enabled() else self.judged).append(images.clone())
        return images.permute(0, 3, 1, 2).float() / 100

    def forward(self, images, *, head_only=False):
        if self.training:
            self.weights.append({name: value.clone() for name, value in self.state_dict().items()})
        with torch.set_grad_enabled(torch.is_grad_enabled() and not head_only):
            maps = self.backbone(images)
        return [maps] * 4, maps.mean((2, 3)), self.head(maps.mean((2, 3)))


class One(NoDistillation):
    """A term of 1 at every batch."""

    needs_teacher = True

    def forward(self, student, *_):
        return {"one": 1 + 0 * student[0].sum()}


def train(folder, role="kd", **changes) -> tuple[Network, Network, list[dict]]:
    """A model, the teacher that it had, and the log; four steps an epoch."""
    values = dict(name="run", out=str(folder), image_size=8, batch_size=4, flip=False, log_every=1, epochs=1)
    config = Config(**(values | dict(validations_per_epoch=1) | changes))
    model, teacher, log = Network(), Network().requires_grad_(False).eval(), Log(config.folder, True)
    teacher.channels = (3, 3, 3, 3)
    given = None if role == "teacher" else teacher
    loop.fit(role, model, splits(), config, loop.new_accelerator(config), log, teacher=given)
    return model, teacher, [row for row in read_rows(config.folder / "metrics.jsonl") if row["model"] == role]


def test_a_teacher_learns_raw_images_alone(tmp_path):
    model, _, log = train(tmp_path, "teacher", teacher_epochs=2, teacher_lr=0.5, lr=0.1, epochs=5, warmup_epochs=1)
    assert len(model.learnt) == 8
    assert all(int(images.max()) < 100 for images in model.learnt + model.judged)
    assert max(row.get("lr", 0) for row in log) == pytest.approx(0.5, rel=0.1), "its own rate"
    assert not torch.equal(model.weights[1]["backbone.weight"], model.weights[0]["backbone.weight"]), "no warm-up"


def test_a_student_learns_compressed_images_whose_raw_twins_its_teacher_sees(tmp_path):
    changes = dict(teacher_epochs=5, teacher_lr=0.5, validations_per_epoch=2)  # also in the middle of an epoch
    model, teacher, log = train(tmp_path, epochs=2, flip=True, lr=0.1, **changes)
    assert len(model.learnt) == len(teacher.judged) == 8 and not teacher.learnt
    for images, twins in zip(model.learnt, teacher.judged, strict=True):
        assert torch.equal(images, twins + 100) and int(twins.max()) < 100
    assert all(int(images.min()) >= 100 for images in model.judged), "validated on what it is for"
    assert model.modes == {(True, True), (False, False)} and teacher.modes == {(False, False)}
    assert max(row.get("lr", 0) for row in log) == pytest.approx(0.1, rel=0.1)


def test_cross_entropy_alone_asks_no_teacher(tmp_path):
    model, teacher, log = train(tmp_path, "none")
    assert len(model.learnt) == 4 and not teacher.judged and not teacher.learnt
    assert all(row["loss"] == row["cross_entropy"] for row in log if "loss" in row)


def test_each_epoch_has_an_order_and_flips_of_its_own(tmp_path):
    def epochs(name, seed):
        model = train(tmp_path / name, epochs=2, flip=True, seed=seed)[0]
        raw = (torch.cat(model.learnt) - 100).numpy()
        flipped = [image.tobytes() not in PLACE for image in raw]
        upright = [image[:, ::-1] if turned else image for image, turned in zip(raw, flipped, strict=True)]
        seen = list(zip([PLACE[image.tobytes()] for image in upright], flipped, strict=True))
        return seen[:16], seen[16:]

    first, second = epochs("a", 0)
    for epoch in (first, second):
        assert sorted(index for index, _ in epoch) == list(range(16)), "every pair once"
        assert 0 < sum(turned for _, turned in epoch) < 16
    assert [index for index, _ in first] != [index for index, _ in second] and set(first) != set(second)
    assert epochs("b", 0) == (first, second)
    other, _ = epochs("c", 1)
    assert [index for index, _ in first] != [index for index, _ in other] and set(first) != set(other)


@pytest.mark.parametrize(
    ("found", "patience", "each", "best", "last"),
    [
        ([0.6, 0.8, 0.7, 0.7, 0.9], 2, 4, 2, 4),
        ([0.6, 0.8, 0.7, 0.7, 0.9], 3, 4, 5, 5),
        ([0.6, 0.6, 0.6, 0.9, 0.9], 2, 4, 1, 3),
        ([0.6, 0.5, 0.5, 0.9, 0.9], 2, 2, 1, 3),  # in the middle of an epoch
        ([0.9, 0.8, 0.7, 0.6, 0.5], 9, 4, 1, 5),
    ],
)
def test_validation_chooses_the_weights_and_the_end(tmp_path, monkeypatch, found, patience, each, best, last):
    left, at = iter(found), []
    changes = dict(epochs=5, patience=patience, validations_per_epoch=4 // each, lr=0.1)

    def judged(model, split, config, accelerator, quality):
        assert quality == "c40"
        at.append({name: value.clone() for name, value in model.state_dict().items()})
        return None, None

    monkeypatch.setattr(loop, "predict", judged)
    monkeypatch.setattr(loop.metrics, "compute", lambda _: {"auc": next(left)})
    model, *_ = train(tmp_path, **changes)
    folder = tmp_path / "run" / "kd"
    assert len(at) == last and len(model.learnt) == each * last
    assert not torch.equal(at[0]["head.weight"], at[1]["head.weight"])
    for kept in (model.state_dict(), read_weights(folder / "model.safetensors")):
        assert all(torch.equal(value, at[best - 1][name]) for name, value in kept.items())
    done = json.loads((folder / "done.json").read_text())
    assert (done["best_auc"], done["best_step"], done["step"]) == (found[best - 1], each * best, each * last)
    (folder / "done.json").unlink()  # as if it had been killed in its last moment
    again, *_ = train(tmp_path, **changes)
    assert not again.learnt and torch.equal(again.head.weight, at[best - 1]["head.weight"])


def test_the_warm_up_trains_the_head_alone_and_distils_nothing(tmp_path, monkeypatch):
    model, teacher, log = train(tmp_path, warmup_epochs=0.5)
    moved = {
        part: [not torch.equal(a[f"{part}.weight"], b[f"{part}.weight"]) for a, b in pairwise(model.weights)]
        for part in ("backbone", "head")
    }
    assert moved == {"backbone": [False, False, True], "head": [True, True, True]}
    assert len(teacher.judged) == 2 and ["kd" in row for row in log if "loss" in row] == [False, False, True, True]
    monkeypatch.setitem(DISTILLERS, "one", lambda *_: One())
    *_, log = train(tmp_path, "one", warmup_epochs=0.5, log_every=4)
    assert [row["one"] for row in log if "loss" in row] == [1], "the mean of the steps after it"


def test_a_distiller_is_told_what_both_networks_say_of_the_same_samples(tmp_path, monkeypatch):
    told, made = [], []

    class Told(One):
        def forward(self, student, teacher, *rest):
            told.append((student, teacher, *rest))
            return super().forward(student)

    monkeypatch.setitem(DISTILLERS, "told", lambda *args: made.append(args) or Told())
    model, teacher, _ = train(tmp_path, "told", flip=True)
    assert [(config.name, *channels) for config, *channels in made] == [("run", (2, 2, 2, 2), (3, 3, 3, 3))]
    for images, (maps, targets, said, known, labels) in zip(model.learnt, told, strict=True):
        assert said.requires_grad and maps[0].requires_grad and not (known.requires_grad or targets[0].requires_grad)
        raw = images - 100
        places = [PLACE.get(i.numpy().tobytes(), PLACE.get(i.flip(1).numpy().tobytes())) for i in raw]
        assert labels.tolist() == [place % 2 for place in places]
        with torch.no_grad():
            expected, _, logits = teacher(teacher.pixels(raw))
        torch.testing.assert_close((targets, known), (expected, logits))


@pytest.mark.parametrize("balance", [0.0, 3.0])
def test_the_factor_of_distillation_scales_its_terms_alone(tmp_path, monkeypatch, capsys, balance):
    monkeypatch.setitem(DISTILLERS, "one", lambda *_: One())
    *_, log = train(tmp_path, "one", distillation_scale=0.25, balance=balance, balance_steps=2)
    first = next(row for row in log if "loss" in row)
    assert first["one"] == pytest.approx(0.25 * (balance * first["cross_entropy"] or 1))
    assert first["loss"] == pytest.approx(first["cross_entropy"] + first["one"])
    told = [
        f"one: distillation starts at 3 × the cross-entropy: one × {row['factor/one']:.3g}"
        for row in log
        if "factor/one" in row and row["step"] == 2
    ]
    assert len(told) == bool(balance) and capsys.readouterr().out.splitlines() == told


def test_batches_that_are_accumulated_are_one_step(tmp_path):
    whole, *_ = train(tmp_path / "a", lr=0.1)
    parts, *_ = train(tmp_path / "b", lr=0.1, batch_size=2, accumulate=2)
    assert len(parts.learnt) == 2 * len(whole.learnt) == 8
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_last_step_is_validated_wherever_an_epoch_ends(tmp_path):
    *_, log = train(tmp_path, batch_size=3, validations_per_epoch=2)
    assert [row["step"] for row in log if "val_auc" in row] == [2, 4, 5]
    *_, log = train(tmp_path / "often", validations_per_epoch=9)  # more than it has steps
    assert [row["step"] for row in log if "val_auc" in row] == [1, 2, 3, 4]


def test_batches_that_fill_no_step_are_left_to_another_epoch(tmp_path):
    changes = dict(epochs=2, batch_size=3, accumulate=2, checkpoint_every=1)  # of the five batches of an epoch
    model, _, log = train(tmp_path, **changes)
    assert len(model.learnt) == 8 and [row["step"] for row in log if "val_auc" in row] == [2, 4]
    stopped = tmp_path / "stopped" / "run" / "kd"
    shutil.copytree(tmp_path / "run" / "kd", stopped, ignore=lambda *_: ["done.json", "checkpoint-00000004"])
    again, *_ = train(tmp_path / "stopped", **changes)
    assert len(again.learnt) == 2 and all(map(torch.equal, again.learnt, model.learnt[6:])), "also where it goes on"


def test_what_is_logged_and_kept_between_validations(tmp_path, monkeypatch):
    """By a clock that a training step advances by a second."""
    seconds = 0.0

    class Clocked(Network):
        def forward(self, images, **options):
            nonlocal seconds
            seconds += self.training
            return super().forward(images, **options)

    monkeypatch.setattr(loop.time, "perf_counter", lambda: seconds)
    monkeypatch.setitem(globals(), "Network", Clocked)
    *_, log = train(tmp_path / "a", epochs=2)
    losses = [row for row in log if "loss" in row]
    assert [(row["step"], row["epoch"]) for row in losses] == [(step, step / 4) for step in range(1, 9)]
    assert [row["epoch"] for row in log if "val_auc" in row] == [1, 2]
    assert not any("val_auc/c40" in row for row in log), "of one quality the mean says all"
    both = {name: replace(split, learnt=("raw", "c40")) for name, split in splits().items()}
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "splits", lambda: both)
        *_, log = train(tmp_path / "c", epochs=1)
    (row,) = [row for row in log if "val_auc" in row]
    assert row["val_auc"] == pytest.approx((row["val_auc/raw"] + row["val_auc/c40"]) / 2)
    changes = dict(epochs=2, log_every=3, checkpoint_every=5)
    *_, log = train(tmp_path / "b", **changes)
    means = [row for row in log if "loss" in row]
    assert [row["step"] for row in means] == [3, 4, 5, 6, 8]
    assert means[0]["loss"] == pytest.approx(np.mean([row["loss"] for row in losses[:3]]))
    assert means[-1]["loss"] == pytest.approx(np.mean([row["loss"] for row in losses[6:]]))
    assert [row["images_per_second"] for row in means] == [4] * 5
    kept = tmp_path / "b" / "run" / "kd"
    assert sorted(path.name for path in kept.glob("checkpoint-*")) == ["checkpoint-00000005", "checkpoint-00000008"]
    assert json.loads((kept / "done.json").read_text())["seconds"] == 8
    (kept / "done.json").unlink()
    shutil.rmtree(kept / "checkpoint-00000008")  # as if it had been killed before
    train(tmp_path / "b", **changes)
    assert json.loads((kept / "done.json").read_text())["seconds"] == 8, "of both runs together"


def test_the_bar_counts_images_and_shows_the_last_loss_and_auc(tmp_path, capsys):
    changes = dict(epochs=2, batch_size=2, accumulate=2)
    *_, log = train(tmp_path, **changes)
    loss, auc = ([row[name] for row in log if name in row][-1] for name in ("loss", "val_auc"))
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert re.search(rf"^ +kd: 100%.* 32\.0/32\.0 \[.*img/s, loss={loss:.3f}, auc={auc:.3f}\]$", last.rstrip())
    (tmp_path / "run" / "kd" / "done.json").unlink()
    train(tmp_path, **changes)
    assert "kd: 100%" in capsys.readouterr().err, "it goes on where it stopped"


def test_what_a_distiller_has_of_its_own_is_trained(tmp_path, monkeypatch):
    class Weighed(One):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, student, *_):
            return {"one": self.weight.square()}

    distiller = Weighed()
    monkeypatch.setitem(DISTILLERS, "one", lambda *_: distiller)
    *_, log = train(tmp_path, "one", lr=0.1)
    terms = [row["one"] for row in log if "one" in row]
    assert len(terms) == 4 and terms == sorted(terms, reverse=True) and distiller.weight < 0.9


def test_a_term_that_is_not_finite_is_told_with_its_step(tmp_path, monkeypatch):
    class Breaks(One):
        def forward(self, student, *_):
            return {"one": next(values) + 0 * student[0].sum()}

    values = iter([1, 1, math.nan, 1])
    monkeypatch.setitem(DISTILLERS, "one", lambda *_: Breaks())
    with pytest.raises(NonFiniteLoss, match=r"step 3: one = nan$"):  # found when it is logged
        train(tmp_path, "one", log_every=4)


def test_rate_and_decay_are_as_told(tmp_path):
    for rise, peak in ((0.75, 6), (1e-3, 2)):  # two steps at least
        *_, log = train(tmp_path / f"{rise}", "none", batch_size=2, lr=0.1, rise=rise)
        rates = [row["lr"] for row in log if "lr" in row]  # each that of the next step
        assert len(rates) == 8 and np.argmax(rates) + 2 == peak
        assert max(rates) == pytest.approx(0.1) and rates[-2] < 1e-6, "that of the last step"
    plain, _, log = train(tmp_path / "short", "none", lr=0.1)  # of four steps, the fewest in which it rises and falls
    rates = [row["lr"] for row in log if "lr" in row]
    assert len(rates) == 4 and rates[0] == pytest.approx(0.1) and rates[2] < 1e-6
    decayed, *_ = train(tmp_path / "decayed", "none", lr=0.1, weight_decay=9.0)
    assert decayed.backbone.weight.norm() < plain.backbone.weight.norm()


def test_a_step_that_nothing_fills_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size: 16 training pairs do not fill one step"):
        train(tmp_path, batch_size=17)
