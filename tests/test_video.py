"""Clips as people have them, and what each shows; files are made by PyAV or patched by hand."""

from __future__ import annotations

import pickle
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from training.data import images, video
from training.files import BrokenFile

WIDTH, HEIGHT = 64, 48
RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
LOSSLESS = {"crf": "0", "preset": "ultrafast"}


def quarters(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Red, green above blue, white."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, WHITE
    return picture


def numbered(count: int) -> list[np.ndarray]:
    """Frames that tell their number by their brightness."""
    return [np.full((HEIGHT, WIDTH, 3), 8 * i, np.uint8) for i in range(count)]


def numbers(shown: list[tuple[av.VideoFrame, bool]]) -> list[int]:
    return [round(float(video.pixels_of(frame).mean()) / 8) for frame, _ in shown]


def encoded(frames: list[np.ndarray], codec: str, pix_fmt: str, options: dict, gop: int = 12) -> list[av.Packet]:
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt = *frames[0].shape[:2], pix_fmt
    context.time_base, context.options, context.gop_size, context.thread_count = Fraction(1, 25), options, gop, 1
    packets = []
    for pts, pixels in enumerate(frames):
        frame = video.of_pixels(pixels).reformat(format=pix_fmt)
        frame.pts, frame.time_base = pts, Fraction(1, 25)
        packets += context.encode(frame)
    return packets + context.encode(None)


def write(
    path: Path,
    frames: list[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    options: dict = LOSSLESS,
    *,
    aspect: Fraction | None = None,
    gop: int = 12,
    times: list[int] | None = None,
    container_options: dict | None = None,
) -> Path:
    """A file of one stream, 25 frames a second unless their times are given."""
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.options, stream.codec_context.gop_size, stream.codec_context.thread_count = options, gop, 1
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for pts, pixels in zip(times or range(len(frames)), frames, strict=True):
            frame = video.of_pixels(pixels)
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(source: Path, target: Path, change: object) -> Path:
    """Copy the packets that ``change(number, bytes)`` returns bytes for."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and (data := change(number, bytes(packet))) is not None:
                copy = av.Packet(data)
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.duration, copy.stream = packet.is_keyframe, packet.duration or 1, stream
                new.mux(copy)
    return target


def with_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Set the display matrix of the only track of an mp4."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)
    return path


def mapped(picture: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """QuickTime's definition, pixel by pixel: (x, y) is shown at (a x + c y, b x + d y), moved to begin at 0."""
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    shown = np.empty((down.max() + 1, across.max() + 1, 3), np.uint8)
    shown[down, across] = picture
    return shown


def reason(clip: video.Clip) -> str:
    with pytest.raises(BrokenFile) as caught:
        list(video.read(clip))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 140
    return text


# ---------------------------------------------------------------------------------------------------------- as it shows

MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "yuv420p"), ("libx264rgb", "rgb24"), ("mjpeg", "yuvj422p")])
def test_clips_are_turned_by_their_display_matrix(tmp_path, matrix, codec, pix_fmt):
    options = {} if codec == "mjpeg" else LOSSLESS
    path = write(tmp_path / "a.mov", [quarters()] * 3, codec, pix_fmt, options)
    plain = [video.pixels_of(frame) for frame, _ in video.read(path)]
    shown = list(video.read(with_matrix(path, *matrix)))
    assert video.promised(path) == len(shown) == 3
    for (frame, damaged), before in zip(shown, plain, strict=True):
        expected, found = mapped(before, *matrix).astype(int), video.pixels_of(frame)
        assert not damaged and found.shape == expected.shape
        assert np.abs(found - expected).mean() < 2  # chroma is enlarged along other edges


def test_a_phone_held_upright_gives_an_upright_clip(tmp_path):
    path = with_matrix(write(tmp_path / "a.mp4", [quarters()]), 0, 1, -1, 0)  # what phones write: 90° clockwise
    pixels = video.pixels_of(next(video.read(path))[0]).astype(int)
    assert pixels.shape == (WIDTH, HEIGHT, 3)
    corners = pixels[8, 8], pixels[8, -8], pixels[-8, 8], pixels[-8, -8]
    assert np.abs(np.array(corners) - [BLUE, RED, WHITE, GREEN]).max() <= 4


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_turned_frames_keep_their_samples(tmp_path, pix_fmt):
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = write(tmp_path / "a.mp4", [noise], pix_fmt=pix_fmt)
    before = next(video.read(path))[0]
    after = next(video.read(with_matrix(path, 0, 1, -1, 0)))[0]
    assert after.format.name == before.format.name == pix_fmt
    assert (after.colorspace, after.color_range) == (before.colorspace, before.color_range)
    for old, new in zip(before.planes, after.planes, strict=True):
        kind = np.uint16 if pix_fmt.endswith("10le") else np.uint8
        rows = [np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : plane.width] for plane in (old, new)]
        assert np.array_equal(rows[1], np.rot90(rows[0], -1))


def test_frames_that_need_nothing_are_passed_on_untouched(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(5), pix_fmt="yuv420p", aspect=Fraction(404, 405))
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray() for frame in container.decode(video=0)]
    shown = [frame for frame, _ in video.read(path)]
    assert {frame.format.name for frame in shown} == {"yuv420p"}
    assert all(np.array_equal(frame.to_ndarray(), e) for frame, e in zip(shown, expected, strict=True))


@pytest.mark.parametrize(
    ("aspect", "matrix", "size"),
    [
        (Fraction(3, 2), (1, 0, 0, 1), (96, 48)),
        (Fraction(2, 3), (1, 0, 0, 1), (64, 72)),
        (Fraction(3, 2), (0, 1, -1, 0), (48, 96)),
        (Fraction(0, 1), (1, 0, 0, 1), (64, 48)),
        (Fraction(200, 1), (1, 0, 0, 1), (64, 48)),
    ],
)
def test_pixels_become_square(tmp_path, aspect, matrix, size):
    path = with_matrix(write(tmp_path / "a.mp4", [quarters()], aspect=aspect), *matrix)
    frame = next(video.read(path))[0]
    assert (frame.width, frame.height) == size and frame.format.name == "yuv444p"
    expected = np.asarray(Image.fromarray(mapped(quarters(), *matrix)).resize(size, Image.Resampling.BICUBIC), int)
    assert np.abs(video.pixels_of(frame) - expected).mean() < 4


def test_turned_clips_stand_beside_turned_pictures(tmp_path):
    upright = mapped(quarters(), 0, 1, -1, 0)
    clip = with_matrix(write(tmp_path / "a.mp4", [quarters()]), 0, 1, -1, 0)
    tags = Image.Exif()
    tags[274] = 6
    Image.fromarray(quarters()).save(tmp_path / "a.png", exif=tags)
    for source in (clip, (tmp_path / "a.png",)):
        assert np.abs(video.pixels_of(next(video.read(source))[0]).astype(int) - upright).mean() < 2


# ------------------------------------------------------------------------------------------------------------- counting


def test_hidden_frames_are_not_shown(tmp_path):
    path = write(tmp_path / "a.webm", numbered(10), "libvpx", "yuv420p", {}, gop=100)
    # Bit 4 of a VP8 frame says that it is shown; encoders clear it in their alternate reference frames.
    path = remux(path, tmp_path / "b.webm", lambda i, data: bytes([data[0] & ~0x10]) + data[1:] if i == 4 else data)
    assert video.promised(path) == 10
    with pytest.raises(video.Miscounted) as caught:
        list(video.keep(video.read(path), [0], 10))
    assert caught.value.frames == 9
    shown = list(video.keep(video.read(path), [3, 4, 8], 9))
    assert numbers(shown) == [3, 5, 9] and not any(damaged for _, damaged in shown)


def test_chunks_by_which_an_avi_skips_frames_are_no_frames(tmp_path):
    path = write(tmp_path / "a.avi", numbered(6), "mpeg4", "yuv420p", {"qscale": "1"}, times=[0, 1, 2, 5, 6, 9])
    assert b"00dc\0\0\0\0" in path.read_bytes()
    assert numbers(list(video.read(path))) == [0, 1, 2, 3, 4, 5]
    assert video.promised(path) == 6


def test_empty_packets_do_not_end_a_clip(tmp_path):
    noise = np.random.default_rng(0).integers(0, 8, (6, HEIGHT, WIDTH, 3), dtype=np.uint8)
    frames = [f + n for f, n in zip(numbered(6), noise, strict=True)]
    path = write(tmp_path / "a.mov", frames, "mjpeg", "yuvj420p", {})
    data = path.read_bytes()
    start = data.index(b"stsz") + 16 + 4 * 2  # the size of the third sample
    path.write_bytes(data[:start] + bytes(4) + data[start + 4 :])
    with av.open(str(path)) as container:
        assert [packet.size > 0 for packet in container.demux(video=0)] == [True, True, False, True, True, True, False]
    assert len(list(video.read(path))) == video.promised(path) == 5


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", {"crf": "10"}), ("mpeg2video", {"b": "2M", "sc_threshold": "1000000000"})]
)
def test_recordings_that_begin_between_key_frames(tmp_path, codec, options):
    path = write(tmp_path / "a.ts", numbered(30), codec, "yuv420p", options, gop=10)
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 6 // 188 * 188 :])  # within the first ten frames
    assert numbers(list(video.read(path))) == list(range(10, 30))


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"x264-params": "open-gop=1:bframes=2:b-adapt=0:scenecut=0:keyint=9:min-keyint=9", "crf": "10"}),
        ("mpeg2video", {"bf": "2", "b": "2M", "sc_threshold": "1000000000"}),
    ],
)
def test_open_groups_cut_at_a_key_frame_lose_what_precedes_it(tmp_path, codec, options):
    path = write(tmp_path / "a.ts", numbered(30), codec, "yuv420p", options, gop=9)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    first = sorted(packet.pts for packet in packets).index(packets[keys[1]].pts)
    assert any(packet.pts < packets[keys[1]].pts for packet in packets[keys[1] :])  # the group is open
    cut = remux(path, tmp_path / "b.ts", lambda number, data: data if number >= keys[1] else None)
    shown = list(video.read(cut))
    assert numbers(shown) == list(range(first, 30)) and not any(damaged for _, damaged in shown)


def test_edit_lists_hide_frames(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(12), gop=4, options=LOSSLESS | {"bf": "0"})
    data = path.read_bytes()
    with av.open(str(path)) as container:
        tick = 1 / (25 * container.streams.video[0].time_base)
    edits = struct.pack(">I4sIIIii", 36, b"edts", 28, int.from_bytes(b"elst"), 0, 1, 7 * 40)
    edits += struct.pack(">ii", int(5 * tick), 1 << 16)
    if (start := data.find(b"edts") - 4) > 0:  # replace what the muxer wrote
        data = data[:start] + edits + data[start + len(edits) :]
    path.write_bytes(data)
    assert video.promised(path) == 7
    assert numbers(list(video.read(path))) == [5, 6, 7, 8, 9, 10, 11]


def test_keep_gives_the_frames_asked_for_and_counts_all():
    frames = [(object(), False) for _ in range(5)]
    assert list(video.keep(frames, [1, 3], 5)) == [frames[1], frames[3]]
    with pytest.raises(video.Miscounted, match=r"^5 frames were decoded, expected 6$") as caught:
        list(video.keep(frames, [], 6))
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes back from another process
    assert (again.frames, str(again)) == (5, str(caught.value))


# ------------------------------------------------------------------------------------------------- pictures, animations


def picture_files(folder: Path, count: int) -> tuple[Path, ...]:
    paths = tuple(folder / f"{i}.png" for i in range(count))
    for path, pixels in zip(paths, numbered(count), strict=True):
        images.write_png(path, pixels)
    return paths


def test_broken_pictures_of_a_sequence_are_damaged_frames(tmp_path):
    paths = picture_files(tmp_path, 6)
    paths[0].write_text("no picture")
    paths[1].unlink()
    paths[4].write_bytes(paths[4].read_bytes()[:60])
    shown = list(video.read(paths))
    assert [damaged for _, damaged in shown] == [True, True, False, False, True, False]
    assert numbers(shown) == [2, 2, 2, 3, 3, 5] and video.promised(paths) == 6


def test_pictures_that_are_all_broken(tmp_path):
    paths = tmp_path / "a.png", tmp_path / "b.png"
    assert reason(paths[:1]) == "cannot be read: No such file or directory"
    assert reason(paths) == "none of its 2 pictures can be read; the first cannot be read: No such file or directory"
    assert reason(()) == "it has no frames"
    with pytest.raises(BrokenFile, match="no frames"):
        video.promised(())


def test_pictures_of_a_sequence_have_one_size(tmp_path):
    paths = picture_files(tmp_path, 3)
    images.write_png(paths[2], quarters(32, 32))
    assert reason(paths) == "frame 2 is 32×32, the first 64×48"


def test_animations_are_clips(tmp_path):
    first, *others = [Image.fromarray(pixels) for pixels in numbered(4)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    assert video.promised(tmp_path / "a.gif") == 4
    assert numbers(list(video.read(tmp_path / "a.gif"))) == [0, 1, 2, 3]


def test_a_truncated_animation_keeps_its_whole_frames(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    first, *others = (Image.fromarray(frame) for frame in noise)
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    (tmp_path / "a.gif").write_bytes((tmp_path / "a.gif").read_bytes()[: -(64 * 64) // 2])
    assert [damaged for _, damaged in video.read(tmp_path / "a.gif")] == [False, False, True]


# ------------------------------------------------------------------------------------------------------------- encoding


def test_encodable_keeps_samples_and_forgets_the_type_of_the_frame(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(3), pix_fmt="yuv420p")
    for frame, _ in video.read(path):
        before = frame.to_ndarray()
        made = video.encodable(frame, "yuv420p")
        assert np.array_equal(made.to_ndarray(), before) and made.pict_type == 0
