"""From videos to pairs: crops of raw frames beside the same crops after compression, and the manifest of them.

    python training/prepare.py /data/FaceForensics++ out=/data/pairs                    everything by default
    python training/prepare.py /data/FaceForensics++ out=/data/pairs manipulations='[Deepfakes]' crfs='[40]' frames=32
    python training/prepare.py mine.csv out=/data/pairs                                 a table of one's own
    python training/prepare.py /data/FaceForensics++ out=/data/pairs scheduler=tcp://host:8786       on a Dask cluster
    sbatch --array=1-8 training/slurm.sh /data/FaceForensics++ out=/data/pairs          an eighth each, by SLURM
    python training/prepare.py --status out=/data/pairs                                 which shards are whole
    python training/prepare.py --check out=/data/pairs                                  verify an existing set
    python training/train.py manifest=/data/pairs                                       train on it

{out} then holds {level}/{dataset}/{manipulation}/{video}/{frame}.png, a manifest (one per shard), settings.json, and
rows/, one file per finished video: an interrupted run continues from these. Exit status: 0 all videos are prepared
(or nothing is wrong with the set), 1 some are not and were listed, 2 wrong usage or a source that does not add up.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from training.interrupts import prepare_imports

    prepare_imports()

from tqdm import tqdm

from training.data import inspection, manifest, sources, workers
from training.data.crops import Pairing, finished_rows, prepare_video, rows_file
from training.data.sources import SPLITS, Draw, Found, Video
from training.files import inside, read_json, shown, write_text
from training.locks import only_one
from training.options import POSITIONAL, run

# Options that do not change what is written for a video.
FREE = ("out", "jobs", "shard", "scheduler", "check", "status", "outside")


@dataclass(kw_only=True)
class Options(Draw, Pairing):
    """Make pairs of raw and compressed face crops from a set of videos, or --check those of an earlier run."""

    source: str = field(default="", metadata=POSITIONAL)
    """FaceForensics++, Celeb-DF or DFDC tree, DeepfakeBench .json, a folder with real/ and fake/, or a table of one's
    own (CSV or parquet: path, label and, if they apply, split, dataset, manipulation, video_id, twin, compression); may
    come first, bare."""
    kind: Literal["auto", "faceforensics", "celeb_df", "deepfakebench", "dfdc", "folder", "table"] = "auto"
    """What the source is; auto recognises it by its folders."""
    manipulations: list[str] | None = None
    """Forgeries to take, e.g. [NeuralTextures]; null: all."""
    splits: list[str] = field(default_factory=lambda: list(SPLITS))
    """Splits to take."""
    reference: Literal["auto", "raw", "source"] = "auto"
    """What uncompressed means here: raw, or source where the videos are compressed already; auto: raw for the level raw
    or c0 of a tree, else source."""
    existing: bool = True
    """Use compressed files that the source has for a level; false makes all from the reference."""
    shard: str = "1/1"
    """Which part i of n this process prepares, i/n; their manifests are read together."""
    jobs: int = 0
    """Processes; 0: one per core."""
    scheduler: str | None = None
    """Address of a Dask scheduler, tcp://host:8786, whose workers prepare the videos; they see source and out under the
    same paths."""
    check: bool = False
    """Verify the hashes and the alignment of the pairs in out, and write contact-sheet.png there."""
    status: bool = False
    """Say which shards of the set in out are whole."""

    def __post_init__(self) -> None:
        Pairing.__post_init__(self)
        Draw.__post_init__(self)
        if self.jobs < 0:
            raise ValueError(f"jobs: expected at least 0, got {self.jobs}")
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise ValueError(f"splits: expected some of {list(SPLITS)}, got {self.splits}")
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"shard: expected i/n with 1 <= i <= n, got '{self.shard}'")
        if not (self.source or self.check or self.status):
            raise ValueError("source: expected the folder of a set of videos first; --help explains")

    @property
    def part(self) -> tuple[int, int]:
        index, count = map(int, self.shard.split("/"))
        return index, count

    @property
    def pairing(self) -> Pairing:
        """What a worker is told; it may stand in another folder."""
        told = {f.name: getattr(self, f.name) for f in fields(Pairing)}
        whole = {name: os.path.abspath(told[name]) for name in ("out", "detector_file") if told[name]}
        return Pairing(**(told | whole))


# ------------------------------------------------------------------------------------------------------- understanding


def understand(options: Options) -> Found:
    """The videos that a source has for these options, checked.

    Raises:
        ValueError: it does not add up.
    """
    root = Path(options.source).absolute()
    if not root.exists():
        raise ValueError(f"source: no folder or file '{root}'")
    kind = sources.recognise(root) if options.kind == "auto" else options.kind
    found = sources.KINDS[kind](root, options)
    videos = [_named(video, options) for video in found.videos if video.split in options.splits]
    if options.manipulations is not None:
        known = sorted({video.manipulation for video in videos if video.label})
        if unknown := sorted(set(options.manipulations) - set(known)):
            raise ValueError(f"manipulations: {unknown} are not in the source, which has {known}")
        videos = [video for video in videos if not video.label or video.manipulation in options.manipulations]
        used = {video.dataset for video in videos if video.label}
        videos = [video for video in videos if video.dataset in used]
    try:
        sources.check(videos, options.splits, options.source)
    except ValueError as error:
        raise ValueError("\n".join([str(error), *(f"  note: {remark}" for remark in found.remarks)])) from error
    return replace(found, videos=videos, remarks=[*found.remarks, *sources.unknown_people(videos)])


def _named(video: Video, options: Options) -> Video:
    """With the reference called as the user wants, and only the compressed files that are to be used."""
    reference = video.reference if options.reference == "auto" else options.reference
    wanted = set(options.levels) if options.existing else set()
    files = {level: clip for level, clip in video.files.items() if level in wanted}
    return replace(video, reference=reference, files={reference: video.files[video.reference]} | files)


def describe(found: Found, options: Options) -> str:
    """What was understood: counts by split, label, manipulation and compression."""
    counts = Counter((v.dataset, v.manipulation, "fake" if v.label else "real", v.split) for v in found.videos)
    lines = [f"{'dataset':18} {'manipulation':18} {'label':6}" + "".join(f"{split:>7}" for split in SPLITS)]
    for group in sorted({key[:3] for key in counts}):
        lines.append("{:18} {:18} {:6}".format(*group) + "".join(f"{counts[*group, split]:7}" for split in SPLITS))
    references = Counter(video.reference for video in found.videos)
    lines.append("reference: " + ", ".join(f"{name} of {count} videos" for name, count in sorted(references.items())))
    for level in options.levels:
        given = sum(level in video.files for video in found.videos)
        lines.append(f"{level}: {given} files exist, {len(found.videos) - given} are made here by H.264")
    if any(isinstance(clip, tuple) for video in found.videos for clip in video.files.values()):
        lines.append(f"note: images are compressed as {options.images}, which is not what a whole video would give")
    return "\n".join(map(shown, [*lines, *(f"note: {remark}" for remark in found.remarks)]))


# ---------------------------------------------------------------------------------------------------------- all videos


def open_folder(options: Options) -> None:
    """Make ``out``, or go on with what an earlier run of the same settings left.

    Raises:
        ValueError: it holds pairs made with other settings.
    """
    settings = {key: value for key, value in asdict(options).items() if key not in FREE}
    settings["source"] = str(Path(options.source).resolve())
    if Path(settings["source"]) in Path(options.out).resolve().parents:
        raise ValueError(f"out: '{options.out}' lies in the source, which would be read with it; name another folder")
    path = Path(options.out) / "settings.json"
    with only_one(path.with_name(".settings.lock"), f"the folder {options.out}", wait=True):  # shards begin together
        if not path.exists():
            write_text(path, json.dumps(settings, indent=1))
            return
        defaults = {f.name: f.default for f in fields(Options) if f.default is not MISSING}
        before = defaults | _settings(path)
        if changed := [shown(f"{key}={before.get(key)}") for key in settings if before.get(key) != settings[key]]:
            raise ValueError(f"out: '{options.out}' was made with {', '.join(changed)}; name another folder")


def _settings(path: Path) -> dict:
    try:
        if isinstance(found := read_json(path), dict):
            return found
        raise ValueError(f"expected a mapping, got {type(found).__name__}")
    except ValueError as error:
        raise ValueError(f"out: {shown(path)} is damaged: {error}; name another folder") from error


def prepare(options: Options) -> int:
    """Everything the command does but --check and --status; returns the exit status.

    Raises:
        InUse: another process prepares the same shard.
    """
    found = understand(options)
    print(describe(found, options), flush=True)
    options.open_detector()  # its file may be missing
    open_folder(options)
    index, count = options.part
    lock = Path(options.out) / "shards" / f".{index}-of-{count}.lock"
    if not inside(lock, options.out):
        raise ValueError(f"out: {shown(lock.parent)} leads outside of {shown(options.out)}; remove this link")
    with only_one(lock, f"shard {options.shard} of {options.out}"):
        return _prepare(options, found, index, count)


def _prepare(options: Options, found: Found, index: int, count: int) -> int:
    videos = found.videos[index - 1 :: count]
    todo = [video for video in videos if not rows_file(video, options.out).is_file()]
    failed = dict(found.refused) if index == 1 else {}

    of = manifest.fingerprint(found.videos)

    def note_shard(*, finished: bool) -> None:
        done = sum(rows_file(video, options.out).is_file() for video in videos)
        reasons = {shown(path): reason for path, reason in failed.items()}
        manifest.write_shard(options.out, index, count, len(videos), done, reasons, finished, of)

    note_shard(finished=False)
    work = partial(prepare_video, pairing=options.pairing)
    engine = (
        workers.by_dask(options.scheduler, work, todo)
        if options.scheduler
        else workers.by_processes(work, todo, options.jobs, preload="training.prepare")
    )
    with tqdm(total=len(videos), initial=len(videos) - len(todo), desc="videos", unit=" videos") as bar:
        for video, reason in engine:
            failed |= {video.path: reason} if reason else {}
            bar.update()
    rows = []
    for video in videos:
        if (finished := finished_rows(video, options.out)) is not None:
            rows += [row | {"split": video.split} for row in finished[0]]
            for note in finished[1]:
                print(shown(f"note: {video.path}: {note}"), file=sys.stderr)
    path = manifest.file_of(options.out, index, count)
    if rows:
        manifest.write(path, rows)
    note_shard(finished=True)
    print(f"{path}: {len(rows)} pairs of {sum(rows_file(video, options.out).is_file() for video in videos)} videos")
    for path, reason in sorted(failed.items()):
        print(shown(f"failed: {path}: {reason}"), file=sys.stderr)
    return 1 if failed else 0


def work(options: Options) -> int:
    if options.check:
        return inspection.check(Path(options.out))
    if options.status:
        print(manifest.describe_status(options.out))
        return 0 if all(shard.whole for shard in manifest.status(options.out)) else 1
    return prepare(options)


def main(argv: Sequence[str] | None = None) -> int:
    return run(work, Options, "prepare.py", argv)


if __name__ == "__main__":
    sys.exit(main())
