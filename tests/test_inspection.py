"""prepare.py --check: what strong compression does is no fault, moved crops are one; hashes where there are some."""

import os

import numpy as np
import pandas
import pytest
import trees
from PIL import Image

from training.data import inspection, manifest, video


def compressed(tmp_path, raw, crf):
    path = trees.write_video(tmp_path / f"{raw.shape[1]}-{crf}.mp4", raw, crf=crf)
    return np.stack([video.pixels_of(frame) for frame, _ in video.read(path)])


def fits(raw, other):
    return [inspection.fit(*pair) for pair in zip(raw, other, strict=True)]


@pytest.mark.parametrize("size", [48, 96, 192])
def test_a_clip_as_it_was_encoded_is_aligned_and_moved_by_a_pixel_it_is_not(tmp_path, size):
    for number in range(4):
        raw = trees.clip_of("train", number, 0, size=size)
        for crf in (23, 40, 51):
            other = compressed(tmp_path, raw, crf)
            assert not inspection.moved(fits(raw, other)), (number, crf)
            if crf == 23:
                for step, axis in ((1, 2), (-1, 1), (2, 1)):
                    assert inspection.moved(fits(raw, np.roll(other, step, axis))), (number, step, axis)


def test_a_fit_is_best_where_the_crop_was_moved_to():
    raw = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    for down, right in ((0, 0), (1, 0), (-2, 1)):
        found = inspection.fit(raw, np.roll(raw, (down, right), (0, 1)))
        assert np.unravel_index(found.argmin(), (5, 5)) == (2 + down, 2 + right) and found[2, 2] == 1
    flat = np.full((20, 20, 3), 7, np.uint8)
    assert np.array_equal(inspection.fit(flat, flat + 1), np.ones((5, 5))), "a flat picture fits everywhere alike"


def a_set(folder, shift=0, hashes=True, frames=4):
    """A prepared folder of one clip, whose compressed crops are moved."""
    raw = trees.clip_of("train", 0, 0, size=64, frames=frames)
    for number, pixels in enumerate(raw):
        for level, picture in (("raw", pixels), ("c23", np.roll(pixels, shift, 1))):
            (folder / level).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / level / f"{number}.png")
    names = {"path_raw": "raw", "path_compressed": "c23"}
    rows = pandas.DataFrame({column: [f"{level}/{i}.png" for i in range(frames)] for column, level in names.items()})
    rows = rows.assign(label=0, split="train", compression="c23", dataset="s", manipulation="real", video_id="v")
    rows = rows.assign(**{"sha256_raw": "0" * 64} if hashes else {})
    manifest.write(manifest.file_of(folder), rows.to_dict("records"))
    return folder


def test_rows_without_a_raw_twin_are_checked_alone(tmp_path, capsys):
    folder = a_set(tmp_path, hashes=False)
    table = pandas.read_parquet(manifest.file_of(folder))
    table.loc[0, "path_raw"] = ""
    manifest.write(manifest.file_of(folder), table.assign(sha256_raw="").to_dict("records"))
    assert inspection.check(folder) == 1
    said = capsys.readouterr()
    assert said.err.count("its hash is not that of the manifest") == 3, "the first has no raw file"
    assert "note: 1 of 4 rows have no raw twin to be aligned with" in said.out
    manifest.write(manifest.file_of(folder), table.to_dict("records"))
    assert inspection.check(folder) == 0
    sheet = np.asarray(Image.open(folder / "contact-sheet.png"))
    assert not sheet[: inspection.TILE, : inspection.TILE].any() and sheet[inspection.TILE :, : inspection.TILE].any()
    (crop := folder / "c23" / "0.png").write_bytes(b"broken")
    assert inspection.check(folder) == 1 and "0.png: cannot be read: " in capsys.readouterr().err
    crop.unlink()
    os.mkfifo(crop)  # which would be read for ever
    assert inspection.check(folder) == 1 and "0.png: cannot be read: no file" in capsys.readouterr().err


def test_a_set_without_hashes_is_checked_by_the_rest_and_that_is_said(tmp_path, capsys):
    assert inspection.check(a_set(tmp_path / "good", hashes=False)) == 0
    assert "note: the manifest has no sha256_raw and no sha256_compressed: " in capsys.readouterr().out
    assert inspection.check(a_set(tmp_path / "moved", shift=1, hashes=False)) == 1
    assert "s/real/v: its c23 crops are not aligned with their raw twins" in capsys.readouterr().err
    assert inspection.check(a_set(tmp_path / "other")) == 1
    said = capsys.readouterr()
    assert said.err.count("its hash is not that of the manifest") == 4 and "has no sha256_compressed:" in said.out
    assert inspection.check(a_set(tmp_path / "one", shift=1, hashes=False, frames=1)) == 0
    assert "1 clips have one frame, which is too few" in capsys.readouterr().out
