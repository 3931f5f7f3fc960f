"""How a model of the loop starts, made, copied, given or found finished, and how it ends; what it says of a split."""

import json
import os
import platform
import resource
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from test_fit import RAW, Network, splits, train

from training import fit as loop
from training.config import Config
from training.models.checkpoints import load_checkpoint, save_weights
from training.models.detector import Detector
from training.models.distillers import DISTILLERS

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(image_size=32, teacher_model="test_byobnet", student_model="test_byobnet")


@pytest.mark.parametrize(("changes", "copied"), [({}, True), ({"student_from_teacher": False}, False)])
def test_a_student_starts_as_its_teacher_or_anew(changes, copied):
    config = Config(**TINY, **changes)
    torch.manual_seed(9)
    teacher = Detector("test_byobnet", 32)
    student = loop.new_student(config, teacher)
    same = [torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True)]
    assert all(same) == copied and student is not teacher
    again = loop.new_student(config, teacher)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True)), "by the seed"
    config.student_model = "test_efficientnet"
    assert loop.new_student(config, teacher).name == "test_efficientnet"


def test_a_student_stands_where_its_teacher_does():
    config, meta = Config(**TINY | {"student_model": "test_efficientnet"}), torch.device("meta")
    teacher = Detector("test_byobnet", 32).to(meta)
    for student in (loop.new_student(config, teacher), loop.new_student(config, None, meta)):
        assert student.name == "test_efficientnet" and {p.device for p in student.parameters()} == {meta}


def test_a_new_model_is_channels_last_and_says_what_its_weights_fit(tmp_path, capsys):
    config = Config(**TINY)
    source = loop.new_model(config, "test_byobnet", torch.device("cpu"))
    kernels = [p for p in source.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert not capsys.readouterr().out
    config.seed, config.weights = 1, str(tmp_path / "model.safetensors")
    save_weights(source, tmp_path / "model.safetensors")
    model = loop.new_model(config, "test_byobnet", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters(), strict=True))
    assert str(model.fit) in capsys.readouterr().out


def test_pretrained_weights_are_asked_for_by_the_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "Detector", lambda *args, **options: asked.append(options) or Detector(*args))
    for pretrained in (False, True):
        loop.new_model(Config(**TINY, pretrained=pretrained), "test_byobnet", torch.device("cpu"))
    assert [options["pretrained"] for options in asked] == [False, True]


def test_a_given_teacher_is_what_the_configuration_says(tmp_path):
    config, cpu, path = Config(**TINY), torch.device("cpu"), tmp_path / "model.safetensors"
    assert loop.given_teacher(config, cpu) is None
    source = Detector("test_byobnet", 32)
    config.teacher_checkpoint = str(path)
    save_weights(source, path)
    state = source.state_dict()
    teacher = loop.given_teacher(config, torch.device("meta"))
    assert teacher.name == "test_byobnet" and next(teacher.parameters()).is_meta
    assert all(torch.equal(v, state[k]) for k, v in loop.given_teacher(config, cpu).state_dict().items())
    message = r"^teacher_checkpoint: it is a test_byobnet, teacher_model is test_efficientnet$"
    with pytest.raises(ValueError, match=message):  # so the file itself says
        loop.given_teacher(replace(config, teacher_model="test_efficientnet"), cpu)
    (run := tmp_path / "run" / "teacher").mkdir(parents=True)
    save_weights(source, run / "model.safetensors")
    (run.parent / "config.yaml").write_text(config.to_yaml())
    other = replace(config, teacher_model="test_efficientnet", teacher_checkpoint=str(run / "model.safetensors"))
    with pytest.raises(ValueError, match=message):  # so the run says
        loop.given_teacher(other, cpu)
    save_file({name: value.contiguous() for name, value in source.backbone.state_dict().items()}, path)
    bare = loop.given_teacher(replace(config, image_size=64), cpu)  # a file that says nothing of itself
    assert (bare.name, bare.image_size, bare.mean, bare.std) == ("test_byobnet", 64, (0.5,) * 3, (0.5,) * 3)
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in bare.backbone.state_dict().items())


def test_distillers_are_tried_before_anything_is_trained(monkeypatch):
    made, teacher = [], Detector("test_byobnet", 32)
    monkeypatch.setitem(DISTILLERS, "told", lambda *args: made.append(args))
    with pytest.raises(ValueError, match=r"^students: unknown \['nobody'\], expected some of \['none', 'kd', "):
        loop.check_distillers(Config(), teacher, ["told", "nobody"])
    loop.check_distillers(Config(), None, ["told"])
    assert not made, "without a teacher there is nothing to make them for"
    for student in ("test_byobnet", "test_efficientnet"):
        config = Config(**TINY | {"student_model": student})
        loop.check_distillers(config, teacher, ["told"])
        assert made.pop() == (config, Detector(student, 32).channels, teacher.channels) and not made


def test_a_finished_model_is_read_and_a_damaged_one_is_named(tmp_path):
    first, *_ = train(tmp_path)
    done, written = tmp_path / "run" / "kd" / "done.json", first.head.weight.clone()
    for content in (done.read_text(), "{}"):  # earlier versions noted no hash
        done.write_text(content)
        again, *_ = train(tmp_path)
        assert not again.learnt and torch.equal(again.head.weight, written)
    damaged = r"^the finished model .*kd is damaged; remove it to train it again: "
    for content, why in {"": "", "[]": "", '{"sha256": "0"}': "its weights are not as they were written$"}.items():
        done.write_text(content)
        with pytest.raises(ValueError, match=damaged + why):
            train(tmp_path)


def test_weights_that_changed_before_the_end_are_named(tmp_path, monkeypatch):
    train(tmp_path)
    folder = tmp_path / "run" / "kd"
    done, weights = folder / "done.json", folder / "model.safetensors"
    written = json.loads(done.read_text())["sha256"]
    done.unlink()  # as if it had been killed in its last moment
    with monkeypatch.context() as patched:  # the checkpoints of earlier versions know no hash
        patched.setattr(loop, "load_checkpoint", lambda *args: replace(load_checkpoint(*args), sha256=""))
        train(tmp_path)
    assert json.loads(done.read_text())["sha256"] == written
    done.unlink()
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"kd/model\.safetensors is not as it was written; remove .*kd to train the"):
        train(tmp_path)


def test_precision_accumulation_and_unused_parameters_are_those_of_the_configuration(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps what the first of a process was told
    try:
        for accumulate, warmup in ((1, 0.0), (3, 0.5)):
            config = Config(mixed_precision="bf16", accumulate=accumulate, warmup_epochs=warmup)
            accelerator = loop.new_accelerator(config)
            assert accelerator.gradient_accumulation_steps == accumulate
            unused = accelerator.ddp_handler.find_unused_parameters
            assert unused == (warmup > 0), "a warm-up leaves the backbone without gradients"
            one = torch.ones(1, 1, device=accelerator.device)
            with accelerator.autocast():
                assert (one @ one).dtype == torch.bfloat16
        model, *_ = train(tmp_path, mixed_precision="bf16")
        with torch.no_grad():  # it is given back as it was, without the precision of its training
            images = torch.from_numpy(RAW[:2])
            assert torch.equal(model(model.pixels(images))[2], Network.forward(model, model.pixels(images))[2])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_freed_memory_is_used_again():
    if not (child := os.fork()):  # what it sets is for the life of a process
        loop.keep_freed_memory()
        faults = []
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            bytearray(2**26)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        os._exit(not (faults[0] > 1000 > 10 * faults[1]))
    assert os.waitpid(child, 0)[1] == 0


def test_a_model_is_asked_about_the_frames_that_there_are():
    model, split, accelerator = Network(), splits()["val"], loop.new_accelerator(Config())
    chosen = [i for i in range(16) if i not in (1, 4)]
    split.images["c40"] = [image if i in chosen else None for i, image in enumerate(split.images["c40"])]
    split.images["c23"] = [None] * 16

    def said(quality, **limit):
        return loop.predict(model, split, Config(image_size=8, batch_size=1), accelerator, quality, **limit)

    outcome, features = said("c40")
    with torch.no_grad():
        _, expected, logits = model(model.pixels(torch.from_numpy(RAW[chosen] + 100)))
    assert outcome.scores == pytest.approx(logits.softmax(1)[:, 1].numpy(), abs=1e-6)
    assert features == pytest.approx(expected.numpy(), abs=1e-6)
    assert outcome.labels.tolist() == [i % 2 for i in chosen] and outcome.groups.tolist() == [i // 2 for i in chosen]
    few, again = (said("c40", limit=13)[0] for _ in range(2))
    places = [outcome.scores.tolist().index(score) for score in few.scores]
    assert len(places) == 13 and places == sorted(set(places)) and few.scores.tolist() == again.scores.tolist()
    assert few.labels.tolist() == outcome.labels[places].tolist()
    assert [len(said("c40", limit=limit)[0].scores) for limit in (1, 99)] == [1, 14]
    with pytest.raises(ValueError, match=r"^quality: the split has no frame in 'c23'$"):
        said("c23")
