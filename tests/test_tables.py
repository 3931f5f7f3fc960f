"""Tables as people have them: what each kind of file is read as, and what is said of what cannot be."""

import gzip
import io
import re
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import pytest
from test_sources import find, split_of
from trees import touch

from training.data import tables
from training.data.sources import Video, check, recognise

PLAIN = "path,label\né/000.png,NA\nb.png,\n"
CELLS = {"path": ["é/000.png", "b.png"], "label": ["NA", ""]}


def csv(folder, content, name="a.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(folder, name="a.parquet", **columns) -> Path:
    pandas.DataFrame(columns).to_parquet(path := folder / name)
    return path


def zipped(*names) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, PLAIN)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", "|"),
        "sep=;\n" + PLAIN.replace(",", ";"),
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        b"\xfe\xff" + PLAIN.encode("utf-16-be"),
        PLAIN.encode("cp1252"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.rstrip(),
        "  \t \r\n \n" + PLAIN,
        PLAIN + "\x1a",
        "\n\n" + PLAIN.replace("b.png", "\nb.png") + ",\n,\n\n",
        "  Path , LABEL\n é/000.png,\tNA \nb.png,  \n",
        '"path","label"\n"é/000.png", "NA"\n"b.png",""\n',
        'path,label,,\n"é/000.png",NA,,\nb.png,,,\n',
        ",path,label\n0,é/000.png,NA\n1,b.png,\n",
    ],
)
def test_csv_is_the_same_table_however_it_was_saved(tmp_path, content):
    assert tables.read(csv(tmp_path, content)).to_dict("list") == CELLS


def test_cells_of_csv_are_what_is_written(tmp_path):
    table = tables.read(csv(tmp_path, 'a,b;c\n"x,\ny",000\n"say ""so""",1.50\n'))
    assert table.to_dict("list") == {"a": ["x,\ny", 'say "so"'], "b;c": ["000", "1.50"]}
    table = tables.read(csv(tmp_path, "a;b\n1,5;2,5,3\n"))
    assert table.to_dict("list") == {"a": ["1,5"], "b": ["2,5,3"]}, "the header decides"
    assert tables.read(csv(tmp_path, "a\nnull\n1e5\n")).to_dict("list") == {"a": ["null", "1e5"]}


def test_content_decides_and_not_the_ending(tmp_path):
    path = parquet(tmp_path, "a.csv", X=[1, 2], y=["é", None])
    table = tables.read(path)
    assert table.to_dict("list") == {"x": [1, 2], "y": ["é", ""]} and table["x"].dtype == np.int64
    assert tables.read(csv(tmp_path, PLAIN, "a.parquet")).to_dict("list") == CELLS
    assert tables.read(csv(tmp_path, PLAIN, "http:x.csv")).to_dict("list") == CELLS


def test_parquet_keeps_types_and_nothing_missing_among_texts(tmp_path):
    columns = {"a": pandas.Categorical(["x", None]), "b": [0.5, None], "c": [None, None], "d": [True, False]}
    pandas.DataFrame(columns, index=pandas.Index(["p", "q"], name="Path")).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "split=x").mkdir()
    table = tables.read((tmp_path / "a.parquet").rename(tmp_path / "split=x" / "a.parquet"))
    assert list(table) == ["path", "a", "b", "c", "d"], "neither is the index lost nor the folder read"
    assert table["path"].tolist() == ["p", "q"] and table["a"].tolist() == ["x", ""] and table["c"].tolist() == ["", ""]
    assert table["b"].dtype == float and table["d"].dtype == bool


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a header line and rows, got an empty file"),
        (" \r\n", "expected a header line and rows, got an empty file"),
        ("a,b\n", "expected rows below the header, got none"),
        ("a,b\n,\n", "expected rows below the header, got none"),
        ("a,A \n1,2\n", "expected different names of columns, got 'a' more than once"),
        ("a,b\n1\n1,2\n1,2,3\n4\n", "expected 2 cells in each row, as in the header, got 1 in rows 1, 4; 3 in row 3"),
        ('a,b\n"x,y\n', "expected CSV, got in line 2: .*is a quote not closed"),
        (bytes(range(256)), "got a binary one"),
        (PLAIN.encode("utf-16")[2:], "got a binary one"),
        (PLAIN.encode("utf-16")[:-1], "got a binary one"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "got a binary one"),
        (zipped("[Content_Types].xml", "xl/workbook.xml"), "got a spreadsheet; save it as CSV"),
        (zipped("mimetype", "a.csv"), "got a zip archive; unpack it"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512), "got a spreadsheet; save it as CSV"),
        (gzip.compress(PLAIN.encode(), mtime=0), "got a gzip archive; unpack it"),
        (b"PAR1" + bytes(30), "expected a whole parquet file, got: "),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, content, message):
    path = csv(tmp_path, content)
    with pytest.raises(ValueError, match=f"^table {re.escape(str(path))}: .*{message}") as error:
        tables.read(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^table .*: expected a CSV or parquet file, got a folder$"):
        tables.read(tmp_path)
    with pytest.raises(ValueError, match=r"^manifest: no file 'absent.csv'$"):
        tables.read("absent.csv", "manifest")
    with pytest.raises(ValueError, match=r"^table .*got: Not a directory$"):
        tables.read(csv(tmp_path, PLAIN) / "b.csv")

    def refuse(path, _):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tables, "read_bytes", refuse)  # root may read whatever its mode
    with pytest.raises(ValueError, match=r"^table a.csv: .*got: Permission denied$"):
        tables.read("a.csv")


def test_problems_are_said_at_once_with_their_rows():
    problems = tables.Problems("table x")
    problems.add("a", [], "nothing")
    problems.add("a", [False, False], "nothing")
    problems.check()
    problems.add("a", [False, True], "odd")
    with pytest.raises(ValueError, match=r"^table x: a, row 2: odd$"):
        problems.check()
    problems.of("y").add("b", [20, 2, 6, 7, 8, 13, 30, 31, 40, 50, 51], "bad")
    problems.add("c", None, "gone")
    with pytest.raises(ValueError, match="problems") as error:
        problems.check()
    assert str(error.value).split("\n  ") == [
        "table x: 3 problems",
        "a, row 2: odd",
        "y: b, rows 3, 7–9, 14, 21, 31–32 and 3 more: bad",
        "c: gone",
    ]
    assert tables.some("abcde", 2) == "a, b and 3 more" and tables.quoted(["a\nb", 1]) == "'a\\nb', '1'"


def test_labels_in_any_spelling_of_a_number_and_in_words():
    cells = [0, 1, "0.0", 1.0, np.float32(0), np.int8(1), "-0", " Real", "ORIGINAL", "genuine", "Pristine"]
    cells += ["fake ", "Forged", "manipulated", "DeepFake", "synthetic"]
    expected = [0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    problems = tables.Problems("t")
    found = tables.labels(pandas.Series(cells, dtype=object, name="label"), problems)
    problems.check()
    assert found.tolist() == expected and found.dtype == np.int64
    for dtype in ("int8", "uint16", "float32", "Int64", "str", "category"):
        assert tables.labels(pandas.Series([0, 1, 1]).astype(dtype), problems).tolist() == [0, 1, 1]


def test_labels_that_could_mean_either_are_refused_with_their_rows():
    problems = tables.Problems("t")
    tables.labels(pandas.Series([0, True, "FALSE", "", None, float("nan"), 2, "1,0", "nan"], dtype=object), problems)
    tables.labels(pandas.Series([True, False], name="label"), problems)
    expected = "expected 0 or real, 1 or fake (true may mean either), got"
    assert problems.lines == [
        "None, rows 4–6: empty",
        f"None, rows 2–3, 7–9: {expected} 'true', 'false', '2' and 2 more",
        f"label, rows 1–2: {expected} 'true', 'false'",
    ]


def test_splits_in_the_words_in_use():
    words = ["train", "Training", "val", "VALID", "validation", "dev", "test ", "Testing", "holdout", ""]
    problems = tables.Problems("t")
    found = tables.splits(pandas.Series(words, name="split"), problems)
    assert found.tolist() == ["train"] * 2 + ["val"] * 4 + ["test"] * 2 + ["", ""] and found.dtype.kind == "U"
    assert problems.lines == ["split, row 10: empty", "split, row 9: expected train, val or test, got 'holdout'"]


def test_boxes_by_video_and_rising_frame(tmp_path):
    rows = "a/0.mp4;7;1;2;3.5;4\n001;0;0;0;9;9\na/0.mp4;3;5;6;7;8\n"
    boxes = tables.read_boxes(str(csv(tmp_path, "Video;frame;left;top;right;bottom\n" + rows)))
    assert {name: found.tolist() for name, found in boxes.items()} == {
        "001": [[0, 0, 0, 9, 9]],
        "a/0.mp4": [[3, 5, 6, 7, 8], [7, 1, 2, 3.5, 4]],
    }
    columns = {"video": [5], "frame": [1], "left": [0.5], "top": [1], "right": [2], "bottom": [3]}
    boxes = tables.read_boxes(parquet(tmp_path, **columns))
    assert boxes["5"].tolist() == [[1, 0.5, 1, 2, 3]] and boxes["5"].dtype == np.float64


def test_boxes_are_found_by_the_name_of_a_video_however_a_system_writes_it(tmp_path):
    path = tmp_path / "real" / "a.mp4"
    video = Video("set", "real", "a.mp4", 0, "train", "source", {"source": path}, "a", root=tmp_path)
    for name in ("real\\a.mp4", "./real//a.mp4", "x/../real/a.mp4", str(path), ".\\set\\real\\a.mp4"):
        boxes = tables.read_boxes(
            csv(tmp_path, f"video,frame,left,top,right,bottom\n{name},0,1,2,3,4\n", f"{len(name)}.csv")
        )
        assert [boxes[known].tolist() for known in video.names if known in boxes] == [[[0, 1, 2, 3, 4]]]


def test_paths_in_windows_and_macos_spelling():
    assert tables.spellings("a/b.mp4") == ["a/b.mp4"] and tables.spellings("a\\b") == ["a\\b", "a/b"]
    assert tables.spellings("Zoe\u0308.mp4") == ["Zoe\u0308.mp4", "Zo\u00eb.mp4"]
    assert tables.spellings("Zo\u00eb.mp4") == ["Zo\u00eb.mp4", "Zoe\u0308.mp4"]


def test_boxes_that_are_none_are_all_listed(tmp_path):
    rows = ["a,0,1,1,2,2", "a,1,,1,2,2", ",2,1,1,x,2", "a,3,2,1,2,2", "a,4,1,3,2,2", "a,0,1,1,2,2", "a,nan,1,1,2,inf"]
    path = csv(tmp_path, "\n".join(["video,frame,left,top,right,bottom", *rows]))
    with pytest.raises(ValueError, match=f"^detector_file {re.escape(str(path))}: 8 problems") as error:
        tables.read_boxes(path)
    assert str(error.value).split("\n  ")[1:] == [
        "video, row 3: empty",
        "frame, row 7: expected a number, got 'nan'",
        "left, row 2: expected a number, got ''",
        "right, row 3: expected a number, got 'x'",
        "bottom, row 7: expected a number, got 'inf'",
        "right, row 4: expected more than left",
        "bottom, row 5: expected more than top",
        "frame, row 6: expected one box in a frame, got another",
    ]
    with pytest.raises(ValueError, match=r"^detector_file .*: columns: .*missing \['right', 'bottom'\], got 'video',"):
        tables.read_boxes(csv(tmp_path, "video,frame,left,top\na,0,1,1\n"))
    with pytest.raises(ValueError, match=r"^detector_file: no file 'absent.csv'$"):
        tables.read_boxes("absent.csv")


# ------------------------------------------------------------------------------------------ a table of one's own


def table(root, text, *files):
    path = touch(root, *files) / "mine.csv"
    path.write_text(text)
    return path


def test_a_table_of_ones_own(tmp_path):
    text = (
        "Path;Label;Split;Manipulation;Video_id;Compression;Person\n"
        "raw/a.mp4;real;train;;a;raw;ann\nc40/a.mp4;0;training;;a;C40;ann\n"
        "x\\a.png;FAKE;train;swap;a;;ann; bob\nframes;1;validation;;;;\n"
    ).replace("ann; bob", '"ann; bob"')
    path = table(tmp_path, text, "raw/a.mp4", "c40/a.mp4", "x/a.png", "frames/2.png", "frames/10.png")
    assert recognise(path) == "table"
    real, fake, frames = find("table", path).videos[:3]
    assert (real.key, real.reference, set(real.files), real.people) == ("mine/real/a", "raw", {"raw", "c40"}, ("ann",))
    assert (fake.key, fake.twin, fake.people) == ("mine/swap/a", real.twin, ("ann", "bob"))
    assert fake.files == {"source": (tmp_path / "x/a.png",)}
    assert (frames.key, frames.split, frames.people) == ("mine/fake/frames", "val", None)
    assert [p.name for p in frames.files["source"]] == ["2.png", "10.png"] and frames.names[0] == "frames"


def test_a_table_without_splits_is_drawn_by_twin_and_person(tmp_path):
    rows = [(f"{kind}{i}.mp4", kind, f"t{i}", f"p{i // 2}") for i in range(20) for kind in ("real", "fake")]
    text = "path,label,twin,person,split\n" + "".join(f"{','.join(row)},\n" for row in rows)
    found = find("table", table(tmp_path, text, *(row[0] for row in rows)))
    split = split_of(found)
    for i in range(0, 20, 2):
        assert len({split[f"{kind}{n}.mp4"] for n in (i, i + 1) for kind in ("real", "fake")}) == 1
    assert Counter(split.values()) == {"train": 28, "val": 4, "test": 8}


def test_all_bad_cells_of_a_table_are_listed_with_their_rows(tmp_path):
    text = (
        "path,label,split,compression,video_id\n"
        "a.mp4,real,train,raw,a\n"
        "gone.mp4,fake,train,raw,b\n"
        ",maybe,train,raw,c\n"
        "a.mp4,real,later,raw,a\n"
        "d.txt,1,test,best,d\n"
    )
    with pytest.raises(ValueError, match=r"mine\.csv: ") as error:
        find("table", table(tmp_path, text, "a.mp4", "d.txt"))
    said = str(error.value)
    for expected in (
        "label, row 3: ",
        "split, row 4: ",
        "path, row 3: empty",
        "path, rows 2, 5: expected a video",
        "path, row 4: expected each once",
        "compression, row 5: ",
        "compression, row 4: expected each quality of a video once",
    ):
        assert expected in said, expected


def test_two_splits_for_one_video_or_one_person_of_a_table_are_refused(tmp_path):
    text = "path,label,split,compression,video_id\na.mp4,0,train,c23,a\nb.mp4,0,test,c40,a\n"
    with pytest.raises(ValueError, match="split, row 2: expected the same for all rows of a video"):
        find("table", table(tmp_path, text, "a.mp4", "b.mp4"))
    text = "path,label,split,person\na.mp4,0,train,ann\nb.mp4,1,test,ann\nc.mp4,0,val,cy\n"
    found = find("table", table(tmp_path, text, "c.mp4"))
    with pytest.raises(ValueError, match=r"'mine/real/a\.mp4' is in the split train and 'mine/fake/b\.mp4' in test"):
        check(found.videos, [], "mine")


def test_people_are_parted_by_any_separator_and_words_for_nothing_are_none(tmp_path):
    names = "abcdef"
    people = ["ann;bob", '"ann, bob"', "ann|bob ", "None", "nan", "NULL"]
    text = "path,label,twin,person\n" + "".join(
        f"{n}.mp4,0,{'nan' if n != 'a' else 't'},{p}\n" for n, p in zip(names, people, strict=True)
    )
    found = find("table", table(tmp_path, text, *(f"{name}.mp4" for name in names)))
    assert [video.people for video in found.videos] == [("ann", "bob")] * 3 + [None] * 3
    assert [video.twin for video in found.videos] == ["t", *"bcdef"]


def test_a_path_is_found_in_the_other_normal_form_of_unicode(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    found = find(
        "table",
        table(tmp_path, f"path,label\n{composed}1.mp4,0\n{apart}2.mp4,1\n", f"{apart}1.mp4", f"{composed}2.mp4"),
    )
    assert [video.path.name for video in found.videos] == [f"{apart}1.mp4", f"{composed}2.mp4"]
