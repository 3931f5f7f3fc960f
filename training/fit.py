"""Train one model: the loop that train.py and study.py share, and what a model says about a split."""

from __future__ import annotations

import copy
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from .config import Config
from .data.loader import Split, evaluation_loader, training_loader
from .files import read_json, write_text
from .models.balance import Balance
from .models.checkpoints import (
    WEIGHTS,
    Foreign,
    Progress,
    find_one_trained,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_weights,
    sha256,
)
from .models.detector import Detector
from .models.distillers import DISTILLERS
from .models.weights import read_weights
from .report import metrics
from .report.log import Log, LossHistory

# -------------------------------------------------------------------------------------------------------------- models


def new_accelerator(config: Config) -> Accelerator:
    """Devices, processes and precision of a run.

    Raises:
        ValueError: fp16 is asked for where it would be float32 without a word.
    """
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("mixed_precision: fp16 needs a GPU, and there is none; take bf16 or no")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else torchrun on a CPU starts strangers, not a group
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.warmup_epochs > 0)],
    )


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks: the page faults of fresh ones cost up to a tenth of a step on the CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def new_model(config: Config, name: str, device: torch.device) -> Detector:
    set_seed(config.seed)
    model = Detector(name, config.image_size, pretrained=config.pretrained, weights=config.weights)
    if model.fit:
        print(model.fit)
    return model.to(device, memory_format=torch.channels_last)


def new_student(config: Config, teacher: Detector | None, device: torch.device | None = None) -> Detector:
    """A student at its start, where its teacher is; without one on the device."""
    if teacher is None:
        return new_model(config, config.student_model, device)
    if config.student_from_teacher and config.student_model == config.teacher_model:
        return copy.deepcopy(teacher)
    return new_model(config, config.student_model, next(teacher.parameters()).device)


def given_teacher(config: Config, device: torch.device) -> Detector | None:
    """The teacher of ``teacher_checkpoint``; None where it is to be trained.

    Raises:
        ValueError: not the weights of ``teacher_model``.
    """
    if not config.teacher_checkpoint:
        return None
    settings = Foreign(model=config.teacher_model, image_size=config.image_size, mean=[0.5], std=[0.5])
    found = find_one_trained(config.teacher_checkpoint, settings)
    if found.architecture != config.teacher_model:
        raise ValueError(f"teacher_checkpoint: it is a {found.architecture}, teacher_model is {config.teacher_model}")
    return found.load(device)


# ------------------------------------------------------------------------------------------------------------ training


def check_distillers(config: Config, teacher: Detector | None, names: Sequence[str]) -> None:
    """Make every distiller once, so that an option it refuses is found before hours of training.

    Raises:
        ValueError, TypeError: an unknown distiller, or an option that one refuses.
    """
    if unknown := [name for name in names if name not in DISTILLERS]:
        raise ValueError(f"students: unknown {unknown}, expected some of {list(DISTILLERS)}")
    if teacher is None:
        return
    same = config.student_model == config.teacher_model
    channels = teacher.channels if same else new_student(config, teacher).channels
    for name in names:
        DISTILLERS[name](config, channels, teacher.channels)


def _finished(model: Detector, folder: Path) -> Detector:
    """A model whose training has ended, as it was then."""
    try:
        done = read_json(folder / "done.json")
        if done.get("sha256", None) not in (None, sha256(folder / WEIGHTS)):
            raise ValueError("its weights are not as they were written")
        model.load_state_dict(read_weights(folder / WEIGHTS))
    except (ValueError, OSError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the finished model {folder} is damaged; remove it to train it again: {error}") from error
    return model


def fit(
    role: str,
    model: Detector,
    splits: dict[str, Split],
    config: Config,
    accelerator: Accelerator,
    log: Log,
    *,
    teacher: Detector | None = None,
) -> Detector:
    """Train one model and return it with the weights that were best on the validation split.

    ``role`` is ``teacher`` (learns the raw images that there are) or the name of a distiller (learns the frames of the
    split in its learnt qualities). The distillation terms of a batch are those of its samples with a raw twin times
    their share of the batch: each sample weighs the same in whatever batch, and on whichever process, it stands.
    """
    folder, is_teacher = config.folder / role, role == "teacher"
    if (folder / "done.json").exists():
        return _finished(model, folder)
    if is_teacher:
        splits = {name: split.of("raw") for name, split in splits.items()}
    learnt = splits["val"].learnt
    epochs, rate = (config.teacher_epochs, config.teacher_lr) if is_teacher else (config.epochs, config.lr)
    world = accelerator.num_processes
    per_epoch = len(splits["train"]) // (config.batch_size * world) // config.accumulate
    if per_epoch == 0:
        raise ValueError(f"batch_size: {len(splits['train'])} training pairs do not fill one step")
    warmup = 0 if is_teacher else round(config.warmup_epochs * per_epoch)
    validate_every = max(1, per_epoch // config.validations_per_epoch)

    set_seed(config.seed)  # of every process: all draw the same views, as one process that has the whole batch
    detector = model
    factory = DISTILLERS["none" if is_teacher else role]
    distiller = factory(config, model.channels, teacher.channels if teacher else model.channels).to(accelerator.device)
    optimizer = torch.optim.Adam(
        [*model.parameters(), *distiller.parameters()], rate, weight_decay=config.weight_decay, fused=True
    )
    total = epochs * per_epoch
    cycle = max(total, 4)  # the shortest in which one-cycle can rise and fall
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, cycle, pct_start=max(config.rise, 2 / cycle))
    model, optimizer = accelerator.prepare(model, optimizer)
    if any(True for _ in distiller.parameters()):
        distiller = accelerator.prepare(distiller)
    needs_teacher = accelerator.unwrap_model(distiller).needs_teacher
    balance = Balance(config.balance, config.balance_steps, accelerator)
    parts = {"model": model, "distiller": distiller, "optimizer": optimizer, "scheduler": scheduler, "balance": balance}
    checkpoint = last_checkpoint(folder)
    progress = load_checkpoint(checkpoint, accelerator, parts) if checkpoint else Progress()
    log.open(role, progress.step)
    history = LossHistory()

    def validate() -> float:
        found = {
            quality: metrics.compute(predict(model, splits["val"], config, accelerator, quality)[0])["auc"]
            for quality in learnt
        }
        auc = sum(found.values()) / len(found)
        progress.validations_without_gain += 1
        if auc > progress.best_auc:
            progress.best_auc, progress.best_step, progress.validations_without_gain = auc, progress.step, 0
            if accelerator.is_main_process:
                save_weights(accelerator.unwrap_model(model), folder / WEIGHTS)
                progress.sha256 = sha256(folder / WEIGHTS)
        each = {f"val_auc/{quality}": value for quality, value in found.items()} if len(found) > 1 else {}
        log.write(progress.step, {"epoch": progress.step / per_epoch, "val_auc": auc} | each)
        return auc

    images_per_step = config.batch_size * config.accumulate * world
    bar = tqdm(
        desc=f"{role:>8}",
        total=total * images_per_step,
        initial=progress.step * images_per_step,
        unit="img",
        unit_scale=True,
        disable=not accelerator.is_main_process,
    )
    began, shown = time.perf_counter() - progress.seconds, {"loss": "–", "auc": "–"}
    logged_at, logged_step = time.perf_counter(), progress.step
    while progress.step < total and progress.validations_without_gain < config.patience:
        epoch, done = divmod(progress.step, per_epoch)
        start = done * config.accumulate * config.batch_size
        loader = training_loader(
            splits["train"], config, epoch=epoch, start=start, rank=accelerator.process_index, world=world
        )
        model.train()
        for batch, _ in zip(loader, range((per_epoch - done) * config.accumulate), strict=False):
            labels = batch["label"].to(accelerator.device, non_blocking=True)
            share = len(batch["positions"]) / len(labels)
            head_only = progress.step < warmup
            with accelerator.accumulate(model, distiller):
                features, _, logits = model(detector.pixels(batch["compressed"]), head_only=head_only)
                terms = {"cross_entropy": F.cross_entropy(logits.float(), labels)}
                if needs_teacher and not head_only and (share or world > 1):
                    raw, (paired_logits, paired_labels, *maps) = paired_part(batch, [logits, labels, *features])
                    with torch.no_grad(), accelerator.autocast():
                        targets, _, teacher_logits = teacher(teacher.pixels(raw))
                    targets = [target.float() for target in targets]
                    distilled = distiller(maps, targets, paired_logits, teacher_logits.float(), paired_labels)
                    if share < 1:
                        distilled = {name: share * term for name, term in distilled.items()}
                    balanced = balance(distilled, terms["cross_entropy"])
                    terms |= {name: config.distillation_scale * term for name, term in balanced.items()}
                accelerator.backward(sum(terms.values()))
                optimizer.step()
                optimizer.zero_grad()
            history.add(progress.step + 1, terms, needs_teacher and head_only)
            if needs_teacher and not head_only and (factors := balance.step()):
                log.write(progress.step + 1, {f"factor/{kind}": factor for kind, factor in factors.items()})
                said = ", ".join(f"{kind} × {factor:.3g}" for kind, factor in factors.items())
                with bar.external_write_mode():
                    accelerator.print(f"{role}: distillation starts at {config.balance:g} × the cross-entropy: {said}")
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            progress.step += 1
            step, last = progress.step, progress.step == total
            validating = step % validate_every == 0 or last
            saving = validating or (config.checkpoint_every and step % config.checkpoint_every == 0)
            if step % config.log_every == 0 or saving:
                means, now = history.read(), time.perf_counter()
                rate_now = (step - logged_step) * images_per_step / (now - logged_at)
                extra = {"epoch": step / per_epoch, "lr": scheduler.get_last_lr()[0], "images_per_second": rate_now}
                log.write(step, means | extra)
                shown["loss"] = f"{means['loss']:.3f}"
                logged_at, logged_step = now, step
            if validating:
                shown["auc"] = f"{validate():.3f}"
                model.train()
            if saving:
                progress.seconds = time.perf_counter() - began
                save_checkpoint(folder, accelerator, config, progress, parts)
                logged_at = time.perf_counter()
            bar.set_postfix(shown, refresh=False)
            bar.update(images_per_step)
            if validating and progress.validations_without_gain >= config.patience:
                break
    bar.close()
    log.close()
    accelerator.wait_for_everyone()
    result = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    found = sha256(folder / WEIGHTS)
    if accelerator.is_main_process and progress.sha256 not in ("", found):
        raise ValueError(f"{folder / WEIGHTS} is not as it was written; remove {folder} to train the model again")
    result.load_state_dict(read_weights(folder / WEIGHTS))
    if accelerator.is_main_process:
        done = asdict(progress) | {"sha256": found}
        write_text(folder / "done.json", json.dumps(done))
    return result


def paired_part(batch: dict[str, Tensor], values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The samples of a batch that have a raw twin; nothing waits for the device.

    Args:
        batch: of :func:`.data.loader.training_loader`.
        values: each of the whole batch, ``(B, …)``, on the device.

    Returns:
        Their raw images, and of each of the values what belongs to them. Where there are none, the first sample stands
        in with its compressed image: processes that exchange the gradients of a distiller must all run it.
    """
    positions = batch["positions"]
    if len(positions) == len(batch["label"]):
        return batch["raw"], values
    if not len(positions):
        return batch["compressed"][:1], [value[:1] for value in values]
    positions = positions.to(values[0].device, non_blocking=True)
    return batch["raw"], [value.index_select(0, positions) for value in values]


@torch.no_grad()
def predict(
    model: nn.Module, split: Split, config: Config, accelerator: Accelerator, quality: str, *, limit: int = 0
) -> tuple[metrics.Outcome, np.ndarray]:
    """What a model says about a split's frames in a quality; shared by all processes.

    Args:
        quality: of ``split.images``.
        limit: keep so many samples, drawn at random (the same ones for every model); 0 keeps all.

    Returns:
        For the N frames of ``split.where(quality)``, or those that were drawn: what was said, and the penultimate
        features ``(N, D)`` float32.

    Raises:
        ValueError: there is no frame in the quality.
    """
    model.eval()
    detector = accelerator.unwrap_model(model)
    chosen = split.where(quality)
    if not len(chosen):
        raise ValueError(f"quality: the split has no frame in '{quality}'")
    if 0 < limit < len(chosen):
        chosen = chosen[np.sort(np.random.default_rng(config.seed).choice(len(chosen), limit, replace=False))]
    world = accelerator.num_processes
    padded = np.resize(chosen, -(-len(chosen) // world) * world)  # every process gets as many
    scores, embeddings = [], []
    for images in evaluation_loader(split, config, padded[accelerator.process_index :: world], quality):
        with accelerator.autocast():
            _, penultimate, logits = model(detector.pixels(images))
        probabilities = logits.double().softmax(1)[:, 1].contiguous()
        scores.append(accelerator.gather(probabilities).reshape(world, -1).T.reshape(-1).cpu())
        gathered = accelerator.gather(penultimate.float().contiguous())
        embeddings.append(gathered.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1).cpu())
    outcome = metrics.Outcome(torch.cat(scores).numpy()[: len(chosen)], split.labels[chosen], split.groups[chosen])
    return outcome, torch.cat(embeddings).numpy()[: len(chosen)]
