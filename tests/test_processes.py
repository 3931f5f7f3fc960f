"""Work side by side: what becomes ready later, what is lost, and that nothing is left running."""

import os
import signal
import time
from pathlib import Path

import pytest

from training.processes import side_by_side, usable_cores


def work(item: tuple[str, str]) -> None:
    folder, name = item
    print(f"this is {name}")
    if name == "wrong":
        raise ValueError("it is wrong")
    if name == "odd":
        raise KeyError("odd")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "endless":
        Path(folder, "pid").write_text(str(os.getpid()))
        time.sleep(600)
    Path(folder, f"{name}.done").write_text("")


def run(folder: Path, ready, finished=lambda *_: None) -> dict[str, str]:
    lost = side_by_side(
        work,
        lambda lost: [(str(folder), name) for name in ready([name for _, name in lost])],
        lambda item: folder / "output" / f"{item[1]}.txt",
        lambda item, *rest: finished(item[1], *rest),
        width=2,
        preload="training.processes",
    )
    return {name: reason for (_, name), reason in lost.items()}


def test_the_lost_are_told_and_the_others_go_on(tmp_path):
    order = []

    def ready(lost):
        done = [path.stem for path in tmp_path.glob("*.done")]
        yield from (name for name in ("wrong", "odd", "killed", "first") if name not in done)
        if "first" in done and "second" not in done:
            assert set(lost) <= {"wrong", "odd", "killed"}
            yield "second"

    lost = run(tmp_path, ready, lambda name, reason, seconds: order.append((name, reason)))
    assert lost == {"wrong": "it is wrong", "odd": "KeyError: 'odd'", "killed": "its process ended with signal 9"}
    assert sorted(order) == sorted([*lost.items(), ("first", ""), ("second", "")])
    assert order.index(("second", "")) > order.index(("first", "")), "it becomes ready when the first is done"
    text = (tmp_path / "output" / "odd.txt").read_text()
    assert text.startswith("this is odd\n") and "KeyError: 'odd'" in text


def test_an_interruption_ends_all(tmp_path):
    def interrupt(name, *_):
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, lambda lost: ["endless", "first"], interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_cores_are_those_that_joblib_counts(monkeypatch):
    """Which knows affinity and the quota of a container, where `docker run --cpus=3` is three workers."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert usable_cores() == 1
