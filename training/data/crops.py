"""From clips to crops: which frames are looked at, one square box for each, cut alike from every quality."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from av import VideoFrame

from ..files import BrokenFile, flush, inside, make_folder, read_json, shown, write_text
from . import faces, images, tables
from .sources.common import Video
from .video import H264, Clip, Encoder, Miscounted, encodable, keep, pixels_of, promised, read

Frames = Iterator[tuple[VideoFrame, bool]]  # and whether it is damaged
Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]  # fmt: skip
R = TypeVar("R")


@dataclass(kw_only=True)
class Cropping:
    """Which frames are looked at, and how faces are cut out of them."""

    frames: int = 64
    """Frames per video, evenly spread."""
    size: int | None = 128
    """Side of a stored crop in pixels; null keeps the pixels of the frame."""
    margin: float = 1.3
    """Side of the crop over that of the face."""
    detector: Literal["cascade", "yunet", "file", "none"] = "cascade"
    """Finds faces on the reference: scikit-image's LBP cascade, OpenCV's YuNet, boxes from a file, or none: frames are
    crops already and are kept whole."""
    detector_file: str | None = None
    """YuNet's .onnx file; or, for detector=file, a CSV or parquet table with the columns video (path below the source,
    or dataset/manipulation/video id), frame, left, top, right, bottom."""
    smoothing: float = 5.0
    """σ in frames of the Gaussian that smooths boxes over time; 0: none."""
    outside: bool = False
    """Read also what links, and paths in lists, lead to outside of the source."""

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("smoothing", 0), ("margin", 0.1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.size is not None and self.size < 8:
            raise ValueError(f"size: expected at least 8 pixels or null, got {self.size}")
        if (self.detector in ("yunet", "file")) != (self.detector_file is not None):
            raise ValueError("detector_file: goes with detector=yunet or detector=file, and these need it")

    def open_detector(self) -> Callable[[np.ndarray], np.ndarray] | dict[str, np.ndarray] | None:
        """What finds boxes: a detector of :mod:`.faces`, the boxes of a table by video, or None.

        Raises:
            ValueError: its file or its package is missing or not what it should be.
        """
        if self.detector == "file":
            return tables.read_boxes(self.detector_file)
        return {"cascade": faces.cascade, "yunet": lambda: faces.yunet(self.detector_file)}.get(
            self.detector, lambda: None
        )()


@dataclass(kw_only=True)
class Pairing(Cropping):
    """How pairs of raw and compressed crops are made from a video."""

    out: str = "pairs"
    """Folder for crops and manifest."""
    crfs: list[int] = field(default_factory=lambda: [23, 40])
    """Compressions, as constant rate factors of H.264: levels c23, c40."""
    pix_fmt: Literal["auto", "yuv420p", "yuv444p"] = "auto"
    """Pixel format of the encoder; auto: yuv444p for FaceForensics++ as released, else yuv420p."""
    preset: Preset = "medium"
    """Preset of libx264."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.crfs or len(set(self.crfs)) != len(self.crfs) or not all(0 <= crf <= 51 for crf in self.crfs):
            raise ValueError(f"crfs: expected different numbers in 0…51, got {self.crfs}")

    @property
    def levels(self) -> list[str]:
        return [f"c{crf}" for crf in self.crfs]


# --------------------------------------------------------------------------------------------------- frames and boxes


def check_place(clip: Clip, root: Path | None) -> None:
    """Raise BrokenFile for a clip that does not lie in ``root``, links followed; None: it may lie anywhere."""
    for path in clip if isinstance(clip, tuple) else (clip,):
        if root is not None and not inside(path, root):
            raise BrokenFile(f"{path} leads outside of {root}; outside=true reads it")


def evenly(total: int, count: int) -> list[int]:
    """Numbers of at most ``count`` frames, the middles of equal parts of a clip of ``total``."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def counted(clip: Clip, work: Callable[[int], R]) -> R:
    """``work(total)`` with the number of frames that a clip promises, and again where its decoder shows another."""
    try:
        return work(promised(clip))
    except Miscounted as error:
        if not error.frames:
            raise BrokenFile("it has no frames that can be decoded") from error
        return work(error.frames)


def boxes_of(
    names: Sequence[str], frames: Frames, kept: list[int], cropping: Cropping
) -> tuple[np.ndarray, np.ndarray]:
    """The square to cut from each kept frame of a clip, in every quality.

    Args:
        names: what a table of boxes may call the clip.
        frames: the kept frames of the reference.
        kept: their numbers.

    Returns:
        ``(T, 4)`` int64: left, top, right, bottom in pixels, right and bottom outside; and ``(T,)`` bool, which frames
        are damaged.

    Raises:
        BrokenFile: no frame has a face, or all are damaged.
    """
    finder, found, damaged = cropping.open_detector(), [], []
    for frame, broken in frames:
        damaged.append(broken)
        if callable(finder):
            found.append(np.empty((0, 4)) if broken else finder(pixels_of(frame)))
    if all(damaged):
        raise BrokenFile(f"all of the {len(damaged)} frames to be used are damaged")
    width, height, times = frame.width, frame.height, np.array(kept, float)
    if finder is None:
        return np.tile([0, 0, width, height], (len(kept), 1)), np.array(damaged)
    if callable(finder):
        track = faces.follow(found)
    else:
        given = next((finder[name] for name in names if name in finder), None)
        if given is None:
            raise BrokenFile(f"{cropping.detector_file} has no box for '{names[0]}'")
        if given[0, 0] > times[-1]:
            raise BrokenFile(
                f"{cropping.detector_file} has boxes from frame {given[0, 0]:g} on, which it does not reach"
            )
        track = np.stack([np.interp(times, given[:, 0], column) for column in given[:, 1:].T], axis=1)
        inside = (track[:, :2] < [width, height]) & (track[:, 2:] > 0)
        if not inside.all():
            box = ", ".join(f"{side:g}" for side in track[~inside.all(1)][0])
            raise BrokenFile(f"{cropping.detector_file} has the box {box}, outside of its frames of {width}×{height}")
    smoothed = faces.smooth(track, times, cropping.smoothing)
    return faces.squares(smoothed, cropping.margin, width, height), np.array(damaged)


def faces_of(
    clip: Clip, names: Sequence[str], cropping: Cropping
) -> Iterator[tuple[int, np.ndarray, tuple[int, int, int, int]]]:
    """Number, pixels ``(H, W, 3)`` uint8 and box of each frame that is looked at; damaged ones are left out.

    A clip is read twice, so that it may have any length: the boxes of a frame depend on later frames.

    Raises:
        BrokenFile: it cannot be read, or has no face.
    """

    def look(total: int) -> tuple[int, list[int], np.ndarray, np.ndarray]:
        kept = evenly(total, cropping.frames)
        return total, kept, *boxes_of(names, keep(read(clip), kept, total), kept, cropping)

    total, kept, boxes, damaged = counted(clip, look)
    frames = keep(read(clip), kept, total)
    for number, box, broken, (frame, _) in zip(kept, boxes.tolist(), damaged, frames, strict=True):
        if not broken:
            yield number, pixels_of(frame), tuple(box)


# ---------------------------------------------------------------------------------------------------------- one video


def pairs_of(video: Video, pairing: Pairing) -> tuple[list[dict[str, Any]], list[str]]:
    """Write the crops of one video in every quality.

    Returns:
        Its rows of the manifest, and what is to be said about it.

    Raises:
        BrokenFile: it cannot be read, has no face, its qualities do not agree frame by frame, or what is read or
            written lies elsewhere than it should.
    """
    for clip in video.files.values():
        check_place(clip, None if pairing.outside else video.root)
    written = [Path(pairing.out, level, video.key) for level in (video.reference, *pairing.levels)]
    for place in (rows_file(video, pairing.out), *written):
        if not inside(place, pairing.out):
            raise BrokenFile(f"{place} leads outside of {pairing.out}")
    return counted(video.files[video.reference], lambda total: _pairs(video, pairing, total))


def _pairs(video: Video, pairing: Pairing, total: int) -> tuple[list[dict[str, Any]], list[str]]:
    kept = evenly(total, pairing.frames)
    auto = "yuv444p" if video.dataset in ("FaceForensics++", "DeepFakeDetection") else "yuv420p"
    pix_fmt = auto if pairing.pix_fmt == "auto" else pairing.pix_fmt
    missing = [crf for crf in pairing.crfs if f"c{crf}" not in video.files]
    encoders = {f"c{crf}": Encoder(H264(crf, pix_fmt, pairing.preset)) for crf in missing}

    def source() -> Frames:
        for frame, broken in read(video.files[video.reference]):
            if encoders:
                prepared = encodable(frame, pix_fmt)
                for encoder in encoders.values():
                    encoder.add(prepared)
            yield frame, broken

    frames = list(keep(source(), kept, total))
    boxes, _ = boxes_of(video.names, iter(frames), kept, pairing)
    written = {video.reference: _write(video, video.reference, iter(frames), kept, boxes, pairing)}
    for level in pairing.levels:
        try:
            if level in encoders:
                twins = ((frame, False) for frame in encoders[level].decoded())
            else:
                twins = _same_size(read(video.files[level]), frames[0][0])
            written[level] = _write(video, level, keep(twins, kept, total), kept, boxes, pairing)
        except BrokenFile as error:
            raise BrokenFile(f"{level}: {error}") from error
    identity = {name: getattr(video, name) for name in ("label", "split", "dataset", "manipulation", "video_id")}
    rows = []
    for level in pairing.levels:
        encoder = str(encoders[level].settings) if level in encoders else "file of the source"
        for place, (number, box) in enumerate(zip(kept, boxes.tolist(), strict=True)):
            if not (written[video.reference][place] and written[level][place]):
                continue  # damaged in one of them
            (raw, sha_raw), (compressed, sha_compressed) = written[video.reference][place], written[level][place]
            rows.append({"path_raw": raw, "path_compressed": compressed} | identity | {
                "compression": level, "frame": number, "twin": f"{video.dataset}/{video.twin}/{place}",
                "reference": video.reference, "frames_in_clip": total, "sha256_raw": sha_raw,
                "sha256_compressed": sha_compressed, "encoder": encoder,
            } | dict(zip(("left", "top", "right", "bottom"), box, strict=True)))  # fmt: skip
    notes = []
    for level, crops in written.items():
        if damaged := [str(number) for number, crop in zip(kept, crops, strict=True) if crop is None]:
            notes.append(f"{level}: damaged and left out: frame {', '.join(damaged)}")
    return rows, notes


def _same_size(frames: Frames, like: VideoFrame) -> Frames:
    for frame, broken in frames:
        if (frame.width, frame.height) != (like.width, like.height):
            raise BrokenFile(f"frames of {frame.width}×{frame.height}, the reference {like.width}×{like.height}")
        yield frame, broken


def _write(
    video: Video, level: str, frames: Frames, kept: list[int], boxes: np.ndarray, pairing: Pairing
) -> list[tuple[str, str] | None]:
    """Path below ``out`` and SHA-256 of each crop, None where the frame is damaged.

    Frames that were padded for the encoder are larger than the boxes reach. The pictures have reached the disk when
    this returns: else a manifest that survives a power cut would name empty ones.
    """
    folder, written = Path(level) / video.key, []
    make_folder(Path(pairing.out) / folder)
    for number, box, (frame, broken) in zip(kept, boxes.tolist(), frames, strict=True):
        if broken:
            written.append(None)
            continue
        name = folder / f"{number:06d}.png"
        path = Path(pairing.out) / name
        content = images.png(images.cut(pixels_of(frame), tuple(box), pairing.size))
        path.unlink(missing_ok=True)  # a link would be followed
        path.write_bytes(content)
        written.append((name.as_posix(), hashlib.sha256(content).hexdigest()))
    for name in [*(Path(crop[0]) for crop in written if crop), folder]:  # together: each alone waits longer
        flush(Path(pairing.out) / name)
    return written


# --------------------------------------------------------------------------------------------- what is left of a video


def rows_file(video: Video, out: str) -> Path:
    """Where the rows of a finished video are kept until the manifest is written."""
    return Path(out) / "rows" / f"{video.key}.json"


def finished_rows(video: Video, out: str) -> tuple[list[dict[str, Any]], list[str]] | None:
    """What :func:`pairs_of` gave for a video in this or an earlier run; None where it is not finished."""
    path = rows_file(video, out)
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        return (content["rows"], content["notes"]) if isinstance(content, dict) else (content, [])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{shown(path)} is damaged; remove it to have the video prepared again: {error}") from error


def prepare_video(video: Video, pairing: Pairing) -> str | None:
    """:func:`pairs_of`, unless it is done already; returns the reason where it cannot be."""
    if rows_file(video, pairing.out).is_file():
        return None
    try:
        rows, notes = pairs_of(video, pairing)
    except BrokenFile as error:
        return str(error)
    except Exception as error:  # one odd file must not end a run of days
        return f"{type(error).__name__}: {error}"
    write_text(rows_file(video, pairing.out), json.dumps({"rows": rows, "notes": notes}))
    return None
