"""How every command reads its options: a dataclass, filled from ``key=value`` or ``--key value`` and from YAML files.

:class:`Config` stands here, too: the options of a training run are saved with it and read by what comes after.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

POSITIONAL = {"positional": True}  # metadata of a field that is also filled by words without a key
O = TypeVar("O")  # noqa: E741 - a dataclass of options
EMBEDDED = Path(__file__).parent / "configs" / "embedded.yaml"  # the main job


class Stopped(RuntimeError):
    """The work cannot go on although the options are right: one line and exit status 1."""


# ------------------------------------------------------------------------------------------------------------- reading


def run(
    work: Callable[[O], int | None],
    kind: type[O],
    command: str,
    argv: Sequence[str] | None = None,
    *,
    default: Path | None = None,
    after_interrupt: str = "the same command continues",
) -> int:
    """A whole command: read its options, do its work, and answer what goes wrong in one line.

    Args:
        work: returns the exit status; None is 0.
        kind: the dataclass of the options.
        command: file name of the command.
        argv: the words after the command; None: those this process was started with.
        default: YAML file that holds where ``--config`` is not given.
        after_interrupt: what Ctrl-C leaves.

    Returns:
        The exit status: that of ``work``, 1 where it was stopped, 2 for wrong usage or input, 130 after Ctrl-C.
    """
    try:
        about = sys.modules[work.__module__].__doc__
        return work(read(sys.argv[1:] if argv is None else argv, kind, command, default, about)) or 0
    except Stopped as error:
        status, said = 1, f"error: {error}"
    except (ValueError, OSError) as error:
        status, said = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, said = 130, f"interrupted; {after_interrupt}"
    print(said.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return status


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Examples as they stand, options folded."""


def read(argv: Sequence[str], kind: type[O], command: str, default: Path | None = None, about: str | None = None) -> O:
    """Options from the words of a command line; see :func:`run`. ``about`` is what ``--help`` says first.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    bare = [f for f in fields(kind) if f.metadata.get("positional")]
    words, loose = _words(argv, kind, bare)
    configured = any(word.startswith("--config=") for word in words)
    parser = ArgumentParser(
        prog=f"python training/{command}",
        usage=" ".join(["%(prog)s", *(f"{f.name} …" for f in bare), "[key=value | --key value] …"]),
        description=(about or kind.__doc__).replace("``", "'"),
        formatter_class=_Formatter,
        default_env=False,
        print_config=None,
        exit_on_error=False,
        default_config_files=[str(default)] if default and not configured else [],
    )
    parser.add_argument("--config", action="config", help="YAML file of these options; later arguments override it.")
    parser.add_class_arguments(kind, nested_key=None, as_group=False)
    try:
        namespace = parser.parse_args(words)
    except Exception as error:  # jsonargparse raises its own family
        raise ValueError(" ".join(str(error).split())) from error
    values = {f.name: namespace[f.name] for f in fields(kind)}
    if loose:  # as they are: a name may have bytes that no parser takes
        values[bare[0].name] = loose if _is_list(get_type_hints(kind)[bare[0].name]) else loose[0]
    return kind(**values)


def load(path: str | Path, kind: type[O] | None = None) -> O:
    """Options that were saved with a run, by default a :class:`Config`.

    Raises:
        ValueError: no YAML mapping, or a key that is no option.
    """
    kind = kind or Config
    values = _mapping(path)
    check_keys(values, str(path), kind)
    return kind(**values)


def check_keys(keys: Sequence[str], where: str, kind: type) -> None:
    """Raise a ValueError for the first key that is no field of ``kind``, naming the nearest one."""
    known = [f.name for f in fields(kind)]
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key '{key}' in {where}; did you mean '{nearest}'?")


def _mapping(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config {path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {path}: expected 'key: value' lines, got {type(values).__name__}")
    return values


def _words(argv: Sequence[str], kind: type, bare: list[Field]) -> tuple[list[str], list[str]]:
    """Every spelling as ``--key=value``, in order, and the words without a key; keys are checked on the way."""
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)} | {"config", "help"}
    result: list[str] = []
    loose: list[str] = []
    queue = list(argv)

    def is_option(word: str) -> bool:
        key = re.match(r"([A-Za-z_]\w*)=", word)
        return (word.startswith("--") and word != "--") or bool(key and key[1] in known) or word == "-h"

    while queue:
        word = queue.pop(0)
        if word == "--":
            loose += queue
            break
        match = re.fullmatch(r"(?:--([A-Za-z][\w-]*)|([A-Za-z_]\w*)(?==))(?:=(.*))?", word, flags=re.DOTALL)
        if word == "-h" or (match and (match[1] or "") == "help"):
            result.append("--help")
            continue
        if not match or (match[2] and match[2] not in known and bare and Path(word).exists()):
            loose.append(word)
            continue
        key, value = (match[1] or match[2]).replace("-", "_"), match[3]
        if key not in known:
            check_keys([key], "the command line", kind)
        hint = str if key == "config" else hints[key]
        if value is not None:
            values = [value]
        elif hint is bool:
            values = [queue.pop(0)] if queue and queue[0] in ("true", "false") else ["true"]
        else:
            values = [queue.pop(0)] if queue and not is_option(queue[0]) else []
            while values and _is_list(hint) and queue and not is_option(queue[0]) and queue[0] != "--":
                values.append(queue.pop(0))
            if not values:
                raise ValueError(f"{key}: expected a value after '{word}'")
        if key == "config":
            check_keys(_mapping(values[0]), values[0], kind)
        result.append(f"--{key}={_joined(values, hint)}")
    if loose and not bare:
        raise ValueError(f"expected key=value or --key value, got '{loose[0]}'")
    if len(loose) > 1 and not _is_list(hints[bare[0].name]):
        raise ValueError(f"{bare[0].name}: expected one, got {loose}")
    return result, loose


def _is_list(hint: object) -> bool:
    return "list[" in str(hint)


def _joined(values: list[str], hint: object) -> str:
    """Words as one value; a single one in brackets is a list already."""
    first = values[0]
    bracketed, absent = first[:1] + first[-1:] == "[]", first == "null" and "None" in str(hint)
    if not _is_list(hint) or (len(values) == 1 and (bracketed or absent)):
        return first
    return json.dumps(values) if "list[str]" in str(hint) else f"[{', '.join(values)}]"


# ------------------------------------------------------------------------------------------------------ a training run


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
