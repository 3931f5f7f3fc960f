"""Kill train, study and prepare with -9 at random moments, run the same command again, and compare every bit.

    .venv/bin/python tests/kill_and_resume.py --kills 50 --seed 1     50 kills of each; --what train takes one of them

A round begins in a new folder and lets a command run to its end through as many kills as hit it, each after a random
time at work, which begins when its lock is there. What is left must be what an undisturbed run left: weights,
optimiser states, logs, results, pictures, tables; no draft, no lock and no process may remain. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

if not __package__:
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import trees

from training.report.log import read_rows

ROOT = Path(__file__).parents[1]
TINY = [
    "image_size=32", "train_clips=20", "val_clips=8", "test_clips=16", "crfs=[40]", "batch_size=8", "epochs=1",
    "teacher_epochs=1", "teacher_model=test_byobnet", "student_model=test_byobnet", "multi_view_weights=[0,0,1,0]",
    "frequency_weights=[0,1,0,0]", "log_every=1", "checkpoint_every=1", "bootstrap=20",
]  # fmt: skip
COMMANDS = {
    "train": ["train.py", *TINY, "compression=c40", "name=it", "students=[add]", "validations_per_epoch=2", "--resume"],
    "study": ["study.py", *TINY, "name=it", "students=[none,kd]", "conditions=[c40]", "folds=2", "scales=[1]"],
    "prepare": ["prepare.py", "frames=4", "crfs=[30,40]", "size=64", "detector=none", "jobs=2"],
}
LOCKS = {"train": ".it.lock", "study": ".it.lock", "prepare": "shards/.1-of-1.lock"}
TIMES = {"images_per_second", "seconds", "facts", "opened"}  # what no two runs have alike


def start(what: str, source: Path, out: Path) -> subprocess.Popen:
    script, *words = COMMANDS[what]
    words += [str(source)] if what == "prepare" else [f"cache={out / '.cache'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    out.mkdir(parents=True, exist_ok=True)
    with (out.parent / "said.txt").open("a") as said:
        command = [sys.executable, str(ROOT / "training" / script), f"out={out}", *words]
        return subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)


def processes(session: int) -> list[int]:
    """The processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def at_work(process: subprocess.Popen, lock: Path) -> bool:
    """Wait until the command holds its lock; False where it ends before."""
    while process.poll() is None:
        try:
            if lock.read_text().startswith(f"process {process.pid} "):
                return True
        except OSError:
            pass
        time.sleep(0.001)
    return False


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return value


def digest(path: Path) -> str:
    """Of what a file says, times and the folder it lies in aside."""
    if path.name == "metrics.jsonl":
        content = repr(without_times({"rows": [without_times(row) for row in read_rows(path)]})).encode()
    elif path.name == "state.pt":
        state, parts = torch.load(path, weights_only=True), []

        def walk(value: object) -> None:
            if isinstance(value, dict):
                for key, inner in value.items():
                    parts.append(repr(key).encode())
                    walk(inner) if key not in TIMES else None
            elif isinstance(value, torch.Tensor):
                parts.append(value.numpy().tobytes())
            else:
                parts.append(repr(value).encode())

        walk(state)
        content = b"".join(parts)
    elif path.suffix == ".npz":
        content = b"".join(value.tobytes() for value in np.load(path).values())
    elif path.suffix == ".json":
        values = without_times(json.loads(path.read_text()))
        content = repr({k: v for k, v in values.items() if k not in ("config", "source")}).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def left(out: Path) -> dict[str, str]:
    """Digests of all that a finished command left in its folder, but for texts about times and places."""
    aside = ("report.html", "config.yaml", "study.yaml", "output.txt", "sums.json")
    found = [p for p in out.rglob("*") if p.is_file() and p.name not in aside and "tensorboard" not in p.parts]
    found = [p for p in found if not (p.name.startswith(".") and p.suffix == ".tmp" and "rows" in p.parts)]
    return {str(path.relative_to(out)): digest(path) for path in found}


def fail(reason: str, folder: Path) -> None:
    sys.exit(f"FAILED: {reason}; what it said: {folder / 'said.txt'}")


def undisturbed(what: str, source: Path, folder: Path) -> tuple[dict[str, str], float]:
    """What an undisturbed run leaves, and the seconds it is at work."""
    process = start(what, source, folder / "out")
    at_work(process, folder / "out" / LOCKS[what])
    began = time.monotonic()
    if process.wait() != 0:
        fail(f"{what} ended with {process.returncode}", folder)
    return left(folder / "out"), time.monotonic() - began


def disturbed(
    what: str, source: Path, folder: Path, expected: dict, seconds: float, most: int, dice: random.Random
) -> int:
    """One round; returns how many kills hit it, at most so many."""
    kills, sessions = 0, []
    while True:
        process = start(what, source, folder / "out")
        sessions.append(process.pid)
        if at_work(process, folder / "out" / LOCKS[what]) and kills < most:
            try:
                process.wait(dice.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
        if process.wait() >= 0:
            break
    if process.returncode != 0:
        fail(f"{what} ended with {process.returncode} after {kills} kills", folder)
    limit = time.monotonic() + 30
    while alive := [pid for session in sessions for pid in processes(session)]:
        if time.monotonic() > limit:
            fail(f"{what}: processes remain: {alive}", folder)
        time.sleep(0.1)
    found = left(folder / "out")
    if wrong := [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]:
        fail(f"{what} after {kills} kills: not the same: {wrong}", folder)
    return kills


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--what", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=4, help="kills of one round")
    options = parser.parse_args(argv)
    dice, root = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    source = root / "source"
    if "prepare" in options.what:
        trees.faceforensics(source, frames=4)
    for what in options.what:
        expected, seconds = undisturbed(what, source, root / what / "whole")
        print(f"{what}: {len(expected)} files, {seconds:.1f} s at work undisturbed", flush=True)
        kills, rounds = 0, 0
        while kills < options.kills:
            rounds += 1
            most = min(options.most, options.kills - kills)
            kills += disturbed(what, source, root / what / str(rounds), expected, seconds, most, dice)
            print(f"{what}: {kills} kills survived in {rounds} rounds", flush=True)
            shutil.rmtree(root / what / str(rounds))
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
