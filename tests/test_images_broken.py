"""Files that are no pictures, or broken ones: one reason each, whatever the decoder says."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from test_images import LETTER, chunk, png, tiff

from training import memory
from training.data import images
from training.files import BrokenFile

# --------------------------------------------------------------------------------------------------------- broken files


def reason(path: Path) -> str:
    with pytest.raises(BrokenFile) as caught:
        images.read(path)
    text = str(caught.value)
    assert "\n" not in text and path.name not in text and len(text) < 120
    return text


@pytest.mark.parametrize("ending", ["png", "jpg", "avif", "webp", "gif", "tif", "bmp", "jp2", "ppm"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated_files_are_broken(tmp_path, ending, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    reason(path)


def test_a_damaged_png_is_broken(tmp_path):
    path = png(tmp_path / "a.png", 2, 1, 8, 0, b"\1\2")
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAT\xff"))
    reason(path)


def test_what_is_no_picture(tmp_path):
    for name, data in {"text.png": b"hello\n" * 50, "movie.jpg": b"\0\0\0\x18ftypisom" + bytes(64)}.items():
        (tmp_path / name).write_bytes(data)
        assert reason(tmp_path / name).startswith("not a picture")
    (tmp_path / "empty.png").touch()
    assert reason(tmp_path / "empty.png") == "the file is empty"
    assert reason(tmp_path / "missing.png") == "cannot be read: No such file or directory"
    (tmp_path / "folder.png").mkdir()
    assert reason(tmp_path / "folder.png") == "cannot be read: Is a directory"


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize(
    ("samples", "tags", "expected"),
    [
        (np.zeros((2, 3), np.float16), (1, 3), "BitsPerSample 16, SampleFormat 3, PhotometricInterpretation 1"),
        (np.zeros((2, 3), np.float64), (1, 3), "BitsPerSample 64, SampleFormat 3, PhotometricInterpretation 1"),
        (np.zeros((2, 3), np.uint64), (1, 1), "BitsPerSample 64, SampleFormat 1, PhotometricInterpretation 1"),
        (np.zeros((2, 3, 2), np.uint16), (1, 1), "BitsPerSample 16, 16, SampleFormat 1, PhotometricInterpretation 1"),
        (
            np.zeros((2, 3, 3), np.float32),
            (2, 3),
            "BitsPerSample 32, 32, 32, SampleFormat 3, PhotometricInterpretation 2",
        ),
    ],
)
def test_samples_that_nothing_reads_are_named(tmp_path, samples, tags, expected, big_endian):
    path = tiff(tmp_path / "a.tif", samples, photometric=tags[0], kind=tags[1], big_endian=big_endian)
    assert reason(path) == f"samples of this type are not supported: {expected}"


def test_a_pfm_of_colours_is_named(tmp_path):
    (tmp_path / "a.pfm").write_bytes(b"PF\n1 1\n-1.0\n" + bytes(12))
    assert reason(tmp_path / "a.pfm") == "samples of this type are not supported: a PFM of three colours"


def test_a_tiff_with_a_broken_header_is_not_said_to_have_odd_samples(tmp_path):
    path = tiff(tmp_path / "a.tif", np.zeros((2, 3), np.float16), kind=3)
    path.write_bytes(path.read_bytes()[:40])
    assert reason(path).startswith("not a picture")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = png(tmp_path / "a.png", 1, 1, 8, 0, b"\1")
    path.chmod(0)
    assert reason(path) == "cannot be read: Permission denied"


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert reason(tmp_path / "a.png").startswith("not a picture")
    assert not {"EPS", "WMF", "PDF", "ICO", "ICNS"} & set(images.FORMATS)


@pytest.mark.skipif("HEIF" in images.FORMATS, reason="pillow-heif is installed")
def test_heic_names_the_package_that_reads_it(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    assert reason(tmp_path / "a.jpg") == "HEIC needs another package: pip install pillow-heif"


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (13000, 13000, "has 13000 × 13000 pixels, more than 134217728"),
        (60000, 60000, "has more than 134217728 pixels"),
        (70000, 1, "has 70000 × 1 pixels, and a side of more than 65536"),
    ],
)
def test_bombs_are_refused_by_their_header(tmp_path, width, height, expected):
    path = png(tmp_path / "a.png", width, height, 8, 0, bytes(height))
    assert reason(path) == expected


def test_a_tile_larger_than_its_picture_is_refused(tmp_path):
    data = zlib.compress(bytes(64))
    tags = {256: 4, 257: 4, 258: 8, 259: 8, 262: 1, 277: 1, 322: 46000, 323: 46000, 324: 8 + 2 + 12 * 10 + 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in (tags | {325: len(data)}).items())
    (tmp_path / "a.tif").write_bytes(b"II*\0\x08\0\0\0\x0a\0" + entries + bytes(4) + data)
    assert reason(tmp_path / "a.tif") == "has 46000 × 46000 pixels, more than 134217728"


def test_below_the_budget_nothing_is_said(tmp_path, recwarn):
    width, height = 2**14, 6000  # more than Pillow warns of, less than the budget; 1 bit, so that it is fast
    path = png(tmp_path / "a.png", width, height, 1, 0, bytes(width // 8 * height))
    assert images.length(path) == 1
    assert not recwarn.list


def dds() -> bytes:
    """Two pixels of a byte each."""
    numbers = (124, 0x1007, 1, 2, 0, 0, 0, *[0] * 11, 32, 0x40, 0, 8, 7, 56, 192, 0, *[0] * 5)
    return b"DDS " + struct.pack(f"<{len(numbers)}I", *numbers) + b"\7\7"


def bmp_rle() -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 8, 1, 4, 0, 0, 256, 0)
    return b"BM" + struct.pack("<III", 0, 0, 54 + 1024) + head + bytes(4 * 255) + b"\1\2\3\0" + b"\2\xff\0\1"


@pytest.mark.parametrize(
    ("data", "samples"),
    [
        (b"P1 2 1 1 0", 2),
        (b"P2 2 1 9 1 2", 2),
        (b"P3 2 1 255 1 2 3 4 5 6", 6),
        (b"P6 2 1 200 abcdef", 6),
        (b"qoif" + struct.pack(">IIBB", 2, 1, 4, 0) + b"\xc1", 8),
        (dds(), 6),
        (bmp_rle(), 2),
    ],
    ids=["P1", "P2", "P3", "P6", "QOI", "DDS", "BMP"],
)
def test_what_is_decoded_in_python_may_have_fewer_samples(tmp_path, monkeypatch, data, samples):
    (tmp_path / "odd.bin").write_bytes(data)
    monkeypatch.setattr(images, "MAX_SLOW_SAMPLES", samples)
    assert images.read(tmp_path / "odd.bin").shape == (1, 2, 3)
    monkeypatch.setattr(images, "MAX_SLOW_SAMPLES", samples - 1)
    assert reason(tmp_path / "odd.bin").startswith("has 2 × 1 pixels, more than ")
    (tmp_path / "odd.bin").write_bytes(b"P6 2 1 255 abcdef")
    assert images.read(tmp_path / "odd.bin").shape == (1, 2, 3), "which is not decoded in Python"


def test_comments_of_a_plain_ppm_are_counted(tmp_path):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P3 1 1 255 " + b"#\n" * 1024 + b"1 2 3")
    assert images.read(path).tolist() == [[[1, 2, 3]]]
    path.write_bytes(b"P3 1 1 255 " + b"#\n" * 1025 + b"1 2 3")
    assert reason(path) == "has more than 1024 comments"


def test_colour_profiles_of_a_png_are_counted(tmp_path, monkeypatch):
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(9)))
    path = png(tmp_path / "a.png", 1, 1, 8, 0, b"\1", profile * 3)
    monkeypatch.setattr(images, "MAX_NOTES", 3)
    assert images.read(path).shape == (1, 1, 3)
    monkeypatch.setattr(images, "MAX_NOTES", 2)
    assert reason(path) == "has more than 2 colour profiles"


def test_marks_are_counted_where_reading_is_cut(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (2**20 - 2) + b"iCCPiCCP")
    assert images.occurrences(tmp_path / "a", b"iCCP") == 2 and images.occurrences(tmp_path / "a", b"x") == 2**20 - 2


def test_strips_of_a_tiff_are_counted(tmp_path, monkeypatch):
    tags = {256: 1, 257: 3, 258: 8, 259: 1, 262: 1, 277: 1, 278: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    entries += struct.pack("<HHIIHHII", 273, 4, 3, 8, 279, 4, 3, 20)
    (tmp_path / "a.tif").write_bytes(
        b"II*\0" + struct.pack("<I7I", 36, 8, 9, 10, 1, 1, 1, 0) + struct.pack("<H", 9) + entries + bytes(4)
    )
    monkeypatch.setattr(images, "MAX_PARTS", 3)
    assert images.read(tmp_path / "a.tif").shape == (3, 1, 3)
    monkeypatch.setattr(images, "MAX_PARTS", 2)
    assert reason(tmp_path / "a.tif") == "has more than 2 strips or tiles"


@pytest.mark.skipif(sys.platform != "linux", reason="this system knows no bound on memory")
def test_a_picture_takes_no_more_memory_than_it_may(tmp_path, monkeypatch):
    path = png(tmp_path / "a.png", 8192, 4096, 1, 0, bytes(1024 * 4096))
    assert images.length(path) == 1
    monkeypatch.setattr(memory, "ROOM", 2**26)
    assert reason(path) == "cannot be read: it takes too much memory"


@pytest.mark.parametrize("error", [struct.error, SyntaxError, KeyError, MemoryError, RecursionError, EOFError])
def test_whatever_a_decoder_raises_is_one_reason(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error("odd")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert "odd" in reason(png(tmp_path / "a.png", 1, 1, 8, 0, b"\1"))


def test_names_that_are_no_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\xfe.png")
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system has no such names")
    images.write_png(path, LETTER)
    assert np.array_equal(images.read(path), LETTER)


def test_scans_of_a_jpeg_are_counted_where_each_goes_over_the_whole_picture(tmp_path, monkeypatch):
    for progressive in (True, False):
        Image.new("L", (64, 64)).save(path := tmp_path / f"{progressive}.jpg", progressive=progressive)
        assert images.read(path).shape == (64, 64, 3)
    scans = (tmp_path / "True.jpg").read_bytes().count(b"\xff\xda")
    monkeypatch.setattr(images, "MAX_SCAN_PIXELS", (scans - 1) * 64 * 64)
    assert reason(tmp_path / "True.jpg") == f"has {scans} scans of 4096 pixels, more than {4096 * (scans - 1)} together"
    monkeypatch.setattr(images, "MAX_SCAN_PIXELS", 0)
    assert images.read(tmp_path / "False.jpg").shape == (64, 64, 3)


# ------------------------------------------------------------------------------------------------- damaged animations


def moving(path: Path) -> tuple[bytes, list[np.ndarray]]:
    """An animation of six frames, written; its bytes, and its frames while it is whole."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    first, *others = (Image.fromarray(frame) for frame in noise)
    first.save(path, save_all=True, append_images=others, **({"lossless": True} if path.suffix == ".webp" else {}))
    return path.read_bytes(), list(images.frames(path))


def damaged(path: Path, whole: list[np.ndarray]) -> list[int]:
    """The numbers of the damaged frames; the others are as they were."""
    found = list(images.frames(path))
    assert len(found) == images.length(path) == len(whole)
    broken = [number for number, frame in enumerate(found) if isinstance(frame, BrokenFile)]
    assert all(np.array_equal(found[n], whole[n]) for n in range(len(whole)) if n not in broken)
    return broken


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_an_animation_shows_no_more_than_its_bytes_may(tmp_path, monkeypatch, ending):
    data, _ = moving(path := tmp_path / f"a.{ending}")
    monkeypatch.setattr(images, "DENSEST", 6 * 32 * 32 / 2**20)
    assert len(list(images.frames(path))) == 6
    monkeypatch.setattr(images, "DENSEST", 5 * 32 * 32 / 2**20)
    with pytest.raises(BrokenFile, match=rf"^has more than 5 frames of 32 × 32 pixels in {len(data)} bytes$"):
        next(images.frames(path))


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_frames_of_an_animation_are_counted(tmp_path, monkeypatch, ending):
    moving(path := tmp_path / f"a.{ending}")
    monkeypatch.setattr(images, "MAX_PARTS", 6)
    assert len(list(images.frames(path))) == 6
    monkeypatch.setattr(images, "MAX_PARTS", 5)
    with pytest.raises(BrokenFile, match=r"^has more than 5 frames$"):
        list(images.frames(path))


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("rest", [b"", bytes(400)])  # cut short, and other bytes
def test_a_damaged_frame_of_an_apng_costs_itself(tmp_path, number, rest):
    data, whole = moving(path := tmp_path / "a.png")
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += length + 12
    pixels = [part for part in chunks if part[0] in (b"IDAT", b"fdAT")][number]
    pixels[1] = pixels[1][:200] + rest
    path.write_bytes(data[:8] + b"".join(chunk(*part) for part in chunks))
    assert damaged(path, whole) == [number]


@pytest.mark.parametrize("change", ["code size", "cut short", "other bytes"])
def test_a_damaged_frame_of_a_gif_costs_itself(tmp_path, change):
    data, whole = moving(path := tmp_path / "a.gif")
    start = -1
    for _ in range(4):  # the fourth frame
        start = data.index(b"\x2c\0\0\0\0\x20\0\x20\0", start + 1)
    size = start + 10 + 3 * 256  # after its palette: the size of a code, then blocks, each after its length
    end = size + 1
    while data[end]:
        end += data[end] + 1
    path.write_bytes(
        {
            "code size": data[:size] + b"\x0d" + data[size + 1 :],
            "cut short": data[: size + 2 + data[size + 1]] + data[end:],
            "other bytes": data[: size + 2] + b"\xff" * 58 + data[size + 60 :],
        }[change]
    )
    assert damaged(path, whole) == [3]


def test_of_a_damaged_webp_what_precedes_the_damage_remains(tmp_path):
    data, whole = moving(path := tmp_path / "a.webp")
    start = -1
    for _ in range(4):
        start = data.index(b"VP8L", start + 1)
    path.write_bytes(data[: start + 13] + bytes(387) + data[start + 400 :])
    assert damaged(path, whole) == [3, 4, 5]


@pytest.mark.parametrize("within", ["its pixels", "its head"])
def test_a_gif_cut_off_gives_its_whole_frames(tmp_path, within):
    data, whole = moving(path := tmp_path / "a.gif")
    head = data.rindex(b"\x2c\0\0\0\0\x20\0\x20\0")
    path.write_bytes(data[: len(data) * 11 // 12 if within == "its pixels" else head + 5])
    assert damaged(path, whole) == [5]


def test_an_apng_that_promises_more_than_it_has_ends_where_it_ends(tmp_path):
    data, whole = moving(path := tmp_path / "a.png")
    start = data.index(b"acTL")
    path.write_bytes(data[: start - 4] + chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + data[start + 16 :])
    found = list(images.frames(path))
    assert len(found) == 7 and isinstance(found[6], BrokenFile)
    assert np.array_equal(found[:6], whole)
