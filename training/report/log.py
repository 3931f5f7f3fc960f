"""What is written down while training: metrics.jsonl, TensorBoard, and the check that every loss term is finite."""

from __future__ import annotations

import json
import math
import sys
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..files import naming, shown, write_text
from ..options import Stopped


class NonFiniteLoss(Stopped):
    """A loss term became NaN or infinite."""


class Log:
    """Appends to metrics.jsonl and TensorBoard; on the main process only."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self.folder, self.enabled = folder, enabled
        self.board: SummaryWriter | None = None

    def open(self, role: str, step: int) -> None:
        """Start or continue the log of a model at a step: what was logged later, before an interruption, is dropped."""
        if not self.enabled:
            return
        self.role, path = role, self.folder / "metrics.jsonl"
        rows = read_rows(path)
        kept = [row for row in rows if row["model"] != role or row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        try:
            self.board = SummaryWriter(str(self.folder / "tensorboard" / role), purge_step=step + 1)
        except UnicodeError:  # in a locale without UTF-8 it takes no other letters
            self.board = None
            print(f"note: TensorBoard takes no such name in this locale: {shown(self.folder)}", file=sys.stderr)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        path = self.folder / "metrics.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"model": self.role, "step": step} | values) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; lines that are none, as a crash may leave one, are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and {"model", "step"} <= row.keys():
            rows.append(row)
    return rows


NO_TERMS = {"model", "step", "epoch", "loss", "cross_entropy", "lr", "images_per_second", "val_auc"}


def term_names(rows: list[dict]) -> list[str]:
    """The distillation terms that rows of a metrics.jsonl have, in order."""
    names = dict.fromkeys(key for row in rows for key in row)
    return sorted(name for name in names if name not in NO_TERMS and not name.startswith(("val_auc/", "factor/")))


class LossHistory:
    """Loss terms of the last steps, kept on the device until they are read together, so that no step waits for them."""

    def __init__(self) -> None:
        self.warming_up = False
        self.names: list[list[str]] = []
        self.rows: list[Tensor] = []
        self.steps: list[int] = []

    def add(self, step: int, terms: dict[str, Tensor], warming_up: bool = False) -> None:
        """Add the terms of a batch; when the warm-up of a distillation has ended, it is left out of the means."""
        if self.warming_up != warming_up:
            self.read()
            self.warming_up = warming_up
        self.names.append(list(terms))
        self.rows.append(torch.stack([term.detach().float() for term in terms.values()]))
        self.steps.append(step)

    def read(self) -> dict[str, float]:
        """Means since the last reading; a term that a batch did not have, as without a raw twin, was 0 there.

        Raises:
            NonFiniteLoss: a term is not finite; the first step and its terms are named.
        """
        if not self.rows:
            return {}
        values = torch.cat(self.rows).cpu().split([len(row) for row in self.rows])
        columns = {name: place for place, name in enumerate(dict.fromkeys(chain(*self.names)))}
        table = torch.zeros(len(values), len(columns))
        for line, step, names, row in zip(table, self.steps, self.names, values, strict=True):
            if bad := [f"{n} = {v:g}" for n, v in zip(names, row.tolist(), strict=True) if not math.isfinite(v)]:
                raise NonFiniteLoss(f"loss is not finite at step {step}: {', '.join(bad)}")
            line[[columns[name] for name in names]] = row
        self.names, self.rows, self.steps = [], [], []
        means = table.mean(0)
        return {"loss": means.sum().item()} | dict(zip(columns, means.tolist(), strict=True))
