"""Pairs of raw and compressed images, from the embedded set or from a manifest, in a reproducible order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import synthetic
from .config import Config

if TYPE_CHECKING:
    import pandas

MANIFEST_COLUMNS = ("path_raw", "path_compressed", "label", "split")


@dataclass
class Split:
    """One split of a set of pairs. Images are arrays ``(N, H, W, 3)`` uint8, or lists of N paths.

    Attributes:
        raw, compressed: the images, index by index the same frame.
        labels: ``(N,)`` int64, 1 = fake.
        groups: ``(N,)`` int64, the source or video of each frame: what the bootstrap resamples.
        twins: ``(N,)`` int64, equal for a real frame and the fake made from it: such samples share a batch, so that the
            forgery is all that tells them apart. From scratch this teaches several times faster.
    """

    raw: np.ndarray | list[Path]
    compressed: np.ndarray | list[Path]
    labels: np.ndarray
    groups: np.ndarray
    twins: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def load_splits(config: Config) -> dict[str, Split]:
    """The splits ``train``, ``val`` and ``test`` that a configuration asks for."""
    return _read_manifest(config) if config.manifest else _embedded(config)


def _embedded(config: Config) -> dict[str, Split]:
    spec = embedded_spec(config)
    if config.compression not in (known := [f"c{crf}" for crf in spec.crfs]):
        raise ValueError(f"compression: the embedded set has {known}, got '{config.compression}'")
    with np.load(synthetic.build(spec, config.cache)) as arrays:
        return {split: Split(*_columns(arrays, split, config.compression)) for split in synthetic.SPLITS}


def _columns(arrays: Mapping[str, np.ndarray], split: str, compression: str) -> list[np.ndarray]:
    names = ("raw", compression, "label", "source", "frame")
    *columns, source, frame = (arrays[f"{split}_{name}"] for name in names)
    return [*columns, source, source * (frame.max() + 1) + frame]


def embedded_spec(config: Config) -> synthetic.EmbeddedSpec:
    return synthetic.EmbeddedSpec(
        config.train_clips,
        config.val_clips,
        config.test_clips,
        size=config.image_size,
        crfs=tuple(config.crfs),
        fingerprint=tuple(config.fingerprint),
    )


def read_table(where: str) -> pandas.DataFrame:
    """The table of a manifest with its paths made whole.

    Args:
        where: a CSV or parquet file; several, the shards of one set, with commas between them; or a folder that holds
            manifests, as prepare.py writes it.
    """
    import pandas

    tables = []
    for name in str(where).split(","):
        files = sorted(Path(name).glob("manifest*.parquet")) if Path(name).is_dir() else [Path(name)]
        if not files or not files[0].is_file():
            raise ValueError(
                f"manifest: no file '{name}'" if not Path(name).is_dir() else f"manifest: none in '{name}'"
            )
        for path in files:
            table = pandas.read_parquet(path) if path.suffix == ".parquet" else pandas.read_csv(path)
            for column in {"path_raw", "path_compressed"} & set(table):
                table[column] = [str(path.parent / image) for image in table[column]]
            tables.append(table)
    table = pandas.concat(tables, ignore_index=True)
    return table.drop_duplicates(ignore_index=True) if len(tables) > 1 else table


def _read_manifest(config: Config) -> dict[str, Split]:
    import pandas

    path = config.manifest
    table = read_table(path)
    if missing := [column for column in MANIFEST_COLUMNS if column not in table]:
        raise ValueError(f"manifest {path}: expected the columns {list(MANIFEST_COLUMNS)}, missing {missing}")
    if "compression" in table:
        levels = sorted(table["compression"].astype(str).unique())
        table = table[table["compression"].astype(str) == config.compression]
        if table.empty:
            raise ValueError(f"compression: manifest {path} has {levels}, got '{config.compression}'")
    if not table["label"].isin([0, 1]).all():
        raise ValueError(
            f"manifest {path}: expected labels 0 (real) and 1 (fake), got {sorted(table['label'].unique())}"
        )
    identity = [column for column in ("dataset", "manipulation", "video_id") if column in table]
    if identity:
        keys = table[identity].astype(str).agg("/".join, axis=1)
        used = table["split"].where(table["split"].isin(synthetic.SPLITS))
        splits_of = used.groupby(keys).nunique()
        if crossing := sorted(splits_of.index[splits_of > 1]):
            raise ValueError(f"manifest {path}: videos in more than one split: {crossing[:3]}")
        groups = keys.astype("category").cat.codes
    else:
        groups = pandas.Series(range(len(table)), index=table.index)
    splits = {}
    for split in synthetic.SPLITS:
        rows = table["split"] == split
        if not rows.any():
            raise ValueError(f"manifest {path}: no rows of split '{split}'")
        paths = [[Path(p) for p in table.loc[rows, column]] for column in MANIFEST_COLUMNS[:2]]
        labels, group = table.loc[rows, "label"].to_numpy(np.int64), groups[rows].to_numpy(np.int64)
        twins = table.loc[rows, "twin"].factorize()[0] if "twin" in table else np.arange(len(labels))
        splits[split] = Split(*paths, labels, group, twins)
    return splits


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

    def _image(self, source: np.ndarray | list[Path], index: int) -> np.ndarray:
        item = source[index]
        if isinstance(item, Path):
            try:
                with Image.open(item) as image:
                    image = image.convert("RGB")
            except OSError as error:
                raise OSError(f"cannot read the image {item}: {error}") from error
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
            item = np.asarray(image)
        return item

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """``raw`` and ``compressed`` ``(size, size, 3)`` uint8, ``label`` and ``index`` int64 scalars."""
        epoch, index = key
        pair = [self._image(source, index) for source in (self.split.raw, self.split.compressed)]
        if self.flip and np.random.default_rng([self.seed, epoch, index]).random() < 0.5:
            pair = [image[:, ::-1] for image in pair]
        raw, compressed = (torch.from_numpy(np.array(image, copy=True)) for image in pair)
        label, index = torch.tensor(self.split.labels[index]), torch.tensor(index)
        return {"raw": raw, "compressed": compressed, "label": label, "index": index}


class EpochSampler(Sampler):
    """The keys ``(epoch, index)`` of one process in one epoch, from sample ``start`` on.

    The order is a shuffle by (seed, epoch) that keeps twins beside each other; processes take consecutive shares of it.
    """

    def __init__(
        self, twins: np.ndarray, *, seed: int, epoch: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        rng = np.random.default_rng([seed, epoch])
        place = rng.permutation(int(twins.max()) + 1)[twins]
        order = np.lexsort((rng.random(len(twins)), place))
        share = len(order) // world  # every process gets as many
        self.keys = [(epoch, int(index)) for index in order[rank * share : (rank + 1) * share][start:]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def training_loader(split: Split, config: Config, *, epoch: int, start: int, rank: int, world: int) -> DataLoader:
    """The batches of one epoch from sample ``start`` on; an incomplete last batch is left out."""
    dataset = PairDataset(split, config.image_size, seed=config.seed, flip=config.flip)
    sampler = EpochSampler(split.twins, seed=config.seed, epoch=epoch, start=start, rank=rank, world=world)
    return _loader(dataset, config.batch_size, sampler, config, drop_last=True)


def evaluation_loader(split: Split, config: Config, indices: np.ndarray) -> DataLoader:
    """The given samples in order, none augmented, none left out."""
    keys = [(0, int(index)) for index in indices]
    dataset = PairDataset(split, config.image_size)
    return _loader(dataset, 4 * config.batch_size, keys, config, drop_last=False)


def _loader(
    dataset: PairDataset, batch: int, sampler: Sampler | list, config: Config, *, drop_last: bool
) -> DataLoader:
    return DataLoader(
        dataset,
        batch,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each new iterator would take a number from the global stream
    )


def pixels(images: Tensor, device: torch.device) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` float32, mean 0.5, std 0.5, in channels-last memory."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
