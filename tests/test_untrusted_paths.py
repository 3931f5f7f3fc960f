"""Files from elsewhere lead to no others: paths in lists and configurations, links, and where results are written."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from untrusted import Even, picture

from training import evaluate, files, locks, predict, study, train
from training.config import Config
from training.data import crops, frames, images, manifest, sources
from training.data.sources.common import Video
from training.models import checkpoints


def benchmark(path: Path, frames: dict[str, list]) -> list[Video]:
    """The videos of a DeepfakeBench manifest, all real."""
    videos = {name: {"label": "real", "frames": list(map(str, listed))} for name, listed in frames.items()}
    videos |= {f"_{i}": videos[name] for i in range(3) for name in list(videos)[:1]}
    path.write_text(json.dumps({"set": {"real": {split: videos for split in ("train", "val", "test")}}}))
    found = sources.KINDS["deepfakebench"](path, sources.Draw()).videos
    return [video for video in found if video.split == "train" and not video.video_id.startswith("_")]


def test_what_a_list_leads_to_outside_of_the_source_is_not_read(tmp_path):
    secret, good = picture(tmp_path / "secret" / "x.png"), picture(tmp_path / "set" / "good" / "0.png")
    picture(tmp_path / "set-aside" / "x.png")
    (tmp_path / "set" / "linked.png").symlink_to(secret)
    (tmp_path / "set" / "folder").symlink_to(secret.parent)
    (tmp_path / "set" / "within.png").symlink_to(good)
    listed = {"good": ["good/0.png"], "within": ["within.png"], "up": ["../secret/x.png"], "whole": [secret]}
    listed |= {"aside": ["../set-aside/x.png"], "link": ["linked.png"], "folder": ["folder/x.png"]}
    listed |= {"among": ["good/0.png", "../secret/x.png"]}
    found = benchmark(tmp_path / "set" / "list.json", listed)
    assert [video.video_id for video in found] == list(listed)
    pairing = {"out": str(tmp_path / "out"), "detector": "none", "crfs": [40]}
    answers = {video.video_id: crops.prepare_video(video, crops.Pairing(**pairing)) for video in found}
    assert answers["good"] is None and answers["within"] is None
    for name in ("up", "aside", "whole", "link", "folder", "among"):
        assert "x.png" in answers[name] or "linked.png" in answers[name]
        assert answers[name].endswith(f"leads outside of {tmp_path / 'set'}; outside=true reads it")
    written = {path.parent.name for path in (tmp_path / "out").rglob("*.png")}
    assert written == {"good", "within"}
    assert crops.prepare_video(found[2], crops.Pairing(**pairing, outside=True)) is None


def test_the_frames_of_a_list_do_not_lie_below_the_root_of_all_files(tmp_path):
    secret = picture(tmp_path / "secret" / "x.png")
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="below none of the folders above"):
        benchmark(tmp_path / "a" / "b" / "list.json", {"v": [secret.relative_to("/")]})


@pytest.mark.parametrize("link", ["rows/set/real", "raw/set"])
def test_what_is_written_stays_below_out(tmp_path, link):
    found = Video("set", "real", "v", 0, "train", "raw", {"raw": picture(tmp_path / "in" / "0.png")}, "t")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / link).parent.mkdir(parents=True)
    (tmp_path / "out" / link).symlink_to(tmp_path / "elsewhere")
    found = Video(**{**vars(found), "files": {"raw": (tmp_path / "in" / "0.png",)}})
    reason = crops.prepare_video(found, crops.Pairing(out=str(tmp_path / "out"), detector="none", crfs=[40]))
    assert f"leads outside of {tmp_path / 'out'}" in reason and not any((tmp_path / "elsewhere").iterdir())


def test_a_manifest_takes_links_to_pictures_elsewhere_only_where_it_may(tmp_path):
    for name in ("0", "1"):
        picture(tmp_path / "set" / f"{name}.png")
    picture(tmp_path / "secret.png")
    (tmp_path / "set" / "link.png").symlink_to("../secret.png")
    (tmp_path / "set" / "inner.png").symlink_to("1.png")
    table = pandas.DataFrame({"path_compressed": ["0.png", "inner.png", "link.png"], "label": [0, 1, 1]})
    table.assign(split="test").to_csv(tmp_path / "set" / "pairs.csv", index=False)
    where = str(tmp_path / "set" / "pairs.csv")
    with pytest.raises(
        ValueError, match=r"path_compressed, row 3: expected pictures in the folder of the manifest .*link"
    ):
        manifest.read(where)
    assert len(manifest.read(where, outside=True)) == 3
    with pytest.raises(ValueError, match="row 3"):
        frames.read_manifest(where)


def test_a_run_from_elsewhere_does_not_say_where_the_embedded_set_is_made(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(evaluate, "read_embedded", lambda config: taken.append(config.cache))
    config = Config(cache=str(tmp_path / "foreign"))
    evaluate.embedded_set(config, None)
    evaluate.embedded_set(config, "mine")
    there = evaluate.embedded.file_of(frames.embedded_spec(config), config.cache)
    there.parent.mkdir()
    there.touch()
    evaluate.embedded_set(config, None)
    assert taken == [Config.cache, "mine", config.cache]


def test_links_in_a_folder_lead_to_no_prediction(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(picture(tmp_path / "secret.png"))
    (item,), _ = predict.items_of(str(tmp_path / "set"))
    (named,), _ = predict.items_of(str(tmp_path / "set" / "link.png"))
    looks = {outside: crops.Cropping(detector="none", outside=outside) for outside in (False, True)}
    with pytest.raises(files.BrokenFile, match=rf"link.png leads outside of {tmp_path}/set; outside=true reads it"):
        predict.Predictor(Even(), looks[False], 4)(item)
    answers = [predict.Predictor(Even(), looks[True], 4)(item), predict.Predictor(Even(), looks[False], 4)(named)]
    assert [str(answer) for answer in answers] == ["fake 0.500"] * 2


def test_the_configuration_of_a_run_from_elsewhere_leads_to_no_files(tmp_path, capsys, monkeypatch):
    run, secret = tmp_path / "run", tmp_path / "secret.safetensors"
    left_out = f"note: teacher_checkpoint {secret} lies neither in {run} nor in the current folder: left out\n"
    for path in (run / "none" / "model.safetensors", run / "t.safetensors", secret):
        files.write_text(path, "x")
    for given, outside, roles in ((secret, False, ["none"]), (secret, True, ["teacher", "none"])):
        files.write_text(run / "config.yaml", Config(teacher_checkpoint=str(given)).to_yaml())
        found = checkpoints.find_trained(run, outside=outside)
        assert [model.role for model in found] == roles
        said = capsys.readouterr().err
        assert said == ("" if outside else left_out)
    files.write_text(run / "config.yaml", Config(teacher_checkpoint=str(run / "t.safetensors")).to_yaml())
    assert len(checkpoints.find_trained(run)) == 2

    for where in ("/dev/zero", f"{run}/../pairs", f"{run}/a.csv,{secret}"):
        model = replace(checkpoints.find_trained(run / "none")[0], config=Config(manifest=where))
        with pytest.raises(ValueError, match=r"neither in it nor in the current folder; if it is yours: manifest="):
            evaluate.own_manifest(model, outside=False)
        assert evaluate.own_manifest(model, outside=True) == where
    inner = replace(model, config=Config(manifest=f"{run}/a.csv, {run}/b.csv"))
    assert evaluate.own_manifest(inner, outside=False) == inner.config.manifest
    assert evaluate.own_manifest(replace(model, config=Config()), outside=False) is None

    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")  # whose runs name what lies beside them
    mine = replace(model, config=Config(manifest="pairs,more/manifest.parquet"))
    assert evaluate.own_manifest(mine, outside=False) == mine.config.manifest
    files.write_text(run / "config.yaml", Config(teacher_checkpoint="teacher.safetensors").to_yaml())
    files.write_text(Path("teacher.safetensors"), "x")
    assert [model.role for model in checkpoints.find_trained(run)] == [
        "teacher",
        "none",
    ] and not capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- written


def test_a_link_of_the_name_that_is_written_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    writers = {
        "a.txt": lambda path: files.write_text(path, "a"),
        "b.png": lambda path: images.write_png(path, np.zeros((8, 8, 3), np.uint8)),
        "c.parquet": lambda path: manifest.write(path, [{"a": 1}]),
    }
    for name, write in writers.items():
        (tmp_path / name).symlink_to(tmp_path / "secret")
        write(tmp_path / name)
        assert not (tmp_path / name).is_symlink() and (tmp_path / "secret").read_text() == "secret", name
    (tmp_path / ".lock").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match=r"\.lock cannot be written"), locks.only_one(tmp_path / ".lock", "it"):
        pass
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_link_in_the_place_of_a_crop_is_not_followed(tmp_path):
    video = Video("set", "real", "v", 0, "train", "raw", {"raw": (picture(tmp_path / "in" / "0.png"),)}, "t")
    (tmp_path / "secret").write_text("secret")
    for level in ("raw", "c40"):
        (crop := tmp_path / "out" / level / "set" / "real" / "v" / "000000.png").parent.mkdir(parents=True)
        crop.symlink_to(tmp_path / "secret")
    assert crops.prepare_video(video, crops.Pairing(out=str(tmp_path / "out"), detector="none", crfs=[40])) is None
    assert (tmp_path / "secret").read_text() == "secret" and images.read(crop).shape == (128, 128, 3)


def test_annotations_lie_below_the_folder_that_was_named(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "up").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}/out/up leads outside of {tmp_path}/out$"):
        predict.annotate(None, None, tmp_path / "out" / "up" / "a.png", tmp_path / "out")


def linked(folder: Path) -> None:
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "up").symlink_to(folder.parent)


def piped(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "up")


@pytest.mark.parametrize(("spoil", "said"), [(linked, "a/up leads outside of"), (piped, "a pipe or a device")])
def test_no_command_goes_on_in_a_folder_that_leads_elsewhere(tmp_path, capsys, monkeypatch, spoil, said):
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / "embedded")
    words = {
        train: ["--resume", f"out={tmp_path}"],
        study: ["name=embedded", f"out={tmp_path}"],
    }
    for command, given in words.items():
        assert command.main(given) == 2
        assert said in capsys.readouterr().err, command
    files.check_folder(tmp_path / "none")


def test_links_within_a_folder_are_nobodys_harm(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("missing")
    (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
    files.check_folder(tmp_path.parent / f"{tmp_path.name}-link")
