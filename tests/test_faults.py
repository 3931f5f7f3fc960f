"""What a run survives, and what it says: somebody else in its folder, a full disk, damage, Ctrl-C, kills."""

import errno
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import kill_and_resume
import numpy as np
import pytest
import torch
import trees
from test_study import TINY
from test_training import cache, tiny  # noqa: F401 - cache is a fixture

from training import evaluate, export, files, locks, predict, prepare, study, train
from training.config import Config
from training.data import embedded, images, loader
from training.data.crops import Pairing, prepare_video
from training.data.sources.common import Video
from training.models import checkpoints
from training.models.detector import Detector

ROOT = Path(__file__).parents[1]
COMMANDS = (train, study, evaluate, prepare, predict, export)


def python(*words: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("environment", {})
    return subprocess.Popen([sys.executable, *words], env=environment, text=True, stdout=subprocess.PIPE, **options)


# --------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import os, sys, time
from pathlib import Path
from training.locks import only_one
with only_one(Path(sys.argv[1]), "it"):
    if not os.fork():
        print(os.getpid(), flush=True)  # said when it has let go
    time.sleep(60)
"""


def test_a_lock_says_who_holds_it_and_ends_with_its_process_alone(tmp_path):
    lock = tmp_path / ".it.lock"
    holder = python("-c", HOLD, str(lock))
    child = int(holder.stdout.readline())
    said = rf"^it is in use by process {holder.pid} on {socket.gethostname()} since 20"
    with pytest.raises(locks.InUse, match=said), locks.only_one(lock, "it"):
        pass
    holder.kill()
    holder.wait()
    assert lock.exists() and os.kill(child, 0) is None, "its file and its child are left"
    with locks.only_one(lock, "it"):
        assert f"process {os.getpid()} on" in lock.read_text()
        refused = python("-c", HOLD, str(lock), stderr=subprocess.PIPE)
        assert f"InUse: it is in use by process {os.getpid()} on" in refused.communicate()[1]
    assert not lock.exists()
    os.kill(child, signal.SIGKILL)


def test_a_lock_holds_for_the_threads_of_a_process_and_may_be_waited_for(tmp_path, capsys, monkeypatch):
    lock, order = tmp_path / "new" / ".it.lock", []

    def second():
        with locks.only_one(lock, "it", wait=True):
            order.append("second")

    with locks.only_one(lock, "it"):
        said = f"it is in use by process {os.getpid()} on"
        with pytest.raises(locks.InUse, match=said), locks.only_one(lock, "it"):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        while "waiting for it, in use by process" not in capsys.readouterr().err:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    unlink = Path.unlink

    def still_held(path, **options):
        with pytest.raises(locks.InUse), locks.only_one(path, "it"):
            pass
        order.append(unlink(path, **options))

    monkeypatch.setattr(Path, "unlink", still_held)
    with locks.only_one(lock, "it"):
        pass
    assert order[2:] == [None], "or the file of the next holder would go"


def test_a_lock_file_that_was_removed_while_it_was_opened_is_not_the_lock(tmp_path, monkeypatch):
    lock, flock, calls = tmp_path / ".it.lock", locks.fcntl.flock, []

    def slow(*arguments):
        flock(*arguments)
        if not calls:
            lock.unlink()  # as its holder does before its lock ends
        calls.append(arguments)

    monkeypatch.setattr(locks.fcntl, "flock", slow)
    with locks.only_one(lock, "it"):
        assert len(calls) == 2 and lock.exists()


def test_where_nothing_can_be_locked_it_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with locks.only_one(tmp_path / ".it.lock", "it"):
        assert "nothing can be locked there; start nothing twice" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "study", "prepare"])
def test_a_second_command_in_a_folder_is_refused_in_one_line(command, cache, tmp_path, capsys):  # noqa: F811
    if command == "prepare":
        source, out = trees.faceforensics(tmp_path / "ff", pairs={"train": 1, "val": 1, "test": 1}, frames=1), tmp_path
        words = [str(source), f"out={out / 'pairs'}", "detector=none"]
        lock, what = out / "pairs" / "shards" / ".2-of-3.lock", f"shard 2/3 of {out / 'pairs'}"
        words.append("shard=2/3")
    else:
        kind = study.StudyConfig(**TINY, out=str(tmp_path)) if command == "study" else tiny(cache, tmp_path)
        (tmp_path / "a.yaml").write_text(kind.to_yaml())
        words = ["--config", str(tmp_path / "a.yaml")]
        lock, what = locks.beside(kind.folder), f"the {'run' if command == 'train' else 'study'} {kind.folder}"
    with locks.only_one(lock, "it"):
        assert globals()[command].main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"error: {what} is in use by process {os.getpid()} on {said[0].partition(' on ')[2]}"]


def test_who_finds_the_embedded_set_in_the_making_waits_for_it(tmp_path, monkeypatch):
    built = []

    def build(spec, path):
        built.append(path)
        time.sleep(0.2)
        path.write_bytes(b"")

    monkeypatch.setattr(embedded, "_build", build)
    threads = [threading.Thread(target=embedded.build, args=(embedded.EmbeddedSpec(), tmp_path)) for _ in range(2)]
    draft = tmp_path / f".embedded-{embedded.EmbeddedSpec().digest()}.npz.0123.tmp"
    draft.touch()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and not draft.exists(), "what a kill left is removed"


# --------------------------------------------------------------------------------------------------------- checkpoints

ONE = SimpleNamespace(
    is_main_process=True, process_index=0, scaler=None, unwrap_model=lambda x: x, wait_for_everyone=lambda: None
)


@pytest.fixture(scope="module")
def parts():
    model = Detector("test_byobnet", 32)
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    nothing = torch.nn.Identity()
    return dict(model=model, optimizer=optimizer, scheduler=nothing, balance=nothing, distiller=nothing)


def save(folder, parts, *steps):
    for step in steps:
        checkpoints.save_checkpoint(folder, ONE, Config(), checkpoints.Progress(step, seconds=step), parts)
    return sorted(folder.glob("checkpoint-*"), reverse=True)


def test_a_checkpoint_is_on_the_disk_before_one_goes(parts, tmp_path, monkeypatch):
    save(tmp_path, parts, 1, 2)
    done = []
    monkeypatch.setattr(checkpoints, "flush", lambda path: done.append(f"flush {path.name}"))

    def noted(name, function):
        return lambda path, *rest, **more: (done.append(f"{name} {Path(path).name}"), function(path, *rest, **more))

    monkeypatch.setattr(os, "rename", noted("rename", os.rename))
    monkeypatch.setattr(shutil, "rmtree", noted("rmtree", shutil.rmtree))
    assert [path.name for path in save(tmp_path, parts, 3)] == ["checkpoint-00000003", "checkpoint-00000002"]
    draft = ".checkpoint-00000003.tmp"
    names = ["config.yaml", "model.safetensors", "rng-0.pt", "state.pt", "sums.json"]
    assert sorted(done[:5]) == [f"flush {name}" for name in names]
    assert done[5] == f"flush {draft}"
    removed = [line for line in done if line != "rmtree checkpoint-00000003"]  # there is none
    expected = [f"rename {draft}", f"flush {tmp_path.name}", "rmtree checkpoint-00000001", f"rmtree {draft}"]
    assert removed[6:] == expected


def test_flushing_asks_the_system(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    files.write_text(tmp_path / "a.txt", "a")
    assert flushed[0].startswith(f"{tmp_path}/.a.txt.") and flushed[1] == str(tmp_path), "the file, then its name"


def test_pictures_are_on_the_disk_before_the_rows_that_name_them(tmp_path, monkeypatch):
    images.write_png(tmp_path / "in.png", np.zeros((16, 16, 3), np.uint8))
    video = Video("set", "real", "v", 0, "train", "raw", {"raw": (tmp_path / "in.png",)}, "t")
    flushed, out, rename = [], tmp_path / "out", os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "replace", lambda a, b: (flushed.append(f"named {b}"), rename(a, b)))
    assert prepare_video(video, Pairing(out=str(out), detector="none", crfs=[40])) is None
    before = flushed[: flushed.index(f"named {out / 'rows' / 'set' / 'real' / 'v.json'}")]
    for level in ("raw", "c40"):
        folder = out / level / "set" / "real" / "v"
        assert {str(folder / "000000.png"), str(folder), *map(str, list(folder.parents)[:4])} <= set(before)
        assert before.index(str(folder / "000000.png")) < before.index(str(folder))


def test_a_writer_that_breaks_off_half_way_leaves_what_was_there(tmp_path):
    def half_a_file(target):
        target.write_text("half")
        raise RuntimeError("broken off")

    def half_a_folder(target):
        target.mkdir()
        half_a_file(target / "a")

    for name, write in (("file", half_a_file), ("new", half_a_file), ("folder", half_a_folder)):
        files.write_text(tmp_path / "file", "whole")
        with pytest.raises(RuntimeError, match="broken off"):
            files.write_whole(tmp_path / name, write)
        assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "whole"


def spoil(path, how):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes({"flipped": bytes(content), "cut": content[: len(content) // 2], "emptied": b""}[how])


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "rng-0.pt", "config.yaml", "sums.json"])
def test_a_damaged_checkpoint_is_named_passed_over_and_replaced(parts, tmp_path, name, how):
    newest, older = save(tmp_path, parts, 1, 2)
    spoil(newest / name, how)
    said = []
    assert checkpoints.last_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1 and f"{newest} is damaged, the one before it is used: " in said[0]
    assert checkpoints.load_checkpoint(older, ONE, parts).step == 1
    assert save(tmp_path, parts, 2) == [newest, older]
    assert checkpoints.last_checkpoint(tmp_path, said.append) == newest and len(said) == 1


def test_damaged_checkpoints_do_not_drive_out_whole_ones(parts, tmp_path):
    newest, older = save(tmp_path, parts, 3, 9)
    (newest / "sums.json").write_text("{}")
    assert checkpoints.last_checkpoint(tmp_path, lambda line: None) == older
    assert [path.name[-1] for path in save(tmp_path, parts, 4)] == ["4", "3"]


def test_what_is_written_follows_the_umask(parts, tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path, parts, 1)
        checkpoints.save_weights(parts["model"], tmp_path / "model.safetensors")
        files.write_text(tmp_path / "a.txt", "a")
        with locks.only_one(tmp_path / ".lock", "it"):
            modes = {str(path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    finally:
        os.umask(before)
    assert len(modes) == 8 and set(modes.values()) == {0o640}


# ------------------------------------------------------------------------------------------ disks and files that refuse


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_of_the_checkpoint_and_those_before_it_stand(parts, tmp_path, monkeypatch):
    save(tmp_path, parts, 1, 2)
    for broken in ("write_torch", "flush"):
        monkeypatch.setattr(checkpoints, broken, full)
        with pytest.raises(OSError, match=r"checkpoint-00000003 cannot be written: No space left on device$"):
            save(tmp_path, parts, 3)
        monkeypatch.undo()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-00000002"
    assert not list(tmp_path.glob(".*")), "what could not be ended is gone, and its room with it"
    assert save(tmp_path, parts, 3)[0].name == "checkpoint-00000003"


@pytest.mark.parametrize("room", [0, 100, 50_000])
def test_torch_tells_of_a_disk_that_is_or_becomes_full(room):
    class Disk(io.BytesIO):
        def write(self, data):
            return super().write(data) if self.tell() + len(data) <= room else full()

    with pytest.raises(OSError, match="No space left"):  # by itself it says "unexpected pos"
        checkpoints.write_torch(SimpleNamespace(open=lambda _: Disk()), {"a": [torch.zeros(5000) for _ in range(9)]})


def test_a_full_disk_ends_a_training_in_one_line(cache, tmp_path, monkeypatch, capsys):  # noqa: F811
    config = tiny(cache, tmp_path)
    loader.load_splits(config)
    capsys.readouterr()
    (tmp_path / "a.yaml").write_text(config.to_yaml())
    monkeypatch.setattr(os, "fsync", full)
    assert train.main(["--config", str(tmp_path / "a.yaml")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {config.folder / 'config.yaml'} cannot be written: No space left on device\n"
    assert not list(config.folder.iterdir()) and {path.name for path in tmp_path.iterdir()} == {"a.yaml", "tiny"}
    monkeypatch.undo()
    (config.folder / ".config.yaml.0123.tmp").touch()  # of a kill in that moment
    train.open_run(replace(config, resume=True), loader.load_splits(config), 1)
    assert "there is no run" in capsys.readouterr().out, "what was not begun begins"


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
def test_a_damaged_set_in_the_cache_is_named(cache, tmp_path, how):  # noqa: F811
    config = tiny(cache, tmp_path)
    loader.load_splits(config)
    for path in Path(cache).glob("*.npz"):
        shutil.copy(path, tmp_path)
        spoil(tmp_path / path.name, how)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/embedded-\w+\.npz is damaged; remove it, and it is made again"):
        loader.load_splits(replace(config, cache=str(tmp_path)))


def test_damaged_remains_of_a_study_and_of_a_video_are_named(tmp_path):
    config = study.StudyConfig(**TINY, out=str(tmp_path))
    model = study.Model(0, "none", "c40")
    files.write_text(model.folder(config) / "done.json", '{"best')
    with pytest.raises(ValueError, match=r"done\.json is damaged; remove its folder to train the model again"):
        model.validation_auc(config)
    options = prepare.Options(source=str(tmp_path), out=str(tmp_path / "o"))
    files.write_text(Path(options.out) / "settings.json", "[1]")
    with pytest.raises(ValueError, match=r"settings\.json is damaged: expected a mapping, got list"):
        prepare.open_folder(replace(options, source=str(tmp_path / "ff")))
    video = SimpleNamespace(key="a/b")
    files.write_text(prepare.rows_file(video, str(tmp_path)), "[")
    with pytest.raises(ValueError, match=r"b\.json is damaged; remove it to have the video prepared again"):
        prepare.finished_rows(video, str(tmp_path))


# ---------------------------------------------------------------------------------------------------- Ctrl-C and kills


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__)
def test_ctrl_c_while_a_command_imports(command, tmp_path):
    for name in ("numpy", "torch", "tqdm"):  # the first that takes long
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    process = python(command.__file__, environment={"PYTHONPATH": str(tmp_path)}, stderr=subprocess.PIPE)
    assert process.communicate()[1] == "interrupted; nothing was begun\n" and process.returncode == 130


SLEEP = "import time; from training.data.workers import by_processes; print(*by_processes(time.sleep, [90, 90], 2))"


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are counted in /proc")
def test_the_processes_of_a_pool_end_with_a_parent_that_is_killed():
    parent = python("-c", SLEEP, start_new_session=True)
    limit = time.monotonic() + 60
    while len(kill_and_resume.processes(parent.pid)) < 5:  # it, the server, the tracker and two at work
        assert parent.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    while kill_and_resume.processes(parent.pid):
        assert time.monotonic() < limit, "they sleep on"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.nightly
def test_killed_and_resumed_is_the_same_to_the_bit():
    assert kill_and_resume.main(["--kills", "2", "--seed", "3"]) == 0
