"""Files that are no pictures, or broken ones: one reason each, whatever the decoder says."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from test_images import LETTER, png

from training.data import images
from training.files import BrokenFile

# --------------------------------------------------------------------------------------------------------- broken files


def reason(path: Path) -> str:
    with pytest.raises(BrokenFile) as caught:
        images.read(path)
    text = str(caught.value)
    assert "\n" not in text and path.name not in text and len(text) < 120
    return text


@pytest.mark.parametrize("ending", ["png", "jpg", "avif", "webp", "gif", "tif", "bmp", "jp2", "ppm", "ico"])
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


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = png(tmp_path / "a.png", 1, 1, 8, 0, b"\1")
    path.chmod(0)
    assert reason(path) == "cannot be read: Permission denied"


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert reason(tmp_path / "a.png").startswith("not a picture")
    assert not {"EPS", "WMF", "PDF"} & set(images.FORMATS)


@pytest.mark.skipif("HEIF" in images.FORMATS, reason="pillow-heif is installed")
def test_heic_names_the_package_that_reads_it(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    assert reason(tmp_path / "a.jpg") == "HEIC needs another package: pip install pillow-heif"


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (13000, 13000, "has 13000 × 13000 pixels, more than 134217728"),
        (60000, 60000, "has more than 134217728 pixels"),
    ],
)
def test_bombs_are_refused_by_their_header(tmp_path, width, height, expected):
    path = png(tmp_path / "a.png", width, height, 8, 0, bytes(height))
    assert reason(path) == expected


def test_below_the_budget_nothing_is_said(tmp_path, recwarn):
    width, height = 2**14, 6000  # more than Pillow warns of, less than the budget; 1 bit, so that it is fast
    path = png(tmp_path / "a.png", width, height, 1, 0, bytes(width // 8 * height))
    with images._opened(path) as image:
        assert image.size == (width, height)
    assert not recwarn.list


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
