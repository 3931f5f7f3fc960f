"""Write a trained model as ONNX and as torch.export's .pt2: the student alone, images in, probability of fake out.

    python training/export.py runs/embedded/add --out student.onnx student.pt2
    python training/export.py runs/embedded/add --hub_folder add-embedded       for the Hugging Face Hub

The graph normalises the pixels itself: it takes face crops as they are decoded, ``images`` (B, S, S, 3) uint8 RGB, and
gives ``probability`` (B,) float32, that of fake, and ``logits`` (B, 2). The file's metadata says so, with S, the margin
of the crop and where the model comes from. Each file is read back and run before it gets its name; one that does not
answer as PyTorch does is not kept. Exit status: 0 written and checked, 1 a file differed, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from training.interrupts import prepare_imports

    prepare_imports()

import numpy as np
import torch
from torch import Tensor, nn

from training.data.crops import Cropping
from training.files import readable, shown_lines, write_whole
from training.models.checkpoints import Foreign, Trained, find_one_trained
from training.models.detector import Detector
from training.options import POSITIONAL, Stopped, run
from training.report import card

CLOSE = 1e-4  # relative L2 distance of logits between PyTorch and a file, float32 through a deep network
BATCHES = (1, 3)  # sizes that a file is tried with
SEED = 0


class Student(nn.Module):
    """The network from decoded crops to answers, without the taps that distillation needs."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``images`` (B, S, S, 3) uint8 RGB to the probability of fake (B,) and the logits (B, 2)."""
        logits = self.model.backbone(self.model.pixels(images))
        return logits.softmax(1)[:, 1], logits


def metadata(trained: Trained, model: Detector, margin: float) -> dict[str, str]:
    """What a file tells about itself."""
    size, normalised = model.image_size, f"mean {model.mean}, std {model.std}"
    return {
        "input": f"images: (batch, {size}, {size}, 3) uint8 RGB; the graph normalises them to {normalised}",
        "output": "probability: (batch,) float32 of fake; logits: (batch, 2), real and fake",
        "crop": f"square face box, {margin} times the face, resized to {size}×{size} (bicubic)",
        "architecture": trained.architecture,
        "trained_on": trained.trained_on,
        "checkpoint": readable(str(trained.path)),
    }


def _write_onnx(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    import onnx

    model = torch.onnx.export(
        program, input_names=["images"], output_names=["probability", "logits"], dynamo=True, verbose=False
    ).model_proto
    onnx.helper.set_model_props(model, facts)
    path.write_bytes(model.SerializeToString())


def _run_onnx(path: Path) -> Callable[[Tensor], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images.numpy()})[0]


def _write_pt2(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    with path.open("wb") as file:  # of a path, it wants the ending
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(facts, ensure_ascii=False)})


def _run_pt2(path: Path) -> Callable[[Tensor], np.ndarray]:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda images: module(images)[1].detach().numpy()


FORMATS = {".onnx": (_write_onnx, _run_onnx), ".pt2": (_write_pt2, _run_pt2)}


class Differs(Stopped):
    """A file does not answer as the model it was written from."""


def export(trained: Trained, paths: list[Path], margin: float) -> dict[Path, float]:
    """Write one file per path, its format by the ending; returns the relative L2 distance found for each.

    Raises:
        ValueError: an ending that is no format.
        Differs: a file that gave other logits than PyTorch; it is not kept.
    """
    if wrong := [str(path) for path in paths if path.suffix.lower() not in FORMATS]:
        raise ValueError(f"out: expected files that end in {' or '.join(FORMATS)}, got {wrong}")
    model = trained.load("cpu")
    for line in trained.assumptions(model):
        print(shown_lines(f"note: {line}"), file=sys.stderr)
    student = Student(model).eval()
    rng = np.random.default_rng(SEED)
    trials = [
        torch.from_numpy(rng.integers(0, 256, (n, model.image_size, model.image_size, 3), dtype=np.uint8))
        for n in BATCHES
    ]
    with torch.no_grad():
        expected = [model(model.pixels(images))[2].numpy() for images in trials]
    batch = torch.export.Dim("batch")
    program = torch.export.export(student, (trials[-1],), dynamic_shapes={"images": {0: batch}})
    distances = {}

    def write_checked(path: Path, draft: Path) -> None:
        write, run = FORMATS[path.suffix.lower()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters about themselves
            write(program, draft, metadata(trained, model, margin))
            answer = run(draft)
        found = [answer(images) for images in trials]
        distance = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True))
        if not distance <= CLOSE:
            raise Differs(f"{path}: differs from PyTorch by {distance:.1e} (relative L2), not kept")
        distances[path] = distance

    for path in paths:
        write_whole(path, partial(write_checked, path))
    return distances


@dataclass(kw_only=True)
class Options(Foreign):
    """Write a trained model as ONNX and as torch.export's .pt2: face crops in, probability of fake out."""

    checkpoint: str = field(default="", metadata=POSITIONAL)
    """The folder of a model in a run, a file of weights, or hf://user/name; may come first, bare."""
    out: list[str] = field(default_factory=list)
    """Files to write, ending in .onnx or .pt2."""
    hub_folder: str = ""
    """Folder to write for the Hugging Face Hub: weights, configuration and a model card with what the run measured."""
    margin: float = Cropping.margin
    """Side of the crop over that of the face, for the record."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint:
            raise ValueError("checkpoint: expected the folder of a model or a file of weights first; --help explains")
        if self.margin <= 0:
            raise ValueError(f"margin: expected above 0, got {self.margin}")
        if not self.out and not self.hub_folder:
            raise ValueError(f"out: expected files that end in {' or '.join(FORMATS)}, or a hub_folder, got none")


def work(options: Options) -> None:
    trained = find_one_trained(options.checkpoint, options)
    written = export(trained, [Path(path) for path in options.out], options.margin) if options.out else {}
    for path, distance in written.items():
        print(f"{path}: equal to PyTorch, relative L2 distance {distance:.1e}")
    if options.hub_folder:
        folder, model = Path(options.hub_folder), trained.load("cpu")
        card.write_folder(folder, trained, model, metadata(trained, model, options.margin))
        print(f"{folder}: weights, configuration and a card; upload by: hf upload USER/NAME {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    return run(work, Options, "export.py", argv, after_interrupt="nothing that was not checked is kept")


if __name__ == "__main__":
    sys.exit(main())
