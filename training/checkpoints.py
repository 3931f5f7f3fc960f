"""Checkpoints that are whole or absent: model, optimiser, scheduler, random numbers, configuration, progress."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from .config import Config
from .models import read_weights


@dataclass
class Progress:
    """How far the training of one model is, in optimiser steps."""

    step: int = 0
    best_auc: float = -math.inf
    best_step: int = 0
    validations_without_gain: int = 0
    seconds: float = 0.0


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary neighbour (a file, or a folder it makes) and rename it to ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def save_weights(model: nn.Module, path: Path) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, lambda target: save_file(state, target))


def last_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("checkpoint-*"), default=None)


def save_checkpoint(
    folder: Path, accelerator: Accelerator, config: Config, progress: Progress, parts: dict[str, Any]
) -> None:
    """Write checkpoint-{step}: the rename is the moment from which it exists, then its predecessors are removed."""
    final = folder / f"checkpoint-{progress.step:08d}"
    draft = folder / f".{final.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_weights(accelerator.unwrap_model(parts["model"]), draft / "model.safetensors")
        state = {name: parts[name].state_dict() for name in ("optimizer", "scheduler")}
        state["distiller"] = accelerator.unwrap_model(parts["distiller"]).state_dict()
        state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
        torch.save(state | {"progress": asdict(progress)}, draft / "state.pt")
        (draft / "config.yaml").write_text(config.to_yaml())
    accelerator.wait_for_everyone()
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    torch.save(rng, draft / f"rng-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = list(folder.glob("checkpoint-*"))
        if final not in older:
            os.rename(draft, final)
        for path in older:
            if path != final:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()


def load_checkpoint(path: Path, accelerator: Accelerator, parts: dict[str, Any]) -> Progress:
    """Bring every part back to where :func:`save_checkpoint` left it."""
    accelerator.unwrap_model(parts["model"]).load_state_dict(read_weights(path / "model.safetensors"))
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    for name in ("optimizer", "scheduler"):
        parts[name].load_state_dict(state[name])
    accelerator.unwrap_model(parts["distiller"]).load_state_dict(state["distiller"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    rng = torch.load(path / f"rng-{accelerator.process_index}.pt", weights_only=True)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return Progress(**state["progress"])
