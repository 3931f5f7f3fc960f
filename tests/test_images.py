"""Pictures as people have them, and what each is as RGB; expected values are computed by hand."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import images
from training.files import BrokenFile

WHITE = [255, 255, 255]
# The letter F, which no turn or mirror maps to itself.
LETTER = np.kron([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]], np.full((8, 8), 250)).astype(np.uint8)
LETTER = LETTER[..., None].repeat(3, axis=2)


def png(path: Path, width: int, height: int, depth: int, kind: int, rows: bytes, extra: bytes = b"") -> Path:
    """A PNG by hand: rows without filter bytes, and chunks that stand before the pixels."""
    stride = len(rows) // height
    data = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(path: Path, samples: np.ndarray, *, photometric: int = 1, kind: int = 1, big_endian: bool = False) -> Path:
    """An uncompressed TIFF by hand: ``(H, W)`` or ``(H, W, C)`` samples; kind 1 unsigned, 2 signed, 3 float."""
    order = ">" if big_endian else "<"
    samples = samples if samples.ndim == 3 else samples[..., None]
    height, width, channels = samples.shape
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    bits = 8 * samples.dtype.itemsize
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, channels)]
    tags += [(278, height), (279, len(data)), (339, kind)]
    offset, extra, entries = 8 + len(data), b"", b""
    after = offset + 2 + 12 * len(tags) + 4
    for tag, value in tags:
        if tag in (258, 339) and channels > 2:
            entries += struct.pack(f"{order}HHII", tag, 3, channels, after + len(extra))
            extra += struct.pack(f"{order}{channels}H", *[value] * channels)
        elif tag in (258, 339):
            entries += struct.pack(f"{order}HHI{channels}H", tag, 3, channels, *[value] * channels).ljust(12, b"\0")
        else:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, value)
    head = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(f"{order}I", offset)
    path.write_bytes(head + data + struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0" + extra)
    return path


def grey(values: list) -> list:
    return [[[value] * 3 for value in row] for row in values]


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF by hand: entries (tag, type, count, four bytes of value or offset); offset 0x40 holds eight bytes."""
    body = struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHI", *e[:3]) + e[3] for e in entries)
    return b"Exif\0\0" + (b"MM\0*\0\0\0\x08" + body + b"\0\0\0\0").ljust(0x40, b"\0") + struct.pack(">ii", -1, 0)


# --------------------------------------------------------------------------------------------------------- grey values


def test_sixteen_bit_png_is_scaled_not_clipped(tmp_path):
    values = [0, 128, 129, 257, 32768, 65535]
    path = png(tmp_path / "a.png", 6, 1, 16, 0, struct.pack(">6H", *values))
    assert images.read(path).tolist() == grey([[0, 0, 1, 1, 128, 255]])


@pytest.mark.parametrize("big_endian", [False, True])
def test_sixteen_bit_tiff_is_scaled(tmp_path, big_endian):
    path = tiff(tmp_path / "a.tif", np.array([[0, 257, 32768, 65535]], np.uint16), big_endian=big_endian)
    assert images.read(path).tolist() == grey([[0, 1, 128, 255]])


def test_sixteen_bit_tiff_whose_white_is_zero_is_inverted(tmp_path):
    path = tiff(tmp_path / "a.tif", np.array([[0, 257, 65535]], np.uint16), photometric=0)
    assert images.read(path).tolist() == grey([[255, 254, 0]])


def test_twelve_bit_tiff_is_scaled(tmp_path):
    path = tiff(tmp_path / "a.tif", np.array([[0xFF, 0xF8, 0x00]], np.uint8))  # two samples in three bytes
    data = path.read_bytes().replace(struct.pack("<HHII", 256, 4, 1, 3), struct.pack("<HHII", 256, 4, 1, 2))
    path.write_bytes(data.replace(struct.pack("<HHIH", 258, 3, 1, 8), struct.pack("<HHIH", 258, 3, 1, 12)))
    assert images.read(path).tolist() == grey([[255, 128]])


def test_sixteen_bit_pgm_is_scaled_by_its_maximum(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023))
    assert images.read(tmp_path / "a.pgm").tolist() == grey([[0, 128, 255]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-510, 0, 2040]], np.int32), [0, 51, 255]),
        (np.array([[0, 2**31, 2**32 - 1]], np.uint32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 0.4, 254.6]], np.float32), [0, 0, 255]),
        (np.array([[0, 257, 65535]], np.float32), [0, 1, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[-3, -3, -3]], np.float32), [0, 0, 0]),
    ],
)
def test_values_of_32_bits_follow_the_stated_rule(tmp_path, values, expected):
    path = tiff(tmp_path / "a.tif", values, kind={"i": 2, "u": 1, "f": 3}[values.dtype.kind])
    assert images.read(path).tolist() == grey([expected])


@pytest.mark.parametrize(("order", "scale"), [("<", b"-1.0"), (">", b"1.0")])
def test_pfm_floats_span_black_to_white_from_the_bottom_row_up(tmp_path, order, scale):
    data = b"Pf\n2 2\n" + scale + b"\n" + struct.pack(f"{order}4f", 1, 0.5, 0, 0.2)
    (tmp_path / "a.pfm").write_bytes(data)
    assert images.read(tmp_path / "a.pfm").tolist() == grey([[0, 51], [255, 128]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    with pytest.raises(BrokenFile, match="not finite"):
        images.read(tiff(tmp_path / "a.tif", np.array([[0, value]], np.float32), kind=3))


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert images.read(tmp_path / "a.png").tolist() == grey([[255, 0]])


# -------------------------------------------------------------------------------------------------------------- colours


def test_48_bit_colours_keep_their_high_bytes(tmp_path):
    values = np.array([[[0, 0x8080, 0xFFFF]]], np.uint16)
    paths = [tiff(tmp_path / "a.tif", values, photometric=2)]
    paths += [png(tmp_path / "a.png", 1, 1, 16, 2, values.astype(">u2").tobytes())]
    assert [images.read(path).tolist() for path in paths] == [[[[0, 128, 255]]]] * 2


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_cmyk_is_ink_on_white(tmp_path, ending):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, :, 1] = 255  # magenta
    Image.fromarray(ink, "CMYK").save(tmp_path / f"a.{ending}", quality=100)  # JPEG: inverted, with Adobe's marker
    pixels = images.read(tmp_path / f"a.{ending}").astype(int)
    assert np.abs(pixels - [255, 0, 255]).max() <= 2


def test_ycbcr_becomes_rgb(tmp_path):
    Image.new("YCbCr", (2, 2), (76, 85, 255)).save(tmp_path / "a.tif")  # red by JFIF's matrix
    assert np.abs(images.read(tmp_path / "a.tif").astype(int) - [255, 0, 0]).max() <= 2


def test_lab_becomes_srgb(tmp_path):
    values = np.array([[[255, 0, 0], [136, 80, 67]]], np.uint8)  # L* in 255 parts, a*, b*: white, and the red of sRGB
    pixels = images.read(tiff(tmp_path / "a.tif", values, photometric=8)).astype(int)
    assert np.abs(pixels - [WHITE, [255, 0, 0]]).max() <= 11


@pytest.mark.parametrize("ending", ["png", "webp", "tif", "avif"])
def test_transparent_pixels_lie_on_the_background(tmp_path, ending):
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0]]], np.uint8).repeat(8, 0).repeat(8, 1)
    options = {"webp": {"lossless": True, "exact": True}, "avif": {"quality": 100, "subsampling": "4:4:4"}}
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", **options.get(ending, {}))
    found = images.read(tmp_path / f"a.{ending}").astype(int)
    assert np.abs(found[4, [2, 12]] - [[200, 0, 0], WHITE]).max() <= 3


def test_half_transparent_is_half_background(tmp_path):
    Image.fromarray(np.array([[[100, 128]]], np.uint8), "LA").save(tmp_path / "a.png")
    assert np.abs(images.read(tmp_path / "a.png").astype(int) - round(100 * 128 / 255 + 127)).max() <= 1


def test_transparent_palette_lies_on_the_background(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png", transparency=1)
    image.save(tmp_path / "b.png", transparency=bytes([255, 255, 0]))
    assert images.read(tmp_path / "a.png").tolist() == [[[10, 20, 30], WHITE, [70, 80, 90]]]
    assert images.read(tmp_path / "b.png").tolist() == [[[10, 20, 30], [40, 50, 60], WHITE]]


@pytest.mark.parametrize(
    ("depth", "kind", "rows", "key", "expected"),
    [
        (8, 0, bytes([7, 8]), struct.pack(">H", 8), [[7] * 3, WHITE]),
        (16, 0, struct.pack(">2H", 0x0700, 0x0701), struct.pack(">H", 0x0701), [[7] * 3, WHITE]),
        (1, 0, bytes([0b01000000]), struct.pack(">H", 1), [[0] * 3, WHITE]),
        (2, 0, bytes([0b01100000]), struct.pack(">H", 2), [[85] * 3, WHITE]),
        (4, 0, bytes([0x3C]), struct.pack(">H", 12), [[51] * 3, WHITE]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 4, 5, 6), [[1, 2, 3], WHITE]),
        (16, 2, bytes([1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0]), bytes([4, 0, 5, 0, 6, 0]), [[1, 2, 3], WHITE]),
    ],
)
def test_a_transparent_colour_lies_on_the_background(tmp_path, depth, kind, rows, key, expected):
    path = png(tmp_path / "a.png", 2, 1, depth, kind, rows, chunk(b"tRNS", key))
    assert images.read(path).tolist() == [expected]


# --------------------------------------------------------------------------------------------------------- orientation


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores whose picture is ``pixels``: the EXIF standard's table, undone."""
    undo = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: np.rot90(a, 2),
        lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1),
        lambda a: np.rot90(a, 1),  # 6: "rotate 90° clockwise to show"
        lambda a: np.rot90(a, 2).swapaxes(0, 1),
        lambda a: np.rot90(a, -1),
    ]
    return np.ascontiguousarray(undo[orientation - 1](pixels))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif", "mpo"])
def test_pictures_are_turned_once_by_their_tag(tmp_path, ending, orientation):
    image, tags = Image.fromarray(turned(LETTER, orientation)), Image.Exif()
    tags[274] = orientation
    more = {"save_all": True, "append_images": [image]} if ending == "mpo" else {}
    image.save(tmp_path / f"a.{ending}", exif=tags, quality=95, **more)
    pixels = images.read(tmp_path / f"a.{ending}")
    assert pixels.shape == LETTER.shape and np.abs(pixels.astype(int) - LETTER).mean() < 8


def test_compressed_tiff_is_turned_once(tmp_path):
    Image.fromarray(turned(LETTER, 6)).save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo={274: 6})
    assert np.array_equal(images.read(tmp_path / "a.tif"), LETTER)


SHORT, ASCII, SIGNED_RATIONAL = 3, 2, 10


@pytest.mark.parametrize("pointer", [34665, 34853, 40965])  # EXIF, GPS, interoperability
def test_a_tiff_whose_exif_lies_nowhere_is_turned(tmp_path, pointer):
    Image.fromarray(turned(LETTER, 6)).save(tmp_path / "a.tif", tiffinfo={274: 6, pointer: 0xFFFFFFF0})
    assert np.array_equal(images.read(tmp_path / "a.tif"), LETTER)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("tags", "orientation"),
    [
        (exif((0x11A, SIGNED_RATIONAL, 1, b"\0\0\0\x40"), (0x112, SHORT, 1, b"\0\x06\0\0")), 6),  # a resolution of -1/0
        (exif((0x10F, SHORT, 1, b"\0\x01\0\0"), (0x112, SHORT, 1, b"\0\x06\0\0")), 6),  # a maker that is a number
        (exif((0x112, SHORT, 1, b"\0\x09\0\0")), 1),
        (exif((0x112, SHORT, 1, b"\0\0\0\0")), 1),
        (exif((0x112, ASCII, 2, b"6\0\0\0")), 1),
        (exif((0x112, SIGNED_RATIONAL, 1, b"\0\0\0\x40")), 1),
        (exif((0x112, SHORT, 1, b"\0\x06\0\0"))[:18], 1),
        (b"Exif\0\0garbage", 1),
        (b"Exif\0\0", 1),
    ],
)
def test_odd_exif_costs_nothing(tmp_path, ending, tags, orientation):
    Image.fromarray(turned(LETTER, orientation)).save(tmp_path / f"a.{ending}", exif=tags, quality=95)
    pixels = images.read(tmp_path / f"a.{ending}")
    assert pixels.shape == LETTER.shape and np.abs(pixels.astype(int) - LETTER).mean() < 8


# ----------------------------------------------------------------------------------------------------------- animations


def moving(count: int = 3) -> list[Image.Image]:
    return [Image.new("RGB", (16, 8), (80 * i, 0, 0)) for i in range(count)]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "apng", "avif"])
def test_animations_give_their_frames_in_order(tmp_path, ending):
    first, *others = moving()
    path = tmp_path / f"a.{ending}"
    lossless = {"lossless": True} if ending == "webp" else {}
    first.save(path, save_all=True, append_images=others, duration=40, **lossless)
    assert images.is_animation(path) and images.length(path) == 3
    values = [frame[4, 8].astype(int) for frame in images.frames(path)]
    assert np.abs(np.array(values) - [[0, 0, 0], [80, 0, 0], [160, 0, 0]]).max() <= 4
    assert np.array_equal(images.read(path), next(images.frames(path)))


def test_the_picture_for_viewers_without_animation_is_no_frame(tmp_path):
    first, *others = moving()
    first.save(tmp_path / "a.png", save_all=True, append_images=others, default_image=True)
    assert [frame[0, 0, 0] for frame in images.frames(tmp_path / "a.png")] == [80, 160]
    assert images.length(tmp_path / "a.png") == 2


def test_partial_frames_of_a_gif_are_composed(tmp_path):
    # By hand: a red 2×1 canvas, then a frame that is one blue pixel at the right, then one that is transparent.
    def block(left: int, width: int, codes: bytes, transparent: int | None) -> bytes:
        control = struct.pack("<BHB", 4 | (transparent is not None), 10, transparent or 0)
        return b"!\xf9\x04" + control + b"\0," + struct.pack("<HHHHB", left, 0, width, 1, 0) + codes

    palette = bytes([255, 0, 0, 0, 0, 255, 0, 255, 0, 0, 0, 0])
    one = {color: bytes([2, 2, 0x44 | color << 3, 1, 0]) for color in range(4)}  # clear, colour, end in 3 bits each
    two_red = bytes([2, 2, 0x04, 0x0A, 0])  # clear, 0, 0, end
    body = block(0, 2, two_red, None) + block(1, 1, one[1], None) + block(0, 1, one[3], 3)
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 2, 1, 0x81, 0, 0) + palette + body + b";")
    red, blue = [255, 0, 0], [0, 0, 255]
    assert [f.tolist() for f in images.frames(tmp_path / "a.gif")] == [[[red, red]], [[red, blue]], [[red, blue]]]


def test_a_frame_that_reaches_beyond_the_first_is_cut_off(tmp_path):
    first, second = (Image.new("RGB", (16, 8), (value, 0, 0)) for value in (0, 200))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    data = bytearray((tmp_path / "a.gif").read_bytes())
    data[data.rindex(b"\x2c\0\0\0\0\x10\0\x08\0") + 1] = 5  # its left side
    (tmp_path / "a.gif").write_bytes(data)
    found = [frame[..., 0].tolist() for frame in images.frames(tmp_path / "a.gif")]
    assert found == [[[0] * 16] * 8, [[0] * 5 + [200] * 11] * 8]


def test_a_transparent_colour_holds_for_all_frames(tmp_path):
    whole = struct.pack(">IIIIHHBB", 2, 1, 0, 0, 1, 25, 0, 0)
    extra = chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"tRNS", bytes([4, 0, 5, 0, 6, 0]))
    rows = bytes([1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0])
    path = png(tmp_path / "a.png", 2, 1, 16, 2, rows, extra + chunk(b"fcTL", struct.pack(">I", 0) + whole))
    more = chunk(b"fcTL", struct.pack(">I", 1) + whole)
    more += chunk(b"fdAT", struct.pack(">I", 2) + zlib.compress(b"\0" + rows[6:] + rows[:6]))
    path.write_bytes(path.read_bytes()[:-12] + more + chunk(b"IEND", b""))
    assert [f.tolist() for f in images.frames(path)] == [[[[1, 2, 3], WHITE]], [[WHITE, [1, 2, 3]]]]


def test_what_is_no_animation(tmp_path):
    for name in ("phone.mpo", "pages.tif"):
        first, *others = (image.resize((16, 16)) for image in moving())
        first.save(tmp_path / name, append_images=others, save_all=True)
    Image.new("RGB", (16, 8)).save(tmp_path / "still.gif")
    (tmp_path / "text.gif").write_text("GIF")
    names = ("phone.mpo", "pages.tif", "still.gif", "text.gif", "missing.gif")
    assert not any(images.is_animation(tmp_path / name) for name in names)
    assert all(len(list(images.frames(tmp_path / name))) == 1 for name in names[:3])


# ----------------------------------------------------------------------------------------------------------- the others


def test_endings_are_those_of_formats_that_are_read():
    assert images.ANIMATIONS < images.ENDINGS
    for name in ("jfif", "jpe", "apng", "webp", "avif", "bmp", "tif", "gif", "jp2", "heic", "mpo"):
        assert f".{name}" in images.ENDINGS
    assert not {".eps", ".pdf", ".wmf", ".mpg", ".mpeg", ".h5"} & images.ENDINGS


def test_resized_and_cut_are_pillows_bicubic():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(images.resized(pixels, 12), image.resize((12, 12), Image.Resampling.BICUBIC))
    assert images.resized(pixels[:20, :20], 20) is not None and images.resized(square := pixels[:20, :20], 20) is square
    box = (3, 2, 25, 18)
    assert np.array_equal(images.cut(pixels, np.array(box), None), pixels[2:18, 3:25])
    expected = image.resize((9, 9), Image.Resampling.BICUBIC, box=box, reducing_gap=None)
    assert np.array_equal(images.cut(pixels, box, 9), expected)


@pytest.mark.parametrize("box", [(0, 0, 31, 20), (0, 0, 30, 21), (-1, 0, 5, 5), (5, 0, 5, 5)])
def test_a_box_beyond_the_picture_is_refused(box):
    with pytest.raises(ValueError, match="within 30×20"):
        images.cut(np.zeros((20, 30, 3), np.uint8), box, None)


def test_png_is_written_without_loss_and_its_folder_made(tmp_path):
    images.write_png(tmp_path / "new" / "a.png", LETTER)
    assert np.array_equal(images.read(tmp_path / "new" / "a.png"), LETTER)
