"""The one typed configuration: a dataclass, read from YAML files and ``key=value`` overrides."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings


@dataclass
class Config:
    """Teach on raw images, distil into students that see their compressed twins, evaluate, report.

    With no arguments: the main job on the embedded set, configs/embedded.yaml.
    """

    name: str = "embedded"
    """The run: everything is written to {out}/{name}."""
    out: str = "runs"
    """Folder of all runs."""
    resume: bool = False
    """Continue the run of this name where its last checkpoint stands, mid-epoch."""
    seed: int = 0
    """Seed of weights, data order, augmentation and views."""

    manifest: str | None = None
    """CSV or parquet table of pairs: path_raw, path_compressed, label, split, and if they apply compression, dataset,
    manipulation, video_id, twin (equal for a real frame and the fake made from it); null: the embedded set."""
    compression: str = "c40"
    """Which compressed twin is learnt from, e.g. c23 or c40; of a manifest, the rows with this value."""
    image_size: int = 64
    """Side in pixels to which images are resized; the embedded set is built at this size."""
    flip: bool = True
    """Mirror training pairs at random, raw and compressed alike."""
    workers: int = 0
    """Processes that load data; 0 loads in the main process."""
    cache: str = "runs/.cache"
    """Where the embedded set is kept."""
    train_clips: int = 1600
    """Embedded set: training clips."""
    val_clips: int = 600
    """Embedded set: validation clips."""
    test_clips: int = 3000
    """Embedded set: test clips; below 3000 the noise of AUC hides what is asked."""
    crfs: list[int] = field(default_factory=lambda: [23, 40])
    """Embedded set: H.264 rate factors; each makes a compression, c23 and so on."""
    fingerprint: list[float] = field(default_factory=lambda: [0.15, 0.30])
    """Embedded set: least and greatest contrast of the forgeries' checkerboard; the weaker, the harder."""

    teacher_model: str = "resnet18"
    """The teacher's timm backbone."""
    student_model: str = "resnet18"
    """The students' timm backbone; any with forward_intermediates."""
    pretrained: bool = False
    """Start networks from timm's ImageNet weights (timm downloads them)."""
    weights: str | None = None
    """Local file of weights to start networks from instead (safetensors or torch)."""
    teacher_checkpoint: str | None = None
    """A trained teacher's model.safetensors: the teacher is not trained."""
    student_from_teacher: bool = True
    """Start students from the trained teacher where the backbones are the same."""

    students: list[str] = field(default_factory=lambda: ["none", "add"])
    """Distillers to train one student with, each: none (cross-entropy only), kd, fitnet, at, nl, ffl, fr (the frequency
    term of ADD alone), mv (its multi-view term alone), add."""
    distillation_scale: float = 1.0
    """Factor of all distillation terms of every method, on top of its own default weights."""
    frequency_weights: list[float] = field(default_factory=lambda: [0.0, 1.0, 2.0, 0.25])
    """ADD: weight of the frequency term at each of the four stages; 0 is off and costs nothing."""
    multi_view_weights: list[float] = field(default_factory=lambda: [0.0, 0.5, 2.5, 2.0])
    """ADD: weight of the multi-view term at each of the four stages."""
    frequency_scale: float = 1.0
    """ADD: factor of all frequency terms."""
    multi_view_scale: float = 16.0
    """ADD: factor of all multi-view terms."""
    frequency_gamma: float = 1.0
    """ADD: sharpness γ of the frequency attention map exp(γ·d)."""
    distance: Literal["l2", "cosine", "gaussian"] = "l2"
    """ADD: distance between spectra."""
    views: int = 12
    """ADD: views drawn at each step."""
    bins: int | None = None
    """ADD: bins per view; null: gcd(C_S, C_T) // 2."""
    coordinates: Literal["index", "unit"] = "index"
    """ADD: project raw indices, or axes scaled to [-1, 1]."""
    attention_gamma: float = 100.0
    """ADD: weight γ of student-teacher attention within the multi-view term."""
    contrast: float = 50.0
    """ADD: weight η of the contrastive part of the multi-view term."""
    margin: float = 0.012
    """ADD: margin of the contrastive part."""

    epochs: int = 1
    """Epochs of each student."""
    teacher_epochs: int = 2
    """Epochs of the teacher."""
    lr: float = 3e-4
    """Peak learning rate of the students (Adam, one-cycle)."""
    teacher_lr: float = 1e-3
    """Peak learning rate of the teacher."""
    weight_decay: float = 0.0
    """Weight decay of Adam."""
    rise: float = 0.05
    """Fraction of the steps during which the one-cycle rate rises."""
    batch_size: int = 32
    """Pairs per step and process."""
    accumulate: int = 1
    """Batches whose gradients are summed before each optimiser step."""
    warmup_epochs: float = 0.0
    """Epochs at a student's start that train only the classifier, distillation off."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast type of the forward passes; losses stay in float32."""

    validations_per_epoch: int = 2
    """Validations per epoch; each writes a checkpoint."""
    patience: int = 10
    """Stop after so many validations without gain in AUC."""
    log_every: int = 10
    """Steps between log lines; losses are read from the device, and checked for NaN, only then."""
    checkpoint_every: int = 0
    """Extra checkpoint every so many steps; 0: at validations only."""
    gallery: int = 0
    """Training samples that recall@1 searches, drawn at random; 0: all."""
    bootstrap: int = 1000
    """Resamples behind the 95 % intervals."""

    def __post_init__(self) -> None:
        for name in ("frequency_weights", "multi_view_weights"):
            if len(getattr(self, name)) != 4:
                raise ValueError(f"{name}: expected four weights, one per stage, got {getattr(self, name)}")
        if len(self.fingerprint) != 2:
            raise ValueError(f"fingerprint: expected the least and the greatest contrast, got {self.fingerprint}")
        for name in (
            "image_size",
            "epochs",
            "teacher_epochs",
            "batch_size",
            "accumulate",
            "validations_per_epoch",
            "patience",
            "log_every",
            "bootstrap",
            "views",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.students or len(set(self.students)) != len(self.students):
            raise ValueError(f"students: expected a list of different distillers, got {self.students}")

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


C = TypeVar("C", bound=Config)
DEFAULT = Path(__file__).parent / "configs" / "embedded.yaml"


def _known(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


def check_keys(keys: list[str], where: str, kind: type[Config] = Config) -> None:
    """Raise a ValueError for the first key that is no field of ``kind``, naming the nearest one."""
    for key in keys:
        if key not in _known(kind):
            nearest = difflib.get_close_matches(key, _known(kind), n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key '{key}' in {where}; did you mean '{nearest}'?")


def _normalise(argv: list[str], kind: type[Config]) -> list[str]:
    """``key=value`` becomes ``--key=value`` and a bare ``--resume`` means true; keys are checked on the way."""
    result: list[str] = []
    takes_value = {f"--{key}" for key in _known(kind) if key != "resume"}
    for position, word in enumerate(argv):
        if re.match(r"[A-Za-z_]\w*=", word) and not takes_value.intersection(argv[max(position - 1, 0) : position]):
            word = f"--{word}"
        if word == "--resume" and argv[position + 1 : position + 2] not in (["true"], ["false"]):
            word = "--resume=true"
        if word.startswith("--"):
            key = word[2:].partition("=")[0]
            if key not in ("config", "help"):
                check_keys([key], "the command line", kind)
        result.append(word)
    return result


def parse(argv: list[str], kind: type[C] = Config, command: str = "train.py", default: Path = DEFAULT) -> C:
    """Read a configuration from the words of a command line.

    Args:
        argv: the words after the command.
        kind: :class:`Config` or a dataclass that adds fields to it; its docstring describes the command.
        command: file name of the command, for ``--help``.
        default: YAML file that holds where ``--config`` is not given.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"python training/{command}",
        description=kind.__doc__.partition("\n")[0],
        epilog=f"Overrides are written key=value or --key value, e.g.: {command} lr=1e-4 students='[none,add]'",
        default_env=False,
        exit_on_error=False,
        default_config_files=[str(default)] if not any(word.startswith("--config") for word in argv) else [],
    )
    parser.add_argument("--config", action="config", help="YAML file of fields; later arguments override it.")
    parser.add_class_arguments(kind, nested_key=None)
    argv = _normalise(argv, kind)
    for position, word in enumerate(argv):
        if word.startswith("--config"):
            path = word.partition("=")[2] or (argv[position + 1] if position + 1 < len(argv) else "")
            if not Path(path).is_file():
                raise ValueError(f"--config: no file '{path}'")
            check_keys(list(yaml.safe_load(Path(path).read_text()) or {}), path, kind)
    try:
        namespace = parser.parse_args(argv)
    except Exception as error:  # jsonargparse raises its own family
        raise ValueError(str(error)) from error
    return kind(**{key: namespace[key] for key in _known(kind)})


def load(path: str | Path, kind: type[C] = Config) -> C:
    """Read a configuration saved with a run."""
    values = yaml.safe_load(Path(path).read_text())
    check_keys(list(values), str(path), kind)
    return kind(**values)
