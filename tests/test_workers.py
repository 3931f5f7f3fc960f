"""The two engines of prepare.py: every item once, whatever becomes of the process that works on it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pandas
import pytest
import trees
from noted_work import is_imported, one_by_one, record

from training import prepare
from training.data import workers
from training.files import write_text

ROOT = Path(__file__).parents[1]


def lines(path):
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def scheduler():
    """The address of a cluster of two workers."""
    distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
    ):
        yield cluster.scheduler_address


@pytest.fixture(params=["processes", "dask"])
def engine(request):
    if request.param == "processes":
        return partial(workers.by_processes, jobs=2)
    return partial(workers.by_dask, request.getfixturevalue("scheduler"))


def test_each_item_comes_once_with_its_reason(engine, tmp_path):
    items = [*"abc", "odd", "faceless"]
    found = list(engine(partial(record, tmp_path), items))
    reasons = {"odd": "OSError: no such codec", "faceless": "it has no face"}
    assert sorted(found) == sorted((item, reasons.get(item)) for item in items)
    assert sorted(item for item, _ in lines(tmp_path / "begun")) == sorted(items)
    assert str(os.getpid()) not in dict(lines(tmp_path / "begun")).values()
    assert list(engine(partial(record, tmp_path), [])) == []


def test_an_item_that_ends_its_process_is_named_and_the_rest_survives(engine, tmp_path):
    items = [*"abc", "deadly", *"defgh"]
    found = list(engine(partial(record, tmp_path), items))
    assert sorted(item for item, _ in found) == sorted(items), "each once"
    ((culprit, reason),) = [(item, reason) for item, reason in found if reason]
    assert culprit == "deadly" and "ended the process" in reason


def test_processes_are_forks_of_one_that_has_imported_what_they_need_and_which_needs_no_torch():
    forkserver._forkserver._stop()  # that of another test
    names = ["colorsys", "wave", "torch"]
    found = dict(workers.by_processes(is_imported, names, 1, preload="colorsys"))
    assert found == dict.fromkeys(names, "it is not imported") | {"colorsys": None}


def test_ctrl_c_drops_what_has_not_begun_and_lets_the_rest_be_finished(engine, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    answers = engine(partial(record, tmp_path), range(40))
    next(answers)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        list(answers)
    time.sleep(0.7)
    begun = lines(tmp_path / "begun")
    assert 1 <= len(begun) < 12 and sorted(begun) == sorted(lines(tmp_path / "done"))


def test_the_item_of_a_killed_worker_is_done_by_another_and_nothing_twice(scheduler, tmp_path):
    items, found, killed = [*"abcdef", "long", *"ghijkl"], [], None
    for answer in workers.by_dask(scheduler, partial(record, tmp_path), items):
        found.append(answer)
        if not killed and (killed := dict(lines(tmp_path / "begun")).get("long")):
            os.kill(int(killed), signal.SIGKILL)
    assert sorted(found) == sorted((item, None) for item in items), "nothing is lost"
    done = lines(tmp_path / "done")
    assert sorted(item for item, _ in done) == sorted(items), "nothing is done twice"
    assert dict(done)["long"] != killed


class Foreign:
    """What a worker cannot read, as if it had no such module."""

    def __reduce__(self):
        return __import__, ("no_such_module",)


def test_a_worker_that_cannot_read_the_work_ends_the_run_instead_of_failing_each_item(scheduler):
    with pytest.raises(ValueError, match=f"^scheduler: a worker .*'no_such_module'.*needs '{ROOT}'.*$"):
        list(workers.by_dask(scheduler, str, [Foreign()]))


FAR = """
from distributed import LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address=None)
    print(cluster.scheduler_address, flush=True)
    input()
    cluster.scale(1)
    input()
"""


def test_workers_may_come_later_and_need_only_the_checkout_and_a_lost_scheduler_is_said(tmp_path, capfd):
    pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    (tmp_path / "far.py").write_text(FAR)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(
        [sys.executable, "far.py"], cwd=tmp_path, env=environment, stdin=-1, stdout=-1, stderr=-3, text=True
    ) as far:
        address = far.stdout.readline().strip()
        threading.Timer(1, print, kwargs={"file": far.stdin, "flush": True}).start()
        answers = workers.by_dask(address, partial(write_text, text="x"), [tmp_path / "a"])
        assert list(answers) == [(tmp_path / "a", None)] and (tmp_path / "a").read_text() == "x"
        threading.Timer(1, far.kill).start()
        with pytest.raises(ValueError, match=r"^scheduler: the connection to it was lost; the same command continues$"):
            list(workers.by_dask(address, time.sleep, [60]))
    assert capfd.readouterr() == ("", "scheduler: no worker is connected yet; waiting for some\n")


def test_what_is_no_scheduler_is_said_in_one_line(monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setattr(workers, "PATIENCE", 2)
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"^scheduler: no Dask scheduler answers at '{address}'.*$"):
            next(workers.by_dask(address, len, ["a"]))
    assert time.monotonic() - start < 4
    with pytest.raises(ValueError, match=r"^scheduler: no Dask .* 'host' .*missing port number.*$"):
        next(workers.by_dask("host", len, ["a"]))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"^scheduler: needs Dask: pip install 'add_ops\[cluster\]'$"):
        next(workers.by_dask(address, len, ["a"]))


def test_a_slurm_array_is_the_shards_of_one_command(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "4"}
    called = subprocess.run(
        ["bash", ROOT / "training/slurm.sh", "/data/my set", "out=/data/pairs"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | slurm, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = ["training/prepare.py", "/data/my set", "out=/data/pairs", "jobs=4", "--shard", "3/8"]
    assert called.stdout.splitlines() == words


def test_prepare_on_a_cluster_that_loses_a_worker_gives_what_one_process_gives(scheduler, tmp_path, monkeypatch):
    import distributed

    for label, kind in enumerate(("real", "fake")):
        for number in range(4):
            clip = trees.clip_of("train", number, label, size=64, frames=12)
            trees.write_video(tmp_path / "in" / kind / f"{number}.mp4", clip, crf=20)
    monkeypatch.chdir(tmp_path)  # relative names must reach workers that stand elsewhere
    words = ["in", "detector=none", "crfs=[40]", "size=32", "frames=4", "jobs=1"]
    with monkeypatch.context() as here:  # a process of its own would import everything first
        here.setattr(workers, "by_processes", one_by_one)
        assert prepare.main([*words, "out=alone"]) == 0

    with distributed.Client(scheduler) as client:
        (victim,) = list(client.run(os.getpid).values())[:1]
    rows = tmp_path / "shared" / "rows"

    def kill_when_begun():
        while not list(rows.rglob("*.json")):
            time.sleep(0.02)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_begun)
    killer.start()
    assert prepare.main([*words, "out=shared", f"scheduler={scheduler}"]) == 0
    killer.join()
    alone, shared = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}
        for folder in (tmp_path / "alone", tmp_path / "shared")
    )
    assert alone == shared and len(alone) == 8 * 4 * 2
    assert pandas.read_parquet("alone/manifest.parquet").equals(pandas.read_parquet("shared/manifest.parquet"))
