"""Which distiller helps, and how surely: methods × seeds × compressions on one set, with one shared teacher.

    python training/study.py                                  configs/study.yaml, on the embedded set
    python training/study.py seeds=10 students='[none,add]'   more of it: what is done already is not done again

The weight of every method is chosen first, on the validation split, by the same budget: one student per factor in
``scales``, with the first seed. Then every seed trains a student with the chosen one, and the test split is opened once
for each. Interrupted and started again, it goes on. Everything lies in {out}/{name}: results.json, table.md, study.png
(and -dark), and a folder per student.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not take the cores of a shared machine

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported ends it without a traceback

import matplotlib.pyplot as plt
import numpy as np
from accelerate import Accelerator
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from torch import nn

from training.config import Config
from training.data.loader import Split, load_splits
from training.files import write_text, write_whole
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
from training.models.detector import Detector
from training.models.distillers import DISTILLERS
from training.options import load, run
from training.report import figures, metrics, page
from training.report.log import Log

DEFAULT = Path(__file__).parent / "configs" / "study.yaml"
GROWING = ("students", "seeds", "compressions", "scales")


@dataclass
class StudyConfig(Config):
    """Compare distillers over seeds and compressions: mean, 95 % interval, paired differences to the first method.

    Of the fields of train.py, ``students`` are the methods; ``compression`` and ``distillation_scale`` are set for each
    student by the study.
    """

    seeds: int = 5
    """Students per method and compression, with the seeds seed, seed + 1, …; the teacher has the first."""
    compressions: list[str] = field(default_factory=lambda: ["c40"])
    """Compressions to learn from and to be tested on, each."""
    scales: list[float] = field(default_factory=lambda: [0.1, 1.0, 10.0])
    """Factors of a method's default weights, of which validation chooses one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 2:
            raise ValueError(f"seeds: expected at least 2, for an interval, got {self.seeds}")
        if not self.compressions or not self.scales:
            raise ValueError("compressions, scales: expected at least one each")
        if unknown := [name for name in self.students if name not in DISTILLERS]:
            raise ValueError(f"students: unknown {unknown}, expected some of {list(DISTILLERS)}")
        if min(self.scales) <= 0 or len(set(self.scales)) != len(self.scales):
            raise ValueError(f"scales: expected different factors above 0, got {self.scales}")
        if len(set(self.compressions)) != len(self.compressions):
            raise ValueError(f"compressions: expected different ones, got {self.compressions}")

    def student(self, compression: str, method: str, scale: float, seed: int) -> Config:
        """The configuration of one student."""
        values = {f.name: getattr(self, f.name) for f in fields(Config)}
        name = f"{self.name}/{compression}/seed {seed}, scale {scale:g}"
        changes = {"name": name, "compression": compression, "seed": seed, "students": [method]}
        return Config(**(values | changes | {"distillation_scale": scale}))


# ------------------------------------------------------------------------------------------------------------ students


@dataclass
class Bench:
    """What all students of one compression share."""

    config: StudyConfig
    compression: str
    splits: dict[str, Split]
    teacher: nn.Module
    accelerator: Accelerator

    def train(self, method: str, scale: float, seed: int) -> tuple[nn.Module, Config]:
        """A trained student, or the finished one of an earlier start."""
        config = self.config.student(self.compression, method, scale, seed)
        config.folder.mkdir(parents=True, exist_ok=True)
        student = new_student(config, self.teacher).requires_grad_(True)
        log = Log(config.folder, self.accelerator.is_main_process)
        student = fit(method, student, self.splits, config, self.accelerator, log, teacher=self.teacher).eval()
        for checkpoint in (config.folder / method).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return student, config

    def validation_auc(self, method: str, scale: float) -> float:
        _, config = self.train(method, scale, self.config.seed)
        return json.loads((config.folder / method / "done.json").read_text())["best_auc"]

    def choose_scale(self, method: str) -> tuple[float, dict[float, float]]:
        """The factor with the best AUC on validation, and that of each."""
        scales = [1.0] if method == "none" else self.config.scales
        found = {scale: self.validation_auc(method, scale) for scale in scales}
        return max(found, key=found.get), found

    def test(self, model: nn.Module, source: str, path: Path) -> metrics.Outcome:
        """What a model says about the test split, asked once and kept in ``path``."""
        if not path.exists():
            outcome, _ = predict(model, self.splits["test"], self.config, self.accelerator, source)
            write_whole(path, lambda target: target.write_bytes(outcome.scores.tobytes()))
        split = self.splits["test"]
        return metrics.Outcome(np.frombuffer(path.read_bytes()), split.labels, split.groups)

    def outcomes(self, method: str, scale: float) -> list[metrics.Outcome]:
        """The test outcomes of a method's students, one per seed."""
        results = []
        for seed in range(self.config.seed, self.config.seed + self.config.seeds):
            student, config = self.train(method, scale, seed)
            results.append(self.test(student, "compressed", config.folder / method / "test.scores"))
        return results


# ---------------------------------------------------------------------------------------------------------- statistics


@dataclass
class Sample:
    """AUC of one method: ``values`` ``(S,)`` per seed, ``resampled`` ``(S, R)`` on resampled test splits."""

    values: np.ndarray
    resampled: np.ndarray

    @classmethod
    def of(cls, outcomes: list[metrics.Outcome], resamples: int) -> Sample:
        values = np.array([metrics.compute(outcome)["auc"] for outcome in outcomes])
        return cls(values, np.stack([metrics.bootstrap(outcome, resamples)["auc"] for outcome in outcomes]))

    def __sub__(self, other: Sample) -> Sample:
        """Paired by seed and by resample; a single model is compared with every seed."""
        return Sample(self.values - other.values, self.resampled - other.resampled)

    def summary(self) -> dict[str, float | list[float]]:
        """The mean and its 95 % interval.

        Its variance is that of the mean over seeds plus that of the test split (by bootstrap of its sources), with
        Student's t of the seeds' degrees of freedom; for a single model, that of the test split alone.
        """
        count = len(self.values)
        variance = self.resampled.mean(0).var(ddof=1)
        if count > 1:
            variance += self.values.var(ddof=1) / count
        quantile = student_t.ppf(0.975, count - 1 if count > 1 else np.inf)
        mean, half = float(self.values.mean()), float(quantile * np.sqrt(variance))
        return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": self.values.tolist()}


def compare(samples: dict[str, Sample], against: list[str]) -> dict[str, dict[str, dict]]:
    """``{method: {"auc": …, "minus <name>": …}}`` with a summary in each place."""
    return {
        method: {"auc": sample.summary()}
        | {f"minus {name}": (sample - samples[name]).summary() for name in against if name != method}
        for method, sample in samples.items()
    }


# -------------------------------------------------------------------------------------------------------------- report


def _cell(summary: dict | None, *, signed: bool = False) -> str:
    return "–" if summary is None else page.span({"value": summary["mean"], **summary}, signed=signed)


def table(results: dict) -> str:
    """The results as Markdown, a table per compression."""
    lines = []
    for compression, found in results["compressions"].items():
        references = found["references"]
        lines += [
            f"{compression}: {found['test_samples']} test frames, {results['config']['seeds']} students per method",
            "",
            "| method | scale | AUC | " + " | ".join(f"− {name}" for name in references) + " |",
            "|---|---|---|" + "---|" * len(references),
        ]
        for method, row in found["methods"].items():
            differences = [_cell(row.get(f"minus {name}"), signed=True) for name in references]
            scale = found["scales"].get(method, {}).get("chosen")
            cells = [method, "–" if scale is None else f"{scale:g}", _cell(row["auc"]), *differences]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(theme: figures.Theme, results: dict) -> Figure:
    """Left the AUC of every method and seed, right its difference to the first method; a row per compression."""
    compressions = results["compressions"]
    rows = max(len(found["methods"]) for found in compressions.values())
    figure, axes = plt.subplots(
        len(compressions), 2, figsize=(10, (0.36 * rows + 1.1) * len(compressions)), squeeze=False, sharey="row"
    )
    for (compression, found), (left, right) in zip(compressions.items(), axes, strict=True):
        base = next(iter(found["references"]))
        for y, (method, row) in enumerate(found["methods"].items()):
            color = theme.color(method if method in ("add", base) else "other")
            for axis, summary in ((left, row["auc"]), (right, row.get(f"minus {base}"))):
                if summary is not None:
                    axis.hlines(y, summary["low"], summary["high"], color=color, linewidth=5, alpha=0.35)
                    axis.plot(summary["seeds"], [y] * len(summary["seeds"]), "|", color=color, markersize=9)
                    axis.plot(summary["mean"], y, "o", color=color, markersize=6)
        left.set(title=f"AUC on {compression}, a mark per seed", yticks=range(len(found["methods"])))
        left.set_yticklabels(found["methods"])
        left.invert_yaxis()
        right.set(title=f"difference to {base}, and its 95 % interval")
        right.axvline(0, color=theme.values["muted"], linewidth=1)
    return figure


# --------------------------------------------------------------------------------------------------------------- study


def open_study(config: StudyConfig) -> None:
    """Make the study's folder, or go on in it; only its size may have changed."""
    saved = config.folder / "study.yaml"
    if saved.exists():
        before, now = asdict(load(saved, StudyConfig)), asdict(config)
        if changed := [key for key in now if key not in (*GROWING, "resume") and now[key] != before[key]]:
            raise ValueError(f"name: the study {config.folder} was started with other values of {', '.join(changed)}")
    config.folder.mkdir(parents=True, exist_ok=True)
    write_text(saved, config.to_yaml())


def shared_teacher(config: StudyConfig, splits: dict[str, Split], accelerator: Accelerator) -> Detector:
    given = given_teacher(config, accelerator.device)
    teacher = given or new_model(config, config.teacher_model, accelerator.device)
    check_distillers(config, teacher, config.students)
    if given is None:
        teacher = fit("teacher", teacher, splits, config, accelerator, Log(config.folder, accelerator.is_main_process))
    return teacher.requires_grad_(False).eval()


def study(config: StudyConfig, say: Callable[[str], None] = print) -> dict:
    """Run or continue the study; returns what results.json holds."""
    keep_freed_memory()
    open_study(config)
    accelerator = new_accelerator(config)
    results: dict = {"config": asdict(config), "compressions": {}}
    for compression in config.compressions:
        splits = load_splits(replace(config, compression=compression))
        bench = Bench(config, compression, splits, shared_teacher(config, splits, accelerator), accelerator)
        folder = config.folder / compression
        folder.mkdir(exist_ok=True)
        teacher = {
            f"teacher on {kind}": [bench.test(bench.teacher, source, folder / f"teacher-{kind}.scores")]
            for kind, source in (("raw", "raw"), (compression, "compressed"))
        }
        samples = {name: Sample.of(outcomes, config.bootstrap) for name, outcomes in teacher.items()}
        scales = {}
        for method in config.students:
            chosen, found = bench.choose_scale(method)
            scales[method] = {"chosen": chosen, "validation": found}
            samples[method] = Sample.of(bench.outcomes(method, chosen), config.bootstrap)
            say(f"{compression} {method}, scale {chosen:g}: AUC {_cell(samples[method].summary())}")
            references = [config.students[0], f"teacher on {compression}"]
            results["compressions"][compression] = {
                "test_samples": len(splits["test"]),
                "references": references,
                "scales": scales,
                "methods": compare(samples, references),
            }
            write(config.folder, results)  # what is interrupted has a table
    return results


def write(folder: Path, results: dict) -> None:
    """results.json, table.md, and the picture in light and dark."""
    write_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
    write_text(folder / "table.md", table(results))
    first = next(iter(results["compressions"].values()))
    shades = [first["references"][0], "add", "other"]
    for theme, png in figures.render(lambda theme: draw(theme, results), shades).items():
        (folder / f"study{'' if theme == 'light' else '-dark'}.png").write_bytes(png)


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda config: print(table(study(config))), StudyConfig, "study.py", argv, default=DEFAULT)


if __name__ == "__main__":
    sys.exit(main())
