"""Say of images and videos how likely their faces are fake.

    python training/predict.py a.mp4 b.jpg folder/ --checkpoint runs/c40/add                    one line per file
    python training/predict.py folder/ --checkpoint runs/c40/add --csv frames.csv --annotate pictures
    python training/predict.py a.mp4 --checkpoint detector.pth --model resnet50 --fake_class 0  weights from elsewhere

Crops are those of prepare.py for the same options: one face is followed through a video, its boxes smoothed, the crop
taken at --size; then, as in training, it is resized to the size the model was trained at. The score of a video is the
mean over its frames. Of a folder, everything below it is taken that is an image or a video by its name; a folder called
like a video (clip.mp4/000.png) is one. A file that cannot be read, or in which no face is found, is said on its line
and does not stop the others; --csv is written file by file. Exit status: 0 every file has a score, 1 some have none,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import csv
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from training.interrupts import prepare_imports

    prepare_imports()

import numpy as np
import torch
import torch.nn.functional as F

from training.data import images, sources, video
from training.data.crops import Cropping, check_place, faces_of
from training.files import BrokenFile, cell, inside, shortened, shown, shown_lines, write_bytes
from training.models.checkpoints import Foreign, find_one_trained
from training.models.detector import Detector
from training.options import POSITIONAL, run
from training.report import figures

THRESHOLD = 0.5
HELD = 2**28  # pixels of frames at a time: 32 of 4K video
MAP = 4  # the least side of a feature map that is worth drawing
HEADER = ["file", "frame", "left", "top", "right", "bottom", "probability", "note"]

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom outside


@dataclass(kw_only=True)
class Options(Foreign, Cropping):
    """Say of images and videos how likely their faces are fake."""

    input: list[str] = field(default_factory=list, metadata=POSITIONAL)
    """Images, videos, and folders of them; any number, bare."""
    checkpoint: str = ""
    """The folder of a model in a run, a file of weights, or hf://user/name."""
    csv: str | None = None
    """File for the box and score of every frame, written as they come."""
    annotate: str | None = None
    """Folder for a picture per file: box, score, Grad-CAM."""
    batch_size: int = 32
    """Crops per batch."""
    size: int | Literal["auto"] | None = "auto"
    """Side of a crop in pixels before it is resized for the model; null: none; auto: 128 for a model trained here, as
    prepare.py stores crops, null for weights from elsewhere."""

    def __post_init__(self) -> None:
        Foreign.__post_init__(self)
        self.cropping(True)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if not self.input:
            raise ValueError("input: expected images, videos or folders of them; --help explains")
        if not self.checkpoint:
            raise ValueError("checkpoint: expected the folder of a model in a run, or a file of weights")

    def cropping(self, ours: bool) -> Cropping:
        """How faces are cut for a model that was trained here, or elsewhere."""
        values = {f.name: getattr(self, f.name) for f in fields(Cropping)}
        if self.size == "auto":
            values["size"] = Cropping.size if ours else None
        return Cropping(**values)


# --------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Item:
    """A file to look at: its ``path``, its path ``below`` the folder that was given, the ``clip`` that reads it.

    No link may lead out of ``folder``, the one that was given; None where the file itself was.
    """

    path: Path
    below: Path
    clip: video.Clip | None
    folder: Path | None = None


def items_of(given: str) -> tuple[list[Item], list[str]]:
    """A file, or everything below a folder that is an image or a video by its name; and remarks on what is not.

    Raises:
        ValueError: there is no such file or folder, or nothing in it.
    """
    path = Path(given)
    if path.is_file():
        clip = path if path.suffix.lower() in video.ENDINGS or images.is_animation(path) else None
        return [
            Item(path, Path(path.name), (path,) if path.suffix.lower() in images.ENDINGS and not clip else clip)
        ], []
    if not path.is_dir():
        raise ValueError(f"input: no file or folder '{shown(path)}'")
    found = sources.listing(path)
    clips: dict[Path, video.Clip] = {clip: clip for clip in found.videos}
    for folder, frames in found.frames.items():
        if folder.suffix.lower() in video.ENDINGS:
            clips[folder] = frames
        else:
            clips |= {frame: (frame,) for frame in frames}
    remarks = sources.left_out([found])
    if not clips:
        raise ValueError(
            f"input: the folder '{shown(path)}' has no images or videos; {'; '.join(remarks) or 'it is empty'}"
        )
    return [Item(name, name.relative_to(path), clips[name], path) for name in sorted(clips)], remarks


# ------------------------------------------------------------------------------------------------------------- answers


@dataclass
class Answer:
    """What is said about a file.

    Attributes:
        frames: for each frame looked at its number, box and probability of fake.
        shown: the frame ``(H, W, 3)`` uint8, the box and the probability to draw: the most fake one of the file.
    """

    frames: list[tuple[int, Box, float]] = field(default_factory=list)
    shown: tuple[np.ndarray, Box, float] | None = None

    def __str__(self) -> str:
        mean = float(np.mean([score for _, _, score in self.frames]))
        several = f" (mean of {len(self.frames)} frames)" if len(self.frames) > 1 else ""
        return f"{'fake' if mean >= THRESHOLD else 'real'} {mean:.3f}{several}"


class Predictor:
    """A model, how faces are cut out for it, and how many at a time it looks at."""

    def __init__(self, model: Detector, cropping: Cropping, batch_size: int) -> None:
        self.model, self.cropping, self.batch_size = model, cropping, batch_size

    def crop(self, frame: np.ndarray, box: Box) -> np.ndarray:
        """A face as the model sees it: as prepare.py stores it, then as training loads it."""
        return images.resized(images.cut(frame, box, self.cropping.size), self.model.image_size)

    def batches(self, faces: Iterator[tuple[int, np.ndarray, Box]]) -> Iterator[list[tuple[int, np.ndarray, Box]]]:
        """Faces with their whole frames, of which no more are held than ``HELD`` pixels allow."""
        batch = []
        for face in faces:
            batch.append(face)
            if len(batch) == self.batch_size or (len(batch) + 1) * face[1][..., 0].size > HELD:
                yield batch
                batch = []
        if batch:
            yield batch

    @torch.inference_mode()
    def __call__(self, item: Item) -> Answer:
        """Look at a file.

        Raises:
            BrokenFile: it cannot be read, or no face is found.
        """
        if item.clip is None:
            raise BrokenFile("neither an image nor a video by its name")
        check_place(item.clip, None if self.cropping.outside else item.folder)
        answer = Answer()
        for batch in self.batches(faces_of(item.clip, (item.below.as_posix(), item.path.name), self.cropping)):
            crops = torch.from_numpy(np.stack([self.crop(frame, box) for _, frame, box in batch]))
            values = self.model(self.model.pixels(crops))[2].double().softmax(1)[:, 1].tolist()
            if not all(map(math.isfinite, values)):
                raise BrokenFile("the model gives scores that are not finite")
            for (number, frame, box), value in zip(batch, values, strict=True):
                answer.frames.append((number, box, value))
                if answer.shown is None or value > answer.shown[2]:
                    answer.shown = (frame, box, value)
        return answer


def grad_cam(model: Detector, image: np.ndarray) -> np.ndarray:
    """Where a crop looks fake: Grad-CAM (Selvaraju et al., ICCV 2017) of the log-odds of fake.

    Args:
        image: ``(S, S, 3)`` uint8, a crop as the model sees it.

    Returns:
        ``(S, S)`` float32 in 0…1, from the deepest tapped layer that the logits come from and that has at least 4×4
        positions, else from the deepest one.
    """
    features, _, logits = model(model.pixels(torch.from_numpy(image[None].copy())))
    gradients = torch.autograd.grad(logits[0, 1] - logits[0, 0], features, allow_unused=True)
    used = [pair for pair in zip(features, gradients, strict=True) if pair[1] is not None]
    if not used:
        raise ValueError("annotate: Grad-CAM needs a tapped layer that the logits come from, this model has none")
    layer, gradient = next((p for p in reversed(used) if min(p[0].shape[2:]) >= MAP), used[-1])
    heat = (gradient.mean((2, 3), keepdim=True) * layer).sum(1, keepdim=True).relu().detach().float()
    heat = F.interpolate(heat, image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    return (heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)).cpu().numpy()


def annotate(predictor: Predictor, answer: Answer, target: Path, folder: Path) -> None:
    """Draw the most fake frame of a file: its box and score, the crop, and where it looks fake.

    Raises:
        ValueError: ``target`` lies outside of ``folder``, or there is nothing to draw from.
        OSError: it cannot be written.
    """
    if not inside(target.parent, folder):
        raise ValueError(f"{target.parent} leads outside of {folder}")
    frame, box, value = answer.shown
    face = predictor.crop(frame, box)
    picture = (frame, box, value, face, grad_cam(predictor.model, face))
    png = figures.render(lambda theme: figures.prediction(theme, *picture), [])["light"]
    write_bytes(target, png)


def free_name(name: Path, taken: set[Path]) -> Path:
    """A file for the picture of a file; files of one name from several inputs get numbers."""
    bare, number = shortened(name.name), 1
    target = name.with_name(f"{bare}.png")
    while target in taken:
        number += 1
        target = name.with_name(f"{bare} ({number}).png")
    taken.add(target)
    return target


# ------------------------------------------------------------------------------------------------------------- command


def lines_of(item: Item, answer: Answer | BrokenFile) -> Iterator[list]:
    """The rows of the CSV for a file."""
    if isinstance(answer, BrokenFile):
        yield [str(item.path), *[None] * 6, str(answer)]
    else:
        for number, box, value in answer.frames:
            yield [str(item.path), number, *box, value, None]


def work(options: Options) -> int:
    found = [items_of(given) for given in options.input]
    items = [item for each, _ in found for item in each]
    for remark in [remark for _, remarks in found for remark in remarks]:
        print(shown(f"note: {remark}"), file=sys.stderr)
    trained = find_one_trained(options.checkpoint, options)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = trained.load(device)
    for line in trained.assumptions(model):
        print(shown_lines(f"note: {line}"), file=sys.stderr)
    cropping = options.cropping(trained.ours)
    cropping.open_detector()  # its file may be missing
    predictor, failed, undrawn, drawn = Predictor(model, cropping, options.batch_size), 0, False, set()
    if options.csv:
        Path(options.csv).parent.mkdir(parents=True, exist_ok=True)
    with open(options.csv, "w", newline="", encoding="utf-8") if options.csv else nullcontext() as file:
        if file:
            (table := csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)).writerow(HEADER)
        for item in items:
            try:
                answer = predictor(item)
            except BrokenFile as reason:
                answer, failed = reason, failed + 1
            except Exception as error:  # one odd file must not end the rest
                answer, failed = BrokenFile(f"{type(error).__name__}: {error}"), failed + 1
            print(shown(f"{item.path}: {answer}"), flush=True)
            if not (getattr(sys.stdout, "heard", True) or options.csv or options.annotate):
                break  # what is asked for is for a reader that has left
            if file:
                table.writerows(map(cell, line) for line in lines_of(item, answer))
                file.flush()
            if options.annotate and isinstance(answer, Answer):
                try:
                    folder = Path(options.annotate)
                    annotate(predictor, answer, free_name(folder / item.below, drawn), folder)
                except (ValueError, OSError) as error:
                    print(shown(f"{item.path}: not drawn: {error}"), file=sys.stderr)
                    undrawn = True
    if failed:
        print(f"{failed} of {len(items)} files have no score", file=sys.stderr)
    return 1 if failed or undrawn else 0


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["export"] and not Path("export").exists():
        print(
            f"error: export is a command of its own: {shlex.join(['python', 'training/export.py', *words[1:]])}",
            file=sys.stderr,
        )
        return 2
    return run(work, Options, "predict.py", argv, after_interrupt="the files so far stand above and in the CSV")


if __name__ == "__main__":
    sys.exit(main())
