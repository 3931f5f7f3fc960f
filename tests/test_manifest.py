"""The table of pairs: what is read from it, what is found wrong before any training, and sets in shards."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest

from training.data import frames, images, manifest
from training.data.sources import Video

SPLITS = ("train", "val", "test")


def table_of(folder: Path) -> pandas.DataFrame:
    """One real and one fake frame per split in c23 and c40, as the least table; empty files stand for its pictures."""
    rows = []
    for split in SPLITS:
        for label in (0, 1):
            for level in ("c23", "c40"):
                names = [f"{quality}/{split}{label}.png" for quality in ("raw", level)]
                rows.append((*names, label, split, level))
                for name in names:
                    (folder / name).parent.mkdir(exist_ok=True, parents=True)
                    (folder / name).touch()
    return pandas.DataFrame(rows, columns=[*manifest.COLUMNS, "compression"])


def saved(table: pandas.DataFrame, folder: Path, **options) -> str:
    table.to_csv(folder / "pairs.csv", **{"index": False} | options)
    return str(folder / "pairs.csv")


def test_the_least_table_and_what_it_does_not_say(tmp_path):
    rows = table_of(tmp_path).drop(columns="compression").iloc[::2]
    table = manifest.read(where := saved(rows, tmp_path))
    assert table["path_raw"].tolist() == [str(tmp_path / name) for name in rows["path_raw"]]
    assert table["path_compressed"].tolist() == [str(tmp_path / name) for name in rows["path_compressed"]]
    assert table["label"].tolist() == [0, 1] * 3 and table["label"].dtype == np.int64
    assert table["split"].tolist() == [split for split in SPLITS for _ in range(2)]
    for column, value in (("compression", "compressed"), ("dataset", "pairs"), ("reference", "raw")):
        assert set(table[column]) == {value}
    assert table["manipulation"].tolist() == ["real", "fake"] * 3
    assert table["video_id"].is_unique and table["twin"].is_unique
    assert table.attrs["where"] == where
    manifest.check_for_training(table, ["compressed"])


def test_what_a_table_says_is_kept(tmp_path):
    rows = table_of(tmp_path).assign(video_id="000", dataset="001", reference="source", frame=7, sha256_raw="ab")
    rows = rows.assign(manipulation=rows["path_raw"], twin=[f"t{i}" for i in range(12)])
    rows.loc[3, "twin"] = ""
    rows.columns = [column.title() for column in rows]
    rows["Label"], rows["Split"] = rows["Label"].map({0: "REAL", 1: "Fake"}), rows["Split"].replace("val", "Valid")
    table = manifest.read(saved(rows, tmp_path, sep=";", encoding="utf-16"))
    assert set(table["video_id"]) == {"000"} and set(table["dataset"]) == {"001"}
    assert table["label"].tolist() == [0, 0, 1, 1] * 3 and set(table["split"]) == set(SPLITS)
    assert table["frame"].tolist() == ["7"] * 12 and table["sha256_raw"].tolist() == ["ab"] * 12
    assert table["twin"].tolist()[:5] == ["t0", "t1", "t2", str(tmp_path / "raw/train1.png"), "t4"]
    manifest.check_for_training(table, ["c40"])


def test_paths_lead_from_the_folder_of_the_table(tmp_path, monkeypatch):
    rows = table_of(tmp_path / "set")
    (tmp_path / "tables").mkdir()
    (tmp_path / "set" / "raw" / "é").mkdir()
    (tmp_path / "set" / "raw" / "é" / "x y.png").touch()
    raw = ["../set/" + rows["path_raw"][0], str(tmp_path / "set" / rows["path_raw"][1]), "..\\set\\raw\\é\\x y.png"]
    rows = rows[:3].assign(path_raw=raw, path_compressed="../set/c40/test0.png", label=0)
    monkeypatch.chdir(tmp_path / "tables")
    expected = ["../set/raw/train0.png", str(tmp_path / "set/raw/train0.png"), "../set/raw/é/x y.png"]
    for where, encoding in ((saved(rows, Path(), encoding="cp1252"), "cp1252"), (saved(rows, tmp_path / "tables"), "")):
        with pytest.raises(ValueError, match=r"path_raw, rows 1–3: expected pictures in the folder of the manifest"):
            manifest.read(where)
        found = manifest.read(where, outside=True)["path_raw"]
        whole = expected if encoding else [os.path.join(tmp_path / "tables", name) for name in expected]
        assert found.tolist() == whole and all(map(os.path.isfile, found))
    monkeypatch.chdir(tmp_path / "set")
    rows.assign(path_raw="./raw//train0.png").to_csv("here.csv")
    assert set(manifest.read("here.csv")["path_raw"]) == {"raw/train0.png"}
    (tmp_path / "set" / "odd\\name.png").touch()
    rows.assign(path_raw="odd\\name.png").to_csv("here.csv")
    assert set(manifest.read("here.csv")["path_raw"]) == {"odd\\name.png"}


def test_equal_rows_are_taken_once(tmp_path):
    rows = table_of(tmp_path)
    again = rows.assign(path_raw=[f"./{name}" for name in rows["path_raw"]])
    whole = manifest.read(saved(rows, tmp_path))
    assert manifest.read(saved(pandas.concat([rows, again, rows]), tmp_path, index=True)).equals(whole)


def test_several_tables_are_one(tmp_path):
    rows = table_of(tmp_path).assign(dataset="d")
    whole = manifest.read(saved(rows, tmp_path))
    rows[:5].to_parquet(tmp_path / "a.parquet")
    rows[5:].to_csv(tmp_path / "b.csv", index=False)
    assert manifest.read(f"{tmp_path / 'a.parquet'}, {tmp_path / 'b.csv'}").equals(whole)
    os.rename(tmp_path / "b.csv", tmp_path / "a,b.csv")
    assert len(manifest.read(str(tmp_path / "a,b.csv"))) == 7, "a file whose own name has a comma"
    with pytest.raises(ValueError, match=r"^manifest: no file 'b.csv'$"):
        manifest.read(f"{tmp_path / 'a.parquet'},b.csv")


def test_all_that_is_wrong_is_listed_with_its_rows(tmp_path):
    rows = table_of(tmp_path).assign(video_id="v", manipulation=lambda t: t["path_raw"]).astype(object)
    rows.loc[[0, 5], "label"] = ["maybe", None]
    rows.loc[[1, 2, 3], "split"] = "holdout"
    rows.loc[4, "path_raw"], rows.loc[[6, 7], "path_raw"] = "raw", "absent.png"
    rows.loc[[2, 8], "path_compressed"] = rows.loc[9, "video_id"] = None
    rows.loc[[10, 11], "label"] = [0, 1]
    with pytest.raises(ValueError, match="manifest") as error:
        manifest.read(where := saved(rows, tmp_path))
    assert str(error.value).split("\n  ") == [
        f"manifest {where}: 8 problems",
        f"path_raw, rows 7–8: expected a picture, found nothing at '{tmp_path}/absent.png'",
        f"path_raw, row 5: expected a picture, found a folder at '{tmp_path}/raw'",
        "path_compressed, rows 3, 9: empty",
        "label, row 6: empty",
        "label, row 1: expected 0 or real, 1 or fake (true may mean either), got 'maybe'",
        "split, rows 2–4: expected train, val or test, got 'holdout'",
        "video_id, row 10: empty, though other rows have it",
        f"path_raw: pictures with two labels: '{tmp_path}/raw/test1.png'",
    ]


def test_rows_are_those_of_the_file_they_are_in(tmp_path):
    rows = table_of(tmp_path)
    rows[:6].to_csv(tmp_path / "a.csv", index=False)
    rows[6:].assign(label=[2, 0, 0, 1, 1, 1], path_raw="x.png").drop(columns="split").to_csv(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="3 problems") as error:
        manifest.read(f"{tmp_path / 'a.csv'},{tmp_path / 'b.csv'}")
    message = str(error.value)
    assert f"\n  {tmp_path / 'b.csv'}: path_raw, rows 1–6: expected a picture" in message
    assert f"\n  {tmp_path / 'b.csv'}: label, row 1: expected 0" in message
    assert re.search(
        r"b\.csv: columns: expected .*, missing \['split'\], got 'path_raw', 'path_compressed', 'lab", message
    )


def test_missing_columns_name_the_nearest(tmp_path):
    rows = table_of(tmp_path).rename(columns={"path_raw": "raw_path", "label": "labels", "split": "filename"})
    with pytest.raises(ValueError, match=r"missing \['label', 'split'\], got 'raw_path', ") as error:
        manifest.read(saved(rows, tmp_path))
    assert "'labels' is near 'label'" in str(error.value)
    assert str(error.value).endswith("columns: expected 'path_raw', or no column of raw pictures, got 'raw_path'")


def test_rows_without_a_raw_twin(tmp_path):
    rows = table_of(tmp_path)
    rows.loc[[0, 1, 5], "path_raw"] = ["", "NaN", None]
    rows.loc[2, ["path_raw", "compression"]] = ["", "raw"]
    for table in (
        manifest.read(saved(rows, tmp_path)),
        manifest.read(saved(rows.assign(reference=["", *["raw"] * 11]), tmp_path)),
    ):
        assert table["path_raw"].iloc[[0, 1, 5]].tolist() == [""] * 3 and (table["path_raw"] == "").sum() == 3
        assert table["path_raw"][2] == table["path_compressed"][2], "what is raw is its own raw twin"
        assert table["reference"].tolist() == ["", "", "raw", "raw", "raw", "", *["raw"] * 6]
        for column in ("video_id", "twin"):
            shared = table["path_compressed"].str.replace("/c23/", "/").str.replace("/c40/", "/")
            own = table["path_raw"].where(table["path_raw"] != "", shared)
            assert table[column].tolist() == own.tolist()
    table = manifest.read(saved(rows.drop(columns="path_raw"), tmp_path))
    assert (table["path_raw"] == "").sum() == 11 and len(table) == 12
    (tmp_path / "parquet").mkdir()
    rows.assign(path_raw=None).to_parquet(tmp_path / "pairs.parquet")
    assert (manifest.read(str(tmp_path / "pairs.parquet"))["path_raw"] == "").sum() == 11
    both = rows.assign(path_compressed=["c23/train0.png", "c40/train0.png"] * 6)
    with pytest.raises(ValueError, match="path_compressed: pictures with two labels") as error:
        manifest.read(saved(both, tmp_path))
    assert "path_raw" not in str(error.value), "to have none is nothing in common"


def test_what_may_not_be_in_two_splits(tmp_path):
    rows = table_of(tmp_path).assign(dataset="FF", manipulation=list("rrff") * 3, video_id=list("000011112222"))
    manifest.read(saved(rows, tmp_path))  # the id of a video exists once per manipulation
    crossing = rows.assign(video_id="7")
    with pytest.raises(ValueError, match=r"^manifest .*: split: videos in more than one split: 'FF/r/7', 'FF/f/7'$"):
        manifest.read(saved(crossing, tmp_path))
    rows.loc[8, "path_raw"] = rows.loc[0, "path_raw"]
    with pytest.raises(ValueError, match=r": path_raw: pictures in more than one split: '.*raw/train0.png'$"):
        manifest.read(saved(rows, tmp_path))


def test_real_and_fake_that_are_called_alike_are_refused(tmp_path):
    rows = table_of(tmp_path).assign(dataset="FF", manipulation="DF", video_id=[f"{i // 4}" for i in range(12)])
    with pytest.raises(ValueError, match=r"called alike, expected another manipulation or video_id: 'FF/DF/0', 'FF/DF"):
        manifest.read(saved(rows, tmp_path))
    rows["manipulation"] = rows["label"].map({0: "real", 1: "DF"})
    assert len(manifest.read(saved(rows, tmp_path))) == 12


def test_twins_in_two_splits_are_refused_where_the_table_names_them(tmp_path):
    rows = table_of(tmp_path).assign(dataset="FF", twin=[f"t{i // 4}" for i in range(12)])
    assert len(manifest.read(saved(rows, tmp_path))) == 12
    rows.loc[[4, 8], "twin"] = "t0", "nan"
    rows.loc[[0, 9], "twin"] = "NaN", "None"  # words for nothing tie nothing
    with pytest.raises(ValueError, match=r"^manifest .*: twin: a real frame and .* in more than one split: 't0'$"):
        manifest.read(saved(rows, tmp_path))
    official = rows.assign(dataset="Celeb-DF-v2", split=rows["split"].replace("val", "test"))
    assert len(manifest.read(saved(official, tmp_path))) == 12, "its test list is by no original"


def test_a_picture_is_found_in_the_other_normal_form_of_unicode(tmp_path):
    rows = table_of(tmp_path)
    (tmp_path / "raw" / "train0.png").rename(tmp_path / "raw" / "Zoe\u0308.png")
    rows["path_raw"] = rows["path_raw"].replace("raw/train0.png", "raw\\Zo\u00eb.png")
    assert manifest.read(saved(rows, tmp_path))["path_raw"][0] == str(tmp_path / "raw" / "Zoe\u0308.png")


def test_pictures_are_looked_for_where_the_system_looks(tmp_path):
    rows = table_of(tmp_path)
    (tmp_path / "raw" / "train0.png").rename(tmp_path / "there.png")
    (tmp_path / "raw" / "train0.png").symlink_to(tmp_path / "there.png")
    where = saved(rows, tmp_path)
    assert len(manifest.read(where)) == 12
    (tmp_path / "there.png").unlink()
    with pytest.raises(ValueError, match=r"path_raw, rows 1–2: expected a picture, found nothing at '.*train0.png'"):
        manifest.read(where)
    assert len(manifest.read(where, pictures=False)) == 12


def test_what_training_needs(tmp_path):
    rows = table_of(tmp_path)

    def check(rows, *qualities, **options):
        manifest.check_for_training(manifest.read(saved(rows, tmp_path)), qualities or ["c40"], **options)

    check(rows)
    check(rows[(rows["split"] != "test") | (rows["label"] == 1)])
    with pytest.raises(ValueError, match=r"^compression: manifest .*pairs.csv has \['raw', 'c23', 'c40'\], got 'c30'$"):
        check(rows, "c30")
    with pytest.raises(ValueError, match="problems") as error:
        check(rows[(rows["split"] != "val") & ((rows["split"] == "test") | (rows["label"] == 0))])
    assert "split train has no fake (label 1) with compression 'c40'" in str(error.value)
    assert "no rows of split 'val' with compression 'c40'" in str(error.value)
    few = rows[(rows["split"] != "val") | (rows["label"] == 1) | (rows["compression"] == "c23")]
    with pytest.raises(ValueError, match=r"split val has no real \(label 0\) with compression 'c40': its AUC"):
        check(few)
    check(few, "c23")
    check(few, "raw", "c23")
    with pytest.raises(ValueError, match=r"^manifest .*pairs.csv: label: split val has no real .* 'c40': its AUC"):
        check(few, "raw", "c23", "c40")
    lacking = rows.assign(path_raw=rows["path_raw"].where(rows["split"] != "val", ""))
    with pytest.raises(ValueError, match=r": split: no rows of split 'val' with a path_raw, for the teacher$"):
        check(lacking)
    check(lacking, teacher=False)
    check(lacking.assign(path_raw=""))


# --------------------------------------------------------------------------------------------------------------- shards


def write(folder: Path, index=1, count=1, **state) -> None:
    """A shard's part of the rows, and its state unless there is none to write."""
    rows = table_of(folder)[index - 1 :: count]
    manifest.write(manifest.file_of(folder, index, count), rows.to_dict("records"))
    if state:
        manifest.write_shard(folder, index, count, **{"failed": {}, "finished": True} | state)


def test_a_prepared_folder_is_read_and_written_whole(tmp_path):
    write(tmp_path, videos=6, done=6)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["manifest.parquet"]
    table = manifest.read(str(tmp_path))
    assert table[manifest.COLUMNS[2]].tolist() == table_of(tmp_path)["label"].tolist()
    assert manifest.describe_status(tmp_path) == "1/1: 6 of 6 videos, whole"
    with pytest.raises(ValueError, match=f"^manifest: none in '{tmp_path / 'raw'}'$"):
        manifest.read(str(tmp_path / "raw"))


def test_an_incomplete_set_is_refused_by_the_names_of_its_shards(tmp_path):
    write(tmp_path, 1, 4, videos=3, done=1, failed={"a.mp4": "no face", "b.mp4": "truncated"})
    write(tmp_path, 2, 4, videos=3, done=3)
    manifest.write_shard(tmp_path, 4, 4, 3, 1, {"c.mp4": "no face"}, finished=False)
    assert manifest.describe_status(tmp_path).splitlines() == [
        "1/4: 1 of 3 videos, 2 failed, whole",
        "2/4: 3 of 3 videos, whole",
        "3/4: not started",
        "4/4: 1 of 3 videos, 1 failed, not ended",
    ]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        manifest.read(str(tmp_path))
    assert str(error.value) == (
        f"manifest: '{tmp_path}' is not complete: shard 3/4 has not started, 4/4 has not ended; "
        f"prepare.py --status out={tmp_path} shows all"
    )
    write(tmp_path, 3, 4, videos=3, done=3)
    manifest.write_shard(tmp_path, 4, 4, 3, 0, dict.fromkeys("abc", "no face"), finished=True)
    assert len(manifest.read(str(tmp_path))) == 9, "a shard of failures has no manifest"
    (tmp_path / "shards" / "2-of-4.json").write_text('{"videos"')
    with pytest.raises(ValueError, match=r"expected the state of a shard in '.*2-of-4.json', got: "):
        manifest.status(tmp_path)


def test_folders_of_an_older_version_are_judged_by_their_files(tmp_path):
    write(tmp_path, 1, 3)
    write(tmp_path, 3, 3)
    with pytest.raises(ValueError, match="is not complete: shard 2/3 has not started; "):
        manifest.read(str(tmp_path))
    assert manifest.describe_status(tmp_path) == "1/3: whole\n2/3: not started\n3/3: whole"
    write(tmp_path, 2, 3)
    assert len(manifest.read(str(tmp_path))) == 12


def test_shards_of_different_lists_of_videos_are_refused_by_name(tmp_path):
    old, new = (manifest.fingerprint([Video("s", "real", str(i), 0, "train", "raw", {}, "") for i in range(count)])
                for count in (4, 6))  # fmt: skip
    assert old != new and re.fullmatch("[0-9a-f]{16}", old)
    write(tmp_path, 1, 2, videos=2, done=2, of=old)
    write(tmp_path, 2, 2, videos=3, done=3, of=new)
    os.utime(tmp_path / "shards" / "1-of-2.json", (0, 0))
    assert manifest.describe_status(tmp_path) == (
        "1/2: 2 of 2 videos, of another list of videos, run it again\n2/2: 3 of 3 videos, whole"
    )
    with pytest.raises(
        ValueError, match="shards 1/2 and 2/2 were made from different lists of videos: run shard 1/2 a"
    ):
        manifest.read(str(tmp_path))
    write(tmp_path, 1, 2, videos=3, done=3, of=new)
    assert len(manifest.read(str(tmp_path))) == 12 and all(shard.whole for shard in manifest.status(tmp_path))


def test_a_list_of_videos_is_told_by_names_and_splits_in_any_order():
    videos = [Video("s", "real", name, 0, split, "raw", {}, "") for name, split in (("a", "train"), ("b", "val"))]
    assert manifest.fingerprint(videos) == manifest.fingerprint(videos[::-1])
    others = [replace(videos[0], split="val"), videos[1]], [videos[0], replace(videos[1], video_id="c")], videos[:1]
    assert len({manifest.fingerprint(found) for found in (videos, *others)}) == 4


def test_one_complete_number_of_shards_suffices_and_the_last_counts(tmp_path):
    write(tmp_path, 1, 3, videos=2, done=2)
    write(tmp_path, 1, 2, videos=3, done=3)
    write(tmp_path, 2, 2, videos=3, done=3)
    assert len(manifest.read(str(tmp_path))) == 12
    rows = table_of(tmp_path)[:8]
    manifest.write(manifest.file_of(tmp_path), rows.to_dict("records"))
    os.utime(manifest.file_of(tmp_path), (0, 2**32))
    assert len(manifest.read(str(tmp_path))) == 8
    os.utime(manifest.file_of(tmp_path), (0, 0))
    assert len(manifest.read(str(tmp_path))) == 12


def test_a_set_without_any_pairs_says_so(tmp_path):
    manifest.write_shard(tmp_path, 1, 1, 1, 0, {"a.mp4": "no face"}, finished=True)
    with pytest.raises(ValueError, match="has no pairs, for none of its videos could be prepared"):
        manifest.read(str(tmp_path))


def test_the_qualities_of_a_picture_without_a_raw_twin_are_one_source(tmp_path):
    rows = [
        {"path_compressed": f"{level}/{name}.png", "label": label, "split": "test", "compression": level}
        for level in ("c23", "c40")
        for label, name in enumerate(("000", "001"))
    ]
    for row in rows:
        images.write_png(tmp_path / row["path_compressed"], np.zeros((8, 8, 3), np.uint8))
    pandas.DataFrame(rows).to_csv(tmp_path / "FaceForensics++.csv", index=False)
    table = frames.read_manifest(str(tmp_path / "FaceForensics++.csv"))["test"].table
    assert table["group"].tolist() == table["video"].tolist() == [0, 1, 0, 1]
    rows[3]["split"] = "val"
    pandas.DataFrame(rows).to_csv(tmp_path / "FaceForensics++.csv", index=False)
    with pytest.raises(ValueError, match=r"videos in more than one split: .*/001\.png'"):
        manifest.read(str(tmp_path / "FaceForensics++.csv"))
