"""Clips by PyAV: read in order, compress whole by H.264, decode again, frame for frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps

# On small frames libx264's AVX-512 code gives another bitstream at every run (seen with libavcodec 62.28).
INSTRUCTIONS = {"x264-params": "asm=avx2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}

Clip = Path | tuple[Path, ...]
"""A video file, or images that are its frames in order."""


class BrokenVideo(ValueError):
    """Why a video cannot be used."""


@dataclass(frozen=True)
class H264:
    """Settings of libx264. One thread, because the bitstream depends on their number."""

    crf: int
    pix_fmt: str = "yuv420p"
    preset: str = "medium"

    def __str__(self) -> str:
        version = ".".join(map(str, av.library_versions["libavcodec"]))
        settings = f"crf={self.crf} preset={self.preset} pix_fmt={self.pix_fmt} threads=1"
        return f"libx264 {settings} libavcodec={version}"


class Encoder:
    """Compresses one clip as its frames come; only the packets are kept."""

    def __init__(self, settings: H264) -> None:
        self.settings, self.packets, self.frames = settings, [], 0
        self.context = av.CodecContext.create("libx264", "w")

    def add(self, frame: av.VideoFrame) -> None:
        """Encode the next frame, which :func:`encodable` made."""
        context = self.context
        if not self.frames:
            context.height, context.width, context.pix_fmt = frame.height, frame.width, self.settings.pix_fmt
            context.colorspace, context.color_range = frame.colorspace, frame.color_range
            context.time_base, context.thread_count = Fraction(1, 25), 1
            context.options = {"crf": str(self.settings.crf), "preset": self.settings.preset} | INSTRUCTIONS
        frame.pts, frame.time_base = self.frames, context.time_base
        self.packets += context.encode(frame)
        self.frames += 1

    def decoded(self) -> Iterator[av.VideoFrame]:
        """The frames after compression, in order; to be called once, after the last frame was added."""
        self.packets += self.context.encode(None)
        decoder = av.CodecContext.create("h264", "r")
        decoder.thread_count = 1
        for packet in [*self.packets, None]:
            yield from decoder.decode(packet)


def encodable(frame: av.VideoFrame, pix_fmt: str) -> av.VideoFrame:
    """A frame in the encoder's pixel format, padded to even sides by repeating the last row or column.

    A frame in this format keeps its samples, matrix and range; any other goes through the pixels that are stored as
    raw, so that the two differ by the compression alone. The type of the frame in its source (I, P, B) is forgotten:
    libx264 would take it for an order.
    """
    if frame.format.name != pix_fmt or frame.height % 2 or frame.width % 2:
        padding = ((0, frame.height % 2), (0, frame.width % 2), (0, 0))
        frame = of_pixels(np.pad(pixels_of(frame), padding, mode="edge"))
    frame = frame.reformat(format=pix_fmt)
    frame.pict_type = 0
    return frame


def of_pixels(pixels: np.ndarray) -> av.VideoFrame:
    """``(H, W, 3)`` uint8 as a frame."""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def pixels_of(frame: av.VideoFrame) -> np.ndarray:
    """A frame as ``(H, W, 3)`` uint8."""
    return frame.to_ndarray(format="rgb24")


def compress(clip: np.ndarray, crf: int) -> np.ndarray:
    """Encode a whole clip by libx264 (medium, yuv420p, one thread) and decode it.

    Args:
        clip: ``(T, H, W, 3)`` uint8, H and W even.
        crf: constant rate factor, 0…51.

    Returns:
        The decoded clip, same shape.
    """
    encoder = Encoder(H264(crf))
    for pixels in clip:
        encoder.add(encodable(of_pixels(pixels), encoder.settings.pix_fmt))
    frames = [pixels_of(frame) for frame in encoder.decoded()]
    if len(frames) != len(clip):
        raise RuntimeError(f"H.264 returned {len(frames)} frames for a clip of {len(clip)}")
    return np.stack(frames)


def length(clip: Clip) -> int:
    """Frames that a clip promises, without decoding it.

    Raises:
        BrokenVideo: it cannot be opened, or has no frames.
    """
    if isinstance(clip, tuple):
        return len(clip)
    try:
        with av.open(str(clip)) as container:
            if not container.streams.video:
                raise BrokenVideo("it has no pictures")
            stream, read, hidden = container.streams.video[0], 0, 0
            for packet in container.demux(stream):
                read += packet.size > 0
                hidden += packet.size > 0 and packet.is_discard
            frames = max(stream.frames, read) - hidden
    except (OSError, av.FFmpegError) as error:
        raise BrokenVideo(f"cannot be read: {error.strerror or error}") from error
    if frames < 1:
        raise BrokenVideo("it has no frames")
    return frames


def read(clip: Clip) -> Iterator[av.VideoFrame]:
    """The frames of a clip in order.

    Raises:
        BrokenVideo: it cannot be decoded, a frame is damaged, or its frames differ in size.
    """
    size = None
    try:
        for index, frame in enumerate(_images(clip) if isinstance(clip, tuple) else _decode(clip)):
            if frame.is_corrupt:
                raise BrokenVideo(f"frame {index} is damaged")
            if size not in (None, (frame.width, frame.height)):
                raise BrokenVideo(f"frame {index} is {frame.width}×{frame.height}, the first {size[0]}×{size[1]}")
            size = frame.width, frame.height
            yield frame
    except (OSError, av.FFmpegError, Image.DecompressionBombError) as error:
        raise BrokenVideo(f"cannot be decoded: {getattr(error, 'strerror', None) or error}") from error


def _images(paths: tuple[Path, ...]) -> Iterator[av.VideoFrame]:
    for path in paths:
        with Image.open(path) as image:
            yield of_pixels(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))


def _decode(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1  # processes share the cores, not threads
        yield from container.decode(video=0)


def keep(frames: Iterable[av.VideoFrame], indices: list[int], total: int) -> Iterator[av.VideoFrame]:
    """The frames at rising ``indices``; all are counted.

    Raises:
        BrokenVideo: there are not exactly ``total`` frames.
    """
    wanted, count = set(indices), 0
    for count, frame in enumerate(frames, 1):
        if count - 1 in wanted:
            yield frame
    if count != total:
        raise BrokenVideo(f"{count} frames were decoded, expected {total}")
