"""Clips as people have them, and what each shows; files are made by PyAV or patched by hand."""

from __future__ import annotations

import os
import pickle
import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
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


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("codec", "ending"), [("mjpeg", "avi"), ("mpeg4", "avi"), ("ffv1", "mkv"), ("prores_ks", "mov")]
)
def test_a_damaged_frame_costs_itself(tmp_path, codec, ending):
    formats = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}
    path = write(tmp_path / f"a.{ending}", numbered(10), codec, formats.get(codec, "yuv420p"), {}, gop=1)
    broken = remux(path, tmp_path / f"b.{ending}", lambda i, data: b"\xaa" * len(data) if i == 4 else data)
    shown = list(video.read(broken))
    assert [damaged for _, damaged in shown] == [i == 4 for i in range(10)]
    assert [n for n, (_, damaged) in zip(numbers(shown), shown, strict=True) if not damaged] == [
        0,
        1,
        2,
        3,
        5,
        6,
        7,
        8,
        9,
    ]


def test_concealed_frames_are_flagged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = write(tmp_path / "a.mp4", list(noise), pix_fmt="yuv420p", options=LOSSLESS | {"bf": "0"}, gop=4)
    broken = remux(
        path, tmp_path / "b.mp4", lambda i, d: d[: len(d) // 2] + bytes(len(d) - len(d) // 2) if i == 3 else d
    )
    assert [damaged for _, damaged in video.read(broken)] == [i == 3 for i in range(8)]


def test_a_file_cut_off_after_its_header_gives_what_it_has(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = write(tmp_path / "a.mp4", list(noise), gop=1, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    shown = list(video.read(path))
    assert 5 <= len(shown) <= 6
    assert not any(damaged for _, damaged in shown[:5])


def test_a_file_of_which_nothing_decodes_is_broken(tmp_path):
    path = write(tmp_path / "a.avi", numbered(4), "mjpeg", "yuvj420p", {})
    broken = remux(path, tmp_path / "b.avi", lambda _, data: b"\xaa" * len(data))
    assert reason(broken) == "cannot be read: Invalid data found when processing input"


def test_frames_that_change_their_size_are_refused(tmp_path):
    packets = encoded([quarters()] * 3, "libx264", "yuv420p", {}) + encoded(
        [quarters(32, 32)], "libx264", "yuv420p", {}
    )
    (tmp_path / "a.h264").write_bytes(b"".join(bytes(packet) for packet in packets))
    assert reason(tmp_path / "a.h264") == "frame 3 is 32×32, the first 64×48"


# -------------------------------------------------------------------------------------------------------------- streams


def write_streams(
    path: Path, *, sizes: tuple[tuple[int, int], ...] = (), cover: bool = False, audio: bool = False
) -> Path:
    with av.open(str(path), "w") as container:
        videos = [container.add_stream("mpeg4", rate=25) for _ in sizes]
        for stream, (width, height) in zip(videos, sizes, strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        sound = container.add_stream("aac", rate=44100) if audio else None
        if cover:
            picture = container.add_stream("mjpeg", rate=25)
            picture.width, picture.height, picture.pix_fmt = 96, 96, "yuvj420p"
            picture.disposition = Disposition.attached_pic.value
        container.start_encoding()
        if cover:
            container.mux(picture.encode(video.of_pixels(quarters(96, 96))) + picture.encode(None))
        for stream, size in zip(videos, sizes, strict=True):
            for _ in range(3):
                container.mux(stream.encode(video.of_pixels(quarters(*size))))
            container.mux(stream.encode(None))
        if audio:
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            frame.sample_rate = 44100
            container.mux(sound.encode(frame) + sound.encode(None))
    return path


def test_cover_art_is_no_clip(tmp_path):
    path = write_streams(tmp_path / "music.mp4", cover=True, audio=True)
    assert reason(path) == "it has no pictures but a cover"
    path = write_streams(tmp_path / "a.mp4", sizes=((WIDTH, HEIGHT),), cover=True)
    assert [(frame.width, frame.height) for frame, _ in video.read(path)] == [(WIDTH, HEIGHT)] * 3


def test_sound_alone_is_no_clip(tmp_path):
    assert reason(write_streams(tmp_path / "a.mp4", audio=True)) == "it has no pictures"
    with wave.open(str(tmp_path / "a.avi"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    assert reason(tmp_path / "a.avi").startswith("not a video")


def test_of_several_streams_the_largest_is_read(tmp_path):
    path = write_streams(tmp_path / "a.mkv", sizes=((32, 32), (WIDTH, HEIGHT), (48, 32)))
    assert [(frame.width, frame.height) for frame, _ in video.read(path)] == [(WIDTH, HEIGHT)] * 3
    assert video.promised(path) == 3


def test_pictures_that_nothing_decodes(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(2))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    assert reason(path) == "there is no decoder for its pictures"


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


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "12:30.mp4",
        "http:x.mp4",
        "concat:a|b.mp4",
        "data:text,x.mp4",
        "-i.mp4",
        "%03d.mp4",
        "a b#?&.mp4",
        b"\xff\xfe.mp4",
    ],
)
def test_names_are_files_and_nothing_else(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    data = write(tmp_path / "plain.mp4", numbered(3)).read_bytes()
    try:
        path.write_bytes(data)
    except OSError:
        pytest.skip("this file system has no such names")
    assert video.promised(path) == 3
    assert numbers(list(video.read(path))) == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile other.ts\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
        'mimeType="video/mp2t"><Representation id="1" bandwidth="1"><BaseURL>other.ts</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    ],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8"])
def test_playlists_open_no_other_file(tmp_path, text, name):
    write(tmp_path / "other.ts", numbered(3))
    (tmp_path / name).write_text(text)
    assert reason(tmp_path / name).startswith("not a video")


# --------------------------------------------------------------------------------------------------------- broken files


def test_what_is_no_clip(tmp_path):
    write(whole := tmp_path / "whole.mp4", numbered(3))
    (tmp_path / "truncated.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])  # its index is at the end
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").touch()
    for name in ("truncated", "text", "empty"):
        assert reason(tmp_path / f"{name}.mp4") == "not a video of a known format, or its header is damaged"
    assert reason(tmp_path / "folder.mp4") == "cannot be read: Is a directory"
    assert reason(tmp_path / "missing.mp4") == "cannot be read: No such file or directory"
    with pytest.raises(BrokenFile, match="No such file"):
        video.promised(tmp_path / "missing.mp4")


def test_frames_beyond_the_budget_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", numbered(2), aspect=Fraction(2, 1))
    monkeypatch.setattr(images, "MAX_PIXELS", 2 * WIDTH * HEIGHT - 1)
    assert reason(path) == "has 128 × 48 pixels, more than 6143"
    monkeypatch.setattr(images, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    assert reason(path) == "has 64 × 48 pixels, more than 3071"


def test_text_in_another_encoding_does_no_harm(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        container.metadata["title"] = "caféé"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.mux(stream.encode(video.of_pixels(quarters())) + stream.encode(None))
    data = (tmp_path / "a.avi").read_bytes()
    assert "éé".encode() in data
    (tmp_path / "a.avi").write_bytes(data.replace("éé".encode(), "éééé".encode("latin-1")))
    assert len(list(video.read(tmp_path / "a.avi"))) == 1


# ------------------------------------------------------------------------------------------------------------- encoding


def test_encodable_keeps_samples_and_forgets_the_type_of_the_frame(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(3), pix_fmt="yuv420p")
    for frame, _ in video.read(path):
        before = frame.to_ndarray()
        made = video.encodable(frame, "yuv420p")
        assert np.array_equal(made.to_ndarray(), before) and made.pict_type == 0
