"""Frames in every quality, from the embedded set or from a manifest, and batches of them in a reproducible order."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path

import numpy as np
import pandas
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import Config
from ..files import BrokenFile, shown
from . import embedded, images, manifest
from .sources.common import SPLITS

Images = np.ndarray | list[Path | None]  # (N, H, W, 3) uint8, or N paths; None: there is none in this quality


# ---------------------------------------------------------------------------------------------------------------- sets


@dataclass
class Frames:
    """The frames of one split, in every quality that exists.

    Attributes:
        raw: each frame before compression.
        compressed: by compression, e.g. ``c40``, each frame after it.
        table: for each frame its ``label`` (1 = fake), ``dataset``, ``manipulation``, ``reference`` (what ``raw`` is
            called), and as numbers its ``video`` (identity), ``group`` (its source: an original and all
            that was made from it, what intervals are about) and ``twin``.
    """

    raw: Images
    compressed: dict[str, Images]
    table: pandas.DataFrame

    @property
    def qualities(self) -> list[str]:
        """What the frames before compression are called, then the compressions."""
        return list(dict.fromkeys([*sorted(self.table["reference"].unique()), *self.compressed]))

    def where(self, quality: str) -> np.ndarray:
        """Which frames there are in a quality, as rising positions."""
        if quality in self.compressed:
            found = self.compressed[quality]
            return (
                np.arange(len(found))
                if isinstance(found, np.ndarray)
                else np.flatnonzero([f is not None for f in found])
            )
        return np.flatnonzero(self.table["reference"] == quality)

    def pairs(self, compression: str) -> Split:
        """The pairs to train on."""
        chosen = self.where(compression)
        columns = (self.table[name].to_numpy(np.int64)[chosen] for name in ("label", "group", "twin"))
        return Split(_take(self.raw, chosen), _take(self.compressed[compression], chosen), *columns)

    def of(self, quality: str, size: int) -> Stills:
        """The frames of one quality, at a size."""
        chosen = self.where(quality)
        source = self.compressed.get(quality, self.raw)
        return Stills(_take(source, chosen), self.table.iloc[chosen].reset_index(drop=True), size)


@dataclass
class Split:
    """One split of a set of pairs.

    Attributes:
        raw, compressed: the images, index by index the same frame.
        labels: ``(N,)`` int64, 1 = fake.
        groups: ``(N,)`` int64, the source or video of each frame: what the bootstrap resamples.
        twins: ``(N,)`` int64, equal for a real frame and the fake made from it: such samples share a batch, so that the
            forgery is all that tells them apart. From scratch this teaches several times faster.
    """

    raw: Images
    compressed: Images
    labels: np.ndarray
    groups: np.ndarray
    twins: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """What training depends on: equal for the same pairs in the same order, wherever their folder lies."""
        parts = [self.labels, self.groups, self.twins]
        for source in (self.raw, self.compressed):
            if isinstance(source, np.ndarray):
                parts.append(source)
            else:
                root = commonpath([path.parent for path in source])
                parts.append(
                    "\n".join(str(path.relative_to(root)) for path in source).encode("utf-8", "surrogateescape")
                )
        value = 0
        for part in parts:
            value = zlib.crc32(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part, value)
        return f"{len(self)} pairs, {value:08x}"


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
    )


def read_embedded(config: Config) -> dict[str, Frames]:
    """The embedded set of a configuration by split; the bootstrap draws a real clip with its forged twin."""
    splits = {}
    with np.load(embedded.build(spec := embedded_spec(config), config.cache)) as arrays:
        for split in SPLITS:
            label, source, frame = (arrays[f"{split}_{name}"] for name in ("label", "source", "frame"))
            table = pandas.DataFrame({"label": label, "dataset": "embedded", "reference": "raw", "group": source})
            table["manipulation"] = np.where(label == 1, "forged", "real")
            table["video"], table["twin"] = 2 * source + label, source * (frame.max() + 1) + frame
            compressed = {f"c{crf}": arrays[f"{split}_c{crf}"] for crf in spec.crfs}
            splits[split] = Frames(arrays[f"{split}_raw"], compressed, table)
    return splits


def read_manifest(where: str | pandas.DataFrame) -> dict[str, Frames]:
    """The frames of a table of pairs by split, those that exist of train, val and test.

    Args:
        where: as :func:`.manifest.read` takes it, or what it gave.

    Raises:
        ValueError: everything that is wrong with the table.
    """
    table = manifest.read(where) if isinstance(where, str) else where
    # A frame is a raw picture; a raw picture that stands beside several of one compression is several frames.
    again = table.groupby(["path_raw", "compression"], sort=False).cumcount()
    table = table.assign(frame_key=table["path_raw"] + "\n" + again.astype(str))
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
        facts["group"] = _sources(facts["video"].to_numpy(), facts["twin"].to_numpy())
        compressed: dict[str, list[Path | None]] = {}
        for level in sorted(rows["compression"].unique()):
            compressed[level] = [None] * len(first)
            chosen = (rows["compression"] == level).to_numpy()
            for place, name in zip(number[chosen], rows["path_compressed"][chosen], strict=True):
                compressed[level][place] = Path(name)
        splits[split] = Frames([Path(name) for name in first["path_raw"]], compressed, facts)
    return splits


def _sources(videos: np.ndarray, twins: np.ndarray) -> np.ndarray:
    """Numbers of the sources of frames: videos of which some frames are twins have one source, directly or by others.

    Args:
        videos, twins: ``(N,)`` int64.
    """
    count = int(videos.max()) + 1
    shape = (count + int(twins.max()) + 1,) * 2
    ties = coo_matrix((np.ones(len(videos), bool), (videos, count + twins)), shape)
    return connected_components(ties, directed=False)[1][videos]


def load_splits(config: Config) -> dict[str, Split]:
    """The splits ``train``, ``val`` and ``test`` that a configuration asks for.

    Raises:
        ValueError: the set has no such compression, or is not fit for training.
    """
    if config.manifest:
        table = manifest.read(config.manifest)
        unnamed = set(table["compression"]) == {manifest.UNNAMED}  # then it is the one that was meant
        compression = manifest.UNNAMED if unnamed else config.compression
        manifest.check_for_training(table, compression)
        frames = read_manifest(table)
    elif config.compression in (known := [f"c{crf}" for crf in config.crfs]):
        compression, frames = config.compression, read_embedded(config)
    else:
        raise ValueError(f"compression: the embedded set has {known}, got '{config.compression}'")
    return {split: frames[split].pairs(compression) for split in SPLITS}


# -------------------------------------------------------------------------------------------------------------- images


def _image(source: Images, index: int, size: int) -> np.ndarray:
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
            return torch.from_numpy(np.array(_image(self.images, index, self.size))), ""
        except BrokenFile as error:
            return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), str(error)

    def take(self, chosen: np.ndarray) -> Stills:
        """Some of the frames, by position."""
        return Stills(_take(self.images, chosen), self.table.iloc[chosen].reset_index(drop=True), self.size)


class PairDataset(Dataset):
    """Pairs of a split; an item is asked for by ``(epoch, index)``.

    The augmentation is a pure function of (seed, epoch, index): the same for both images of the pair, and the same
    whatever the number of workers, the order of requests, and the interruptions.

    Args:
        split: the pairs.
        size: side in pixels to which images are resized.
        seed: of the augmentation.
        flip: mirror every second pair or so; False at evaluation.
    """

    def __init__(self, split: Split, size: int, *, seed: int = 0, flip: bool = False) -> None:
        self.split, self.size, self.seed, self.flip = split, size, seed, flip

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """``raw`` and ``compressed`` ``(size, size, 3)`` uint8, ``label`` and ``index`` int64 scalars."""
        epoch, index = key
        pair = [_image(source, index, self.size) for source in (self.split.raw, self.split.compressed)]
        if self.flip and np.random.default_rng([self.seed, epoch, index]).random() < 0.5:
            pair = [image[:, ::-1] for image in pair]
        raw, compressed = (torch.from_numpy(np.array(image, copy=True)) for image in pair)
        label, index = torch.tensor(self.split.labels[index]), torch.tensor(index)
        return {"raw": raw, "compressed": compressed, "label": label, "index": index}


# ------------------------------------------------------------------------------------------------------------- batches


class EpochSampler(Sampler):
    """The keys ``(epoch, index)`` of one process in one epoch, from its sample ``start`` on.

    The order is a shuffle by (seed, epoch) that keeps twins beside each other. Processes take consecutive parts of each
    batch of ``world · batch`` samples, so that a step sees the same samples however many processes share it.
    """

    def __init__(
        self, twins: np.ndarray, *, batch: int, seed: int, epoch: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        rng = np.random.default_rng([seed, epoch])
        place = rng.permutation(int(twins.max()) + 1)[twins]
        order = np.lexsort((rng.random(len(twins)), place))
        whole = order[: len(order) // (batch * world) * batch * world].reshape(-1, world, batch)
        self.keys = [(epoch, int(index)) for index in whole[:, rank].ravel()[start:]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def training_loader(
    split: Split, config: Config, *, epoch: int, start: int, rank: int, world: int
) -> Iterator[dict[str, Tensor]]:
    """The batches of one epoch from sample ``start`` on; an incomplete last batch is left out.

    Raises:
        BrokenFile: an image cannot be read, told as "cannot read the image …".
    """
    dataset = PairDataset(split, config.image_size, seed=config.seed, flip=config.flip)
    sampler = EpochSampler(
        split.twins, batch=config.batch_size, seed=config.seed, epoch=epoch, start=start, rank=rank, world=world
    )
    return _batches(dataset, config.batch_size, sampler, config, drop_last=True)


def evaluation_loader(split: Split, config: Config, indices: np.ndarray) -> Iterator[dict[str, Tensor]]:
    """The given samples in order, none augmented, none left out."""
    keys = [(0, int(index)) for index in indices]
    dataset = PairDataset(split, config.image_size)
    return _batches(dataset, 4 * config.batch_size, keys, config, drop_last=False)


def _batches(
    dataset: PairDataset, batch: int, keys: EpochSampler | list[tuple[int, int]], config: Config, *, drop_last: bool
) -> Iterator[dict[str, Tensor]]:
    loader = DataLoader(
        dataset,
        batch,
        sampler=keys,
        drop_last=drop_last,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each new iterator would take a number from the global stream
    )
    try:
        yield from loader
    except BrokenFile as error:  # a process that loads tells it with its traceback
        raise BrokenFile(str(error).rpartition("BrokenFile: ")[2].strip()) from error
