"""What becomes of a clip's colours: matrices that swscale refuses, transparency, rounding, threads."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_video import LOSSLESS, numbered, quarters, write

from training.data import images, video
from training.files import BrokenFile

WIDTH, HEIGHT = 64, 48
UNSPECIFIED = 2


# ------------------------------------------------------------------------------------------------------------- matrices


def tagged(path: Path, matrix: int) -> Path:
    """A lossless clip in yuv420p whose H.264 stream names this colour matrix (its number in H.273)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = WIDTH, HEIGHT, "yuv420p", LOSSLESS
        stream.codec_context.colorspace = matrix
        frame = video.of_pixels(quarters()).reformat(format="yuv420p", threads=1)
        frame.pts, frame.time_base, frame.colorspace = 0, Fraction(1, 25), matrix
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("aspect", [None, Fraction(3, 2)])
@pytest.mark.parametrize("matrix", [8, 10, 11, 12, 13, 14])  # YCgCo, BT.2020 CL, BT.2085, chroma-derived, ICtCp
def test_a_matrix_that_swscale_refuses_is_an_unspecified_one(tmp_path, matrix, aspect, monkeypatch):
    path, plain = tagged(tmp_path / "a.mp4", matrix), tagged(tmp_path / "b.mp4", UNSPECIFIED)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert frame.colorspace == matrix
        with pytest.raises(OSError, match="not supported"):
            frame.reformat(format="rgb24", threads=1)
    if aspect:
        monkeypatch.setattr(video, "_square", lambda *_: (96, 48))
    (frame, damaged), (expected, _) = next(video.read(path)), next(video.read(plain))
    assert not damaged and frame.format.name == "yuv420p"
    assert np.array_equal(video.pixels_of(frame), video.pixels_of(expected))
    encoder = video.Encoder(video.H264(20))
    encoder.add(video.encodable(frame, "yuv420p"))
    assert [video.pixels_of(f).shape for f in encoder.decoded()] == [video.pixels_of(frame).shape]


@pytest.mark.parametrize("matrix", [1, 2, 4, 5, 6, 7, 9])
def test_the_other_matrices_are_kept(tmp_path, matrix):
    frame, _ = next(video.read(tagged(tmp_path / "a.mp4", matrix)))
    assert frame.colorspace == video.encodable(frame, "yuv420p").colorspace == matrix


def test_a_frame_that_cannot_be_converted_is_a_broken_file():
    frame = video.of_pixels(quarters()).reformat(format="yuv420p", threads=1)
    frame.colorspace = 8
    for convert in (video.pixels_of, lambda f: video.encodable(f, "yuv444p")):
        with pytest.raises(BrokenFile, match=r"^cannot be read: Operation not supported$"):
            convert(frame)


# --------------------------------------------------------------------------------------------------------- transparency


def fading(width: int = WIDTH) -> np.ndarray:
    """Blue of rising opacity from left to right, ``(H, W, 4)``."""
    pixels = np.zeros((HEIGHT, width, 4), np.uint8)
    pixels[..., 2], pixels[..., 3] = 200, np.linspace(0, 255, width).round()
    return pixels


def write_alpha(path: Path, codec: str, pix_fmt: str, pixels: np.ndarray, options: dict | None = None) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = *pixels.shape[:2], pix_fmt, options or {}
        stream.codec_context.thread_count = 1
        for pts in range(2):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=pix_fmt, threads=1)
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "ending", "tolerance"),
    [
        ("qtrle", "argb", "mov", 1),
        ("png", "rgba", "mov", 1),
        ("ffv1", "bgra", "mkv", 1),
        ("ffv1", "yuva444p", "mkv", 4),
        ("utvideo", "gbrap", "avi", 1),
        ("prores_ks", "yuva444p10le", "mov", 6),
        ("libvpx-vp9", "yuva420p", "webm", 12),
        ("libvpx", "yuva420p", "webm", 16),
    ],
)
def test_transparent_clips_lie_on_the_background(tmp_path, codec, pix_fmt, ending, tolerance):
    pixels = fading()
    options = {"b": "4M", "auto-alt-ref": "0"} if codec.startswith("libvpx") else {}
    path = write_alpha(tmp_path / f"a.{ending}", codec, pix_fmt, pixels, options)
    opacity = pixels[..., 3:] / 255
    expected = pixels[..., :3] * opacity + np.array(images.BACKGROUND) * (1 - opacity)
    shown = [video.pixels_of(frame) for frame, damaged in video.read(path) if not damaged]
    assert len(shown) == video.promised(path) == 2
    assert max(np.abs(found - expected).max() for found in shown) <= tolerance


def test_a_transparent_clip_is_the_transparent_picture(tmp_path):
    path = write_alpha(tmp_path / "a.mov", "png", "rgba", fading())
    Image.fromarray(fading()).save(tmp_path / "a.png")
    assert np.array_equal(video.pixels_of(next(video.read(path))[0]), images.read(tmp_path / "a.png"))


def test_colours_under_transparency_do_not_bleed_where_pixels_become_square(tmp_path, monkeypatch):
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[:, WIDTH // 2 :] = 255  # white beside transparent black
    path = write_alpha(tmp_path / "a.mov", "png", "rgba", pixels)
    monkeypatch.setattr(video, "_square", lambda *_: (96, 48))
    assert video.pixels_of(next(video.read(path))[0]).min() >= 254


def test_the_fourth_byte_of_raw_avi_is_no_opacity(tmp_path):
    pixels = fading()
    pixels[..., 3] = 0  # what recorders of the screen leave there
    path = write_alpha(tmp_path / "a.avi", "rawvideo", "bgra", pixels)
    assert np.array_equal(video.pixels_of(next(video.read(path))[0]), pixels[..., :3])


# ---------------------------------------------------------------------------------------------------- exact and sparing


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux tells them")
def test_reading_starts_no_threads(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(30) * 10, pix_fmt="yuv420p", aspect=Fraction(3, 2))
    before, most, count = len(list(Path("/proc/self/task").iterdir())), 0, 0
    for frame, _ in video.read(path):
        video.pixels_of(video.encodable(frame, "yuv444p"))
        most, count = max(most, len(list(Path("/proc/self/task").iterdir()))), count + 1
    assert count == 300 and most <= before + 2


def test_ten_bits_are_stretched_alike_every_time(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (98, 126, 3), dtype=np.uint8)
    path = write(tmp_path / "a.mp4", [noise] * 12, pix_fmt="yuv420p10le", aspect=Fraction(16, 15))
    first, *others = ([video.pixels_of(frame) for frame, _ in video.read(path)] for _ in range(5))
    assert all(np.array_equal(first, other) for other in others)  # by several threads swscale gives other pixels


def test_brightness_lost_on_the_way_to_yuv420p_is_what_encodable_says():
    rows, columns = np.mgrid[:256, :256]
    pixels = np.stack([rows, columns, (rows + columns) // 2], axis=2).astype(np.uint8)
    lost = pixels.astype(float) - video.pixels_of(video.encodable(video.of_pixels(pixels), "yuv420p"))
    assert 1.1 < lost.mean() < 1.5
