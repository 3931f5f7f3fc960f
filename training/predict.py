"""Say of images and videos how likely their faces are fake.

    python training/predict.py clip.mp4 --checkpoint runs/c40/add                    one line per file
    python training/predict.py folder --checkpoint runs/c40/add --csv frames.csv --annotate pictures
    python training/predict.py export --checkpoint runs/c40/add --out student.onnx   see export.py

Faces are cropped as for training: the square box of the face times --margin, resized to the size the model was trained
at. The score of a video is the mean over its frames. A file that cannot be read, or in which no face is found, is
said on its line and does not stop the others. Exit status: 0 every file has a score, 1 some have none, 2 wrong usage.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from PIL import Image, ImageOps, UnidentifiedImageError
from skimage.feature import Cascade

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import export, figures
from training.data import pixels
from training.evaluate import load_image, score
from training.export import MARGIN
from training.models import Detector, find_one_trained

IMAGES = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".mpeg", ".webm", ".wmv"}
THRESHOLD = 0.5
DETECTED_AT = 480  # pixels of the longer side at which faces are looked for
LEAST_FACE = 40  # pixels, at that size
MAP = 4  # the least side of a feature map that is worth drawing

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom outside


class NotUsable(ValueError):
    """Why a file gets no score."""


@dataclass
class Answer:
    """What is said about a file.

    Attributes:
        frames: for each frame looked at its number, box and probability of fake; box and probability are None where no
            face was found.
        shown: the frame ``(H, W, 3)`` uint8, the box and the probability to draw: the most fake one of the file.
    """

    frames: list[tuple[int, Box | None, float | None]] = field(default_factory=list)
    shown: tuple[np.ndarray, Box, float] | None = None

    @property
    def scores(self) -> list[float]:
        return [score for _, _, score in self.frames if score is not None]

    def __str__(self) -> str:
        mean, without = float(np.mean(self.scores)), len(self.frames) - len(self.scores)
        text = f"{'fake' if mean >= THRESHOLD else 'real'} {mean:.3f}"
        if len(self.frames) > 1:
            text += f" (mean of {len(self.scores)} frames{f', {without} more without a face' if without else ''})"
        return text


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


def frames_of(path: Path, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Number and RGB pixels ``(H, W, 3)`` uint8 of an image (number 0) or of ``count`` frames spread over a video.

    Raises:
        NotUsable: neither an image nor a video, or unreadable.
    """
    try:
        if path.suffix.lower() in IMAGES:
            with Image.open(path) as image:
                yield 0, np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        elif path.suffix.lower() in VIDEOS:
            yield from _video(path, count)
        else:
            raise NotUsable("neither an image nor a video by its name")
    except UnidentifiedImageError as error:
        raise NotUsable("cannot be read: not an image") from error
    except (OSError, av.FFmpegError, Image.DecompressionBombError) as error:
        raise NotUsable(f"cannot be read: {error}") from error


def _video(path: Path, count: int) -> Iterator[tuple[int, np.ndarray]]:
    with av.open(path) as container:
        if not container.streams.video:
            raise NotUsable("cannot be read: it has no pictures")
        total = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
    if total == 0:
        raise NotUsable("cannot be read: it has no frames")
    wanted = range(total) if count == 0 else {(2 * i + 1) * total // (2 * count) for i in range(count)}
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                yield number, frame.to_ndarray(format="rgb24")


# --------------------------------------------------------------------------------------------------------------- faces


def cascade(margin: float) -> Callable[[np.ndarray], Box | None]:
    """Finds the largest face of a frame by scikit-image's LBP cascade; its box times the margin, within the frame."""
    detector = Cascade(skimage.data.lbp_frontal_face_cascade_filename())

    def find(frame: np.ndarray) -> Box | None:
        height, width = frame.shape[:2]
        shrink = min(1.0, DETECTED_AT / max(height, width))
        small = np.asarray(Image.fromarray(frame).resize((round(width * shrink), round(height * shrink))))
        least, most = (LEAST_FACE, LEAST_FACE), small.shape[:2]
        if min(most) < LEAST_FACE:
            return None
        found = detector.detect_multi_scale(small, 1.2, 1, least, most)
        if not found:
            return None
        face = max(found, key=lambda box: box["width"])
        side = min(round(margin * face["width"] / shrink), height, width)
        left, top = (
            int(np.clip(round((face[corner] + face["width"] / 2) / shrink - side / 2), 0, length - side))
            for corner, length in (("c", width), ("r", height))
        )
        return left, top, left + side, top + side

    return find


def whole(_: float) -> Callable[[np.ndarray], Box | None]:
    """Takes every frame whole: it is a crop already."""
    return lambda frame: (0, 0, frame.shape[1], frame.shape[0])


FACES = {"cascade": cascade, "none": whole}
FACES_HELP = "cascade (scikit-image's LBP frontal faces) or none (the files are crops already)"

# ------------------------------------------------------------------------------------------------------------- answers


class Predictor:
    """A model, how faces are found for it, and how many frames of a video it looks at."""

    def __init__(self, model: Detector, size: int, options: Namespace) -> None:
        self.model, self.size, self.options = model, size, options
        self.find = FACES[options.faces](options.margin)

    def crop(self, frame: np.ndarray, box: Box) -> np.ndarray:
        left, top, right, bottom = box
        return load_image(frame[top:bottom, left:right], self.size)

    def __call__(self, path: Path) -> Answer:
        """Look at a file.

        Raises:
            NotUsable: it cannot be read, or no face is found.
        """
        answer, waiting = Answer(), []
        for number, frame in frames_of(path, self.options.frames):
            waiting.append((number, frame, self.find(frame)))
            if len(waiting) == self.options.batch_size:
                self._judge(waiting, answer)
                waiting = []
        self._judge(waiting, answer)
        if not answer.scores:
            raise NotUsable("no face found" if len(answer.frames) == 1 else "no face found in any frame")
        return answer

    def _judge(self, frames: list[tuple[int, np.ndarray, Box | None]], answer: Answer) -> None:
        crops = [self.crop(frame, box) for _, frame, box in frames if box is not None]
        scores = iter(score(self.model, [torch.from_numpy(np.stack(crops))])[0].tolist() if crops else [])
        for number, frame, box in frames:
            value = None if box is None else next(scores)
            answer.frames.append((number, box, value))
            if value is not None and (answer.shown is None or value > answer.shown[2]):
                answer.shown = (frame, box, value)


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
    add("--faces", type=Literal[tuple(FACES)], default="cascade", help=f"How faces are found: {FACES_HELP}.")
    add("--margin", type=PositiveFloat, default=MARGIN, help="Side of the crop over that of the face.")
    add("--frames", type=NonNegativeInt, default=32, help="Frames of a video, evenly spread; 0: all.")
    add("--csv", type=str | None, default=None, help="File for the box and score of every frame.")
    add("--annotate", type=str | None, default=None, help="Folder for a picture per file: box, score, Grad-CAM.")
    add("--batch_size", type=PositiveInt, default=32, help="Crops per batch.")
    return result


def run(options: Namespace) -> int:
    """Everything the command does; returns its exit status."""
    root = Path(options.input)
    files = files_of(root)
    trained = find_one_trained(options.checkpoint, options.model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = trained.load(device)
    if model.fit and not model.fit.complete:
        print(f"note: {model.fit}", file=sys.stderr)
    predictor, lines, failed = Predictor(model, trained.image_size(options.image_size), options), [], 0
    for path in files:
        try:
            answer = predictor(path)
        except NotUsable as reason:
            failed += 1
            print(f"{path}: {reason}")
            lines.append([path, None, None, None, None, None, None, str(reason)])
            continue
        print(f"{path}: {answer}")
        for number, box, value in answer.frames:
            lines.append([path, number, *(box or [None] * 4), value, None if box else "no face found"])
        if options.annotate:
            frame, box, value = answer.shown
            target = Path(options.annotate) / (path.relative_to(root) if root.is_dir() else Path(path.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            crop = predictor.crop(frame, box)
            picture = (frame, box, value, crop, grad_cam(model, crop))
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
