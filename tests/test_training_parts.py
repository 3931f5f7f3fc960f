"""Configuration, data and metrics of the training folder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from training import data, metrics, synthetic
from training.config import DEFAULT, Config, load, parse
from training.study import StudyConfig
from training.train import main

CONFIGS = sorted(DEFAULT.parent.glob("*.yaml"))
SPEC = synthetic.EmbeddedSpec(train_clips=8, val_clips=6, test_clips=8, size=32, clip_length=4)


# ------------------------------------------------------------------------------------------------------- configuration


def test_overrides_in_both_spellings():
    config = parse(["lr=1e-4", "--epochs", "7", "students=[add]", "manifest=null", "--seed=3", "--resume"])
    assert (config.lr, config.epochs, config.students, config.manifest) == (1e-4, 7, ["add"], None)
    assert config.seed == 3 and config.resume
    assert parse([]).name == "embedded"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations(path, tmp_path):
    kind = StudyConfig if path.stem == "study" else Config
    config = parse(["--config", str(path)], kind)
    assert config.name == path.stem
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "saved.yaml", kind) == parse(["--config", str(tmp_path / "saved.yaml")], kind) == config


def test_paper_numbers_of_resnet50():
    config = parse(["--config", str(DEFAULT.with_name("resnet50_ffpp_c40.yaml")), "lr=5"])
    assert (config.image_size, config.batch_size, config.epochs, config.warmup_epochs) == (128, 144, 32, 3)
    assert config.frequency_weights == [0, 1, 2, 0.25] and config.multi_view_weights == [0, 0.5, 2.5, 2]
    assert (config.views, config.attention_gamma, config.contrast, config.margin) == (12, 100, 50, 0.012)
    assert config.multi_view_scale == 16 and config.lr == 5, "a later argument overrides the file"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lrr=1"], "unknown key 'lrr' in the command line; did you mean 'lr'?"),
        (["--epoch", "2"], "did you mean 'epochs'"),
        (["epochs=two"], "epochs"),
        (["epochs=0"], "epochs: expected at least 1, got 0"),
        (["distance=l3"], "distance"),
        (["frequency_weights=[1, 2]"], "expected four weights"),
        (["--config", "nowhere.yaml"], "no file 'nowhere.yaml'"),
        (["students=[add, add]"], "different distillers"),
    ],
)
def test_bad_words_are_named(words, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse(words)


def test_unknown_key_in_a_file_names_the_nearest(tmp_path):
    (tmp_path / "bad.yaml").write_text("batchsize: 3\n")
    with pytest.raises(ValueError, match=r"'batchsize' in .*bad.yaml; did you mean 'batch_size'"):
        parse(["--config", str(tmp_path / "bad.yaml")])


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for key in Config.__dataclass_fields__:
        explanation = text.partition(f" --{key} ")[2].partition(" ")[2]
        assert explanation and not explanation.startswith("(type"), key
    assert "sharpness γ of the frequency attention map" in text


def test_errors_reach_the_user_in_one_line():
    with pytest.raises(SystemExit, match=r"^error: unknown key 'lrr'"):
        main(["lrr=1"])
    with pytest.raises(SystemExit, match=r"^error: students: unknown"):
        main(["students=[magic]"])


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return synthetic.build(SPEC, tmp_path_factory.mktemp("cache"))


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
    again = synthetic.build(SPEC, tmp_path)
    with np.load(built) as first, np.load(again) as second:
        assert all(np.array_equal(first[name], second[name]) for name in first.files)
    written = again.stat().st_mtime_ns
    assert synthetic.build(SPEC, tmp_path) == again and again.stat().st_mtime_ns == written
    assert synthetic.build(replace(SPEC, seed=1), tmp_path) != again
    assert len(list(tmp_path.iterdir())) == 2, "temporary files were left behind"


def test_photographs_do_not_cross_splits_and_lie_in_the_wheels():
    names = [name for split in synthetic.SPLITS for name in synthetic.PHOTOGRAPHS[split]]
    assert len(names) == len(set(names)) >= 15
    assert all(min(synthetic.load_photograph(name).size) > 150 for name in names)


def test_forgery_is_local():
    rng = np.random.default_rng(0)
    canvas = rng.uniform(0, 255, (74, 74, 3)).astype(np.float32)
    for _ in range(20):
        changed = np.abs(synthetic.forge(canvas, synthetic.EmbeddedSpec(), rng) - canvas).max(-1) > 1e-3
        assert 0.01 < changed.mean() < 0.35
        assert not changed[[0, -1]].any() and not changed[:, [0, -1]].any()


def test_h264_keeps_order_and_is_deterministic():
    clip = np.stack([np.full((32, 48, 3), 40 * i, np.uint8) for i in range(6)])
    decoded = synthetic.compress(clip, 30)
    assert np.abs(decoded.astype(int) - clip).max() < 12
    assert np.array_equal(decoded, synthetic.compress(clip, 30))


def pairs(count=64, size=8):
    raw = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return data.Split(raw, 255 - raw, np.arange(count) % 2, np.arange(count) // 2, np.arange(count) // 2)


def test_one_flip_per_pair():
    split = pairs()
    dataset, flips = data.PairDataset(split, 8, seed=1, flip=True), []
    for index in range(len(split)):
        item = dataset[5, index]
        assert torch.equal(item["compressed"], 255 - item["raw"]), "both images of a pair must be flipped alike"
        flips.append(not np.array_equal(item["raw"].numpy(), split.raw[index]))
        assert np.array_equal(item["raw"].numpy(), split.raw[index][:, ::-1] if flips[-1] else split.raw[index])
    assert 0.3 < np.mean(flips) < 0.7
    plain = data.PairDataset(split, 8, seed=1)
    assert all(np.array_equal(plain[5, i]["raw"].numpy(), split.raw[i]) for i in range(len(split)))


def _batches(config, **where):
    loader = data.training_loader(pairs(), config, **(dict(epoch=0, start=0, rank=0, world=1) | where))
    return [(batch["index"].tolist(), batch["raw"]) for batch in loader]


def test_order_depends_on_seed_and_epoch_only():
    config = Config(batch_size=8, image_size=8)
    whole = _batches(config)
    state = torch.get_rng_state()
    with_workers = _batches(replace(config, workers=2))
    assert torch.equal(state, torch.get_rng_state()), "a loader must not touch the global generator"
    resumed = _batches(config, start=24)
    for one, other in ((whole, with_workers), (whole[3:], resumed)):
        assert len(one) == len(other)
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))
    assert sorted(index for indices, _ in whole for index in indices) == list(range(64))
    assert whole[0][0] != _batches(config, epoch=1)[0][0] != _batches(replace(config, seed=9), epoch=1)[0][0]
    assert all({index ^ 1 for index in indices} == set(indices) for indices, _ in whole), "twins share a batch"
    shares = [[i for indices, _ in _batches(config, rank=rank, world=2) for i in indices] for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(64)), "processes share the samples without overlap"


def test_pixels_are_normalised():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 3, 2).permute(0, 1, 2, 3)
    images = torch.cat([images, images[..., :1]], dim=3)
    result = data.pixels(images, torch.device("cpu"))
    assert result.shape == (1, 3, 3, 3) and result.is_contiguous(memory_format=torch.channels_last)
    assert result[0, 0].eq(-1).all() and result[0, 1].eq(1).all()


def manifest(
    folder: Path, rows: list[tuple], columns="path_raw,path_compressed,label,split,compression,video_id"
) -> str:
    for row in rows:
        for name in row[:2]:
            Image.fromarray(np.full((10, 12, 3), 7, np.uint8)).save(folder / name)
    (folder / "pairs.csv").write_text("\n".join([columns, *(",".join(map(str, row)) for row in rows)]))
    return str(folder / "pairs.csv")


ROWS = [
    ("a.png", "b.png", i % 2, split, level, f"{split}{i}")
    for split in ("train", "val", "test")
    for i in range(2)
    for level in ("c23", "c40")
]


def test_manifest(tmp_path):
    config = Config(manifest=manifest(tmp_path, ROWS), compression="c40", image_size=16)
    splits = data.load_splits(config)
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "val": 2, "test": 2}
    item = data.PairDataset(splits["val"], 16)[0, 1]
    assert item["raw"].shape == (16, 16, 3) and item["label"] == 1
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(OSError, match=r"cannot read the image .*b.png"):
        data.PairDataset(splits["val"], 16)[0, 1]


def test_bad_manifests_are_refused(tmp_path):
    path = manifest(tmp_path, ROWS)
    with pytest.raises(ValueError, match=r"has \['c23', 'c40'\], got 'c30'"):
        data.load_splits(Config(manifest=path, compression="c30"))
    crossing = [*ROWS, ("a.png", "b.png", 0, "test", "c40", "train0")]
    with pytest.raises(ValueError, match=r"more than one split: \['train0'\]"):
        data.load_splits(Config(manifest=manifest(tmp_path, crossing), compression="c40"))
    with pytest.raises(ValueError, match="no rows of split 'val'"):
        data.load_splits(Config(manifest=manifest(tmp_path, ROWS[:4]), compression="c40"))
    with pytest.raises(ValueError, match=r"missing .'label'"):
        data.load_splits(
            Config(manifest=manifest(tmp_path, [("a.png", "b.png", "val")], "path_raw,path_compressed,split"))
        )
    with pytest.raises(ValueError, match="no file"):
        data.load_splits(Config(manifest=str(tmp_path / "none.csv")))


# ------------------------------------------------------------------------------------------------------------- metrics


def outcome(scores, labels, hits=None):
    labels = np.array(labels)
    return metrics.Outcome(
        np.array(scores, float), labels, np.arange(len(labels)), None if hits is None else np.array(hits)
    )


def test_metrics_by_hand():
    values = metrics.compute(outcome([0.9, 0.8, 0.3, 0.6, 0.2, 0.1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 1]))
    assert values["accuracy"] == pytest.approx(4 / 6)
    assert values["auc"] == pytest.approx(8 / 9)
    assert values["ap"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert values["eer"] == pytest.approx(1 / 3)
    assert values["precision"] == values["recall"] == values["f1"] == pytest.approx(2 / 3)
    # Confidences .9 .8 .7 .6 .8 .9, right except the third and fourth; equal ones share a bin.
    assert values["ece"] == pytest.approx((2 * 0.1 + 2 * 0.2 + 0.7 + 0.6) / 6, abs=1e-6)
    assert values["recall_at_1"] == pytest.approx(4 / 6)


def test_undefined_metrics_are_nan_and_do_not_crash():
    for labels in ([0, 0, 0], [1, 1, 1]):
        one_class = outcome([0.1, 0.2, 0.3], labels)
        values = metrics.compute(one_class)
        assert np.isnan([values["auc"], values["eer"], values["precision"], values["recall_at_1"]]).all()
        assert not np.isnan([values["accuracy"], values["ece"]]).any()
        table = metrics.summary({"m": one_class}, 20)["m"]
        assert np.isnan(table["auc"]["low"]) and table["accuracy"]["low"] <= table["accuracy"]["value"]


@pytest.mark.parametrize("decimals", [1, 6])  # with and without ties
def test_bootstrap_formulas_equal_the_libraries(decimals):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    scores = np.clip(np.round(rng.normal(0.4 + 0.2 * labels, 0.2), decimals) + 1e-4, 0, 0.9999)
    result = outcome(scores, labels, rng.random(200) < 0.6)
    counts = rng.multinomial(200, np.full(200, 1 / 200), size=5)
    answers = metrics.weighted(result, np.concatenate([np.ones((1, 200)), counts]).astype(float))
    for row, count in enumerate([np.ones(200, int), *counts]):
        drawn = np.repeat(np.arange(200), count)
        expected = metrics.compute(metrics.Outcome(scores[drawn], labels[drawn], drawn, result.hits[drawn]))
        for name in metrics.METRICS:
            assert answers[name][row] == pytest.approx(expected[name], abs=1e-5), name  # the library's ECE is float32


def test_interval_covers_and_shrinks():
    rng = np.random.default_rng(0)
    found, widths = [], {100: [], 400: []}
    for count in [100, 400] * 20:
        labels = rng.permutation(np.arange(count) % 2)
        low, high = metrics.interval(metrics.bootstrap(outcome(rng.normal(labels, 1.0), labels), 100)["auc"])
        found.append(low < 0.7602 < high)  # Φ(1/√2), the AUC of two unit normals one apart
        widths[count].append(high - low)
    assert np.mean(found) > 0.8
    assert np.mean(widths[100]) / np.mean(widths[400]) == pytest.approx(2, rel=0.2), (
        "a quarter of the samples, twice as wide"
    )


def test_bootstrap_resamples_groups():
    labels = np.tile([0, 1], 50)
    scores = np.random.default_rng(0).random(100)
    frames = metrics.Outcome(np.repeat(scores, 9), np.repeat(labels, 9), np.repeat(np.arange(100), 9))
    clips = outcome(scores, labels)
    assert metrics.interval(metrics.bootstrap(frames, 200)["auc"]) == pytest.approx(
        metrics.interval(metrics.bootstrap(clips, 200)["auc"])
    )


def test_paired_difference():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    scores = 1 / (1 + np.exp(-rng.normal(labels, 1)))
    same = metrics.difference(outcome(scores, labels), outcome(scores, labels), 50)["auc"]
    assert same == {"value": 0, "low": 0, "high": 0}
    better = metrics.difference(outcome(np.where(labels, 0.9, 0.1), labels), outcome(scores, labels), 50)["auc"]
    assert better["value"] == pytest.approx(1 - roc_auc_score(labels, scores)) and better["low"] > 0
    with pytest.raises(ValueError, match="same samples"):
        metrics.difference(outcome(scores, labels), outcome(scores, 1 - labels), 5)


def test_nearest_neighbour_hits():
    gallery, labels = np.array([[0.0, 0], [10, 0]]), np.array([0, 1])
    hits = metrics.nearest_neighbour_hits(np.array([[1.0, 1], [9, 0], [8, 0]]), np.array([0, 1, 0]), gallery, labels)
    assert hits.tolist() == [True, True, False]


def test_equal_error_rate_interpolates():
    assert metrics.equal_error_rate(np.array([0, 1.0]), np.array([0, 1.0])) == pytest.approx(0.5)
    assert metrics.equal_error_rate(np.array([0, 0, 1.0]), np.array([0, 1.0, 1.0])) == pytest.approx(0)
    assert metrics.equal_error_rate(*roc_curve([0, 1, 0, 1], [0.1, 0.4, 0.35, 0.8])[:2]) == pytest.approx(0)
    assert average_precision_score([0, 1], [0.1, 0.9]) == 1
