"""The options of a training run: said to train.py, saved with the run, and read by all that comes after."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from .files import CONTROLS, LONGEST, readable
from .options import load

EMBEDDED = Path(__file__).parent / "configs" / "embedded.yaml"  # the main job
LARGEST = 4096  # pixels of a side of the images that a network sees


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
    """CSV or parquet table of pairs: path_raw (empty where there is no raw twin: such rows train by cross-entropy
    alone), path_compressed, label, split, and if they apply compression, dataset, manipulation, video_id, twin (equal
    for a real frame and the fake made from it); null: the embedded set."""
    outside: bool = False
    """Read also pictures that a manifest leads to outside of its own folder, by paths or links."""
    compression: str = "c40"
    """Which compressed twin is learnt from, e.g. c23 or c40; of a manifest, the rows with this value."""
    qualities: list[str] = field(default_factory=list)
    """Several qualities to learn from instead of that one, e.g. [raw, c23, c40]: each frame is shown in one of those it
    has, drawn anew in each epoch; validation is the mean over them."""
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
    fold: int | None = None
    """Embedded set: null: the main job's photographs; a number: test on those of this fold, learn from the others."""
    folds: int = 5
    """Embedded set: parts of its photographs, all but the validation ones, that are tested in turn."""

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
    term of ADD alone), mv (its multi-view term alone), add, and mv_points, add_points (these with slicing=points)."""
    distillation_scale: float = 1.0
    """Factor of all distillation terms of every method, on top of its own default weights, or of the balance."""
    balance: float = 0.0
    """Let the distillation terms start at this multiple of the cross-entropy, whatever the network and its size: a
    factor for each kind (ADD: frequency, multi-view) is set once from the first steps; 0: the weights as they are."""
    balance_steps: int = 20
    """Batches at a student's start, after its warm-up, that the factors of balance are measured on."""
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
    slicing: Literal["grid", "points"] = "grid"
    """ADD: multi-view attention as histograms over the maps' own grid, or as sorted random projections of the pixels in
    channel space."""
    sampling: Literal["uniform", "orthogonal", "quasi"] = "uniform"
    """ADD: draw the views independently, orthogonal by threes (points: by channels), or evenly spread (grid only); the
    losses vary less from step to step."""
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
        parts = Path(self.name).parts
        if not parts or ".." in parts or Path(self.name).is_absolute() or re.search(CONTROLS, self.name):
            raise ValueError(f"name: expected the name of a folder below out, got '{self.name}'")
        if (longest := max(len(readable(part).encode()) for part in parts)) > LONGEST:
            raise ValueError(f"name: expected parts of at most {LONGEST} bytes, got one of {longest}")
        for name in ("frequency_weights", "multi_view_weights"):
            if len(weights := getattr(self, name)) != 4 or min(weights) < 0:
                raise ValueError(f"{name}: expected four weights >= 0, one per stage, got {weights}")
        if self.image_size > LARGEST:
            raise ValueError(f"image_size: expected at most {LARGEST}, got {self.image_size}")
        if len(set(self.qualities)) != len(self.qualities):
            raise ValueError(f"qualities: expected different ones, got {self.qualities}")
        if len(self.fingerprint) != 2:
            raise ValueError(f"fingerprint: expected the least and the greatest contrast, got {self.fingerprint}")
        positive = ("image_size", "epochs", "teacher_epochs", "batch_size", "accumulate", "validations_per_epoch")
        positive += ("patience", "log_every", "bootstrap", "views", "balance_steps")
        at_least = dict.fromkeys(positive, 1)
        names = (
            "seed",
            "workers",
            "gallery",
            "checkpoint_every",
            "warmup_epochs",
            "weight_decay",
            "distillation_scale",
            "balance",
        )
        at_least |= dict.fromkeys((*names, "frequency_scale", "multi_view_scale"), 0)
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("lr", "teacher_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected above 0, got {getattr(self, name)}")
        if not 0 < self.rise < 1:
            raise ValueError(f"rise: expected between 0 and 1, got {self.rise}")
        if self.folds < 2:
            raise ValueError(f"folds: expected at least 2, got {self.folds}")
        if self.fold is not None and (self.manifest or not 0 <= self.fold < self.folds):
            raise ValueError(f"fold: expected null, or without a manifest 0 to {self.folds - 1}, got {self.fold}")
        if self.slicing == "points" and self.bins is not None:
            raise ValueError("bins: go with slicing=grid; points are sorted, not binned")
        if self.slicing == "points" and self.sampling == "quasi":
            raise ValueError("sampling: quasi goes with slicing=grid, whose views have three dimensions")
        if self.bins is not None and self.bins < 1:
            raise ValueError(f"bins: expected at least 1 or null, got {self.bins}")
        if self.manifest is None and self.image_size % 2:
            raise ValueError(f"image_size: expected an even side for the embedded set, got {self.image_size}")
        if not self.students or len(set(self.students)) != len(self.students):
            raise ValueError(f"students: expected a list of different distillers, got {self.students}")

    @property
    def learnt(self) -> list[str]:
        """The qualities that students learn from."""
        return self.qualities or [self.compression]

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path) -> Config:
    """The options that a run was started with; see :func:`.options.load`."""
    return load(path, Config)
