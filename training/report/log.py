"""What is written down while training: metrics.jsonl, TensorBoard, and the check that every loss term is finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..files import write_text
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
        self.board = SummaryWriter(str(self.folder / "tensorboard" / role), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"model": self.role, "step": step} | values) + "\n")
        for name, value in values.items():
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
        except ValueError:
            continue
        if isinstance(row, dict) and {"model", "step"} <= row.keys():
            rows.append(row)
    return rows


class LossHistory:
    """Loss terms of the last steps, kept on the device until they are read together, so that no step waits for them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rows: list[Tensor] = []
        self.steps: list[int] = []

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        if self.names != list(terms):  # the warm-up ended: other terms
            self.read()
            self.names = list(terms)
        self.rows.append(torch.stack([term.detach().float() for term in terms.values()]))
        self.steps.append(step)

    def read(self) -> dict[str, float]:
        """Means since the last reading; raises :class:`NonFiniteLoss` that names the first term to go wrong."""
        if not self.rows:
            return {}
        table, steps = torch.stack(self.rows).cpu(), self.steps
        self.rows, self.steps = [], []
        for step, row in zip(steps, table, strict=True):
            terms = zip(self.names, row.tolist(), strict=True)
            if bad := [f"{name} = {value:g}" for name, value in terms if not math.isfinite(value)]:
                raise NonFiniteLoss(f"loss is not finite at step {step}: {', '.join(bad)}")
        means = table.mean(0)
        return {"loss": means.sum().item()} | dict(zip(self.names, means.tolist(), strict=True))
