"""The pairs that a configuration asks for, and batches of them in a reproducible order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..config import Config
from ..files import BrokenFile, shown
from . import manifest
from .frames import RAW, Images, Split, picture, read_embedded, read_manifest
from .sources.common import SPLITS
from .tables import quoted


def load_splits(config: Config) -> dict[str, Split]:
    """The splits ``train``, ``val`` and ``test`` that a configuration asks for.

    Raises:
        ValueError: the set has no such quality, or is not fit for training.
    """
    asked = config.learnt
    option = "qualities" if config.qualities else "compression"
    if config.manifest:
        table = manifest.read(config.manifest, outside=config.outside)
        if set(table["compression"]) == {manifest.UNNAMED} and len(names := set(asked) - {RAW}) == 1:
            table = table.assign(compression=names.pop())  # it is the one that was meant
        manifest.check_for_training(table, asked, option=option, teacher=not config.teacher_checkpoint)
        frames = read_manifest(table)
    elif unknown := [name for name in asked if name not in (known := [RAW, *(f"c{crf}" for crf in config.crfs)])]:
        raise ValueError(f"{option}: the embedded set has {known}, got {quoted(unknown)}")
    else:
        frames = read_embedded(config)
    splits = {split: frames[split].pairs(*asked) for split in SPLITS}
    distilled = [name for name in config.students if name != "none"]
    if distilled and not len(splits["train"].where(RAW)):
        raise ValueError(
            f"students: {', '.join(distilled)} learn from a teacher, and no training row of manifest "
            f"{shown(config.manifest)} has a path_raw: nothing for the teacher to learn; students=none needs none"
        )
    return splits


# --------------------------------------------------------------------------------------------------------------- pairs


class PairDataset(Dataset):
    """Pairs of a split; an item is asked for by ``(epoch, index)``.

    The quality, of those in which the frame exists, and the augmentation are pure functions of (seed, epoch, index):
    the same whatever the number of workers, the order of requests, and the interruptions. Both images of a pair are
    augmented alike.

    Args:
        split: the pairs.
        size: side in pixels to which images are resized.
        qualities: of ``split.images``, to draw from; default: those that are learnt.
        seed: of the draws.
        flip: mirror every second pair or so; False at evaluation.
    """

    def __init__(
        self, split: Split, size: int, qualities: Sequence[str] = (), *, seed: int = 0, flip: bool = False
    ) -> None:
        self.split, self.size, self.seed, self.flip = split, size, seed, flip
        self.qualities = tuple(qualities) or split.learnt

    def __len__(self) -> int:
        return len(self.split)

    def quality(self, epoch: int, index: int) -> str:
        """The quality that a frame is shown in.

        Raises:
            ValueError: it exists in none.
        """
        images = self.split.images
        found = [quality for quality in self.qualities if images[quality][index] is not None]
        if not found:
            raise ValueError(f"qualities: frame {index} exists in none of {', '.join(self.qualities)}")
        if len(found) == 1:
            return found[0]
        return found[np.random.default_rng([self.seed, epoch, index, 1]).integers(len(found))]  # 1: not the flip's

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """``compressed``, the frame in the drawn quality, and ``raw``, both ``(size, size, 3)`` uint8; scalars:
        ``paired``, bool, whether there is a raw twin (else ``raw`` is 0), and ``label`` and ``index``, int64.
        """
        epoch, index = key
        quality, paired = self.quality(epoch, index), self.split.images[RAW][index] is not None
        compressed = picture(self.split.images[quality], index, self.size)
        if quality == RAW:
            raw = compressed
        else:
            raw = picture(self.split.images[RAW], index, self.size) if paired else np.zeros_like(compressed)
        pair = raw, compressed
        if self.flip and np.random.default_rng([self.seed, epoch, index]).random() < 0.5:
            pair = [image[:, ::-1] for image in pair]
        raw, compressed = (torch.from_numpy(np.array(image, copy=True)) for image in pair)
        label, index, paired = map(torch.tensor, (self.split.labels[index], index, paired))
        return {"raw": raw, "compressed": compressed, "label": label, "index": index, "paired": paired}


@dataclass
class Pictures(Dataset):
    """Pictures as they are: an item is ``(size, size, 3)`` uint8."""

    images: Images
    size: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(picture(self.images, index, self.size)))


# ------------------------------------------------------------------------------------------------------------- batches


class EpochSampler(Sampler):
    """The keys ``(epoch, index)`` of one process in one epoch, from its sample ``start`` on.

    The order is a shuffle by (seed, epoch) that keeps twins beside each other. Processes take consecutive parts of each
    batch of ``world · batch`` samples, so that a step sees the same samples however many processes share it.
    """

    def __init__(
        self, twins: np.ndarray, *, batch: int, seed: int, epoch: int, start: int, rank: int, world: int
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

    A batch has ``compressed`` ``(B, size, size, 3)`` uint8, ``label`` and ``index`` ``(B,)`` int64, and, of its P
    samples with a raw twin, ``positions`` ``(P,)`` int64, rising, and ``raw`` ``(P, size, size, 3)`` uint8.

    Raises:
        BrokenFile: an image cannot be read, told as "cannot read the image …".
    """
    dataset = PairDataset(split, config.image_size, seed=config.seed, flip=config.flip)
    sampler = EpochSampler(
        split.twins, batch=config.batch_size, seed=config.seed, epoch=epoch, start=start, rank=rank, world=world
    )
    return _batches(dataset, config.batch_size, sampler, config, drop_last=True, collate_fn=_collate)


def _collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = default_collate(items)
    batch["positions"] = batch.pop("paired").nonzero().flatten()
    if len(batch["positions"]) < len(items):
        batch["raw"] = batch["raw"][batch["positions"]]
    return batch


def evaluation_loader(split: Split, config: Config, indices: np.ndarray, quality: str) -> Iterator[Tensor]:
    """The given frames, of :meth:`Split.where`, in one quality: ``(B, size, size, 3)`` uint8, in order, none augmented,
    none left out.
    """
    dataset = Pictures(split.images[quality], config.image_size)
    return _batches(dataset, 4 * config.batch_size, indices.tolist(), config)


def _batches(
    dataset: Dataset, batch: int, keys: EpochSampler | list[int], config: Config, **options: object
) -> Iterator[Tensor | dict[str, Tensor]]:
    loader = DataLoader(
        dataset,
        batch,
        sampler=keys,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each new iterator would take a number from the global stream
        **options,
    )
    try:
        yield from loader
    except BrokenFile as error:  # a process that loads tells it with its traceback
        raise BrokenFile(str(error).rpartition("BrokenFile: ")[2].strip()) from error
