"""Which distiller helps, and how surely: methods × folds over photographs × qualities, on the embedded set.

    python training/study.py                                configs/study.yaml: every method, on c36
    python training/study.py students='[none,add]' scales='[0.3,1,3]'   more of it: what is done is not done again
    python training/study.py --config training/configs/study-qualities.yaml   one student for all, or one per quality

Each fold has a teacher, students and a seed of its own, and tests photographs that they have not seen; every photograph
is tested once, but for the three that validate. The factor of a method's weights is chosen on those, in fold 0, by the
same budget for all: one student per factor in ``scales``. Students are trained side by side, on one thread each, which
changes no bit of them. Interrupted and started again, it goes on. Everything lies in {out}/{name}: results.json,
table.md, study.png (and -dark), and a folder per fold with what each student said while it was trained (output.txt).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not take the cores of a shared machine

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from training.interrupts import prepare_imports

    prepare_imports()

import numpy as np
import torch

from training.config import Config
from training.data import embedded
from training.data.frames import RAW, embedded_spec
from training.data.loader import load_splits
from training.files import check_folder, read_json, read_npz, remove_drafts, write_text, write_whole
from training.fit import check_distillers, fit, keep_freed_memory, new_accelerator, new_model, new_student, predict
from training.locks import beside, only_one
from training.models.distillers import DISTILLERS
from training.options import Stopped, load, run
from training.processes import side_by_side, usable_cores
from training.report import folds
from training.report.log import Log
from training.report.page import without_nan

DEFAULT = Path(__file__).parent / "configs" / "study.yaml"
GROWING = ("students", "conditions", "scales", "parallel", "resume", "workers", "cache", "bootstrap", "log_every")
TEACHER = folds.TEACHER


@dataclass
class StudyConfig(Config):
    """Compare distillers over folds of photographs: means, 95 % intervals, paired differences.

    Of the fields of train.py, ``students`` are the methods, of which the first is what the others are compared with;
    ``compression``, ``qualities``, ``fold`` and ``distillation_scale`` are set for each student by the study.
    """

    conditions: list[str] = field(default_factory=lambda: ["c40"])
    """What students learn from, each: a quality, as c40, or several, as raw+c23+c40; all are tested on all of these."""
    scales: list[float] = field(default_factory=lambda: [0.3, 1.0, 3.0])
    """Factors of a method's weights, of which validation chooses one."""
    parallel: int = 0
    """Students trained side by side, on one thread each; 0: as many as there are cores, or one with a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.manifest or self.teacher_checkpoint:
            name = "manifest" if self.manifest else "teacher_checkpoint"
            raise ValueError(f"{name}: the study has folds of the embedded set, each with a teacher of its own")
        if self.fold is not None or self.qualities:
            name = "qualities" if self.qualities else "fold"
            raise ValueError(f"{name}: the study sets it; say conditions, and how many folds")
        if not self.conditions or not self.scales:
            raise ValueError("conditions, scales: expected at least one each")
        if unknown := [name for name in self.students if name not in DISTILLERS]:
            raise ValueError(f"students: unknown {unknown}, expected some of {list(DISTILLERS)}")
        if min(self.scales) <= 0 or len(set(self.scales)) != len(self.scales):
            raise ValueError(f"scales: expected different factors above 0, got {self.scales}")
        known = [RAW, *(f"c{crf}" for crf in self.crfs)]
        alike = [frozenset(condition.split("+")) for condition in self.conditions]
        for condition, qualities in zip(self.conditions, alike, strict=True):
            if not qualities <= set(known) or len(qualities) != len(condition.split("+")) or alike.count(qualities) > 1:
                raise ValueError(f"conditions: expected different ones of {known}, or of these by +, got '{condition}'")
        if self.parallel < 0:
            raise ValueError(f"parallel: expected at least 0, got {self.parallel}")
        if self.test_clips // 2 < (most := -(-len(embedded.FOLDED) // self.folds)):
            raise ValueError(
                f"test_clips: expected two for each photograph of a fold, {2 * most}, got {self.test_clips}"
            )

    @property
    def tested(self) -> list[str]:
        """The qualities that all students are tested on."""
        return list(dict.fromkeys(quality for condition in self.conditions for quality in condition.split("+")))

    def factors(self, method: str) -> list[float]:
        return [1.0] if method == "none" else self.scales


# -------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    """One model of the study; ``tested``: it is to speak about the test split, too."""

    fold: int
    method: str = TEACHER
    condition: str = ""
    scale: float = 1.0
    tested: bool = True

    def __str__(self) -> str:
        if self.method == TEACHER:
            return f"fold {self.fold}, teacher"
        return f"fold {self.fold}, {self.condition}, {self.method}" + f" × {self.scale:g}" * (self.method != "none")

    @property
    def teacher(self) -> Model:
        return Model(self.fold)

    def options(self, config: StudyConfig) -> Config:
        """The configuration of its training."""
        changes: dict = {"seed": config.seed + self.fold, "fold": self.fold, "distillation_scale": self.scale}
        if self.method == TEACHER:
            changes |= {"name": f"{config.name}/fold {self.fold}", "qualities": config.tested, "students": ["none"]}
        else:
            folder = f"{config.name}/fold {self.fold}/{self.condition}/{self.method}, scale {self.scale:g}"
            changes |= {"name": folder, "qualities": self.condition.split("+"), "students": [self.method]}
        return Config(**({f.name: getattr(config, f.name) for f in fields(Config)} | changes))

    def folder(self, config: StudyConfig) -> Path:
        return self.options(config).folder / self.method

    def tests(self, config: StudyConfig) -> dict[str, Path]:
        """By quality, where what it said about the test split is kept."""
        qualities = dict.fromkeys([*([RAW] if self.method == TEACHER else []), *config.tested])
        return {quality: self.folder(config) / f"test-{quality}.npz" for quality in qualities}

    def is_trained(self, config: StudyConfig) -> bool:
        return (self.folder(config) / "done.json").exists()

    def is_done(self, config: StudyConfig) -> bool:
        tests = self.tests(config).values() if self.tested else ()
        return self.is_trained(config) and all(path.exists() for path in tests)

    def validation_auc(self, config: StudyConfig) -> float:
        path = self.folder(config) / "done.json"
        try:
            return float(read_json(path)["best_auc"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged; remove its folder to train the model again: {error}") from error


def make(config: StudyConfig, model: Model) -> None:
    """Train a model, unless that is done, and test it, once per quality; on one thread, which settles its bits."""
    torch.set_num_threads(1)
    keep_freed_memory()
    options = model.options(config)
    accelerator = new_accelerator(options)
    splits = load_splits(replace(options, qualities=config.tested))
    splits = {name: replace(split, learnt=tuple(options.learnt)) for name, split in splits.items()}
    of_teacher = model.teacher.options(config)
    teacher = new_model(of_teacher, config.teacher_model, accelerator.device)
    if model.method == TEACHER:
        check_distillers(config, teacher, config.students)
        trained = fit(TEACHER, teacher, splits, options, accelerator, Log(options.folder, True))
    else:
        teacher = fit(TEACHER, teacher, splits, of_teacher, accelerator, Log(of_teacher.folder, False))
        teacher = teacher.requires_grad_(False).eval()
        student = new_student(options, teacher).requires_grad_(True)
        log = Log(options.folder, True)
        trained = fit(model.method, student, splits, options, accelerator, log, teacher=teacher)
    for checkpoint in model.folder(config).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for quality, path in model.tests(config).items() if model.tested else ():
        if not path.exists():
            outcome, _ = predict(trained.eval(), splits["test"], options, accelerator, quality)
            _keep(path, outcome.scores, outcome.labels, splits["test"].photographs)


def _keep(path: Path, scores: np.ndarray, labels: np.ndarray, photographs: np.ndarray) -> None:
    def write(target: Path) -> None:
        with target.open("wb") as file:
            np.savez(file, scores=scores, labels=labels, photographs=photographs)

    write_whole(path, write)


# ------------------------------------------------------------------------------------------------------------ schedule


def trials(config: StudyConfig, condition: str, method: str) -> list[Model]:
    """The students of which validation chooses the factor; none are tested."""
    return [Model(0, method, condition, scale, tested=False) for scale in config.factors(method)]


def chosen(config: StudyConfig, condition: str, method: str, lost: Collection[Model] = ()) -> float | None:
    """The factor with the best AUC on validation; None while it is not known, as when all are lost."""
    found = trials(config, condition, method)
    if len(found) == 1:
        return found[0].scale
    if not all(model.is_trained(config) or model in lost for model in found):
        return None
    found = [model for model in found if model.is_trained(config)]
    return max(found, key=lambda model: model.validation_auc(config)).scale if found else None


def wanted(config: StudyConfig, lost: Collection[Model]) -> Iterator[Model]:
    """The models that are known to be needed, what others wait for first."""
    yield from (Model(fold) for fold in range(config.folds))
    students = [(condition, method) for condition in config.conditions for method in config.students]
    for student in students:
        if len(found := trials(config, *student)) > 1:
            yield from found
    for student in students:
        if (scale := chosen(config, *student, lost)) is not None:
            condition, method = student
            yield from (Model(fold, method, condition, scale) for fold in range(config.folds))


def ready(config: StudyConfig, lost: Collection[Model]) -> Iterator[Model]:
    """The models that are not done and whose teacher is trained."""
    for model in wanted(config, lost):
        if (model.method == TEACHER or model.teacher.is_trained(config)) and not model.is_done(config):
            yield model


# --------------------------------------------------------------------------------------------------------------- study


def open_study(config: StudyConfig) -> None:
    """Make the study's folder, or go on in it; only its size may have changed."""
    check_folder(config.folder)
    saved = config.folder / "study.yaml"
    if saved.exists():
        before, now = asdict(load(saved, StudyConfig)), asdict(config)
        if changed := [key for key in now if key not in GROWING and now[key] != before[key]]:
            raise ValueError(f"name: the study {config.folder} was started with other values of {', '.join(changed)}")
    write_text(saved, config.to_yaml())


def collect(config: StudyConfig) -> dict:
    """The results so far, as results.json holds them."""
    tested, scales, singles = [], {}, {}

    def values(models: list[Model], quality: str) -> folds.Values:
        found = {}
        for model in models:
            if (path := model.tests(config)[quality]).exists():
                names = embedded_spec(model.options(config)).photographs("test")
                for number, auc in folds.photograph_aucs(**read_npz(path)).items():
                    found[model.fold, Path(names[number]).stem] = auc
        return found

    teachers = [Model(fold) for fold in range(config.folds)]
    tested += [folds.Tested(RAW, TEACHER, quality, values(teachers, quality)) for quality in teachers[0].tests(config)]
    for condition in config.conditions:
        scales[condition], validation = {}, {}
        for method in config.students:
            models = [model for model in trials(config, condition, method) if model.is_trained(config)]
            validated = {model.scale: model.validation_auc(config) for model in models}
            scale = chosen(config, condition, method, [m for m in trials(config, condition, method) if m not in models])
            scales[condition][method] = {"chosen": scale, "validation": validated}
            if scale is None:
                continue
            models = [Model(fold, method, condition, scale) for fold in range(config.folds)]
            tested += [folds.Tested(condition, method, quality, values(models, quality)) for quality in config.tested]
            if method != config.students[0] and not method.startswith("add"):
                done = {m.fold: m.validation_auc(config) for m in models if m.is_trained(config)}
                validation |= {method: done} if done else {}
        singles[condition] = folds.best(validation)
    lines = folds.compare([one for one in tested if one.values], config.students[0], singles)
    return {"config": asdict(config), "scales": scales, "best_single": singles, "lines": lines}


def write(config: StudyConfig) -> str:
    """results.json, table.md, and the picture in light and dark; returns the table."""
    results, base = collect(config), config.students[0]
    scales = {
        condition: {method: found["chosen"] for method, found in of.items()}
        for condition, of in results["scales"].items()
    }
    text = f"{about(config, results)}\n\n{folds.table(results['lines'], scales, base)}"
    write_text(config.folder / "results.json", json.dumps(without_nan(results), indent=1, ensure_ascii=False))
    write_text(config.folder / "table.md", text)
    if any(line["method"] != TEACHER for line in results["lines"]):
        for theme, png in folds.pictures(results["lines"], base).items():
            path = config.folder / f"study{'' if theme == 'light' else '-dark'}.png"
            write_whole(path, lambda target, png=png: target.write_bytes(png))
    return text


def about(config: StudyConfig, results: dict) -> str:
    """What the numbers of the table are, in Markdown."""
    photographs = len(embedded.FOLDED)
    frames = config.folds * config.test_clips // photographs
    singles = [f"{name} ({condition})" for condition, name in results["best_single"].items() if name]
    text = (
        f"{photographs} photographs in {config.folds} folds, each tested once, on about {frames} frames; a fold has "
        f"a teacher ({config.teacher_model}), students ({config.student_model}, {config.image_size} px, "
        f"{config.epochs} epochs) and a seed of its own, on {config.train_clips} clips of the others. Mean of the "
        "photographs’ AUC [95 % interval; its variance the larger of those between photographs and between folds]. "
        "**Bold**: differs from 0, p < 0.05 after Holm’s correction for the methods of a column."
    )
    if len(config.scales) > 1:
        factors = ", ".join(f"{scale:g}" for scale in config.scales)
        text += f" Factor: of {factors} the best on the validation photographs."
    return text + (f" Best single method on validation: {', '.join(singles)}." if singles else "")


def study(config: StudyConfig, say: Callable[[str], None] = print) -> None:
    """Run or continue the study.

    Raises:
        Stopped: models were lost; the others are done, and the table is written.
        InUse: another process is at work in the study's folder.
    """
    with only_one(beside(config.folder), f"the study {config.folder}"):
        _study(config, say)


def _study(config: StudyConfig, say: Callable[[str], None]) -> None:
    open_study(config)
    remove_drafts(config.folder)
    for fold in range(config.folds):
        embedded.build(embedded_spec(Model(fold).options(config)), config.cache)
    os.environ.setdefault("TQDM_MININTERVAL", "30")  # of the processes, whose bars go to files
    tries = [len(config.factors(method)) for method in config.students]
    total = config.folds + len(config.conditions) * sum((count > 1) * count + config.folds for count in tries)
    done = sum(model.is_done(config) for model in wanted(config, ()))

    def finished(model: Model, reason: str, seconds: float) -> None:
        nonlocal done
        done += not reason
        what = f"lost: {reason}" if reason else f"AUC on validation {model.validation_auc(config):.3f}"
        say(f"[{done}/{total}] {model}: {what} ({seconds:.0f} s)")
        write(config)  # what is interrupted has a table

    lost = side_by_side(
        partial(make, config),
        partial(ready, config),
        lambda model: model.folder(config) / "output.txt",
        finished,
        width=config.parallel or (1 if torch.accelerator.is_available() else usable_cores()),
        preload="training.study",
    )
    say(write(config))
    if lost:
        which = "; ".join(f"{model}: {reason}" for model, reason in lost.items())
        raise Stopped(f"{len(lost)} of the models could not be trained; the same command tries them again: {which}")


def main(argv: Sequence[str] | None = None) -> int:
    return run(study, StudyConfig, "study.py", argv, default=DEFAULT)


if __name__ == "__main__":
    sys.exit(main())
