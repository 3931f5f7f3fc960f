"""Clips by PyAV: opened here alone and read as a player shows them; compressed whole by H.264, frame for frame."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.stream import Disposition

from .. import memory
from ..files import PACKED, BrokenFile
from . import images

# On small frames libx264's AVX-512 code gives another bitstream at every run (seen with libavcodec 62.28).
INSTRUCTIONS = {"x264-params": "asm=avx2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}

ENDINGS = frozenset(
    {
        *(".mp4", ".m4v", ".mov", ".qt", ".mj2", ".3gp", ".3g2", ".f4v", ".flv", ".mkv", ".mk3d", ".webm", ".ivf"),
        *(".avi", ".divx", ".amv", ".wmv", ".asf", ".mpg", ".mpeg", ".mpe", ".mpv", ".m1v", ".m2v", ".m2p", ".vob"),
        *(".ts", ".mts", ".m2ts", ".m2t", ".ogv", ".ogm", ".mxf", ".gxf", ".dv", ".mjpg", ".mjpeg", ".y4m", ".nut"),
        *(".h264", ".264", ".avc", ".h265", ".265", ".hevc", ".obu", ".vc1", ".rm", ".rmvb", ".wtv"),
    }
)
"""File endings of videos, in lower case."""

WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these do not read the transparency

MATRICES = frozenset((0, 1, 2, 4, 5, 6, 7, 9))
"""The colour matrices that swscale knows, by their numbers in H.273."""

DEMUXERS = (
    "asf,av1,avi,dirac,dv,flv,gxf,h261,h263,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,"
    "rm,vc1,vvc,wtv,yuv4mpegpipe"
)
"""FFmpeg's readers that may be used: none of them opens further files or addresses, as playlists do."""

DENSEST = 2**16
"""The most pixels that a video shows for each of its bytes; see :func:`.images.check_density`."""

MOST_TAGS = 1000  # of a Matroska file, beside what chance gives: FFmpeg's time goes with the cube of their number

Clip = Path | tuple[Path, ...]
"""A video or an animation, or pictures that are its frames in order."""


# --------------------------------------------------------------------------------------------------------- compressing


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
    libx264 would take it for an order. By swscale's default rounding, which sets made so far have, the way from RGB to
    yuv420p and back loses about 1.3 levels of brightness on photographs.

    Raises:
        BrokenFile: FFmpeg cannot convert it.
    """
    if frame.format.name != pix_fmt or frame.height % 2 or frame.width % 2:
        padding = ((0, frame.height % 2), (0, frame.width % 2), (0, 0))
        frame = of_pixels(np.pad(pixels_of(frame), padding, mode="edge"))
    frame = _converted(frame, pix_fmt)
    frame.pict_type = 0
    return frame


def of_pixels(pixels: np.ndarray) -> av.VideoFrame:
    """``(H, W, 3)`` uint8 as a frame."""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def pixels_of(frame: av.VideoFrame) -> np.ndarray:
    """A frame as ``(H, W, 3)`` uint8; BrokenFile where FFmpeg cannot convert it."""
    return _converted(frame, "rgb24").to_ndarray()


def _converted(frame: av.VideoFrame, pix_fmt: str, **changes: object) -> av.VideoFrame:
    """A frame in another pixel format or size: every conversion is done here, in the thread that asks for it.

    By default each would start a thread per core, which stay until the garbage collector finds them.
    """
    try:
        return frame.reformat(format=pix_fmt, threads=1, **changes)
    except Exception as error:
        raise BrokenFile(images.reason(error)) from error


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


# ------------------------------------------------------------------------------------------------------------- reading


class Miscounted(BrokenFile):
    """A clip has another number of frames than expected; ``frames`` is how many there really were."""

    def __init__(self, frames: int, expected: int) -> None:
        super().__init__(frames, expected)
        self.frames, self.expected = frames, expected

    def __str__(self) -> str:
        return f"{self.frames} frames were decoded, expected {self.expected}"


def promised(clip: Clip) -> int:
    """How many frames a clip claims, without decoding it: a first guess, as a decoder may show others than that.

    Raises:
        BrokenFile: it cannot be opened, or has no frames.
    """
    if isinstance(clip, tuple):
        count = len(clip)
    elif images.is_animation(clip):
        count = images.length(clip)
    else:
        with _opened(clip) as (container, stream, _):
            count = sum(not packet.is_discard for packet in _packets(container, stream))
    if not count:
        raise BrokenFile("it has no frames")
    return count


def read(clip: Clip) -> Iterator[tuple[av.VideoFrame, bool]]:
    """Every frame that a decoder shows, in order, and whether it is damaged.

    Frames are upright (display matrix, orientation tag), opaque (laid on :data:`images.BACKGROUND`) and have square
    pixels: of others the shorter direction is enlarged. A frame that needs none of it is passed on as it was decoded;
    a colour matrix that FFmpeg cannot convert (YCgCo, ICtCp, …) is taken for an unspecified one. In the place of a
    frame or picture that cannot be decoded its neighbour stands, so that the others keep their numbers; what precedes
    the first frame of a video that can be decoded is not shown.

    Raises:
        BrokenFile: nothing of it can be decoded, or its frames differ in size.
    """
    if isinstance(clip, tuple):
        frames = _filled(_pictures(clip))
    elif images.is_animation(clip):
        frames = _filled(images.frames(clip))
    else:
        frames = _decoded(clip)
    first = None
    for index, (frame, damaged) in enumerate(frames):
        size = frame.width, frame.height
        first = first or size
        if size != first:
            raise BrokenFile(f"frame {index} is {size[0]}×{size[1]}, the first {first[0]}×{first[1]}")
        yield frame, damaged
    if first is None:
        raise BrokenFile("it has no frames")


def keep(
    frames: Iterable[tuple[av.VideoFrame, bool]], indices: list[int], total: int
) -> Iterator[tuple[av.VideoFrame, bool]]:
    """The frames at rising ``indices``; all are counted.

    Raises:
        Miscounted: after the last one, where there are not exactly ``total``.
    """
    wanted, count = set(indices), 0
    for count, frame in enumerate(frames, 1):
        if count - 1 in wanted:
            yield frame
    if count != total:
        raise Miscounted(count, total)


def _pictures(paths: tuple[Path, ...]) -> Iterator[np.ndarray | BrokenFile]:
    for path in paths:
        try:
            yield images.read(path, images.MAX_FRAME_PIXELS if len(paths) > 1 else None)
        except BrokenFile as error:
            yield error


def _filled(pictures: Iterable[np.ndarray | BrokenFile]) -> Iterator[tuple[av.VideoFrame, bool]]:
    """The pictures as frames; in the place of an error the one before, or at the beginning the first."""
    last, first, waiting = None, None, 0
    for picture in pictures:
        damaged = isinstance(picture, BrokenFile)
        if damaged:
            first = first or picture
            if last is None:
                waiting += 1
                continue
        else:
            last = of_pixels(picture)
        yield from [(last, True)] * waiting
        waiting = 0
        yield last, damaged
    if waiting:
        several = f"none of its {waiting} pictures can be read; the first " if waiting > 1 else ""
        raise BrokenFile(f"{several}{first}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream, av.VideoCodecContext]]:
    """A file, its best stream of pictures and the decoder for it; whatever is raised becomes BrokenFile."""
    budget = {"max_pixels": str(images.MAX_FRAME_PIXELS)}
    options = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS} | budget
    try:
        if images.occurrences(path, b"\x45\xa3", b"\x1a\x45\xdf\xa3") > MOST_TAGS + os.path.getsize(path) // 2**15:
            raise BrokenFile(f"has more than {MOST_TAGS} tags")
        try:
            with memory.bounded():  # an index of a few bytes may stand for millions of frames
                container = av.open(f"file:{os.path.abspath(path)}", options=options, metadata_errors="replace")
        except ValueError as error:  # invalid data, or a format that is not on the list
            raise BrokenFile("not a video of a known format, or its header is damaged") from error
        with container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise BrokenFile("it has no pictures" + (" but a cover" if container.streams.video else ""))
            streams = [s for s in streams if s.codec_context]
            if not streams:
                raise BrokenFile("there is no decoder for its pictures")
            stream = max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))
            images.check_size(stream.width, stream.height, images.MAX_FRAME_PIXELS)
            decoder = stream.codec_context
            if stream.metadata.get("alpha_mode") == "1" and decoder.name in WITH_ALPHA:
                decoder = av.CodecContext.create(WITH_ALPHA[decoder.name], "r")
            decoder.thread_count = 1  # processes share the cores, not threads
            decoder.options = budget
            yield container, stream, decoder
    except BrokenFile:
        raise
    except Exception as error:
        raise BrokenFile(images.reason(error)) from error


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets up to the end, or to where the file is cut off.

    An empty one, by which an AVI skips a frame, would be taken for the end by the decoder.

    Raises:
        BrokenFile: they are far more than the file has bytes for, as where an index names the same bytes many times.
    """
    count, taken, size = 0, 0, (stream.width, stream.height)
    try:
        packets = container.demux(stream)
        while True:
            with memory.bounded():
                packet = next(packets, None)
            if packet is None:
                return
            if packet.size:
                count, taken = count + 1, taken + packet.size
                images.check_density(count, *size, container.size, DENSEST)
                if taken > PACKED * container.size:
                    raise BrokenFile(f"its first {count} frames take {taken} bytes, and the file has {container.size}")
                yield packet
    except av.InvalidDataError:
        return


def _decoded(path: Path) -> Iterator[tuple[av.VideoFrame, bool]]:
    with _opened(path) as (container, stream, decoder):
        aspect, graphs = stream.sample_aspect_ratio, {}
        opaque = container.format.name == "avi" and decoder.name == "rawvideo"  # the fourth byte is unused there
        last, error, lost = None, None, []
        for packet in chain(_packets(container, stream), [None]):
            frames = []
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError as raised:
                error = raised
                if last is not None and packet is not None:
                    lost.append(packet.pts)
            for frame in frames:
                while lost and (None in (lost[0], frame.pts) or lost[0] < frame.pts):
                    lost.pop(0)
                    yield last, True
                last = _shown(frame, aspect, opaque, graphs)
                yield last, frame.is_corrupt
        yield from [(last, True)] * len(lost)
        if last is None and error is not None:
            raise error


def _shown(frame: av.VideoFrame, aspect: Fraction | None, opaque: bool, graphs: dict) -> av.VideoFrame:
    """A frame laid on the background unless it is said to be opaque, with square pixels, turned by its display matrix.

    ``graphs`` keeps FFmpeg's filters for the next one.
    """
    if frame.colorspace not in MATRICES:
        frame.colorspace = 2  # unspecified
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    # A point (x, y) of the frame is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20]) if matrix else (1, 0, 0, 0, 1)
    if abs(b) + abs(c) > abs(a) + abs(d):
        swapped = {(False, False): "cclock_flip", (True, False): "clock", (False, True): "cclock"}
        steps = [("transpose", swapped.get((c < 0, b < 0), "clock_flip"))]
    else:  # not by vflip: it gives rows in falling order, which PyAV misread before 18
        steps = [("hflip", None)] * (a < 0) + [("transpose", "cclock_flip"), ("transpose", "cclock")] * (d < 0)
    if not opaque and (frame.format.has_palette or any(part.is_alpha for part in frame.format.components)):
        frame = of_pixels(images.on_background(_converted(frame, "rgba").to_ndarray()))
    width, height = _square(frame.width, frame.height, aspect)
    if not steps and (width, height) == (frame.width, frame.height):
        return frame
    layout = frame.format
    if layout.has_palette or layout.is_bit_stream or layout.chroma_width(64) != layout.chroma_height(64):
        frame = _converted(frame, "rgb24")  # what cannot be turned, or stretched, as it is
    frame = _converted(frame, frame.format.name, width=width, height=height, interpolation="BICUBIC")
    if not steps:
        return frame
    key = frame.format.name, width, height, *steps
    if key not in graphs:
        graphs[key] = graph = Graph()
        source = graph.add_buffer(width=width, height=height, format=frame.format, time_base=Fraction(1, 25))
        graph.link_nodes(source, *(graph.add(*step) for step in steps), graph.add("buffersink")).configure()
    graphs[key].vpush(frame)
    return graphs[key].vpull()


def _square(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """The size at square pixels of frames whose pixels are ``aspect`` times as wide as high.

    Less than a hundredth off square is left as it is (encoders leave 404:405 after rounding, and resampling wipes out
    the traces of compression that a detector looks at); beyond 10 : 1 either way it means nothing.
    """
    if not aspect or not 0.1 <= aspect <= 10 or 0.99 < aspect < 1.01:
        return width, height
    width, height = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    images.check_size(width, height, images.MAX_FRAME_PIXELS)
    return width, height
