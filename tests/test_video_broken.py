"""Clips that are damaged, hold something else, or have names that could be taken for addresses."""

from __future__ import annotations

import mmap
import os
import struct
import sys
import wave
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image
from test_video import LOSSLESS, encoded, numbered, numbers, quarters, reason, remux, write

from training import memory
from training.data import images, video
from training.files import BrokenFile

WIDTH, HEIGHT = 64, 48


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
    pictures = tuple(tmp_path / f"{i}.png" for i in range(2))
    for picture in pictures:
        Image.new("RGB", (WIDTH, HEIGHT)).save(picture)
    Image.new("RGB", (WIDTH, HEIGHT)).save(
        tmp_path / "a.gif", append_images=[Image.new("RGB", (WIDTH, HEIGHT), "red")], save_all=True
    )
    monkeypatch.setattr(images, "MAX_FRAME_PIXELS", 2 * WIDTH * HEIGHT - 1)
    assert reason(path) == "has 128 × 48 pixels, more than 6143"
    assert len(list(video.read(pictures))) == len(list(video.read(tmp_path / "a.gif"))) == 2
    monkeypatch.setattr(images, "MAX_FRAME_PIXELS", WIDTH * HEIGHT - 1)
    assert len(list(video.read(pictures[:1]))) == 1, "a picture alone is no frame of a clip"
    for clip in (path, pictures, tmp_path / "a.gif"):
        assert reason(clip).endswith("has 64 × 48 pixels, more than 3071")


def test_a_later_frame_of_a_gif_beyond_the_budget_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    data = bytearray((tmp_path / "a.gif").read_bytes())
    size = data.rindex(b",\0\0\0\0\4\0\4\0") + 5
    data[size : size + 4] = struct.pack("<HH", 9000, 9000)
    (tmp_path / "a.gif").write_bytes(data)
    first, second = images.frames(tmp_path / "a.gif")
    assert first.shape == (4, 4, 3) and str(second) == "has 9000 × 9000 pixels, more than 33554432"


def test_a_video_shows_no_more_than_its_bytes_may(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", numbered(5))
    monkeypatch.setattr(video, "DENSEST", 5 * WIDTH * HEIGHT / 2**20)
    assert video.promised(path) == len(list(video.read(path))) == 5
    monkeypatch.setattr(video, "DENSEST", 4 * WIDTH * HEIGHT / 2**20)
    said = f"has more than 4 frames of {WIDTH} × {HEIGHT} pixels in {path.stat().st_size} bytes"
    assert reason(path) == said
    with pytest.raises(BrokenFile, match=said):
        video.promised(path)


def test_a_frame_takes_some_bytes_however_small_its_picture():
    for size, most in ((0, 2**17), (2**20, 2**17), (2**23, 2**20)):
        images.check_density(most, 1, 1, size, video.DENSEST)
        with pytest.raises(BrokenFile, match=rf"^has more than {most} frames of 1 × 1 pixels in {size} bytes$"):
            images.check_density(most + 1, 1, 1, size, video.DENSEST)


def test_tags_of_a_matroska_are_counted_but_not_what_chance_gives(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mkv", numbered(3))
    monkeypatch.setattr(video, "MOST_TAGS", path.read_bytes().count(b"\x45\xa3"))
    path.write_bytes(path.read_bytes() + b"\x45\xa3" + bytes(2**16))
    assert video.promised(path) == 3
    path.write_bytes(path.read_bytes() + b"\x45\xa3" * 2)
    assert reason(path) == f"has more than {video.MOST_TAGS} tags"
    other = write(tmp_path / "a.mp4", numbered(3))
    other.write_bytes(other.read_bytes() + b"\x45\xa3" * 99)
    assert video.promised(other) == 3


def counted(path: Path, count: int) -> bytes:
    """An MP4 whose index says of its three frames that they are so many of a byte each."""
    data = bytearray(path.read_bytes())
    for box, place, values in ((b"stsz", 8, (1, count)), (b"stsc", 12, (1, count)), (b"stts", 8, (1, count))):
        start = data.rindex(box) + place
        data[start : start + 8] = struct.pack(">II", *values)
    return bytes(data)


def test_an_index_of_more_frames_than_there_are_is_opened_with_little_room(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", numbered(3), options={"bf": "0"})
    path.write_bytes(counted(path, 3))
    assert video.promised(path) == 3
    path.write_bytes(counted(path, 5_000_000))
    bounded, rooms = memory.bounded, []

    @contextmanager
    def recorded():
        with bounded():
            rooms.append("bounded")
            yield
            rooms.append("free")

    opened = av.open
    monkeypatch.setattr(memory, "bounded", recorded)
    monkeypatch.setattr(av, "open", lambda *args, **options: rooms.append("open") or opened(*args, **options))
    # By what the process has at hand, FFmpeg goes without the index, or without the file.
    assert reason(path) in ("it has no frames", "cannot be read: Invalid data found when processing input")
    assert rooms[rooms.index("open") - 1] == "bounded"


@pytest.mark.skipif(sys.platform != "linux", reason="this system knows no bound on memory")
def test_a_bound_on_memory_holds_and_ends(monkeypatch):
    monkeypatch.setattr(memory, "ROOM", 2**26)
    mmap.mmap(-1, 2**27).close()
    with memory.bounded(), pytest.raises(OSError, match="Cannot allocate memory"):
        mmap.mmap(-1, 2**27)
    mmap.mmap(-1, 2**27).close()


def test_frames_that_lie_over_one_another_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", numbered(3))
    size = path.stat().st_size
    monkeypatch.setattr(video, "PACKED", 1 / size)
    with pytest.raises(BrokenFile, match=rf"^its first 1 frames take \d+ bytes, and the file has {size}$"):
        video.promised(path)


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
