"""Which frames are looked at, the face that is followed through them, and the square that is cut."""

import numpy as np
import pytest
import trees
from PIL import Image

from training import prepare
from training.data import crops, faces, inspection, sources
from training.files import BrokenFile
from training.prepare import Options


def test_cascade_finds_the_astronaut(tmp_path):
    trees.write_video(tmp_path / "0.mp4", clip := trees.face_clip(frames=4), crf=10)
    item = sources.Video("set", "real", "0", 0, "train", "source", {"source": tmp_path / "0.mp4"}, "0")
    options = Options(source=str(tmp_path), out=str(tmp_path / "out"), frames=4, crfs=[30])
    rows, _ = crops.pairs_of(item, options)
    for number, row in enumerate(rows):
        side, centre = row["right"] - row["left"], (row["right"] + row["left"]) / 2
        assert 70 < side < 110 and side == row["bottom"] - row["top"]
        assert abs(centre - (76 - 2 * number)) < 10 and abs((row["top"] + row["bottom"]) / 2 - 85) < 10
        assert Image.open(tmp_path / "out" / row["path_compressed"]).size == (128, 128)
    assert not inspection.misaligned(*(
        np.asarray(Image.open(tmp_path / "out" / rows[1][name])) for name in ("path_raw", "path_compressed")
    ))  # fmt: skip
    trees.write_video(tmp_path / "0.mp4", 0 * clip, crf=10)
    with pytest.raises(BrokenFile, match="no face found in any of 4 frames"):
        crops.pairs_of(item, options)


def test_boxes_from_a_file(tmp_path):
    trees.write_video(tmp_path / "0.mp4", trees.face_clip(frames=4), crf=10)
    table = "video,frame,left,top,right,bottom\n0.mp4,0,10,20,30,40\n0.mp4,3,40,20,60,40\n"
    (tmp_path / "boxes.csv").write_text(table)
    item = sources.Video("set", "real", "0", 0, "train", "source", {"source": tmp_path / "0.mp4"}, "0", root=tmp_path)
    options = {"source": str(tmp_path), "out": str(tmp_path / "out"), "frames": 4, "crfs": [30], "smoothing": 0}
    options |= {"detector": "file", "detector_file": str(tmp_path / "boxes.csv"), "margin": 1.5}
    rows, _ = crops.pairs_of(item, Options(**options))
    assert [(r["left"], r["top"], r["right"], r["bottom"]) for r in rows] == [
        (5 + 10 * i, 15, 35 + 10 * i, 45) for i in range(4)
    ]


def test_one_face_is_followed():
    face = np.array([10.0, 10, 30, 30])
    other = np.array([100.0, 10, 118, 28])
    track = faces.follow([np.array([other, face + 1]), np.array([face]), np.empty((0, 4)), np.array([other])])
    assert np.array_equal(track[:2], [face + 1, face]) and np.isnan(track[2:]).all()
    farther = np.array([25.0, 10, 60, 45])  # larger than the face, and within one side of it
    assert np.array_equal(faces.follow([np.array([[0.0, 0, 40, 40]]), np.array([farther, face])])[1], face)
    filled = faces.smooth(np.array([[0.0] * 4, [np.nan] * 4, [4.0] * 4]), np.array([0.0, 1, 4]), 0)
    assert filled[:, 0].tolist() == [0, 1, 4]
    line = np.arange(9.0)[:, None] * np.ones(4)
    assert np.allclose(faces.smooth(line, np.arange(9.0), 1)[4], 4) and faces.smooth(line, np.arange(9.0), 1)[0, 0] > 0
    assert faces.squares(np.array([[0.0, 0, 10, 20], [90, 0, 100, 200]]), 1.3, 100, 60).tolist() == [
        [0, 0, 26, 26], [40, 0, 100, 60],
    ]  # fmt: skip


def test_frames_are_evenly_spaced():
    assert crops.evenly(10, 5) == [1, 3, 5, 7, 9] and crops.evenly(3, 64) == [0, 1, 2]
    assert crops.evenly(300, 2) == [75, 225]


@pytest.mark.parametrize(
    ("frames", "size", "said"),
    [
        (6, 64, "c23: 6 frames were decoded, expected 4"),
        (3, 64, "c23: 3 frames were decoded, expected 4"),
        (4, 48, "c23: frames of 48×48, the reference 64×64"),
    ],
)
def test_a_given_quality_has_the_frames_of_the_reference(tmp_path, frames, size, said):
    for name, count, side in (("raw", 4, 64), ("c23", frames, size)):
        trees.write_video(tmp_path / f"{name}.mp4", trees.clip_of("train", 0, 0, frames=count, size=side), crf=10)
    clips = {name: tmp_path / f"{name}.mp4" for name in ("raw", "c23")}
    item = sources.Video("set", "real", "0", 0, "train", "raw", clips, "0", root=tmp_path)
    with pytest.raises(BrokenFile, match=f"^{said}"):
        crops.pairs_of(item, crops.Pairing(out=str(tmp_path / "out"), frames=2, crfs=[23], detector="none"))


def test_boxes_that_cannot_be_of_the_clip_are_refused(tmp_path):
    trees.write_video(tmp_path / "0.mp4", trees.face_clip(frames=4), crf=10)
    item = sources.Video("set", "real", "0", 0, "train", "source", {"source": tmp_path / "0.mp4"}, "0", root=tmp_path)
    options = {"out": str(tmp_path / "out"), "frames": 4, "crfs": [30], "detector": "file"}
    for row, said in (
        ("0.mp4,0,500,300,700,600", "outside of its frames of 192×192"),
        ("0.mp4,99,1,1,9,9", "frame 99"),
    ):
        (tmp_path / said).with_suffix(".csv").write_text(f"video,frame,left,top,right,bottom\n{row}\n")
        pairing = crops.Pairing(**options, detector_file=str((tmp_path / said).with_suffix(".csv")))
        with pytest.raises(BrokenFile, match=said):
            crops.pairs_of(item, pairing)


def test_a_preset_that_libx264_does_not_know_is_refused_before_the_work():
    assert prepare.main(["/data", "preset=fastest"]) == 2
