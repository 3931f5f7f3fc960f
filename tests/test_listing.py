"""What a folder holds, and which names can be used."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import find
from trees import touch

from training.data import sources
from training.data.sources import Video, clip_at, common, listing

# ------------------------------------------------------------------------------------------------------------- folders


def test_hidden_and_system_files_are_left_out_and_the_rest_counted_by_ending(tmp_path):
    touch(tmp_path, "a.mp4", "b.MTS", "c.3gp", "d/e.vob", "d/f.jpg", "note.txt", "more.txt", "x.json", "noending")
    touch(tmp_path, "._a.mp4", ".DS_Store", "@eaDir/a.mp4", ".thumbnails/a.jpg", "Thumbs.db", "__MACOSX/a.mp4")
    found = listing(tmp_path)
    assert list(found.clips()) == ["a.mp4", "b.MTS", "c.3gp", "d", "d/e.vob"]
    assert found.skipped == {"hidden": 6, ".txt": 2, ".json": 1, "without ending": 1}
    assert sources.left_out([found]) == ["left out: 6 hidden, 2 .txt, 1 .json, 1 without ending"]


def test_a_folder_called_like_a_video_is_a_clip_of_its_frames_in_order_of_number(tmp_path):
    touch(tmp_path, "clip.mp4/10.png", "clip.mp4/2.png", "clip.mp4/1.PNG", "still.png")
    clips = listing(tmp_path).clips()
    assert [path.name for path in clips["clip.mp4"]] == ["1.PNG", "2.png", "10.png"]
    assert clips["still.png"] == (tmp_path / "still.png",) and len(clips) == 2
    stills = listing(tmp_path).clips(stills=True)
    assert list(stills) == ["clip.mp4/1.PNG", "clip.mp4/2.png", "clip.mp4/10.png", "still.png"]


def test_links_are_followed_but_loops_are_not(tmp_path):
    touch(tmp_path, "store/a.mp4", "tree/b.mp4")
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "tree")
    (tmp_path / "tree" / "self").symlink_to("self")
    (tmp_path / "tree" / "gone.mp4").symlink_to("nowhere.mp4")
    found = listing(tmp_path / "tree")
    assert list(found.clips()) == ["b.mp4", "linked/a.mp4"]
    assert found.skipped == {"looping links": 1, "broken links or devices": 2}


def test_a_folder_that_cannot_be_read_is_a_remark(tmp_path, monkeypatch):
    touch(tmp_path, "a.mp4", "locked/b.mp4")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = listing(tmp_path)
    assert list(found.clips()) == ["a.mp4"]
    assert sources.left_out([found]) == [f"cannot be read: {tmp_path / 'locked'}: Permission denied"]


def test_an_animation_is_a_clip_and_a_still_of_its_ending_is_a_picture(tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), 90 * i, np.uint8)) for i in range(3)]
    for name in ("moving.gif", "moving.webp", "moving.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert clip_at(tmp_path / name) == tmp_path / name
    frames[0].save(tmp_path / "still.gif")
    found = listing(tmp_path)
    assert [path.name for path in found.videos] == ["moving.gif", "moving.png", "moving.webp"]
    assert found.frames == {tmp_path: (tmp_path / "still.gif",)} and clip_at(tmp_path / "nothing.gif") is None
    assert clip_at(touch(tmp_path, "f/1.jpg", "f/0.jpg") / "f") == (tmp_path / "f/0.jpg", tmp_path / "f/1.jpg")


# --------------------------------------------------------------------------------------------------------------- names


def test_names_that_cannot_be_folders_are_refused_and_the_rest_goes_on(tmp_path):
    odd = [os.fsdecode(b"\xff.mp4"), "bell\a.mp4", "l" * 210 + ".mp4"]
    touch(tmp_path, *(f"{kind}/{i}.mp4" for kind in ("real", "fake") for i in range(3)), *(f"real/{n}" for n in odd))
    found = find("folder", tmp_path)
    assert len(found.videos) == 6 and {path.name for path, _ in found.refused} == set(odd)
    reasons = sorted(reason for _, reason in found.refused)
    assert reasons[0] == "its name 'TREE/real/bell\\x07.mp4' has a control character".replace("TREE", tmp_path.name)
    assert reasons[1:] == ["its name has a part of 214 bytes, expected at most 200", "its name is no UTF-8"]


@pytest.mark.parametrize("name", ["../up", "/abs", "a//b", "a/../b", "."])
def test_a_name_that_leads_outside_is_refused(tmp_path, name):
    video = Video("set", "real", name, 0, "train", "source", {"source": tmp_path / "a.mp4"}, "a")
    kept, refused = common.usable([video])
    assert not kept and refused == [(tmp_path / "a.mp4", f"its name 'set/real/{name}' leads outside of a folder")]


def test_a_table_of_boxes_may_call_a_video_by_path_key_or_id(tmp_path):
    frames = (tmp_path / "c23/000/1.png", tmp_path / "c23/000/2.png")
    video = Video("set", "real", "000", 0, "train", "source", {"source": frames}, "000", root=tmp_path)
    assert video.names == ("c23/000", "set/real/000", "000")
    assert Video("s", "m", "i", 1, "", "raw", {"raw": Path("/x/a.mp4")}, "i", root=tmp_path).names[0] == "/x/a.mp4"


def test_a_frame_that_one_quality_lacks_is_taken_from_none():
    raw = tuple(Path(f"raw/{i}.png") for i in range(5))
    c23 = tuple(Path(f"c23/{i}.jpg") for i in (0, 1, 3, 4, 7))
    reference, levels, lost = common.qualities({"c0": raw, "c23": c23, "c40": Path("c40.mp4")})
    assert (reference, lost, levels["c40"]) == ("raw", 2, Path("c40.mp4"))
    assert [p.stem for p in levels["raw"]] == [p.stem for p in levels["c23"]] == ["0", "1", "3", "4"]
    others = tuple(Path(f"c40/frame{i}.png") for i in range(5))
    reference, levels, lost = common.qualities({"c23": c23, "c40": others})
    assert (reference, levels, lost) == ("source", {"source": c23, "c40": others}, 0), "no name is shared"
