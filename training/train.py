"""Train a teacher on raw images and students on their compressed twins; evaluate all; write the report.

    python training/train.py                                                       the main job, on the embedded set
    python training/train.py --config training/configs/resnet50_ffpp_c40.yaml manifest=pairs.csv lr=1e-4
    python training/train.py --resume                                              go on after an interruption
    torchrun --nproc_per_node 8 training/train.py …                                on several GPUs

Everything of a run lies in {out}/{name}: config.yaml, metrics.jsonl, tensorboard/, one folder per model (its best
weights model.safetensors, its last checkpoint), results.json, report.html.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import sys
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not take the cores of a shared machine

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import metrics, report
from training.checkpoints import (
    Progress,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_weights,
    write_atomically,
)
from training.config import Config, load, parse
from training.data import Split, evaluation_loader, load_splits, pixels, training_loader
from training.distillers import DISTILLERS
from training.log import Log, LossHistory, NonFiniteLoss
from training.models import Detector, read_weights


class Clock:
    """Seconds by part of the run, in order."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


# ------------------------------------------------------------------------------------------------------------ training


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

    ``role`` is ``teacher`` (learns raw images) or the name of a distiller (learns compressed images).
    """
    folder, is_teacher = config.folder / role, role == "teacher"
    source = "raw" if is_teacher else "compressed"
    if (folder / "done.json").exists():
        model.load_state_dict(read_weights(folder / "model.safetensors"))
        return model
    epochs, rate = (config.teacher_epochs, config.teacher_lr) if is_teacher else (config.epochs, config.lr)
    world = accelerator.num_processes
    per_epoch = len(splits["train"]) // (config.batch_size * world) // config.accumulate
    if per_epoch == 0:
        raise ValueError(f"batch_size: {len(splits['train'])} training pairs do not fill one step")
    warmup = 0 if is_teacher else round(config.warmup_epochs * per_epoch)
    validate_every = max(1, per_epoch // config.validations_per_epoch)

    set_seed(config.seed, device_specific=True)
    factory = DISTILLERS["none" if is_teacher else role]
    distiller = factory(config, model.channels, teacher.channels if teacher else model.channels).to(accelerator.device)
    optimizer = torch.optim.Adam(
        [*model.parameters(), *distiller.parameters()], rate, weight_decay=config.weight_decay, fused=True
    )
    total = epochs * per_epoch
    cycle = max(total, 4)  # the shortest in which one-cycle can rise and fall
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, cycle, pct_start=min(0.5, max(config.rise, 2 / cycle))
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    if any(True for _ in distiller.parameters()):
        distiller = accelerator.prepare(distiller)
    needs_teacher = accelerator.unwrap_model(distiller).needs_teacher
    parts = {"model": model, "distiller": distiller, "optimizer": optimizer, "scheduler": scheduler}
    checkpoint = last_checkpoint(folder)
    progress = load_checkpoint(checkpoint, accelerator, parts) if checkpoint else Progress()
    log.open(role, progress.step)
    history = LossHistory()

    def validate() -> float:
        auc = metrics.compute(predict(model, splits["val"], config, accelerator, source)[0])["auc"]
        progress.validations_without_gain += 1
        if auc > progress.best_auc:
            progress.best_auc, progress.best_step, progress.validations_without_gain = auc, progress.step, 0
            if accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                save_weights(accelerator.unwrap_model(model), folder / "model.safetensors")
        log.write(progress.step, {"epoch": progress.step / per_epoch, "val_auc": auc})
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
            labels = batch["label"].to(accelerator.device)
            head_only = progress.step < warmup
            with accelerator.accumulate(model, distiller):
                features, _, logits = model(pixels(batch[source], accelerator.device), head_only=head_only)
                terms = {"cross_entropy": F.cross_entropy(logits.float(), labels)}
                if needs_teacher and not head_only:
                    with torch.no_grad(), accelerator.autocast():
                        targets, _, teacher_logits = teacher(pixels(batch["raw"], accelerator.device))
                    targets = [target.float() for target in targets]
                    distilled = distiller(features, targets, logits, teacher_logits.float(), labels)
                    terms |= {name: config.distillation_scale * term for name, term in distilled.items()}
                accelerator.backward(sum(terms.values()))
                optimizer.step()
                optimizer.zero_grad()
            history.add(progress.step + 1, terms)
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
    result.load_state_dict(read_weights(folder / "model.safetensors"))
    if accelerator.is_main_process:
        write_atomically(folder / "done.json", lambda path: path.write_text(json.dumps(asdict(progress))))
    return result


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(
    model: nn.Module, split: Split, config: Config, accelerator: Accelerator, source: str, *, limit: int = 0
) -> tuple[metrics.Outcome, np.ndarray]:
    """What a model says about a split, and its penultimate features ``(N, D)`` float32; shared by all processes.

    ``limit`` keeps so many samples, drawn at random (the same ones for every model); 0 keeps all.
    """
    model.eval()
    chosen = np.arange(len(split))
    if 0 < limit < len(split):
        chosen = np.sort(np.random.default_rng(config.seed).choice(len(split), limit, replace=False))
    world = accelerator.num_processes
    padded = np.resize(chosen, -(-len(chosen) // world) * world)  # every process gets as many
    scores, embeddings = [], []
    for batch in evaluation_loader(split, config, padded[accelerator.process_index :: world]):
        with accelerator.autocast():
            _, penultimate, logits = model(pixels(batch[source], accelerator.device))
        probabilities = logits.double().softmax(1)[:, 1].contiguous()
        scores.append(accelerator.gather(probabilities).reshape(world, -1).T.reshape(-1).cpu())
        gathered = accelerator.gather(penultimate.float().contiguous())
        embeddings.append(gathered.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1).cpu())
    outcome = metrics.Outcome(torch.cat(scores).numpy()[: len(chosen)], split.labels[chosen], split.groups[chosen])
    return outcome, torch.cat(embeddings).numpy()[: len(chosen)]


def evaluate(
    model: nn.Module, splits: dict[str, Split], config: Config, accelerator: Accelerator, source: str
) -> metrics.Outcome:
    """Open the test split once; recall@1 searches the training split."""
    outcome, queries = predict(model, splits["test"], config, accelerator, source)
    known, gallery = predict(model, splits["train"], config, accelerator, source, limit=config.gallery)
    outcome.hits = metrics.nearest_neighbour_hits(queries, outcome.labels, gallery, known.labels)
    return outcome


# ------------------------------------------------------------------------------------------------------------- the run


def open_run(config: Config) -> None:
    """Make the run's folder; an earlier run of the name is continued (``resume``) or moved aside, never overwritten."""
    folder, saved = config.folder, config.folder / "config.yaml"
    if config.resume and saved.exists():
        before, now = asdict(load(saved)), asdict(config)
        if changed := [key for key in now if key not in ("resume", "out") and now[key] != before[key]]:
            raise ValueError(f"resume: the run {folder} was started with other values of {', '.join(changed)}")
        return
    if folder.exists():
        started = datetime.fromtimestamp(folder.stat().st_mtime)
        os.rename(folder, aside := folder.with_name(f"{folder.name}.{started:%Y-%m-%dT%H-%M-%S.%f}"))
        print(f"the earlier run {folder} is now {aside}")
    folder.mkdir(parents=True)
    saved.write_text(config.to_yaml())


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks: the page faults of fresh ones cost up to a tenth of a step on the CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def new_model(config: Config, name: str, device: torch.device) -> Detector:
    set_seed(config.seed)
    model = Detector(name, pretrained=config.pretrained, weights=config.weights)
    if model.fit:
        print(model.fit)
    return model.to(device, memory_format=torch.channels_last)


def new_student(config: Config, teacher: Detector) -> Detector:
    """A student at its start."""
    if config.student_from_teacher and config.student_model == config.teacher_model:
        return copy.deepcopy(teacher)
    return new_model(config, config.student_model, next(teacher.parameters()).device)


def train(config: Config) -> Path:
    """The whole run: data, teacher, students, evaluation, report. Returns the run's folder."""
    clock = Clock()
    keep_freed_memory()
    if unknown := [name for name in config.students if name not in DISTILLERS]:
        raise ValueError(f"students: unknown {unknown}, expected some of {list(DISTILLERS)}")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else torchrun on a CPU starts strangers, not a group
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.warmup_epochs > 0)],
    )
    if accelerator.is_main_process:
        open_run(config)
    with accelerator.main_process_first():
        splits = load_splits(config)
    if len(set(splits["val"].labels)) < 2:
        raise ValueError("the validation split has one class only: its AUC, which chooses the model, is undefined")
    log = Log(config.folder, accelerator.is_main_process)
    clock.lap("data")

    teacher = new_model(config, config.teacher_model, accelerator.device)
    if config.teacher_checkpoint:
        teacher.load_state_dict(read_weights(config.teacher_checkpoint))
    else:
        teacher = fit("teacher", teacher, splits, config, accelerator, log)
    teacher = teacher.requires_grad_(False).eval()
    clock.lap("teacher")
    students = {}
    for name in config.students:
        student = new_student(config, teacher).requires_grad_(True)
        students[name] = fit(name, student, splits, config, accelerator, log, teacher=teacher).eval()
        clock.lap(report.title(name))

    outcomes = {"teacher on raw": evaluate(teacher, splits, config, accelerator, "raw")}
    outcomes["teacher on compressed"] = evaluate(teacher, splits, config, accelerator, "compressed")
    for name, student in students.items():
        outcomes[report.title(name)] = evaluate(student, splits, config, accelerator, "compressed")
    if accelerator.is_main_process:
        models = {"start": new_student(config, teacher).eval()} | students
        clock.lap("evaluation")
        print(report.write(config, splits, teacher, models, outcomes, clock.laps))
    accelerator.wait_for_everyone()
    return config.folder


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse(sys.argv[1:] if argv is None else argv))
    except (ValueError, NonFiniteLoss) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
