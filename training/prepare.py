"""From videos to pairs: crops of raw frames beside the same crops after compression, and the manifest of them.

    python training/prepare.py /data/FaceForensics++ out=/data/pairs                    everything by default
    python training/prepare.py /data/FaceForensics++ out=/data/pairs manipulations='[Deepfakes]' crfs='[40]' frames=32
    python training/prepare.py /data/FaceForensics++ out=/data/pairs --shard 3/8        an eighth of it, on a cluster
    python training/prepare.py --check out=/data/pairs                                  verify an existing set
    python training/train.py manifest=/data/pairs                                       train on it

{out} then holds {level}/{dataset}/{manipulation}/{video}/{frame}.png, a manifest (one per shard), settings.json, and
rows/, one file per finished video: an interrupted run continues from these. Exit status: 0 all videos are prepared
(or nothing is wrong with the set), 1 some are not and were listed, 2 wrong usage or a source that does not add up.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

if not __package__:  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from training import faces, inspection, sources
from training.prepare_options import UNALTERED, Options, parse
from training.sources import KINDS, Draw, Found, Video
from training.synthetic import SPLITS
from training.video import H264, BrokenVideo, Encoder, encodable, keep, length, pixels_of, read

# ------------------------------------------------------------------------------------------------------- understanding


def understand(options: Options) -> Found:
    """The videos that a source has for these options, checked.

    Raises:
        ValueError: it does not add up.
    """
    root = Path(options.source)
    if not root.exists():
        raise ValueError(f"source: no folder or file '{root}'")
    kind = sources.recognise(root) if options.kind == "auto" else options.kind
    stills = options.images == "stills"
    draw = Draw(options.val_fraction, options.test_fraction, options.draw_val, stills, options.seed)
    found = KINDS[kind](root, draw)
    videos = [_named(video, options) for video in found.videos if video.split in options.splits]
    if options.manipulations is not None:
        known = sorted({video.manipulation for video in videos if video.label})
        if unknown := sorted(set(options.manipulations) - set(known)):
            raise ValueError(f"manipulations: {unknown} are not in the source, which has {known}")
        videos = [video for video in videos if not video.label or video.manipulation in options.manipulations]
        used = {video.dataset for video in videos if video.label}
        videos = [video for video in videos if video.dataset in used]
    sources.check(videos, options.splits, options.source)
    return Found(videos, found.remarks)


def _named(video: Video, options: Options) -> Video:
    """With the reference called as the user wants, and only the compressed files that are to be used."""
    reference = video.reference if options.reference == "auto" else options.reference
    wanted = {f"c{crf}" for crf in options.crfs} if options.existing else set()
    files = {level: clip for level, clip in video.files.items() if level in wanted}
    return replace(video, reference=reference, files={reference: video.files[video.reference]} | files)


def describe(found: Found, options: Options) -> str:
    """What was understood: counts by split, label, manipulation and compression."""
    levels = [f"c{crf}" for crf in options.crfs]
    counts = Counter((v.dataset, v.manipulation, "fake" if v.label else "real", v.split) for v in found.videos)
    lines = [f"{'dataset':18} {'manipulation':18} {'label':6}" + "".join(f"{split:>7}" for split in SPLITS)]
    for group in sorted({key[:3] for key in counts}):
        lines.append("{:18} {:18} {:6}".format(*group) + "".join(f"{counts[*group, split]:7}" for split in SPLITS))
    references = Counter(video.reference for video in found.videos)
    lines.append("reference: " + ", ".join(f"{name} of {count} videos" for name, count in sorted(references.items())))
    for level in levels:
        given = sum(level in video.files for video in found.videos)
        lines.append(f"{level}: {given} files exist, {len(found.videos) - given} are made here by H.264")
    if any(isinstance(clip, tuple) for video in found.videos for clip in video.files.values()):
        lines.append(f"note: images are compressed as {options.images}, which is not what a whole video would give")
    return "\n".join([*lines, *(f"note: {remark}" for remark in found.remarks)])


# ----------------------------------------------------------------------------------------------------------- one video


def evenly(total: int, count: int) -> list[int]:
    """Numbers of at most ``count`` frames, the middles of equal parts of a clip of ``total``."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def boxes_of(path: Path, frames: Iterable[av.VideoFrame], kept: list[int], options: Options) -> np.ndarray:
    """The square to cut from each kept frame of a clip, in every quality.

    Args:
        path: names the clip in a table of boxes.
        frames: the kept frames of the reference.
        kept: their numbers.

    Returns:
        ``(T, 4)`` int64: left, top, right, bottom in pixels; right and bottom lie outside.

    Raises:
        BrokenVideo: no frame has a face.
    """
    first = next(frames := iter(frames))
    width, height = first.width, first.height
    if options.detector == "none":
        return np.tile([0, 0, width, height], (len(kept), 1))
    times = np.array(kept, float)
    if options.detector == "file":
        name = path.relative_to(options.source).as_posix()
        given = faces.read_boxes(options.detector_file).get(name)
        if given is None:
            raise BrokenVideo(f"{options.detector_file} has no box for '{name}'")
        track = np.stack([np.interp(times, given[:, 0], column) for column in given[:, 1:].T], axis=1)
    else:
        detect = faces.cascade() if options.detector == "cascade" else faces.yunet(options.detector_file)
        track = faces.follow([detect(pixels_of(frame)) for frame in chain([first], frames)])
    return faces.squares(faces.smooth(track, times, options.smoothing), options.margin, width, height)


def crop(pixels: np.ndarray, box: np.ndarray, size: int | None) -> Image.Image:
    """The box of a frame ``(H, W, 3)`` uint8, resized to a side of ``size`` pixels unless that is None."""
    image = Image.fromarray(pixels)
    if size is None:
        return image.crop(tuple(box.tolist()))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=tuple(box.tolist()), reducing_gap=None)


def prepare_video(video: Video, options: Options) -> list[dict]:
    """Write the crops of one video in every quality and return its rows of the manifest.

    Raises:
        BrokenVideo: it cannot be read, has no face, or its qualities do not agree frame by frame.
    """
    total = length(video.files[video.reference])
    kept, levels = evenly(total, options.frames), [f"c{crf}" for crf in options.crfs]
    auto = "yuv444p" if video.dataset in ("FaceForensics++", "DeepFakeDetection") else "yuv420p"
    pix_fmt = auto if options.pix_fmt == "auto" else options.pix_fmt
    made = {f"c{crf}": Encoder(H264(crf, pix_fmt, options.preset)) for crf in options.crfs}
    encoders = {level: encoder for level, encoder in made.items() if level not in video.files}

    def source() -> Iterator:
        for frame in read(video.files[video.reference]):
            if encoders:
                prepared = encodable(frame, pix_fmt)
                for encoder in encoders.values():
                    encoder.add(prepared)
            yield frame

    frames = list(keep(source(), kept, total))
    boxes = boxes_of(video.path, frames, kept, options)
    written = {video.reference: _write(video, video.reference, frames, kept, boxes, options)}
    for level in levels:
        twins = encoders[level].decoded() if level in encoders else read(video.files[level])
        try:
            if level in video.files:
                twins = _same_size(twins, frames[0])
            written[level] = _write(video, level, keep(twins, kept, total), kept, boxes, options)
        except BrokenVideo as error:
            raise BrokenVideo(f"{level}: {error}") from error
    identity = {name: getattr(video, name) for name in ("label", "split", "dataset", "manipulation", "video_id")}
    rows = []
    for level in levels:
        encoder = str(encoders[level].settings) if level in encoders else "file of the source"
        for slot, (number, box) in enumerate(zip(kept, boxes.tolist(), strict=True)):
            (raw, sha_raw), (compressed, sha_compressed) = written[video.reference][slot], written[level][slot]
            rows.append({"path_raw": raw, "path_compressed": compressed} | identity | {
                "compression": level, "frame": number, "twin": f"{video.dataset}/{video.twin}/{slot}",
                "reference": video.reference, "frames_in_clip": total, "sha256_raw": sha_raw,
                "sha256_compressed": sha_compressed, "encoder": encoder,
            } | dict(zip(("left", "top", "right", "bottom"), box, strict=True)))  # fmt: skip
    return rows


def _same_size(frames: Iterator, like: object) -> Iterator:
    for frame in frames:
        if (frame.width, frame.height) != (like.width, like.height):
            raise BrokenVideo(f"frames of {frame.width}×{frame.height}, the reference {like.width}×{like.height}")
        yield frame


def _write(
    video: Video, level: str, frames: Iterator, kept: list[int], boxes: np.ndarray, options: Options
) -> list[tuple[str, str]]:
    """Path below ``out`` and SHA-256 of each crop; frames padded for the encoder are wider than the boxes reach."""
    folder, written = Path(level) / video.key, []
    (Path(options.out) / folder).mkdir(parents=True, exist_ok=True)
    for number, box, frame in zip(kept, boxes, frames, strict=True):
        name = folder / f"{number:06d}.png"
        crop(pixels_of(frame), box, options.size).save(path := Path(options.out) / name, compress_level=4)
        written.append((name.as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()))
    return written


# ---------------------------------------------------------------------------------------------------------- all videos


def rows_file(video: Video, out: str) -> Path:
    return Path(out) / "rows" / f"{video.key}.json"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbour and rename it: the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(temporary := path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    os.replace(temporary, path)


def _work(video: Video, options: Options) -> str | None:
    """Prepare one video in a worker process; returns the reason where it cannot be."""
    try:
        rows = prepare_video(video, options)
    except BrokenVideo as error:
        return str(error)
    except Exception as error:  # one odd file must not end a run of days
        return f"{type(error).__name__}: {error}"
    replace_file(rows_file(video, options.out), lambda path: path.write_text(json.dumps(rows)))
    return None


def outcomes(videos: list[Video], options: Options) -> Iterator[tuple[Video, str | None]]:
    """Each video and, where it cannot be prepared, the reason; also of one that kills its process."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    waiting = [(videos, options.jobs or os.cpu_count() or 1)]
    while waiting:
        batch, width = waiting.pop()
        lost = []
        ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C lets the videos at work be finished
        with ProcessPoolExecutor(min(width, max(len(batch), 1)), context, signal.signal, ignore) as pool:
            futures = {pool.submit(_work, video, options): video for video in batch}
            try:
                for future in as_completed(futures):
                    try:
                        yield futures[future], future.result()
                    except BrokenProcessPool:
                        lost.append(futures[future])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if lost and len(batch) == 1:
            yield batch[0], "it ended the process that read it (a crash of the decoder, or no memory)"
        elif lost:  # the culprit was running, so it is among the first: each of these alone, then the others
            lost.sort(key=batch.index)
            waiting += [(lost[2 * width + 1 :], width)] if lost[2 * width + 1 :] else []
            waiting += [([video], 1) for video in lost[: 2 * width + 1]]


def write_manifest(videos: list[Video], options: Options) -> int:
    """The table of all prepared videos of this shard; returns how many pairs it has."""
    import pandas

    rows = []
    for video in videos:
        if (path := rows_file(video, options.out)).is_file():
            rows += [row | {"split": video.split} for row in json.loads(path.read_text())]
    if rows:
        replace_file(options.manifest, lambda path: pandas.DataFrame(rows).to_parquet(path, index=False))
    return len(rows)


def open_folder(options: Options) -> None:
    """Make ``out``, or go on with what an earlier run of the same settings left.

    Raises:
        ValueError: it holds pairs made with other settings.
    """
    settings = {key: value for key, value in asdict(options).items() if key not in UNALTERED}
    settings["source"] = str(Path(options.source).resolve())
    path = Path(options.out) / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        if changed := [f"{key}={before.get(key)}" for key in settings if before.get(key) != settings[key]]:
            raise ValueError(f"out: '{options.out}' was made with {', '.join(changed)}; name another folder")
    else:
        replace_file(path, lambda target: target.write_text(json.dumps(settings, indent=1)))


def prepare(options: Options) -> int:
    """Everything the command does but --check; returns the exit status."""
    found = understand(options)
    print(describe(found, options), flush=True)
    if options.detector == "yunet":
        faces.yunet(options.detector_file)
    elif options.detector == "file":
        faces.read_boxes(options.detector_file)
    open_folder(options)
    index, count = options.part
    videos = found.videos[index - 1 :: count]
    todo = [video for video in videos if not rows_file(video, options.out).is_file()]
    failed = []
    with tqdm(total=len(videos), initial=len(videos) - len(todo), desc="videos", unit=" videos") as bar:
        for video, reason in outcomes(todo, options):
            failed += [(video.path, reason)] if reason else []
            bar.update()
    pairs = write_manifest(videos, options)
    print(f"{options.manifest}: {pairs} pairs of {len(videos) - len(failed)} videos")
    for path, reason in sorted(failed):
        print(f"failed: {path}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> None:
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        status = inspection.check(Path(options.out)) if options.check else prepare(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
