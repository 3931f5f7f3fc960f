"""The embedded set: real photographs, forged twins, H.264, the same at every build."""

from dataclasses import replace

import numpy as np
import pytest

from training.data import embedded, video

SPEC = embedded.EmbeddedSpec(train_clips=8, val_clips=6, test_clips=8, size=32, clip_length=4)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return embedded.build(SPEC, tmp_path_factory.mktemp("cache"))


def test_embedded_set(built):
    with np.load(built) as arrays:
        arrays = dict(arrays)
    for split, count in (("train", 16), ("val", 6), ("test", 8)):
        raw, c23, c40 = (arrays[f"{split}_{kind}"] for kind in ("raw", "c23", "c40"))
        assert raw.shape == c23.shape == c40.shape == (count, 32, 32, 3) and raw.dtype == np.uint8
        errors = [np.abs(raw.astype(int) - image).mean() for image in (c23, c40)]
        assert 0 < errors[0] < errors[1] < 40, "stronger compression, larger error"
        assert arrays[f"{split}_label"].mean() == 0.5
        for source in np.unique(arrays[f"{split}_source"]):
            real, fake = (raw[(arrays[f"{split}_source"] == source) & (arrays[f"{split}_label"] == k)] for k in (0, 1))
            changed = (real != fake).any(-1).mean((1, 2))
            assert len(real) and (changed > 0).all() and (changed < 0.5).all(), "twins differ by the forgery only"


def test_embedded_set_is_reproduced_and_cached(built, tmp_path):
    again = embedded.build(SPEC, tmp_path)
    with np.load(built) as first, np.load(again) as second:
        assert all(np.array_equal(first[name], second[name]) for name in first.files)
    written = again.stat().st_mtime_ns
    assert embedded.build(SPEC, tmp_path) == again and again.stat().st_mtime_ns == written
    assert embedded.build(replace(SPEC, seed=1), tmp_path) != again
    assert len(list(tmp_path.iterdir())) == 2, "temporary files were left behind"


def test_photographs_do_not_cross_splits_and_lie_in_the_wheels():
    names = [name for split in embedded.SPLITS for name in embedded.PHOTOGRAPHS[split]]
    assert len(names) == len(set(names)) >= 15
    assert all(min(embedded.load_photograph(name).size) >= 300 for name in {*names, *embedded.FOLDED})


@pytest.mark.parametrize("count", [2, 3, 5, 15])
def test_folds_test_every_photograph_once_but_those_that_validate(count):
    specs = [replace(SPEC, fold=(number, count)) for number in range(count)]
    tested = [name for spec in specs for name in spec.photographs("test")]
    known = {name for split in embedded.SPLITS for name in embedded.PHOTOGRAPHS[split]}
    assert sorted(tested) == sorted(set(tested)) and set(tested) >= known - set(embedded.PHOTOGRAPHS["val"])
    for spec in specs:
        train, val, test = (set(spec.photographs(split)) for split in embedded.SPLITS)
        assert val == set(embedded.PHOTOGRAPHS["val"]) and train | test == set(tested)
        assert not train & test and not val & (train | test)
    scenes = [name.partition("_")[0] for name in (*tested, *embedded.PHOTOGRAPHS["val"]) if "motorcycle" in name]
    assert len(scenes) == 1, "the two motorcycles are one scene"
    assert len({spec.digest() for spec in (*specs, SPEC)}) == count + 1


def test_a_fold_has_the_clips_of_its_photographs(tmp_path):
    small = replace(SPEC, train_clips=2, val_clips=2, test_clips=4)
    parts = []
    for fold in (None, (1, 5), (2, 5)):
        with np.load(embedded.build(replace(small, fold=fold), tmp_path)) as arrays:
            parts.append(arrays["test_raw"])
            assert arrays["test_photograph"].tolist() == [0, 0, 1, 1]
    assert not any(np.array_equal(a, b) for a, b in zip(parts, [*parts[1:], parts[0]], strict=True))
    with pytest.raises(ValueError, match=r"fold: expected \(i, k\) with 0 <= i < k and 2 <= k <= 15, got \(5, 5\)"):
        embedded.build(replace(small, fold=(5, 5)), tmp_path)


def test_forgery_is_local():
    rng = np.random.default_rng(0)
    canvas = rng.uniform(0, 255, (74, 74, 3)).astype(np.float32)
    for _ in range(20):
        changed = np.abs(embedded.forge(canvas, embedded.EmbeddedSpec(), rng) - canvas).max(-1) > 1e-3
        assert 0.01 < changed.mean() < 0.35
        assert not changed[[0, -1]].any() and not changed[:, [0, -1]].any()


def test_h264_keeps_order_and_is_deterministic():
    clip = np.stack([np.full((32, 48, 3), 40 * i, np.uint8) for i in range(6)])
    decoded = video.compress(clip, 30)
    assert np.abs(decoded.astype(int) - clip).max() < 12
    assert np.array_equal(decoded, video.compress(clip, 30))
