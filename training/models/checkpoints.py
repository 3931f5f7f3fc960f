"""What a run leaves on disk: checkpoints that are whole or absent, and the trained models of a run or of a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import save

from ..config import LARGEST, Config, load_config
from ..files import flush, naming, reachable, read_json, remove_drafts, shown, write_whole
from ..options import mapping
from .detector import Detector, numbers, pretrained_setting
from .hub import WEIGHTS, local, weights_of_folder
from .weights import read_metadata, read_torch, read_weights

NOTE = "add_ops"  # key of the metadata of our files of weights
LONGEST_NOTE = 10_000  # characters
KEPT = 2  # checkpoints: a damaged one falls back to the one before it


# --------------------------------------------------------------------------------------------------------- checkpoints


@dataclass
class Progress:
    """How far the training of one model is, in optimiser steps; ``sha256`` is of the file of its best weights."""

    step: int = 0
    best_auc: float = -math.inf
    best_step: int = 0
    validations_without_gain: int = 0
    seconds: float = 0.0
    sha256: str = ""


def save_weights(model: Detector, path: Path) -> None:
    """Write the weights, and beside them what one must know to use them without their run."""
    write_whole(path, lambda target: target.write_bytes(_weights(model)))  # save_file would let nobody else read it


def _weights(model: Detector) -> bytes:
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    about = {name: getattr(model, name) for name in ("name", "image_size", "mean", "std")}
    return save(state, {NOTE: json.dumps(about)})


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), reverse=True)


def save_checkpoint(
    folder: Path, accelerator: Accelerator, config: Config, progress: Progress, parts: dict[str, Any]
) -> None:
    """Write checkpoint-{step}: the rename, when all is on the disk, is the moment from which it exists; then the
    third-last one is removed.

    Raises:
        OSError: it cannot be written, as on a full disk; those before it stand.
    """
    final = folder / f"checkpoint-{progress.step:08d}"
    draft = folder / f".{final.name}.tmp"
    try:
        with naming(final):
            if accelerator.is_main_process:
                remove_drafts(folder, "checkpoint-*")
                draft.mkdir(parents=True)
                (draft / WEIGHTS).write_bytes(_weights(accelerator.unwrap_model(parts["model"])))
                state = {name: parts[name].state_dict() for name in ("optimizer", "scheduler", "balance")}
                state["distiller"] = accelerator.unwrap_model(parts["distiller"]).state_dict()
                state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
                write_torch(draft / "state.pt", state | {"progress": asdict(progress)})
                (draft / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            accelerator.wait_for_everyone()
            rng = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                rng["cuda"] = torch.cuda.get_rng_state()
            write_torch(draft / f"rng-{accelerator.process_index}.pt", rng)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                sums = {path.name: sha256(path) for path in draft.iterdir()}
                (draft / "sums.json").write_text(json.dumps(sums), encoding="utf-8")
                for path in (*draft.iterdir(), draft):
                    flush(path)
                shutil.rmtree(final, ignore_errors=True)  # a damaged one, which the one before it has replaced
                os.rename(draft, final)
                flush(folder)
                known = _checkpoints(folder)
                place = known.index(final)
                for path in known[:place] + known[place + KEPT :]:  # later ones were damaged
                    shutil.rmtree(path)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)  # of what failed: it may be what fills the disk
    accelerator.wait_for_everyone()


def write_torch(path: Path, content: dict[str, Any]) -> None:
    """What ``torch.save`` writes to a file; OSError where the disk is full."""
    with path.open("wb") as file:  # given a path, torch.save says nothing of a full disk
        try:
            torch.save(content, file)
        except RuntimeError as error:  # nor always given a file
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_checkpoint(
    folder: Path, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> Path | None:
    """The newest checkpoint that is as it was written; damaged ones are named, and None where there is none.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    damaged = []
    for path in _checkpoints(folder):
        try:
            sums = read_json(path / "sums.json")
            if missing := {WEIGHTS, "state.pt"} - sums.keys():
                raise ValueError(f"sums.json does not tell of {', '.join(sorted(missing))}")
            if changed := [name for name, value in sums.items() if sha256(path / name) != value]:
                raise ValueError(f"not as they were written: {', '.join(changed)}")
        except (ValueError, OSError, AttributeError) as error:
            damaged.append(path)
            say(f"note: the checkpoint {path} is damaged, the one before it is used: {error}")
            continue
        return path
    if damaged:
        raise ValueError(f"resume: no checkpoint of {folder} can be read: {', '.join(path.name for path in damaged)}")
    return None


def load_checkpoint(path: Path, accelerator: Accelerator, parts: dict[str, Any]) -> Progress:
    """Bring every part back to where :func:`save_checkpoint` left it."""
    accelerator.unwrap_model(parts["model"]).load_state_dict(read_weights(path / WEIGHTS))
    state = read_torch(path / "state.pt")
    for name in ("optimizer", "scheduler", "balance"):
        if name in state:  # the checkpoints of earlier versions know no balance
            parts[name].load_state_dict(state[name])
    accelerator.unwrap_model(parts["distiller"]).load_state_dict(state["distiller"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    own = path / f"rng-{accelerator.process_index}.pt"
    rng = read_torch(own if own.exists() else path / "rng-0.pt")  # now there are more processes: all draw alike
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return Progress(**state["progress"])


# ------------------------------------------------------------------------------------------------------ trained models


@dataclass(kw_only=True)
class Foreign:
    """What a file of weights from elsewhere does not tell about its model."""

    model: str | None = None
    """timm model of a file that comes from elsewhere."""
    image_size: int | None = None
    """Side in pixels of the images; null: as the run was trained, of a foreign file timm's own for the model."""
    mean: list[float] | None = None
    """Mean of the normalisation, pixels in 0…1: one number or three; null: as the run was trained (0.5), of a foreign
    file timm's own for the model."""
    std: list[float] | None = None
    """Standard deviation of the normalisation; null: as mean."""
    fake_class: Literal[0, 1] = 1
    """Which of a foreign model's two classes is fake."""
    prefix: str | None = None
    """What stands before the model's names in a foreign file that holds several networks; null: averaged weights, else
    the first that fits."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and (len(value) not in (1, 3) or not all(map(math.isfinite, value))):
                raise ValueError(f"{name}: expected one number or three, got {value}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std: expected numbers above 0, got {self.std}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size: expected at least 1, got {self.image_size}")


@dataclass(frozen=True)
class Trained:
    """A trained model on disk.

    Attributes:
        path: its file of weights.
        role: ``teacher``, a distiller's name, or the file's stem.
        architecture: its timm model.
        foreign: what was said of it on the command line.
        config: of the run that trained it; None for a file that lies in no run.
        note: what such a file tells about itself, if it was written here.
    """

    path: Path
    role: str
    architecture: str
    foreign: Foreign
    config: Config | None = None
    note: dict[str, Any] | None = None

    @property
    def trained_on(self) -> str:
        """The quality of the images it learnt from, several as ``raw+c40``; ``raw`` for a teacher, ``unknown`` for a
        file from elsewhere.
        """
        if self.config is None:
            return "unknown"
        return "raw" if self.role == "teacher" else "+".join(self.config.learnt)

    @property
    def ours(self) -> bool:
        """Whether a run or the file itself tells all about it."""
        return self.config is not None or self.note is not None

    @property
    def setting(self) -> tuple[Sequence[float], Sequence[float], int]:
        """Mean and deviation of the normalisation, and side in pixels of its images."""
        told = self.foreign
        if self.config:
            mean, std, size = [0.5], [0.5], self.config.image_size
        elif self.note:
            mean, std, size = (self.note[name] for name in ("mean", "std", "image_size"))
        else:
            mean, std, size = pretrained_setting(self.architecture)
            mean, std = told.mean or mean, told.std or std
        return mean, std, told.image_size or size

    def load(self, device: torch.device | str = "cpu") -> Detector:
        """The model in evaluation mode; of a file from elsewhere, ``fit`` tells how it fitted.

        Raises:
            ValueError: not its weights, or no two-class head among them.
        """
        mean, std, size = self.setting
        if self.ours:  # what a small file names may be too large for this machine
            needed, found = numbers(self.architecture, size), self.path.stat().st_size
            if found < needed:
                raise ValueError(
                    f"weights {shown(self.path)}: expected {needed} numbers of '{self.architecture}', got {found} bytes"
                )
        told = {} if self.ours else {"fake_class": self.foreign.fake_class, "prefix": self.foreign.prefix}
        model = Detector(self.architecture, size, weights=self.path, mean=mean, std=std, **told)
        if not model.fit.head:
            raise ValueError(f"weights {self.path}: no two-class head, so the model is not a detector yet; {model.fit}")
        if self.config and not model.fit.complete:
            raise ValueError(f"{self.path}: not the weights of '{self.architecture}': {model.fit}")
        return model.to(device, memory_format=torch.channels_last).eval()

    def assumptions(self, model: Detector) -> list[str]:
        """What is to be said of a loaded model: how a file from elsewhere fitted, and how it is shown images."""
        told = [name for name in ("image_size", "mean", "std") if getattr(self.foreign, name) is not None]
        file = f"weights {shown(self.path)}"
        if self.ours:
            ignored = ["model"] * (self.foreign.model not in (None, self.architecture))
            ignored += [name for name in told if name != "image_size"] + ["fake_class"] * (self.foreign.fake_class != 1)
            return [f"{file}: trained here, so {', '.join(ignored)} as told are not for it"] if ignored else []
        how = (
            f"timm's for this model; {', '.join(told)} as told"
            if told
            else "timm's for this model; image_size=, mean=, std= say otherwise"
        )
        normalised = f"normalised to mean {model.mean} and deviation {model.std}"
        return [str(model.fit), f"{file}: images of {model.image_size}×{model.image_size} px, {normalised} ({how})"]


def find_trained(path: str | Path, foreign: Foreign | None = None, *, outside: bool = False) -> list[Trained]:
    """The trained models that a path holds.

    Args:
        path: the folder of a run (every model of it, the teacher first), the folder of one model, a file of weights, or
            a model on the Hugging Face Hub, ``hf://user/name``.
        foreign: about a file that lies in no run.
        outside: take also a teacher that a run's configuration names neither in its folder nor in the current one; else
            that is said, and it is left out, for a run that comes from elsewhere may name any file.

    Raises:
        ValueError: nothing there, or a file whose architecture is not known.
    """
    path, foreign = weights_of_folder(local(path)), foreign or Foreign()
    if path.is_file() and not (path.name == WEIGHTS and _saved_config(path.parent)):
        note = _note(path)
        model = note["name"] if note else foreign.model
        if model is None:
            raise ValueError(f"checkpoint {path}: a file from elsewhere; its timm model is needed: model=NAME")
        return [Trained(path, path.stem, model, foreign, note=note)]
    folder = path.parent if path.is_file() else path
    if (folder / WEIGHTS).is_file() and (saved := _saved_config(folder)):
        return [_of_run(folder / WEIGHTS, load_config(saved), foreign)]
    if (folder / "config.yaml").is_file():
        config = load_config(folder / "config.yaml")
        found = {file.parent.name: _of_run(file, config, foreign) for file in folder.glob(f"*/{WEIGHTS}")}
        if "teacher" not in found and (given := config.teacher_checkpoint):
            if not (outside or reachable(given, folder)):
                note = f"teacher_checkpoint {shown(given)} lies neither in {shown(folder)} nor in the current folder"
                print(f"note: {note}: left out", file=sys.stderr)
            elif Path(given).is_file():
                found["teacher"] = Trained(Path(given), "teacher", config.teacher_model, foreign, config)
        order = ["teacher", *config.students, *sorted(found)]
        if found:
            return sorted(found.values(), key=lambda model: order.index(model.role))
    raise ValueError(
        f"checkpoint {path}: expected the folder of a run, the folder of a model ({WEIGHTS} in a run), or a file of "
        f"weights; found none"
    )


def find_one_trained(path: str | Path, foreign: Foreign | None = None) -> Trained:
    """As :func:`find_trained`, where one model is needed; several are an error that names them."""
    found = find_trained(path, foreign)
    if len(found) > 1:
        folders = ", ".join(str(model.path.parent) for model in found)
        raise ValueError(f"checkpoint {path}: expected one model, got a run of {len(found)}; choose: {folders}")
    return found[0]


def _note(path: Path) -> dict[str, Any] | None:
    """What :func:`save_weights` noted in a file; None in others."""
    try:
        if len(text := read_metadata(path).get(NOTE, "")) > LONGEST_NOTE:
            return None
        note = json.loads(text)
        Foreign(**{name: note[name] for name in ("image_size", "mean", "std")})
        return note if isinstance(note["name"], str) and 0 < note["image_size"] <= LARGEST else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _saved_config(folder: Path) -> Path | None:
    """The configuration of the run that a model's folder lies in; other projects have a config.yaml, too."""
    file = folder.resolve().parent / "config.yaml"
    try:
        return file if {"teacher_model", "student_model"} <= mapping(file).keys() else None
    except ValueError:
        return None


def _of_run(file: Path, config: Config, foreign: Foreign) -> Trained:
    role = file.resolve().parent.name
    architecture = config.teacher_model if role == "teacher" else config.student_model
    return Trained(file, role, architecture, foreign, config)
