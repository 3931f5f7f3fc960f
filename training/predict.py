"""Say of images and videos how likely their faces are fake.

    python training/predict.py clip.mp4 --checkpoint runs/c40/add                    one line per file
    python training/predict.py folder --checkpoint runs/c40/add --csv frames.csv --annotate pictures
    python training/predict.py export --checkpoint runs/c40/add --out student.onnx   see export.py

Crops are those of prepare.py for the same options: one face is followed through a video, its boxes smoothed, the crop
stored at --size; then, as in training, it is resized to the size the model was trained at. The score of a video is the
mean over its frames. A file that cannot be read, or in which no face is found, is said on its line and does not stop
the others. Exit status: 0 every file has a score, 1 some have none, 2 wrong usage.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import export, figures
from training.data import pixels
from training.evaluate import load_image, score
from training.models import Detector, find_one_trained
from training.prepare import boxes_of, crop, evenly
from training.prepare_options import Options
from training.sources import IMAGES, VIDEOS
from training.video import BrokenVideo, Clip, keep, length, pixels_of, read

CROPPING = ("frames", "size", "margin", "detector", "detector_file", "smoothing")  # options as of prepare.py
THRESHOLD = 0.5
MAP = 4  # the least side of a feature map that is worth drawing

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom outside


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


# --------------------------------------------------------------------------------------------------------------- files


def files_of(path: Path) -> list[Path]:
    """The file itself, or every file under a folder but hidden ones, in order of name."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"input: no file or folder '{path}'")
    found = sorted(p for p in path.rglob("*") if p.is_file())
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not found:
        raise ValueError(f"input: the folder '{path}' has no files")
    return found


def clip_of(path: Path) -> Clip:
    """A file as a clip, an image as one of a single frame; its name tells which it is.

    Raises:
        BrokenVideo: neither an image nor a video.
    """
    if path.suffix.lower() in VIDEOS:
        return path
    if path.suffix.lower() in IMAGES:
        return (path,)
    raise BrokenVideo("neither an image nor a video by its name")


def faces_of(path: Path, options: Options) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, pixels ``(H, W, 3)`` uint8 and box ``(4,)`` of each frame that is looked at.

    A video is read twice, so that it may have any length: the boxes of a frame depend on later frames.

    Raises:
        BrokenVideo: it cannot be read, or has no face.
    """
    clip = clip_of(path)
    total = length(clip)
    kept = evenly(total, options.frames)
    boxes = boxes_of(path, keep(read(clip), kept, total), kept, options)
    for number, box, frame in zip(kept, boxes, keep(read(clip), kept, total), strict=True):
        yield number, pixels_of(frame), box


# ------------------------------------------------------------------------------------------------------------- answers


class Predictor:
    """A model, how faces are cut out for it, and how many at a time it looks at."""

    def __init__(self, model: Detector, image_size: int, batch_size: int, cropping: Options) -> None:
        self.model, self.image_size, self.batch_size, self.cropping = model, image_size, batch_size, cropping

    def crop(self, frame: np.ndarray, box: np.ndarray) -> np.ndarray:
        """A face as the model sees it: as prepare.py stores it, then as training loads it."""
        return load_image(np.asarray(crop(frame, box, self.cropping.size)), self.image_size)

    def __call__(self, path: Path) -> Answer:
        """Look at a file.

        Raises:
            BrokenVideo: it cannot be read, or no face is found.
        """
        answer, faces = Answer(), faces_of(path, self.cropping)
        while batch := list(islice(faces, self.batch_size)):
            crops = torch.from_numpy(np.stack([self.crop(frame, box) for _, frame, box in batch]))
            for (number, frame, box), value in zip(batch, score(self.model, [crops])[0].tolist(), strict=True):
                answer.frames.append((number, tuple(box.tolist()), value))
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
    features, _, logits = model(pixels(torch.from_numpy(image[None]), next(model.parameters()).device))
    gradients = torch.autograd.grad(logits[0, 1] - logits[0, 0], features, allow_unused=True)
    used = [pair for pair in zip(features, gradients, strict=True) if pair[1] is not None]
    if not used:
        raise ValueError("annotate: Grad-CAM needs a tapped layer that the logits come from, this model has none")
    layer, gradient = next((p for p in reversed(used) if min(p[0].shape[2:]) >= MAP), used[-1])
    heat = (gradient.mean((2, 3), keepdim=True) * layer).sum(1, keepdim=True).relu().detach().float()
    heat = F.interpolate(heat, image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    return (heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)).cpu().numpy()


# -------------------------------------------------------------------------------------------------------- command line


def parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    result = ArgumentParser(
        prog="python training/predict.py",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        epilog="predict.py export --help: writes ONNX and .pt2. Exit status: 0 all scored, 1 some not, 2 wrong usage.",
    )
    add = result.add_argument
    add("input", type=str, help="An image, a video, or a folder of them.")
    add("--checkpoint", type=str, required=True, help="The folder of a model in a run, or a file of weights.")
    add("--model", type=str | None, default=None, help="timm model of a file that comes from elsewhere.")
    add("--image_size", type=PositiveInt | None, default=None, help="Side in pixels; without: as the run was trained.")
    add("--csv", type=str | None, default=None, help="File for the box and score of every frame.")
    add("--annotate", type=str | None, default=None, help="Folder for a picture per file: box, score, Grad-CAM.")
    add("--batch_size", type=PositiveInt, default=32, help="Crops per batch.")
    others = {f.name for f in fields(Options)} - set(CROPPING)
    result.add_class_arguments(Options, nested_key=None, as_group=False, skip=others)
    return result


def run(options: Namespace) -> int:
    """Everything the command does; returns its exit status."""
    root = Path(options.input)
    files = files_of(root)
    source = str(root if root.is_dir() else root.parent)
    cropping = Options(source=source, **{key: options[key] for key in CROPPING})
    trained = find_one_trained(options.checkpoint, options.model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = trained.load(device)
    if model.fit and not model.fit.complete:
        print(f"note: {model.fit}", file=sys.stderr)
    predictor = Predictor(model, trained.image_size(options.image_size), options.batch_size, cropping)
    lines, failed = [], 0
    for path in files:
        try:
            answer = predictor(path)
        except BrokenVideo as reason:
            failed += 1
            print(f"{path}: {reason}")
            lines.append([path, None, None, None, None, None, None, str(reason)])
            continue
        print(f"{path}: {answer}")
        for number, box, value in answer.frames:
            lines.append([path, number, *box, value, None])
        if options.annotate:
            frame, box, value = answer.shown
            target = Path(options.annotate) / (path.relative_to(root) if root.is_dir() else Path(path.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            face = predictor.crop(frame, box)
            picture = (frame, box, value, face, grad_cam(model, face))
            pictures = figures.render(lambda theme, picture=picture: figures.prediction(theme, *picture), [])
            target.with_name(f"{target.name}.png").write_bytes(pictures["light"])
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "frame", "left", "top", "right", "bottom", "probability", "note"])
            writer.writerows(lines)
    if failed:
        print(f"{failed} of {len(files)} files have no score", file=sys.stderr)
    return min(failed, 1)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["export"]:
        return export.main(argv[1:])
    parse = parser()
    options = parse.parse_args(argv)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        parse.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
