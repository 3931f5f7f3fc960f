"""Frames in every quality, from the embedded set or from a manifest: what is trained on and evaluated on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path

import numpy as np
import pandas
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.utils.data import Dataset

from ..config import Config
from ..files import BrokenFile, read_npz, shown
from . import embedded, images, manifest
from .manifest import RAW
from .sources.common import SPLITS
from .sources.faceforensics import people_of

Images = np.ndarray | list[Path | None]  # (N, H, W, 3) uint8, or N paths; None: there is none in this quality


# ---------------------------------------------------------------------------------------------------------------- sets


@dataclass
class Frames:
    """The frames of one split, in every quality that exists.

    Attributes:
        raw: each frame before compression.
        compressed: by compression, e.g. ``c40``, each frame after it.
        table: for each frame its ``label`` (1 = fake), ``dataset``, ``manipulation``, ``reference`` (what ``raw`` is
            called; "" where there is none), and as numbers its ``video`` (identity), ``group`` (its source: an
            original and all that was made from it, what intervals are about), ``twin`` and, of the embedded set,
            ``photograph``.
    """

    raw: Images
    compressed: dict[str, Images]
    table: pandas.DataFrame

    @property
    def qualities(self) -> list[str]:
        """What the frames before compression are called, then the compressions."""
        references = sorted(set(self.table["reference"]) - {""})
        return list(dict.fromkeys([*references, *self.compressed]))

    def where(self, quality: str) -> np.ndarray:
        """Which frames there are in a quality, as rising positions."""
        if quality in self.compressed:
            return _present(self.compressed[quality])
        return np.flatnonzero(self.table["reference"] == quality)

    def pairs(self, *qualities: str) -> Split:
        """What is to be learnt in these qualities, ``raw`` or compressions: the frames that exist in one of them."""
        images = {RAW: self.raw} | {
            quality: self.compressed.get(quality, [None] * len(self.table)) for quality in qualities if quality != RAW
        }
        chosen = np.unique(np.concatenate([_present(images[quality]) for quality in qualities]))
        columns = (self.table[name].to_numpy(np.int64)[chosen] for name in ("label", "group", "twin"))
        photographs = self.table["photograph"].to_numpy(np.int64)[chosen] if "photograph" in self.table else None
        taken = {quality: _take(source, chosen) for quality, source in images.items()}
        return Split(taken, *columns, photographs, qualities)

    def of(self, quality: str, size: int) -> Stills:
        """The frames of one quality, at a size."""
        chosen = self.where(quality)
        source = self.compressed.get(quality, self.raw)
        return Stills(_take(source, chosen), self.table.iloc[chosen].reset_index(drop=True), size)


@dataclass
class Split:
    """One split of a set of pairs.

    Attributes:
        images: by quality, index by index the same frame; ``raw`` (what the teacher sees) and every learnt quality.
        labels: ``(N,)`` int64, 1 = fake.
        groups: ``(N,)`` int64, the source of each frame: what intervals are about.
        twins: ``(N,)`` int64, equal for a real frame and the fake made from it: such samples share a batch, so that the
            forgery is all that tells them apart. From scratch this teaches several times faster.
        photographs: of the embedded set ``(N,)`` int64, the place in its list of the photograph of each frame.
        learnt: the qualities that a student learns from; () stands for all of ``images`` but ``raw``.
    """

    images: dict[str, Images]
    labels: np.ndarray
    groups: np.ndarray
    twins: np.ndarray
    photographs: np.ndarray | None = None
    learnt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.learnt = tuple(self.learnt) or tuple(quality for quality in self.images if quality != RAW)

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, quality: str) -> np.ndarray:
        """Which frames there are in a quality, as rising positions.

        Raises:
            ValueError: it was not loaded.
        """
        if quality not in self.images:
            raise ValueError(f"quality: expected one of {list(self.images)}, got '{quality}'")
        return _present(self.images[quality])

    def of(self, quality: str) -> Split:
        """The frames of one quality, to be learnt in it alone."""
        chosen = self.where(quality)
        images = {name: _take(self.images[name], chosen) for name in dict.fromkeys((RAW, quality))}
        photographs = None if self.photographs is None else self.photographs[chosen]
        columns = (column[chosen] for column in (self.labels, self.groups, self.twins))
        return Split(images, *columns, photographs, (quality,))

    def fingerprint(self) -> str:
        """What training depends on: equal for the same pairs in the same order, wherever their folder lies."""
        parts = [self.labels, self.groups, self.twins]
        for source in self.images.values():
            if isinstance(source, np.ndarray):
                parts.append(source)
            else:
                root = commonpath([path.parent for path in source if path] or [""])
                names = "\n".join(str(path.relative_to(root)) if path else "" for path in source)
                parts.append(names.encode("utf-8", "surrogateescape"))
        value = 0
        for part in parts:
            value = zlib.crc32(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part, value)
        return f"{len(self)} pairs, {value:08x}"


def _present(source: Images) -> np.ndarray:
    """The positions of the frames that there are."""
    if isinstance(source, np.ndarray):
        return np.arange(len(source))
    return np.flatnonzero([frame is not None for frame in source])


def _take(source: Images, chosen: np.ndarray) -> Images:
    if len(chosen) == len(source):
        return source
    return source[chosen] if isinstance(source, np.ndarray) else [source[i] for i in chosen]


def embedded_spec(config: Config) -> embedded.EmbeddedSpec:
    return embedded.EmbeddedSpec(
        config.train_clips,
        config.val_clips,
        config.test_clips,
        size=config.image_size,
        crfs=tuple(config.crfs),
        fingerprint=tuple(config.fingerprint),
        fold=None if config.fold is None else (config.fold, config.folds),
    )


def read_embedded(config: Config) -> dict[str, Frames]:
    """The embedded set of a configuration by split; the bootstrap draws a real clip with its forged twin."""
    splits = {}
    arrays = read_npz(embedded.build(spec := embedded_spec(config), config.cache))
    for split in SPLITS:
        label, source, frame = (arrays[f"{split}_{name}"] for name in ("label", "source", "frame"))
        table = pandas.DataFrame({"label": label, "dataset": "embedded", "reference": "raw", "group": source})
        table["manipulation"] = np.where(label == 1, "forged", "real")
        table["video"], table["twin"] = 2 * source + label, source * (frame.max() + 1) + frame
        table["photograph"] = arrays[f"{split}_photograph"]
        compressed = {f"c{crf}": arrays[f"{split}_c{crf}"] for crf in spec.crfs}
        splits[split] = Frames(arrays[f"{split}_raw"], compressed, table)
    return splits


def read_manifest(where: str | pandas.DataFrame, *, outside: bool = False) -> dict[str, Frames]:
    """The frames of a table of pairs by split, those that exist of train, val and test.

    Args:
        where: as :func:`.manifest.read` takes it, or what it gave.
        outside: as of :func:`.manifest.read`.

    Raises:
        ValueError: everything that is wrong with the table.
    """
    table = manifest.read(where, outside=outside) if isinstance(where, str) else where
    # A frame is a raw picture; a raw picture that stands beside several of one compression is several frames.
    # Where there is none, every compressed picture is a frame.
    own = table["path_raw"].where(table["path_raw"] != "", "\n" + table["path_compressed"])
    again = own.groupby([own, table["compression"]], sort=False).cumcount()
    table = table.assign(frame_key=own + "\n" + again.astype(str))
    splits = {}
    for split in SPLITS:
        rows = table[table["split"] == split]
        if rows.empty:
            continue
        number, _ = pandas.factorize(rows["frame_key"])
        first = rows[~rows["frame_key"].duplicated()].reset_index(drop=True)
        identity = first["dataset"] + "\n" + first["manipulation"] + "\n" + first["video_id"]
        facts = first[["label", "dataset", "manipulation", "reference"]].copy()
        facts["video"], facts["twin"] = pandas.factorize(identity)[0], pandas.factorize(first["twin"])[0]
        facts["group"] = _sources(facts["video"].to_numpy(), facts["twin"].to_numpy(), _people(first))
        compressed: dict[str, list[Path | None]] = {}
        itself = (rows["compression"] == RAW) & (rows["path_compressed"] == rows["path_raw"])
        for level in sorted(rows.loc[~itself, "compression"].unique()):
            compressed[level] = [None] * len(first)
            chosen = (rows["compression"] == level).to_numpy()
            for place, name in zip(number[chosen], rows["path_compressed"][chosen], strict=True):
                compressed[level][place] = Path(name)
        splits[split] = Frames([Path(name) if name else None for name in first["path_raw"]], compressed, facts)
    return splits


def _people(table: pandas.DataFrame) -> list[tuple[str, ...]]:
    """Of each row of a manifest the people that the name of a FaceForensics++ video tells; () for other videos."""
    own = [manifest.own_name(*pair) for pair in zip(table["path_compressed"], table["compression"], strict=True)]
    named = (table["video_id"] != table["path_raw"]) & (table["video_id"] != own)
    codes, videos = pandas.factorize(table["dataset"].where(named, "") + "\n" + table["video_id"])
    people = [people_of(*video.split("\n", 1)) for video in videos]
    return [people[code] for code in codes]


def _sources(videos: np.ndarray, twins: np.ndarray, people: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Numbers of the sources of frames: what is tied, directly or by others, by twins or by people has one source.

    Args:
        videos, twins: ``(N,)`` int64.
        people: of each frame, whose videos are one source whatever was made of them.
    """
    frames = np.repeat(np.arange(len(videos)), [len(names) for names in people])
    persons, known = pandas.factorize(np.array([name for names in people for name in names], object))
    first_twin = int(videos.max()) + 1
    first_person = first_twin + int(twins.max()) + 1
    size = first_person + len(known)
    ends = np.concatenate([first_twin + twins, first_person + persons])
    starts = np.concatenate([videos, videos[frames]])
    ties = coo_matrix((np.ones(len(starts), bool), (starts, ends)), (size, size))
    return connected_components(ties, directed=False)[1][videos]


# -------------------------------------------------------------------------------------------------------------- images


def picture(source: Images, index: int, size: int) -> np.ndarray:
    """One picture of a quality at a size: ``(size, size, 3)`` uint8.

    Raises:
        BrokenFile: it cannot be read, told as "cannot read the image …".
    """
    item = source[index]
    if isinstance(item, np.ndarray):
        return images.resized(item, size)
    try:
        return images.resized(images.read(item), size)
    except BrokenFile as error:
        raise BrokenFile(f"cannot read the image {shown(item)}: {error}") from error


@dataclass
class Stills(Dataset):
    """Frames of one quality for evaluation: an item is ``(size, size, 3)`` uint8, and why it could not be read or "".

    Attributes:
        images: the frames.
        table: as of :class:`Frames`, a row for each.
        size: side in pixels to which a frame is resized.
    """

    images: Images
    table: pandas.DataFrame
    size: int

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return torch.from_numpy(np.array(picture(self.images, index, self.size))), ""
        except BrokenFile as error:
            return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), str(error)

    def take(self, chosen: np.ndarray) -> Stills:
        """Some of the frames, by position."""
        return Stills(_take(self.images, chosen), self.table.iloc[chosen].reset_index(drop=True), self.size)
