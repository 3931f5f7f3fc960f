"""What sources find in trees as people have them: names, labels, splits and groups, without opening a video."""

import json
import re
from collections import Counter

import pytest
from trees import celeb_df, dfdc, touch

from training.data import sources
from training.data.sources import KINDS, Draw, check, recognise, unknown_people

PAIRS = {"train": [["000", "003"]], "val": [["001", "004"]], "test": [["002", "005"]]}


def faceforensics(root, *names, level="c23", pairs=PAIRS):
    """A tree of empty files in which every pair is complete; names are added."""
    for split, listed in pairs.items():
        touch(root, f"splits/{split}.json").joinpath(f"splits/{split}.json").write_text(json.dumps(listed))
    for a, b in (pair for listed in pairs.values() for pair in listed):
        for one, other in ((a, b), (b, a)):
            touch(root, f"original_sequences/youtube/{level}/videos/{one}.mp4")
            touch(root, f"manipulated_sequences/Deepfakes/{level}/videos/{one}_{other}.mp4")
    return touch(root, *names)


def find(kind, path, **draw):
    return KINDS[kind](path, Draw(**draw))


def by_id(found):
    return {video.video_id: video for video in found.videos}


def split_of(found):
    return {video.video_id: video.split for video in found.videos}


def said(found, pattern):
    return any(re.search(pattern, remark) for remark in found.remarks)


# ------------------------------------------------------------------------------------------------------ FaceForensics++


def test_frames_in_folders_called_like_their_video_and_videos_without_their_folder(tmp_path):
    tree = faceforensics(tmp_path / "videos")
    plain, frames = tmp_path / "plain", tmp_path / "frames"
    faceforensics(plain), faceforensics(frames)
    for folder in plain.rglob("videos"):
        for path in folder.iterdir():
            path.rename(folder.parent / path.name)
        folder.rmdir()
    for path in list(frames.rglob("*.mp4")):
        path.unlink()
        touch(path.parents[1] / "images" / path.name, "10.png", "9.png")
    expected = find("faceforensics", tree)
    for root in (plain, frames):
        found = find("faceforensics", root)
        assert split_of(found) == split_of(expected) and len(found.videos) == 12 and not found.remarks
    assert [path.name for path in by_id(found)["000_003"].files["source"]] == ["9.png", "10.png"]
    assert by_id(expected)["000_003"].people == ("000", "003") and by_id(expected)["000_003"].twin == "000"


def test_fakes_of_people_that_no_list_pairs_are_left_out(tmp_path):
    videos = "manipulated_sequences/Deepfakes/c23/videos"
    tree = faceforensics(tmp_path, f"{videos}/000_001.mp4", f"{videos}/003_005.mp4", f"{videos}/003.mp4")
    found = find("faceforensics", tree)
    assert len(found.videos) == 12 and not {"000_001", "003_005", "003"} & {v.video_id for v in found.videos if v.label}
    assert said(found, "^3 videos are in no official split and are left out$")


def test_without_lists_it_is_said_where_they_come_from_or_whole_pairs_are_drawn(tmp_path):
    pairs = {"any": [[f"{2 * i:03d}", f"{2 * i + 1:03d}"] for i in range(20)]}
    tree = faceforensics(tmp_path, "original_sequences/actors/c23/videos/01__walking.mp4", pairs=pairs)
    (tree / "splits" / "any.json").unlink()
    (tree / "splits").rmdir()
    with pytest.raises(ValueError, match=r"ondyari/FaceForensics on GitHub.*draw_splits=true draws whole id pairs"):
        find("faceforensics", tree)
    found = find("faceforensics", tree, draw_splits=True)
    check(found.videos, list(sources.SPLITS), "tree")
    counts = Counter((v.split, v.label) for v in found.videos if v.dataset == "FaceForensics++")
    assert counts == {(s, i): n for s, n in (("train", 28), ("val", 4), ("test", 8)) for i in (0, 1)}
    videos = by_id(found)
    assert all(videos[a].split == videos[b].split == videos[f"{a}_{b}"].split for a, b in pairs["any"])
    assert videos["01__walking"].split == "test" and said(found, "not the official ones")


def test_official_splits_are_used_though_others_are_asked_for_and_that_is_said(tmp_path):
    found = find("faceforensics", faceforensics(tmp_path), draw_splits=True)
    assert split_of(found) == split_of(find("faceforensics", tmp_path)) and len(found.videos) == 12
    assert found.remarks == ["draw_splits: the tree has official splits, and these are used"]


def test_a_tree_of_one_level_without_the_folders_of_levels(tmp_path):
    pairs = [(f"{i:03d}", f"{i ^ 1:03d}") for i in range(20)]
    for a, b in pairs:
        touch(tmp_path, f"original/{a}.mp4", f"Deepfakes/{a}_{b}.mp4", f"NeuralTextures/{a}_{b}.mp4")
    touch(tmp_path, "DeepFakeDetection/01_02__walking__ABC.mp4", "csv/Deepfakes.csv")
    assert recognise(tmp_path) == "faceforensics"
    found = find("faceforensics", tmp_path, draw_splits=True)
    videos = by_id(found)
    assert Counter(v.manipulation for v in found.videos) == {
        "real": 20, "Deepfakes": 20, "NeuralTextures": 20, "DeepFakeDetection": 1,
    }  # fmt: skip
    assert all(videos[a].split == videos[f"{a}_{b}"].split == videos[b].split for a, b in pairs)
    assert {(v.reference, *v.files) for v in found.videos} == {("source", "source")}


def test_two_originals_of_one_name_are_refused_naming_both(tmp_path):
    tree = faceforensics(tmp_path, "original_sequences/masked/c23/videos/000.mp4")
    found = find("faceforensics", tree)
    with pytest.raises(
        ValueError, match=r"masked/.*000\.mp4' and '.*youtube/.*000\.mp4' are both called '.*/real/000'"
    ):
        check(found.videos, [], "tree")


def test_two_files_of_one_video_are_refused_naming_both(tmp_path):
    tree = faceforensics(tmp_path, "original_sequences/youtube/c23/videos/000.avi")
    with pytest.raises(ValueError, match=r"000\.avi' and '.*000\.mp4' are the same video"):
        find("faceforensics", tree)


def test_actors_are_people_and_their_fakes_belong_to_the_clip_they_are_made_of(tmp_path):
    actors = "original_sequences/actors/c23/videos/01__walking_outside.mp4"
    forged = "manipulated_sequences/deepfakedetection/c23/videos/01_02__walking_outside__YVGY8LOK.mp4"
    videos = by_id(find("faceforensics", faceforensics(tmp_path, actors, forged)))
    real, fake = videos["01__walking_outside"], videos["01_02__walking_outside__YVGY8LOK"]
    assert real.dataset == fake.dataset == "DeepFakeDetection" and real.split == fake.split == "test"
    assert real.twin == fake.twin == "01__walking_outside" and (real.people, fake.people) == (("01",), ("01", "02"))


# ------------------------------------------------------------------------------------------------------------ Celeb-DF


def test_celeb_df_as_frames_with_a_list_from_windows_is_celeb_df_as_videos(tmp_path):
    tree = celeb_df(tmp_path / "videos", identities=8, size=32, frames=2)
    expected = find("celeb_df", tree)
    frames = tmp_path / "frames"
    for path in tree.rglob("*.mp4"):
        touch(frames / path.parent.name / "frames" / path.stem, "0.png", "1.png")
    lines = (tree / "List_of_testing_videos.txt").read_text().replace("/", "\\").replace("\n", "\r\n")
    (frames / "List_of_testing_videos.txt").write_text("\ufeff" + lines, newline="")
    found = find("celeb_df", frames)
    assert {f"{name}.mp4": split for name, split in split_of(found).items()} == split_of(expected)
    assert Counter(split_of(found).values())["test"] == 5 and recognise(frames) == "celeb_df"
    fake = by_id(found)["Celeb-synthesis/id0_id1_0000"]
    assert (fake.twin, fake.people, len(fake.files["source"])) == ("id0_0000", ("id0", "id1"), 2)
    assert found.remarks == ["val is drawn from the training videos, seed 0"]
    assert len(unknown_people(found.videos)) == 1 and "of 3 of 19 videos" in unknown_people(found.videos)[0]


@pytest.mark.parametrize(
    ("folder", "lines", "name"),
    [("Celeb-DF", 518, "Celeb-DF-v2"), ("Celeb-DF-v1", 518, "Celeb-DF-v1"), ("celeb_df_v2", 9, "Celeb-DF-v2"),
     ("celeb", 100, "Celeb-DF")],
)  # fmt: skip
def test_the_version_of_celeb_df_is_what_its_folder_or_its_list_says(tmp_path, folder, lines, name):
    touch(
        tmp_path / folder, *(f"{kind}/id{i}_0000.mp4" for i in range(9) for kind in ("Celeb-real", "Celeb-synthesis"))
    )
    listed = "".join(f"1 YouTube-real/{i:05d}.mp4\n" for i in range(lines))
    (tmp_path / folder / "List_of_testing_videos.txt").write_text(listed)
    assert {video.dataset for video in find("celeb_df", tmp_path / folder).videos} == {name}


# ------------------------------------------------------------------------------------------------------- DeepfakeBench


def manifest(root, content, *frames):
    touch(root, *frames)
    path = root / "set.json"
    path.write_text(json.dumps(content))
    return path


def entry(label, *frames):
    return {"label": label, "frames": list(frames)}


def test_frames_that_are_not_on_disk_cost_themselves_and_videos_without_any_are_left_out(tmp_path):
    names = [f"f\\{video}\\{i}.png" for video in ("a", "b", "c") for i in (10, 9, 8)]
    content = {
        "set": {"x_real": {"train": {v: entry("x_real", *names[3 * i : 3 * i + 3]) for i, v in enumerate("abc")}}}
    }
    on_disk = [name.replace("\\", "/") for name in names if name not in ("f\\a\\9.png", *names[6:])]
    found = find("deepfakebench", manifest(tmp_path, content, *on_disk))
    videos = by_id(found)
    assert [p.name for p in videos["a"].files["source"]] == ["8.png", "10.png"] and set(videos) == {"a", "b"}
    assert said(found, "4 of 9 frames are not on disk") and said(found, "1 of 3 videos have no frame on disk")
    assert videos["b"].names[:3] == ("f/b", "set/real/b", "b")


def test_fakes_of_a_manifest_are_drawn_with_the_video_they_are_named_after(tmp_path):
    names = {"Real": [f"{i:04d}" for i in range(20)], "Fake": [f"{i:04d}_fake" for i in range(20)]}
    of_two = [f"{i:04d}_{i + 10:04d}" for i in range(10)]
    names["Fake"] += of_two
    content = {f"U_{kind}": {"train": {n: entry(f"U_{kind}", f"{kind}/{n}/0.png") for n in found}}
               for kind, found in names.items()}  # fmt: skip
    frames = [f"{kind}/{name}/0.png" for kind, found in names.items() for name in found]
    split = split_of(find("deepfakebench", manifest(tmp_path, {"U": content}, *frames)))
    assert all(split[name] == split[f"{name}_fake"] for name in names["Real"]) and set(split.values()) == {
        *sources.SPLITS
    }
    assert all(split[name] == split[real] for name in of_two for real in name.split("_"))


def test_qualities_of_a_manifest_are_aligned_by_frame(tmp_path):
    frames = {level: [f"{level}/000/{i}.png" for i in range(4)] for level in ("c23", "c40")}
    content = {"FF": {"FF-real": {"train": {lv: {"000": entry("FF-real", *names)} for lv, names in frames.items()}}}}
    found = find("deepfakebench", manifest(tmp_path, content, *frames["c23"][1:], *frames["c40"][:3]))
    (video,) = found.videos
    assert {lv: [p.name for p in files] for lv, files in video.files.items()} == {
        "source": ["1.png", "2.png"], "c40": ["1.png", "2.png"],
    }  # fmt: skip
    assert said(found, "2 frames are missing in some quality")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected {…} for the whole, got list"),
        ({"s": {"real": {"train": {"v": {"label": "real"}}}}}, r"the video 's/real/train/v': expected .* got {'label"),
        ({"s": {"real": {"train": {"v": {"frames": [1]}}}}}, r"the video 's/real/train/v': expected"),
        ({"s": {"real": {"train": {"v": entry("fake", "a.png")}}}}, r"expected a label like .*'real', got 'fake'"),
        ({"s": {"real": {"train": ["v"]}}}, "for 's/real/train', got list"),
        ({"s": {"real": {"later": {}}}}, "expected train, val or test, got 's/real/later'"),
        (
            {"s": {"real": {"train": {"v": entry("real", "no.png")}}}},
            "first frame 'no.png' and all others lie below none",
        ),
    ],
)
def test_an_entry_of_another_kind_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        find("deepfakebench", manifest(tmp_path, content))


def test_a_manifest_cannot_write_outside(tmp_path):
    content = {"s": {"real": {"train": {"../../up": entry("real", "a.png"), "b": entry("real", "a.png")}}}}
    found = find("deepfakebench", manifest(tmp_path, content, "a.png"))
    assert [video.video_id for video in found.videos] == ["b"]
    assert [reason for _, reason in found.refused] == ["its name 's/real/../../up' leads outside of a folder"]


# ---------------------------------------------------------------------------------------------------------------- DFDC


def test_dfdc_keeps_an_original_and_its_fakes_together_and_says_what_is_missing(tmp_path):
    tree = touch(dfdc(tmp_path, parts=2, originals=4, size=32, frames=2), "dfdc_train_part_1/unnamed.mp4")
    path = tree / "dfdc_train_part_0" / "metadata.json"
    more = {"gone.mp4": {"label": "REAL", "split": "train"}, "orphan.mp4": {"label": "fake", "original": None}}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    found = find("dfdc", touch(tree, "dfdc_train_part_0/orphan.mp4"))
    assert recognise(tree) == "dfdc" and len(found.videos) == 17
    videos = by_id(found)
    for part in (0, 1):
        for i in range(4):
            real, fake = (videos[f"dfdc_train_part_{part}/{kind}{part}{i}.mp4"] for kind in ("real", "fake"))
            assert (real.label, fake.label, real.twin, real.split) == (0, 1, fake.twin, fake.split)
    counts = Counter(video.split for video in found.videos if not video.label)
    assert counts == {"train": 5, "val": 1, "test": 2}
    for pattern in ("^1 videos are listed", "^1 videos are there but in no list", "^1 fakes name no original"):
        assert said(found, pattern)


def test_an_original_that_is_not_a_number_is_none(tmp_path):
    listed = {"a.mp4": {"label": "FAKE", "original": float("nan")}, "b.mp4": {"label": "FAKE", "original": "nan"}}
    touch(tmp_path, *listed).joinpath("metadata.json").write_text(json.dumps(listed))
    found = find("dfdc", tmp_path)
    assert [video.twin for video in found.videos] == ["a", "b"] and said(found, "^2 fakes name no original")


def test_a_metadata_file_of_another_kind_makes_no_dfdc(tmp_path):
    touch(tmp_path, "real/a.mp4", "fake/a.mp4").joinpath("metadata.json").write_text('{"name": "mine"}')
    assert recognise(tmp_path) == "folder"
    (tmp_path / "real" / "a.mp4").unlink(), (tmp_path / "real").rmdir()
    with pytest.raises(ValueError, match="expected a FaceForensics"):
        recognise(tmp_path)


def test_the_preview_of_dfdc_has_splits_and_people(tmp_path):
    listed = {}
    for person, part in ((1, "train"), (2, "train"), (3, "train"), (4, "test"), (5, "test")):
        listed[f"original_videos/{person}/{person}_A.mp4"] = {"label": "real", "set": part, "target_id": person}
        swapped = {1: 2, 2: 1, 3: 3, 4: 5, 5: 4}[person]
        made = {"label": "fake", "set": part, "target_id": person, "swapped_id": swapped}
        listed[f"method_A/{person}/{person}_{swapped}_A.mp4"] = made
    touch(tmp_path, *listed).joinpath("dataset.json").write_text(json.dumps(listed))
    found = find("dfdc", tmp_path)
    check(found.videos, list(sources.SPLITS), "preview")
    fake = by_id(found)["method_A/4/4_5_A.mp4"]
    assert (fake.manipulation, fake.split, fake.people) == ("method_A", "test", ("4", "5"))
    assert found.remarks == ["val is drawn from the training videos, seed 0"]


@pytest.mark.parametrize("made", [{"label": "MAYBE"}, {"split": "train"}, "FAKE", {"label": "FAKE", "split": "fold0"}])
def test_a_dfdc_entry_of_other_words_is_named(tmp_path, made):
    touch(tmp_path, "a.mp4").joinpath("metadata.json").write_text(json.dumps({"a.mp4": made}))
    with pytest.raises(ValueError, match=r"metadata\.json', 'a\.mp4': expected"):
        find("dfdc", tmp_path)


def test_what_is_no_source_is_told_what_would_be(tmp_path):
    for path in (tmp_path, touch(tmp_path, "set.zip") / "set.zip"):
        with pytest.raises(ValueError, match=r"expected a FaceForensics.*metadata\.json.*real/ and fake/.*\.csv"):
            recognise(path)
