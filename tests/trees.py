"""Miniature FaceForensics++, Celeb-DF v2 and DFDC trees: real mp4 files, forged from the embedded photographs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from training.data import embedded

PAIRS = {"train": 2, "val": 1, "test": 1}


def write_video(path: Path, clip: np.ndarray, *, crf: int | None = None, pix_fmt: str = "yuv420p") -> Path:
    """Write a clip ``(T, H, W, 3)`` uint8 as mp4: H.264 at a CRF, or bit-exact (``libx264rgb``) without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        lossless = {"crf": "0", "preset": "ultrafast"}
        stream = container.add_stream("libx264rgb" if crf is None else "libx264", rate=25, time_base=Fraction(1, 25))
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "rgb24" if crf is None else pix_fmt
        stream.options = lossless if crf is None else {"crf": str(crf), "preset": "medium"}
        stream.codec_context.thread_count = 1
        for pixels in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_frames(folder: Path, clip: np.ndarray, ending: str = ".png") -> Path:
    """Write the frames of a clip ``(T, H, W, 3)`` uint8 as ``000.png`` and so on, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(clip):
        Image.fromarray(pixels).save(folder / f"{number:03d}{ending}")
    return folder


def touch(root: Path, *names: str) -> Path:
    """Make empty files of these names, for what is never opened, and return the root."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def clip_of(split: str, source: int, fake: int, *, size: int = 96, frames: int = 8) -> np.ndarray:
    """``(frames, size, size, 3)`` uint8: a moving crop of a photograph of the split; the same crop forged for a fake.

    Args:
        source: number of the real clip.
        fake: 0 for the real clip, else the number of the forgery made from it.
    """
    spec = embedded.EmbeddedSpec(size=size, clip_length=frames)
    names = embedded.PHOTOGRAPHS[split]
    rng = np.random.default_rng([embedded.SPLITS.index(split), source])
    photograph = embedded.load_photograph(names[source % len(names)])
    real = embedded.render_clip(photograph, False, spec, rng)
    if not fake:
        return real
    # The window pans over one canvas, so the forgery of a frame is blended at a fixed place of the frame instead.
    forgery = np.random.default_rng([embedded.SPLITS.index(split), source, fake]).integers(1 << 31)
    forged = [embedded.forge(frame.astype(np.float32), spec, np.random.default_rng(forgery)) for frame in real]
    return np.clip(np.round(forged), 0, 255).astype(np.uint8)


def face_clip(side: int = 192, frames: int = 8) -> np.ndarray:
    """``(frames, side, side, 3)`` uint8: the astronaut's face, about 0.4 of the side, drifting 2 pixels a frame."""
    astronaut = np.asarray(embedded.load_photograph("skimage/data/astronaut.png").resize((2 * side, 2 * side)))
    return np.stack([astronaut[:side, side // 2 + 2 * i : side // 2 + 2 * i + side] for i in range(frames)])


def faceforensics(
    root: Path,
    *,
    manipulations: Sequence[str] = ("NeuralTextures",),
    levels: Sequence[str] = ("raw",),
    pairs: Mapping[str, int] = PAIRS,
    size: int = 96,
    frames: int = 8,
) -> Path:
    """Write a FaceForensics++ tree and return its root.

    Args:
        manipulations: folders under ``manipulated_sequences``.
        levels: folders under each: ``raw`` or ``c0`` is bit-exact, ``c{crf}`` is H.264 in yuv444p.
        pairs: id pairs per split; each makes two reals and, per manipulation, two fakes.
        size: side of a frame in pixels.
        frames: per video.
    """
    number, listed = 0, {}
    for split, count in pairs.items():
        names = [f"{number + i:03d}" for i in range(2 * count)]
        listed[split] = list(zip(names[::2], names[1::2], strict=True))
        for i, name in enumerate(names):
            partner = names[i ^ 1]
            videos = {f"original_sequences/youtube/{{}}/videos/{name}.mp4": 0}
            for forgery, manipulation in enumerate(manipulations, 1):
                videos[f"manipulated_sequences/{manipulation}/{{}}/videos/{name}_{partner}.mp4"] = forgery
            for pattern, forgery in videos.items():
                clip = clip_of(split, number + i, forgery, size=size, frames=frames)
                for level in levels:
                    crf = None if level in ("raw", "c0") else int(level[1:])
                    write_video(root / pattern.format(level), clip, crf=crf, pix_fmt="yuv444p")
        number += 2 * count
    (root / "splits").mkdir(parents=True, exist_ok=True)
    for split, entries in listed.items():
        (root / "splits" / f"{split}.json").write_text(json.dumps(entries))
    return root


def celeb_df(root: Path, *, identities: int = 6, size: int = 96, frames: int = 8) -> Path:
    """Write a Celeb-DF v2 tree and return its root: the last two identities and one YouTube video are the test split.

    Args:
        identities: even; each has one real video, and one fake with its neighbour's face.
        size: side of a frame in pixels.
        frames: per video.
    """
    names, testing = [f"id{i}" for i in range(identities)], []
    for i, name in enumerate(names):
        test = i >= identities - 2
        real, fake = f"Celeb-real/{name}_0000.mp4", f"Celeb-synthesis/{name}_{names[i ^ 1]}_0000.mp4"
        for path, forgery in ((real, 0), (fake, 1)):
            clip = clip_of("test" if test else "train", i, forgery, size=size, frames=frames)
            write_video(root / path, clip, crf=20)
        testing += [f"1 {real}", f"0 {fake}"] if test else []
    for i in range(3):
        clip = clip_of("val", i, 0, size=size, frames=frames)
        write_video(root / f"YouTube-real/{i:05d}.mp4", clip, crf=20)
    (root / "List_of_testing_videos.txt").write_text("\n".join([*testing, "1 YouTube-real/00002.mp4", ""]))
    return root


def dfdc(root: Path, *, parts: int = 2, originals: int = 3, size: int = 96, frames: int = 8) -> Path:
    """Write DFDC folders with ``metadata.json`` and return their root; each original has one fake, all is train.

    Args:
        parts: folders.
        originals: in each.
        size: side of a frame in pixels.
        frames: per video.
    """
    for part in range(parts):
        folder, listed = root / f"dfdc_train_part_{part}", {}
        for i in range(originals):
            real, fake = f"real{part}{i}.mp4", f"fake{part}{i}.mp4"
            for name, forgery in ((real, 0), (fake, 1)):
                clip = clip_of("train", part * originals + i, forgery, size=size, frames=frames)
                write_video(folder / name, clip, crf=20)
            listed[real] = {"label": "REAL", "split": "train"}
            listed[fake] = {"label": "FAKE", "split": "train", "original": real}
        (folder / "metadata.json").write_text(json.dumps(listed))
    return root
