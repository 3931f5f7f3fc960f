"""Splits that are drawn, in whole groups, and splits that are checked."""

from collections import Counter

import pytest

from training.data import sources
from training.data.sources import Draw, Video, check, splits


def make(label, number, twin, people=None, split=""):
    return Video("set", "fake" if label else "real", str(number), label, split, "source", {}, twin, people)


def drawn(videos, **draw):
    found, remarks = splits.complete(videos, Draw(**draw))
    return {video.key: video.split for video in found}, remarks


def test_drawn_splits_keep_groups_whole_have_both_classes_and_their_shares():
    videos = [make(label, f"{i}.{j}", str(i)) for i in range(40) for label in (0, 1) for j in range(1 + label)]
    found, remarks = drawn(videos)
    by_twin = {video.twin: set() for video in videos}
    for video in videos:
        by_twin[video.twin].add(found[video.key])
    assert all(len(names) == 1 for names in by_twin.values())
    assert remarks == ["val and test are drawn from all videos, seed 0"]
    counts = Counter((found[video.key], video.label) for video in videos)
    assert counts == {("train", 0): 28, ("train", 1): 56, ("val", 0): 4, ("val", 1): 8, ("test", 0): 8, ("test", 1): 16}
    assert drawn(videos)[0] == found and drawn(videos, seed=1)[0] != found


def test_the_least_set_has_both_classes_in_every_split():
    for seed in range(5):
        videos = [
            make(label, f"{i}.{j}", str(i)) for i in range(3) for label in (0, 1) for j in range(1 + 4 * i * label)
        ]
        found, _ = drawn(videos, seed=seed)
        assert {(split, key.split("/")[1]) for key, split in found.items()} == {
            (split, name) for split in sources.SPLITS for name in ("real", "fake")
        }


def test_where_everyone_is_swapped_with_everyone_fakes_that_mix_splits_are_left_out():
    people = [f"id{i}" for i in range(20)]
    videos = [make(0, f"{p}_{n}", f"{p}_{n}", (p,), "train") for p in people for n in range(3)]
    videos += [make(1, f"{p}_{q}", f"{p}_0", (p, q), "train") for p in people for q in people if p != q]
    videos.append(make(0, "tested", "tested", split="test"))
    found, remarks = splits.complete(videos, Draw(val_fraction=0.2))
    of = {split: {p for v in found if v.split == split for p in v.people or ()} for split in ("train", "val")}
    assert len(of["val"]) == 4 and len(of["train"]) == 16 and not of["train"] & of["val"]
    assert Counter(v.split for v in found if v.label) == {"train": 16 * 15, "val": 4 * 3}
    assert remarks == [
        "val is drawn from the training videos, seed 0",
        f"{2 * 4 * 16} fakes mix people of two drawn splits and are left out",
    ]
    check(found, ["train", "val"], "set")


@pytest.mark.parametrize("bad", [{"val_fraction": 0.0}, {"test_fraction": -1.0}, {"val_fraction": 0.9}])
def test_fractions_that_leave_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="val_fraction, test_fraction: expected above 0, and their sum below 1"):
        Draw(**bad)


def test_a_seed_below_zero_is_named():
    with pytest.raises(ValueError, match="seed: expected at least 0, got -1"):
        Draw(seed=-1)


def test_videos_of_nobody_known_are_counted_among_those_that_are_left():
    videos = [make(0, 1, "a", ("p",)), make(0, 2, "b"), make(1, 3, "c")]
    assert sources.unknown_people(videos[:1]) == []
    (remark,) = sources.unknown_people(videos)
    assert "of 2 of 3 videos" in remark


def test_what_belongs_together_in_two_splits_is_refused_naming_both():
    real, fake = make(0, 1, "a", split="train"), make(1, 2, "a", split="test")
    with pytest.raises(ValueError, match=r"'set/real/1' is in the split train and 'set/fake/2' in test.* original 'a'"):
        check([real, fake], [], "s")
    one, other = make(0, 1, "a", ("p",), "train"), make(0, 2, "b", ("p",), "val")
    with pytest.raises(ValueError, match=r"'set/real/2' in val, but they share the person 'p'; draw_val=true"):
        check([one, other], [], "s")
    with pytest.raises(ValueError, match="the split train has no fake videos"):
        check([real], ["train"], "s")
