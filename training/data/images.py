"""Pictures by Pillow: opened here alone, and given as a viewer shows them: upright, opaque, eight bits, RGB.

Colour profiles are not applied: the numbers are those of the file. Pillow's own limit of pixels, a global variable, is
left alone: with its default it refuses nothing below :data:`MAX_PIXELS`, and its warning is silenced here.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from .. import memory
from ..files import BrokenFile, write_bytes

try:
    from pillow_heif import register_heif_opener
except ImportError:
    HEIF = ()
else:
    register_heif_opener()
    HEIF = ("HEIF",)

Image.init()
FORMATS = tuple(
    name
    for name in (
        *("PNG", "JPEG", "WEBP", "AVIF", *HEIF, "GIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM"),
        *("QOI", "SGI", "SUN", "PCX", "DDS", "PSD", "TGA"),  # TGA last: it has no signature
    )
    if name in Image.OPEN
)
"""Pillow's decoders that may be used: none runs a program, as that of EPS does, or draws pages, or decodes a picture
within before its size is known, as those of icons do."""

ENDINGS = frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS) | {
    *(".heic", ".heif", ".mpo"),
}
"""File endings of these formats, in lower case; also those of HEIC without pillow-heif, so that its lack is said."""

ANIMATIONS = frozenset({".gif", ".webp", ".apng", ".png", ".avif", ".avifs"})
"""Endings of files that may hold an animation, in lower case."""

MAX_PIXELS = 2**27
"""The most pixels of a picture; one that takes more than :data:`.memory.ROOM` fails, however many it has."""

MAX_SIDE = 2**16
"""The longest side of a picture: Pillow takes further memory for each row."""

MAX_SLOW_SAMPLES = 2**23
"""The most samples of a picture that Pillow decodes in Python, at about half a microsecond each."""

MAX_PARTS = 2**16
"""The most strips or tiles of a picture, and frames of an animation."""

MAX_NOTES = 2**10
"""The most colour profiles of a PNG, and comments of a PPM in plain text: each may move a megabyte."""

MAX_SCAN_PIXELS = 2**34
"""The most pixels of all scans of a progressive JPEG: each goes over the whole picture, and may take ten bytes."""

MAX_FRAME_PIXELS = 2**25
"""The most pixels of a frame of a clip, 8K: encoders hold about fifty at a time."""

DENSEST = 2**8
"""The most pixels that an animation shows for each of its bytes; see :func:`check_density`."""

BACKGROUND = (255, 255, 255)
"""What transparent pixels are laid on: white, the page of a viewer."""


def read(path: Path | str, most: int | None = None) -> np.ndarray:
    """A picture as a viewer shows it, of an animation the first frame.

    Args:
        path: the file.
        most: pixels that it may have; None: :data:`MAX_PIXELS`.

    - Transparent pixels are laid on :data:`BACKGROUND`.
    - The orientation tag is obeyed; one that is no integer 1…8, or EXIF that cannot be parsed, means upright.
    - Sixteen bits are scaled to eight, never clipped. Grey values of 32 bits, integer or float, are taken as they are
      where all lie within 0…255, for 16 bits where all lie within 0…65535, else stretched from least to greatest;
      floats that all lie within 0…1 span black to white.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        BrokenFile: it cannot be opened or decoded, or has more pixels; the reason has no path.
    """
    with _opened(path, most) as image:
        return _pixels(image, 0)


def frames(path: Path | str) -> Iterator[np.ndarray | BrokenFile]:
    """The frames of an animation in order, each composed as shown, or the one of a still; see :func:`read`.

    All have the size of the first: what a later one of a GIF has beyond it is cut off. In the place of one that cannot
    be decoded its error is given; those after it follow where Pillow can pass it, composed on what it left.

    Raises:
        BrokenFile: it cannot be opened, or has more than :data:`MAX_FRAME_PIXELS`, or too many frames for its bytes.
    """
    with _opened(path, MAX_FRAME_PIXELS) as image:
        width, height = image.size
        numbers = _shown(image)
        count = len(numbers)
        if image.format == "PNG":  # which may promise any number
            count = min(count, occurrences(path, b"fcTL"))
        _check_count(count, MAX_PARTS, "frames")
        check_density(count, width, height, os.path.getsize(path), DENSEST)
        for number in numbers:
            try:
                frame = _pixels(image, number)
                yield frame[:height, :width] if image.format == "GIF" else frame
            except Exception as error:
                yield error if isinstance(error, BrokenFile) else BrokenFile(reason(error))
                if image.tell() != number:  # the next one is not found
                    return
                _leave(image)


def length(path: Path | str) -> int:
    """The number of frames of an animation; 1 of a still, to which a preview or further pages do not count.

    Raises:
        BrokenFile: it cannot be opened.
    """
    with _opened(path) as image:
        return len(_shown(image))


def is_animation(path: Path | str) -> bool:
    """Whether it is a GIF, WebP, APNG or AVIF of several frames; False of what cannot be opened."""
    try:
        return length(path) > 1
    except BrokenFile:
        return False


def check_size(width: int, height: int, most: int | None = None) -> None:
    """Raise BrokenFile for more pixels than ``most``, or than :data:`MAX_PIXELS`, or a side above :data:`MAX_SIDE`."""
    if max(width, height) > MAX_SIDE:
        raise BrokenFile(f"has {width} × {height} pixels, and a side of more than {MAX_SIDE}")
    if width * height > (most := most or MAX_PIXELS):
        raise BrokenFile(f"has {width} × {height} pixels, more than {most}")


def check_density(count: int, width: int, height: int, size: int, most: int) -> None:
    """Raise BrokenFile for frames of more than ``most`` pixels for each of ``size`` bytes, of which 1 MB is granted.

    A frame that repeats the one before takes a few bytes, eight at least, so that a small file may hold many hours.
    """
    if count * max(width * height, 8 * most) > most * max(size, 2**20):
        raise BrokenFile(f"has more than {count - 1} frames of {width} × {height} pixels in {size} bytes")


def reason(error: Exception) -> str:
    """What an exception of a library says, for a message of one line."""
    unsaid = "it takes too much memory" if isinstance(error, MemoryError) else type(error).__name__
    text = getattr(error, "strerror", None) or str(error) or unsaid
    return f"cannot be read: {' '.join(text.split())}"


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """``(H, W, 3)`` uint8 at ``(size, size, 3)``, bicubic: what models see. The array itself where it has that size."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def cut(pixels: np.ndarray, box: Sequence[int], size: int | None) -> np.ndarray:
    """The inside of a box, at a side of ``size`` pixels (bicubic) unless that is None.

    Args:
        pixels: ``(H, W, 3)`` uint8.
        box: left, top, right, bottom in whole pixels; right and bottom lie outside.

    Returns:
        ``(bottom - top, right - left, 3)`` or ``(size, size, 3)`` uint8.

    Raises:
        ValueError: the box is empty, or reaches beyond the picture.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = box = tuple(int(side) for side in box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"box: expected left < right and top < bottom within {width}×{height}, got {box}")
    if size is None:
        return pixels[top:bottom, left:right]
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=None))


def on_background(pixels: np.ndarray) -> np.ndarray:
    """``(H, W, 4)`` uint8, red, green, blue and opacity, laid on :data:`BACKGROUND`: ``(H, W, 3)`` uint8."""
    image = Image.fromarray(pixels)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB"))


def png(pixels: np.ndarray) -> bytes:
    """``(H, W, 3)`` uint8 as a PNG file."""
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG", compress_level=4)
    return buffer.getvalue()


def write_png(path: Path | str, pixels: np.ndarray) -> None:
    """Write ``(H, W, 3)`` uint8 as PNG, whole or not at all; the folder is made."""
    write_bytes(Path(path), png(pixels))


# ------------------------------------------------------------------------------------------------------------ decoding


@contextmanager
def _guarded() -> Iterator[None]:
    """Pillow warns of nothing, and takes no more memory than it may."""
    with memory.bounded(), warnings.catch_warnings(action="ignore"):
        yield


@contextmanager
def _opened(path: Path | str, most: int | None = None) -> Iterator[Image.Image]:
    """An image within the budget; whatever is raised by a decoder becomes BrokenFile."""
    try:
        _check_count(occurrences(path, b"iCCP", b"\x89PNG"), MAX_NOTES, "colour profiles")
        with _guarded():
            image = Image.open(path, formats=FORMATS)
        with image:
            check_size(*image.size, most)
            _check_count(len(image.tile), MAX_PARTS, "strips or tiles")
            if (decoders := {tile.codec_name for tile in image.tile}) & Image.DECODERS.keys():
                check_size(*image.size, MAX_SLOW_SAMPLES // len(image.getbands()))
            if "ppm_plain" in decoders:
                _check_count(occurrences(path, b"#"), MAX_NOTES, "comments")
            if image.format == "TIFF":  # of which a tile may be larger
                tile = TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH
                check_size(*(image.tag_v2.get(tag, 1) for tag in tile), most)
            if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
                _check_scans(path, image.width * image.height)
            _scale_key(image)
            yield image
    except BrokenFile:
        raise
    except UnidentifiedImageError as error:
        raise BrokenFile(_unidentified(path)) from error
    except Image.DecompressionBombError as error:
        raise BrokenFile(f"has more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # decoders raise anything: struct.error, SyntaxError, EOFError, MemoryError, …
        raise BrokenFile(reason(error)) from error


def occurrences(path: Path | str, mark: bytes, beginning: bytes = b"") -> int:
    """How often some bytes stand in a file; 0 where it does not begin as told."""
    count, block = 0, b""
    with open(path, "rb") as file:
        if file.read(len(beginning)) != beginning:
            return 0
        while more := file.read(2**20):
            block = block[len(block) - len(mark) + 1 :] + more
            count += block.count(mark)
    return count


def _check_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise BrokenFile(f"has more than {most} {what}")


def _check_scans(path: Path | str, pixels: int) -> None:
    count = occurrences(path, b"\xff\xda")
    if count * pixels > MAX_SCAN_PIXELS:
        raise BrokenFile(f"has {count} scans of {pixels} pixels, more than {MAX_SCAN_PIXELS} together")


def _unidentified(path: Path | str) -> str:
    with open(path, "rb") as file:
        head = file.read(12)
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf") and not HEIF:
        return "HEIC needs another package: pip install pillow-heif"
    if samples := "a PFM of three colours" if head[:2] == b"PF" else _samples(path):
        return f"samples of this type are not supported: {samples}"
    return "not a picture of a known format, or its header is damaged"


@_guarded()
def _samples(path: Path | str) -> str | None:
    """What the samples of a TIFF are, in its own words, where that is why Pillow does not read it."""
    try:
        TiffImagePlugin.TiffImageFile(path).close()
    except SyntaxError as error:
        if str(error) == "unknown pixel mode":
            _, colours, kind, _, bits, _ = error.__cause__.args[0]
            bits = ", ".join(map(str, bits))
            return f"BitsPerSample {bits}, SampleFormat {kind[0]}, PhotometricInterpretation {colours}"
    except Exception:  # a broken one raises anything
        return None
    return None


@_guarded()
def _shown(image: Image.Image) -> range:
    """The numbers of the frames that a viewer plays; an APNG may have a picture before them for others."""
    if image.format not in ("GIF", "WEBP", "PNG", "AVIF"):
        return range(1)
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # a GIF that ends within the head of a frame, which is counted
        count = image.tell() + 2
        image.seek(0)
    return range(bool(getattr(image, "default_image", False)), count)


def _scale_key(image: Image.Image) -> None:
    """Give a PNG's transparent colour the bits of Pillow's pixels: it scales these to eight, and the colour not."""
    key, stored = image.info.get("transparency"), image.tile[0].args if image.tile else None
    if image.format != "PNG" or key is None:
        return
    if stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif stored in ("L;2", "L;4"):
        image.info["transparency"] = key % 4 * 85 if stored == "L;2" else key % 16 * 17


@_guarded()
def _leave(image: Image.Image) -> None:
    """Let seek pass the frame at hand, which cannot be decoded: it would try that again."""
    if image.tile:
        image.tile = []
        with suppress(Exception):  # what can be composed of it
            image.load_end()


@_guarded()
def _pixels(image: Image.Image, number: int) -> np.ndarray:
    """A frame of an image, ``(H, W, 3)`` uint8."""
    if number:
        image.seek(number)
        check_size(*image.size, MAX_FRAME_PIXELS)  # that of a GIF may be larger than the first
    image.load()
    transparency = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        pixels = np.repeat(_grey(image, values)[:, :, None], 3, axis=2)
        if transparency is not None:
            pixels[values == transparency] = BACKGROUND
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        pixels = np.asarray(ImageCms.profileToProfile(image, *profiles, outputMode="RGB"))
    elif image.has_transparency_data:
        pixels = on_background(np.asarray(image.convert("RGBA")))
    else:
        pixels = np.asarray(image.convert("RGB"))
    return _upright(pixels, _orientation(image))


def _grey(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """Grey values of more than eight bits as uint8; the rule is that of :func:`read`."""
    tags = getattr(image, "tag_v2", {})
    if values.dtype == np.int32 and tags.get(339) == (1,):  # SampleFormat: unsigned
        values = values.view(np.uint32)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise BrokenFile("has values that are not finite")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        low, high = 0, 4095 if tags.get(258) == (12,) else 65535  # BitsPerSample
    elif values.dtype == np.float32 and low >= 0 and high <= 1:
        low, high = 0, 1
    elif low >= 0 and high <= 65535:
        low, high = 0, 255 if high <= 255 else 65535
    scaled = np.rint((values - float(low)) * (255 / max(float(high) - float(low), 1e-30))).astype(np.uint8)
    return 255 - scaled if tags.get(262) == 0 else scaled  # PhotometricInterpretation: white is zero


def _orientation(image: Image.Image) -> int:
    """The orientation tag, 1 where it means nothing; a TIFF has none left once it is loaded: Pillow turned it."""
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # EXIF that cannot be parsed raises anything
        return 1
    return tag if isinstance(tag, int) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turned so that the first row and column lie where the tag says they belong."""
    if 5 <= orientation <= 8:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
