"""Options of prepare.py: one dataclass, read from the words of its command line."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from .synthetic import SPLITS

UNALTERED = ("out", "jobs", "shard", "check")  # options that do not change what is written for a video


@dataclass
class Options:
    """Make pairs of raw and compressed face crops from a set of videos, or --check those of an earlier run."""

    source: str = ""
    """FaceForensics++ or Celeb-DF v2 tree, DeepfakeBench .json, or a folder with real/ and fake/; may
    come first, bare."""
    out: str = "pairs"
    """Folder for crops and manifest."""
    kind: Literal["auto", "faceforensics", "celeb_df", "deepfakebench", "folder"] = "auto"
    """What the source is; auto recognises it by its folders."""
    manipulations: list[str] | None = None
    """Forgeries to take, e.g. [NeuralTextures]; null: all."""
    splits: list[str] = field(default_factory=lambda: list(SPLITS))
    """Splits to take."""
    reference: Literal["auto", "raw", "source"] = "auto"
    """What uncompressed means here: raw, or source where the videos are compressed already; auto: raw for the level raw
    or c0 of a tree, else source."""
    frames: int = 64
    """Frames per video, evenly spread."""
    size: int | None = 128
    """Side of a stored crop in pixels; null keeps the pixels of the frame."""
    margin: float = 1.3
    """Side of the crop over that of the face."""
    crfs: list[int] = field(default_factory=lambda: [23, 40])
    """Compressions, as constant rate factors of H.264: levels c23, c40."""
    existing: bool = True
    """Use compressed files that the source has for a level; false makes all from the reference."""
    pix_fmt: Literal["auto", "yuv420p", "yuv444p"] = "auto"
    """Pixel format of the encoder; auto: yuv444p for FaceForensics++ as released, else yuv420p."""
    preset: str = "medium"
    """Preset of libx264."""
    detector: Literal["cascade", "yunet", "file", "none"] = "cascade"
    """Finds faces on the reference: scikit-image's LBP cascade, OpenCV's YuNet, boxes from a file, or none: frames are
    crops already and are kept whole."""
    detector_file: str | None = None
    """YuNet's .onnx file; or, for detector=file, a CSV or parquet table with the columns video (path below the source),
    frame, left, top, right, bottom."""
    smoothing: float = 5.0
    """σ in frames of the Gaussian that smooths boxes over time; 0: none."""
    images: Literal["clips", "stills"] = "clips"
    """Images beside each other in a sub-folder of real/ or fake/: the frames of a clip, or stills, compressed each."""
    val_fraction: float = 0.1
    """Part of the videos for validation, where the source has no such split."""
    test_fraction: float = 0.2
    """Part of the videos for the test, where the source has no such split."""
    draw_val: bool = False
    """Draw the validation split of a DeepfakeBench manifest from its training videos even where it has one."""
    seed: int = 0
    """Seed of drawn splits."""
    shard: str = "1/1"
    """Which part i of n this process prepares, i/n; their manifests are read together."""
    jobs: int = 0
    """Processes; 0: one per core."""
    check: bool = False
    """Verify the hashes and the alignment of the pairs in out, and write contact-sheet.png there."""

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("jobs", 0), ("smoothing", 0), ("margin", 0.1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.size is not None and self.size < 8:
            raise ValueError(f"size: expected at least 8 pixels or null, got {self.size}")
        if not self.crfs or len(set(self.crfs)) != len(self.crfs) or not all(0 <= crf <= 51 for crf in self.crfs):
            raise ValueError(f"crfs: expected different numbers in 0…51, got {self.crfs}")
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise ValueError(f"splits: expected some of {list(SPLITS)}, got {self.splits}")
        if min(self.val_fraction, self.test_fraction) <= 0 or self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction, test_fraction: expected above 0, and their sum below 1")
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"shard: expected i/n with 1 <= i <= n, got '{self.shard}'")
        if not self.source and not self.check:
            raise ValueError("source: expected the folder of a set of videos first; --help explains")
        if (self.detector in ("yunet", "file")) != (self.detector_file is not None):
            raise ValueError("detector_file: goes with detector=yunet or detector=file, and these need it")

    @property
    def part(self) -> tuple[int, int]:
        index, count = map(int, self.shard.split("/"))
        return index, count

    @property
    def manifest(self) -> Path:
        index, count = self.part
        return Path(self.out) / ("manifest.parquet" if count == 1 else f"manifest-{index}-of-{count}.parquet")


def parse(argv: list[str]) -> Options:
    """Options from the words of a command line, in the spellings ``key=value`` and ``--key value``.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range.
    """
    keys, words = [f.name for f in fields(Options)], []
    for position, word in enumerate(argv):
        if position == 0 and not word.startswith("-") and not re.match(r"[a-z_]+=", word):
            word = f"--source={word}"
        elif re.match(r"[A-Za-z_]\w*=", word):
            word = f"--{word}"
        elif word == "--check" and argv[position + 1 : position + 2] not in (["true"], ["false"]):
            word = "--check=true"
        key = word[2:].partition("=")[0]
        if word.startswith("--") and key not in (*keys, "help"):
            raise ValueError(f"unknown key '{key}'; did you mean '{difflib.get_close_matches(key, keys, 1, 0)[0]}'?")
        words.append(word)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python training/prepare.py",
        description=Options.__doc__,
        epilog="Options are written key=value or --key value. Exit status: 0 all well, 1 some videos or pairs are not, "
        "2 wrong usage or a source that does not add up.",
        default_env=False,
        exit_on_error=False,
    )
    parser.add_class_arguments(Options, nested_key=None)
    try:
        namespace = parser.parse_args(words)
    except Exception as error:  # jsonargparse raises its own family
        raise ValueError(str(error)) from error
    return Options(**{key: namespace[key] for key in keys})
