"""What a folder holds, which names can be used, and real/ and fake/: what belongs together, what is there twice."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import by_id, find, said, split_of
from trees import touch

from training.data import sources
from training.data.sources import SPLITS, Video, check, clip_at, common, listing, recognise

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
    assert video.names == ("c23/000", "set/real/000", "000", str(tmp_path / "c23/000"))
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


# -------------------------------------------------------------------------------------------------- real/ and fake/


def test_real_and_fake_of_one_name_are_in_one_split(tmp_path):
    names = [f"Real/{i:03d}.mp4" for i in range(20)] + [f"Real/{i:03d}.avi" for i in range(20)]
    names += [f"FAKE/{i:03d}.mkv" for i in range(20)] + [f"FAKE/{2 * i:03d}_{2 * i + 1:03d}.mp4" for i in range(10)]
    found = find("folder", touch(tmp_path, *names, "FAKE/other.mp4"))
    assert recognise(tmp_path) == "folder" and len(found.videos) == 71
    videos = by_id(found)
    for i in range(0, 20, 2):
        pair = [f"{n:03d}.{ending}" for n in (i, i + 1) for ending in ("mp4", "avi", "mkv")]
        assert len({videos[name].split for name in [*pair, f"{i:03d}_{i + 1:03d}.mp4"]}) == 1
        assert videos[f"{i:03d}_{i + 1:03d}.mp4"].twin == videos[f"{i:03d}.mp4"].twin == videos[f"{i:03d}.mkv"].twin
    assert said(found, "30 of 31 fakes belong to a real video by name")


def test_a_name_that_many_share_ties_nothing_together(tmp_path):
    names = [f"{kind}/{kind}{i}/clip.mp4" for kind in ("real", "fake") for i in range(10)]
    found = find("folder", touch(tmp_path, *names))
    assert said(found, "0 of 10 fakes belong") and len({video.twin for video in found.videos}) == 20
    found = find("folder", touch(tmp_path, "fake/real3/clip.mp4", "fake/real4/x_clip_y.mp4"))
    twins = {video.video_id: video.twin for video in found.videos if video.label}
    assert (twins["real3/clip.mp4"], twins["real4/x_clip_y.mp4"]) == ("real3/clip", "real4/clip")


def test_two_folders_that_differ_in_capital_letters_are_refused(tmp_path):
    touch(tmp_path, "real/a.mp4", "Real/b.mp4", "fake/a.mp4")
    with pytest.raises(ValueError, match=r"expected one folder 'real', got \['Real', 'real'\]"):
        find("folder", tmp_path)


# ------------------------------------------------------------------------------------------------- names that tell more


@pytest.mark.parametrize("kind", ["celeb", "actors"])
def test_a_fake_belongs_to_the_clip_it_was_made_of_and_not_to_the_donor(tmp_path, kind):
    for i in range(20):
        for j in (i, i ^ 1):
            own, pair = (f"id{i}", f"id{i}_id{j}") if kind == "celeb" else (f"{i:02d}", f"{i:02d}_{j:02d}")
            real, fake = ((f"{own}_0000", f"{pair}_0000") if kind == "celeb" else
                          (f"{own}__walking", f"{pair}__walking__ABC"))  # fmt: skip
            touch(tmp_path, f"real/{real}.mp4", *([f"fake/{fake}.mp4"] if j != i else []))
    found = find("folder", tmp_path)
    videos, a, b = by_id(found), *(("id4", "id5") if kind == "celeb" else ("04", "05"))
    fake, own, donor = (videos[f"{name}{'_0000' if kind == 'celeb' else '__walking' + end}.mp4"]
                        for name, end in ((f"{a}_{b}", "__ABC"), (a, ""), (b, "")))  # fmt: skip
    assert fake.twin == own.twin != donor.twin and (fake.people, own.people) == ((a, b), (a,))
    assert len(found.videos) == 40 and said(found, "20 of 20 fakes belong") and fake.split == own.split == donor.split
    check(found.videos, list(SPLITS), "set")  # no person in two splits


# ------------------------------------------------------------------------------------------------------ the same twice


@pytest.mark.parametrize("inner", ["frames/{}", "Images/{}", "{}", "{}/frames", "videos/{}"])
def test_a_video_beside_its_frames_is_taken_once_as_the_file(tmp_path, inner):
    for i in range(6):
        for kind, end in (("real", ""), ("fake", "_fake")):
            touch(tmp_path, f"{kind}/{i:04d}{end}.mp4")
            touch(tmp_path / kind / inner.format(f"{i:04d}{end}"), "0.png", "1.png")
    for images, count in (("clips", 12), ("stills", 24)):
        found = find("folder", tmp_path, images=images)
        assert sorted(split_of(found)) == sorted(
            [*(f"{i:04d}.mp4" for i in range(6)), *(f"{i:04d}_fake.mp4" for i in range(6))]
        )
        assert said(found, f"^{count} clips exist as a file and as frames")
        assert {video.path.suffix for video in found.videos} == {".mp4"} and said(found, "6 of 6 fakes belong")


def test_the_folders_that_videos_and_frames_lie_in_are_no_part_of_their_names(tmp_path):
    touch(
        tmp_path,
        "real/videos/a.mp4",
        "real/x/frames/0.png",
        "real/x/frames/1.png",
        "fake/frames/a/0.png",
        "fake/frames/b/0.png",
    )
    touch(tmp_path, "real/b.mp4", "real/frames/c/0.png", "real/images/c/0.png", "real/c.mp4")
    found = find("folder", tmp_path)
    assert [video.video_id for video in found.videos] == ["b.mp4", "c.mp4", "a.mp4", "x", "a", "b"]
    assert [video.twin for video in found.videos] == ["b", "c", "a", "x", "a", "b"] and said(found, "^2 clips exist")


# ---------------------------------------------------------------------------------------------- splits that are folders


@pytest.mark.parametrize(
    "pattern", ["{split}/{kind}/{name}", "{kind}/{split}/{name}", "{kind}/frames/{split}/{name}/0.png"]
)
def test_folders_called_like_splits_are_the_splits(tmp_path, pattern):
    words = {"Training": "train", "valid": "val", "test": "test"}
    for split in words:
        for i in range(3):
            touch(tmp_path, pattern.format(split=split, kind="real", name=f"{i}.mp4"))
            touch(tmp_path, pattern.format(split=split, kind="fake", name=f"{i}_9.mp4"))
    found = find("folder", tmp_path)
    assert recognise(tmp_path) == "folder" and len(found.videos) == 18
    assert all(video.split == words[video.video_id.partition("/")[0]] for video in found.videos)
    assert len({video.twin for video in found.videos}) == 9, "0 of one split is not 0 of another"
    assert found.remarks == ["9 of 9 fakes belong to a real video by name and are in its split"]
    check(found.videos, list(SPLITS), "set")


def test_what_the_folders_do_not_split_is_drawn_and_given_splits_stay(tmp_path):
    for split, people in (("train", range(20)), ("test", range(18, 22))):
        for i in people:
            touch(tmp_path, f"{split}/real/id{i}_0000.mp4", f"{split}/fake/id{i}_id{i ^ 1}_0000.mp4")
    found = find("folder", tmp_path)
    assert Counter((v.split, v.label) for v in found.videos) == {
        (split, label): n for split, n in (("train", 18), ("val", 2), ("test", 4)) for label in (0, 1)
    }
    assert said(found, "^2 of 22 people are in more than one of the given splits")
    assert said(found, "val is drawn from the training videos")
    check(found.videos, list(SPLITS), "set")


def test_a_fake_in_another_split_than_its_original_is_said(tmp_path):
    touch(tmp_path, *(f"{split}/{kind}/{name}" for split, kind, name in (
        ("train", "real", "000.mp4"), ("train", "fake", "000_001.mp4"), ("test", "real", "003.mp4"),
        ("test", "fake", "003_004.mp4"), ("test", "fake", "000_009.mp4"))))  # fmt: skip
    found = find("folder", tmp_path)
    assert said(found, "^2 of 3 fakes belong") and said(found, "^1 fakes are named after a real video of another")


def test_a_folder_called_like_a_split_beside_other_clips_is_none_and_that_is_said(tmp_path):
    touch(tmp_path, *(f"{kind}/{name}.mp4" for kind in ("real", "fake") for name in ("train/a", "b", "c", "d")))
    assert set(split_of(found := find("folder", tmp_path)).values()) == {*SPLITS}
    assert said(found, "folders 'train' are not taken as splits")
