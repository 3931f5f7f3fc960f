"""Train a teacher on raw images and students on their compressed twins; evaluate all; write the report.

    python training/train.py                                                       the main job, on the embedded set
    python training/train.py --config training/configs/resnet50_ffpp_c40.yaml manifest=pairs.csv lr=1e-4
    python training/train.py --resume                                              go on after an interruption
    torchrun --nproc_per_node 8 training/train.py …                                on several GPUs

Everything of a run lies in {out}/{name}: config.yaml, metrics.jsonl, tensorboard/, one folder per model (its best
weights model.safetensors, its last checkpoints), results.json, report.html. Exit status: 0 done, 1 the training broke
off (a loss that is not finite), 2 wrong usage or data, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not take the cores of a shared machine
if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from training.interrupts import prepare_imports

    prepare_imports()

from accelerate import Accelerator
from torch import nn

from training import options
from training.config import EMBEDDED, Config, load_config
from training.data.loader import Split, load_splits
from training.files import check_folder, read_json, remove_drafts, shown, write_text
from training.fit import (
    check_distillers,
    fit,
    given_teacher,
    keep_freed_memory,
    new_accelerator,
    new_model,
    new_student,
    predict,
)
from training.locks import beside, only_one
from training.report import metrics, page
from training.report.log import Log

# Options that change neither the samples of a step nor what is learnt from them. A manifest may move: what counts is
# what stands in it. Batches may be shared by another number of processes.
FREE = ("resume", "name", "out", "cache", "manifest", "students", "workers", "log_every", "checkpoint_every", "gallery")
FREE = (*FREE, "bootstrap", "batch_size", "outside")


class Clock:
    """Seconds by part of the run, in order."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def _begun(folder: Path) -> bool:
    """Whether there is a run; one that was killed in its first moments has left at most drafts."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


def check_options(config: Config) -> None:
    """Refuse to continue an earlier run with options that change what is learnt; before the data are read.

    Raises:
        ValueError: it was started with other values, or has no configuration, or something in it leads elsewhere.
    """
    folder = config.folder
    if not config.resume or not _begun(folder):
        return
    check_folder(folder)
    before, now = asdict(load_config(folder / "config.yaml")), asdict(config)
    if changed := [shown(f"{key}={before[key]}") for key in now if key not in FREE and now[key] != before[key]]:
        raise ValueError(f"resume: the run {folder} was started with {', '.join(changed)}; say so again, or start anew")


def open_run(config: Config, splits: dict[str, Split], processes: int) -> None:
    """Make the run's folder; an earlier run of the name is continued (``resume``) or moved aside, never overwritten.

    Raises:
        ValueError: the earlier run cannot be continued, because it would not be the same any more.
    """
    folder = config.folder
    facts = {"processes": processes, "data": {name: split.fingerprint() for name, split in splits.items()}}
    check_options(config)
    if config.resume and _begun(folder):
        _check_facts(config, facts, has_teacher=not config.teacher_checkpoint and len(splits["train"].where("raw")) > 0)
        remove_drafts(folder)
    elif config.resume:
        print(f"note: there is no run {folder} to go on with; it begins")
    elif folder.exists():
        started = datetime.fromtimestamp(folder.stat().st_mtime)
        os.rename(folder, aside := folder.with_name(f"{folder.name}.{started:%Y-%m-%dT%H-%M-%S.%f}"))
        print(f"the earlier run {folder} is now {aside}")
    write_text(folder / "config.yaml", config.to_yaml())
    write_text(folder / "run.json", json.dumps(facts, indent=1))


def _check_facts(config: Config, facts: dict, *, has_teacher: bool) -> None:
    folder, saved = config.folder, config.folder / "run.json"
    roles = ["teacher", *config.students] if has_teacher else config.students
    if all((folder / role / "done.json").exists() for role in roles):
        return  # nothing is left to train
    try:
        started = read_json(saved) if saved.exists() else facts | {"data": {}}
        world, data = int(started["processes"]), dict(started["data"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"resume: {saved} is damaged, so what the run saw is not known; start anew: {error}"
        ) from error
    before = load_config(folder / "config.yaml").batch_size
    if before * world != config.batch_size * facts["processes"]:
        was = f"{before} pairs on each of {world} processes"
        now = f"{config.batch_size} on each of {facts['processes']}"
        raise ValueError(f"resume: the run {folder} had steps of {was}, now {now}: its steps would be others")
    for name in ("train", "val"):
        if (was := data.get(name, facts["data"][name])) != (found := facts["data"][name]):
            had, has = was.partition(",")[0], found.partition(",")[0]
            raise ValueError(
                f"resume: the split {name} of the run {folder} had {had}, now {has}, or others of them: their order "
                "would be another; restore the table, or start anew"
            )
    if world != facts["processes"]:
        print(
            "note: another number of processes has other shares of a batch, and with them other batch norms and pairs"
        )


def evaluate(
    model: nn.Module, splits: dict[str, Split], config: Config, accelerator: Accelerator, qualities: Iterable[str]
) -> dict[str, metrics.Outcome]:
    """Open the test split once in each quality that it has; recall@1 searches the training split in the same."""
    outcomes = {}
    for quality in qualities:
        if not len(splits["test"].where(quality)):
            continue
        outcome, queries = predict(model, splits["test"], config, accelerator, quality)
        if len(splits["train"].where(quality)):
            known, gallery = predict(model, splits["train"], config, accelerator, quality, limit=config.gallery)
            outcome.hits = metrics.nearest_neighbour_hits(queries, outcome.labels, gallery, known.labels)
        outcomes[quality] = outcome
    return outcomes


def train(config: Config) -> Path:
    """The whole run: data, teacher, students, evaluation, report. Returns the run's folder.

    Where nothing raw is there to learn from, as in a table without ``path_raw``, there is no teacher.

    Raises:
        InUse: another process is at work in the run's folder.
    """
    keep_freed_memory()
    check_options(config)
    accelerator = new_accelerator(config)
    alone = only_one(beside(config.folder), f"the run {config.folder}")
    with alone if accelerator.is_main_process else nullcontext():
        return _train(config, accelerator)


def _train(config: Config, accelerator: Accelerator) -> Path:
    clock = Clock()
    with accelerator.main_process_first():
        splits = load_splits(config)
    if len(set(splits["val"].labels)) < 2:
        raise ValueError("the validation split has one class only: its AUC, which chooses the model, is undefined")
    if accelerator.is_main_process:
        open_run(config, splits, accelerator.num_processes)
    accelerator.wait_for_everyone()
    log = Log(config.folder, accelerator.is_main_process)
    clock.lap("data")

    device = accelerator.device
    given = teacher = given_teacher(config, device)
    if given is None and len(splits["train"].where("raw")):
        teacher = new_model(config, config.teacher_model, device)
    check_distillers(config, teacher, config.students)
    if teacher is not None:
        if given is None:
            teacher = fit("teacher", teacher, splits, config, accelerator, log)
        teacher = teacher.requires_grad_(False).eval()
        clock.lap("teacher")
    students = {}
    for name in config.students:
        student = new_student(config, teacher, device).requires_grad_(True)
        students[name] = fit(name, student, splits, config, accelerator, log, teacher=teacher).eval()
        clock.lap(page.title(name))

    outcomes = {}
    if teacher is not None:
        shown = dict.fromkeys(("raw", *config.learnt))
        outcomes["teacher"] = evaluate(teacher, splits, config, accelerator, shown)
    for name, student in students.items():
        outcomes[page.title(name)] = evaluate(student, splits, config, accelerator, config.learnt)
    if accelerator.is_main_process:
        models = {"start": new_student(config, teacher, device).eval()} | students
        clock.lap("evaluation")
        print(page.write(config, splits, teacher, models, outcomes, clock.laps))
    accelerator.wait_for_everyone()
    return config.folder


def main(argv: Sequence[str] | None = None) -> int:
    def work(config: Config) -> None:
        train(config)

    continues = "the same command with --resume goes on from the last checkpoint"
    return options.run(work, Config, "train.py", argv, default=EMBEDDED, after_interrupt=continues)


if __name__ == "__main__":
    sys.exit(main())
