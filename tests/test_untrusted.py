"""What comes from elsewhere leads nowhere, takes no more than it may, and does no harm where it is written down."""

import ast
import csv
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from training import evaluate, files, options, predict
from training.config import Config
from training.data import crops, frames, manifest, sources, tables
from training.data.sources.common import Video, usable
from training.models import checkpoints
from training.models.weights import read_weights
from training.report import figures, log, page, sentences

ROOT = Path(__file__).parents[1]
EVIL = "=cmd|' /C calc'!A0"


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("é – 漢", "é – 漢"),
        ("a\n\x1b[2J\u202eb", r"a\n\x1b[2J\u202eb"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("caf\udcc3\udca9", "café"),  # as a name comes where the locale is not UTF-8
        ("\ud800\udcff", r"\ud800\xff"),
    ],
)
def test_every_text_can_be_shown_and_written(tmp_path, text, expected):
    assert files.shown(text) == expected
    files.write_text(tmp_path / "a", text)
    assert files.shown((tmp_path / "a").read_text(encoding="utf-8")) == expected


def test_a_name_forges_no_line_of_a_message():
    assert files.shown_lines("error: 'a\nall is well'\n  row 1") == "error: 'a\\nall is well'\n  row 1"


@pytest.mark.parametrize("name", ["a" * 250, "é" * 125, "漢" * 80 + ".png", os.fsdecode(b"\xff" * 250)])
def test_names_that_a_file_system_hardly_takes(tmp_path, name):
    short = files.shortened(name)
    assert len(os.fsencode(short)) <= files.LONGEST and short != files.shortened(name[:-1] + "b")
    assert files.shortened("a" * files.LONGEST) == "a" * files.LONGEST
    files.write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]
    target = predict._free(Path(name), set())
    (tmp_path / target).touch()
    assert target.suffix == ".png"


def test_a_name_of_many_parts_is_refused_before_the_work(tmp_path):
    videos = [Video("set", "real", "a/" * n + "b", 0, "train", "raw", {"raw": tmp_path}, "t") for n in (900, 1100)]
    kept, refused = usable(videos)
    assert kept == videos[:1] and refused == [(tmp_path, "its name has 2210 bytes, expected at most 2000")]


# --------------------------------------------------------------------------------------------------------------- paths


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (9, 99, 199)).save(path)
    return path


def benchmark(path: Path, frames: dict[str, list]) -> list[Video]:
    """The videos of a DeepfakeBench manifest, all real."""
    videos = {name: {"label": "real", "frames": list(map(str, listed))} for name, listed in frames.items()}
    videos |= {f"_{i}": videos[name] for i in range(3) for name in list(videos)[:1]}
    path.write_text(json.dumps({"set": {"real": {split: videos for split in ("train", "val", "test")}}}))
    found = sources.KINDS["deepfakebench"](path, sources.Draw()).videos
    return [video for video in found if video.split == "train" and not video.video_id.startswith("_")]


def test_what_a_list_leads_to_outside_of_the_source_is_not_read(tmp_path):
    secret, good = picture(tmp_path / "secret" / "x.png"), picture(tmp_path / "set" / "good" / "0.png")
    (tmp_path / "set" / "linked.png").symlink_to(secret)
    (tmp_path / "set" / "folder").symlink_to(secret.parent)
    (tmp_path / "set" / "within.png").symlink_to(good)
    listed = {"good": ["good/0.png"], "within": ["within.png"], "up": ["../secret/x.png"], "whole": [secret]}
    listed |= {"link": ["linked.png"], "folder": ["folder/x.png"], "among": ["good/0.png", "../secret/x.png"]}
    found = benchmark(tmp_path / "set" / "list.json", listed)
    assert [video.video_id for video in found] == list(listed)
    pairing = {"out": str(tmp_path / "out"), "detector": "none", "crfs": [40]}
    answers = {video.video_id: crops.prepare_video(video, crops.Pairing(**pairing)) for video in found}
    assert answers["good"] is None and answers["within"] is None
    for name in ("up", "whole", "link", "folder", "among"):
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


class Even:
    """A model that says the same of every picture."""

    image_size, logits = 16, (0.0, 0.0)

    def pixels(self, crops):
        return crops

    def __call__(self, crops):
        return None, None, torch.tensor([self.logits] * len(crops))


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


@pytest.mark.parametrize("kind", ["deepfakebench", "dfdc", "faceforensics"])
def test_lists_that_are_nested_without_end(tmp_path, kind):
    place = {"deepfakebench": "a.json", "dfdc": "metadata.json", "faceforensics": "splits/train.json"}[kind]
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        sources.KINDS[kind](tmp_path / place if kind == "deepfakebench" else tmp_path, sources.Draw())


@pytest.mark.parametrize("state", ['{"videos": "\\n1"}', '{"done": "1"}', '{"failed": ["a"]}', "[" * 99_999, "[]", "1"])
def test_the_state_of_a_shard_is_what_it_should_be(tmp_path, state):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "1-of-1.json").write_text(state)
    with pytest.raises(ValueError, match="expected the state of a shard"):
        manifest.status(tmp_path)


# -------------------------------------------------------------------------------------------------------------- memory


def test_prediction_holds_few_large_frames_at_a_time(monkeypatch):
    monkeypatch.setattr(predict, "HELD", 3 * 100)
    faces = [(i, np.zeros((10, 10, 3), np.uint8), (0, 0, 10, 10)) for i in range(7)]
    for size, expected in ((32, [3, 3, 1]), (2, [2, 2, 2, 1])):
        predictor = predict.Predictor(Even(), crops.Cropping(), size)
        assert [len(batch) for batch in predictor.batches(iter(faces))] == expected
    monkeypatch.setattr(predict, "HELD", 99)
    assert [len(batch) for batch in predictor.batches(iter(faces))] == [1] * 7, "one frame is always looked at"


def test_tables_of_more_cells_than_are_read(tmp_path, monkeypatch):
    pandas.DataFrame({"a": ["x"] * 50, "b": [1] * 50}).to_parquet(tmp_path / "a.parquet")
    assert len(tables.read(tmp_path / "a.parquet")) == 50
    monkeypatch.setattr(tables, "MAX_CELLS", 99)
    with pytest.raises(ValueError, match="at most 99 cells, not 50 rows of 2"):
        tables.read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "change",
    [
        {"name": ["resnet18"]},
        {"image_size": "64"},
        {"image_size": 10**6},
        {"mean": "a"},
        {"mean": [0.5, 0.5]},
        {"std": [0.0]},
        {"std": 1},
        {"mean": [None]},
        "[" * 100_000,
    ],
)
def test_what_a_file_of_weights_says_of_itself_is_believed_only_where_it_can_be(tmp_path, change):
    note = {"name": "resnet18", "image_size": 64, "mean": [0.5], "std": [0.5, 0.5, 0.5]}
    for said, ours in ((note, True), (note | change if isinstance(change, dict) else change, False)):
        text = said if isinstance(said, str) else json.dumps(said)
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"add_ops": text})
        (found,) = checkpoints.find_trained(tmp_path / "a.safetensors", checkpoints.Foreign(model="resnet18"))
        assert found.ours == ours


def torch_file(path: Path, code: bytes) -> Path:
    """A file as torch.save writes it, of a pickle by opcodes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", code), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"a/{name}", content)
    return path


def doubled(times: int) -> bytes:
    """A pair of a pair of … of None, each holding the one before twice."""
    return b"N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (b"]q\0h\0a.", "found none"),
        (b"}q\0X\1\0\0\0ah\0s.", "found none"),
        (b"]q\0h\0\x85q\1h\0h\1a0h\1.", "found none"),
        (b"c__main__\nA\n)\x81q\0}X\1\0\0\0ah\0sb.", "found none"),
        (doubled(60) + b".", "found none"),
        (b"}" + doubled(60) + b"K\1s.", "unhashable"),
        (b"c__builtin__\nset\n]" + doubled(60) + b"a\x85R.", "unhashable"),
        (b"c__builtin__\nfrozenset\n(" + doubled(60) + b"l\x85R.", "unhashable"),
        (b"]" * 9_999 + b"a" * 9_998 + b".", "containers at most 100 deep"),
        (b"c__builtin__\nbytearray\n\x8a\5\0\0\0\0\x40\x85R.", "bytearray of int"),
        (b"c__builtin__\nbytes\n\x8a\5\0\0\0\0\x40\x85R.", "bytes of int"),
        (b"Nr\0\0\0\x7f.", "found none"),  # a place in the memo, of which the one in C makes 32 GiB
        (b"\x96" + struct.pack("<Q", 1 << 38) + b".", ""),
    ],
)
def test_pickles_take_no_more_time_or_memory_than_their_size(tmp_path, code, said):
    with pytest.raises(ValueError, match=rf"^weights .*{said}"):
        read_weights(torch_file(tmp_path / "a.pth", b"\x80\2" + code))


def test_long_tuples_and_nested_ones_are_read(tmp_path):
    first, second = torch.zeros(1), torch.ones(1)
    torch.save({"many": (first, second) * 6_000, ("a", ("b", 1)): {"w": second}}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")
    assert len(found) == 12_001 and found["many.11999"] == 1 and found["('a', ('b', 1)).w"] == 1


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\2N.")
        archive.writestr("a/data/0", bytes(10_000_000))
    with pytest.raises(ValueError, match="that unpacks to 10000004"):
        read_weights(tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------------------- options


EXPLODING = [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 1}]" for i in range(30)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"students: [{', '.join(EXPLODING)}]", "cannot be read: expected at most 1000000 characters"),
        (f"fingerprint: '[{', '.join(EXPLODING)}]'", "fingerprint: expected no aliases"),
        (f"lr: '[{', '.join(EXPLODING)}]'", "lr: expected no aliases"),
        (f"name: &a {'x' * 20_000}\nstudents: [{', '.join(['*a'] * 100)}]", "cannot be read: expected at most"),
        ("students: &a [*a]", "cannot be read: an alias stands within"),
        ("x: &a {y: 1}\nz: {<<: *a}", "the key '<<', which merges others, is not read"),
        ("name: !!python/object/apply:os.system ['touch evil']", "could not determine a constructor"),
        ("lr: !!timestamp x", "cannot be read: AttributeError"),
        ("flip: !!bool x", "cannot be read: KeyError"),
        ("seed: !!int ''", "cannot be read: IndexError"),
        ("students: !!set {a, b}", "students: expected one value, or a list where it has several, got set"),
        ("students: {a: b}", "students: expected one value, or a list where it has several, got dict"),
        ("name: !!binary aGk=", "name: expected one value, or a list where it has several, got bytes"),
        ("name: [a, b]", "name: expected one value, or a list where it has several, got list"),
        ("seed: " + "9" * 5000, "cannot be read: Exceeds the limit"),
        ("seed: " + "[" * 990, "cannot be read: RecursionError"),
        ("~", "expected 'key: value' lines, got NoneType"),
        ("", "expected 'key: value' lines, got NoneType"),
        ("? [a, b]\n: 1", "cannot be read: while constructing a mapping"),
        ("lr: [" + "1, " * 9999 + "]", "lr: "),
    ],
)
def test_a_configuration_from_elsewhere_gets_one_line(tmp_path, capsys, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    assert options.run(lambda _: 0, Config, "train.py", [f"config={tmp_path}/a.yaml"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and said in line and line.count("\n") == 1 and len(line) < 1000
    assert os.listdir(tmp_path) == ["a.yaml"]


def test_aliases_of_plain_values_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("frequency_weights: &w [0, 1, 0, 1]\nmulti_view_weights: *w\n")
    assert options.load(tmp_path / "a.yaml", Config).multi_view_weights == [0, 1, 0, 1]


# ------------------------------------------------------------------------------------------------- written for others


@pytest.mark.parametrize("text", [EVIL, "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1"])
def test_what_a_spreadsheet_would_run_is_text(text):
    assert files.cell(text) == f"'{files.shown(text)}"
    assert files.cell(f"a{text}") == files.shown(f"a{text}") and files.cell(-1.5) == -1.5 and files.cell(None) is None


def row(**changes) -> dict:
    cell = {"value": -0.25, "low": 0.1, "high": 0.9}
    about = {"model": EVIL, "trained_on": "@raw", "dataset": "+a;=b", "manipulation": "all", "compression": "-c40"}
    about |= {"videos": 2, "reals": 4, "fakes": 4}
    level = dict.fromkeys(("auc", "accuracy", "eer", "recall_at_1"), cell)
    return about | {"frame": level, "video": level} | changes


def test_the_table_of_an_evaluation_runs_nothing(tmp_path):
    evaluate.write(
        [row()],
        {},
        SimpleNamespace(out=tmp_path, **dict.fromkeys(("checkpoint", "manifest", "split", "gallery", "bootstrap"))),
    )
    text = (tmp_path / "results.csv").read_text(encoding="utf-8")
    (line,) = csv.DictReader(io.StringIO(text))
    assert (line["model"], line["trained_on"], line["dataset"]) == (f"'{EVIL}", "'@raw", "'+a;=b")
    assert line["compression"] == "'-c40" and line["frame_auc"] == "-0.25" and line["videos"] == "2"
    assert '"\'+a;=b"' in text, "quoted, so that no other mark between cells parts it"


def test_the_table_of_predictions_runs_nothing(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "a.png").rename(tmp_path / "=a\n.png")
    (tmp_path / "+b.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    trained = SimpleNamespace(load=lambda _: Even(), assumptions=lambda _: [], ours=False)
    monkeypatch.setattr(predict, "find_one_trained", lambda *_: trained)
    assert predict.main(["=a\n.png", "+b.png", "--checkpoint", "x", "--csv", "t.csv", "--detector", "none"]) == 1
    with open("t.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["file"] for line in lines] == ["'=a\\n.png", "'+b.png"] and lines[0]["probability"] == "0.5"
    assert capsys.readouterr().out.splitlines()[0] == "=a\\n.png: fake 0.500"


def test_scores_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    (item,), _ = predict.items_of(str(picture(tmp_path / "a.png")))
    table = pandas.DataFrame({"label": [0], "dataset": ["d"]})
    stills = frames.Stills(np.zeros((1, 16, 16, 3), np.uint8), table, 16)
    for logits in ((float("nan"), 0.0), (float("inf"), float("inf"))):
        monkeypatch.setattr(Even, "logits", logits)
        monkeypatch.setattr(
            Even, "__call__", lambda self, crops: (None, torch.zeros(len(crops), 2), torch.tensor([self.logits]))
        )
        with pytest.raises(files.BrokenFile, match="scores that are not finite"):
            predict.Predictor(Even(), crops.Cropping(detector="none"), 4)(item)
        with pytest.raises(ValueError, match="c40: the model gives scores that are not finite for 1 of the frames"):
            evaluate.score(Even(), stills, SimpleNamespace(batch_size=1, workers=0), "c40")


def test_names_move_no_cursor_of_a_terminal(tmp_path):
    lines = sentences.text_table([{"model": "a\x1b[2J", "set": "b\nall is well"}]).splitlines()
    assert len(lines) == 2 and all(map(str.isprintable, lines))
    for column in ("compression", "dataset", "manipulation"):
        picture(tmp_path / "a.png")
        table = {"path_compressed": ["a.png"], "label": [1], "split": ["test"], column: ["c\x1b[2J"]}
        pandas.DataFrame(table).to_parquet(tmp_path / "t.parquet")
        with pytest.raises(ValueError, match=rf"{column}, row 1: expected no control characters, got 'c\\x1b\[2J'"):
            manifest.read(str(tmp_path / "t.parquet"))


def test_names_are_no_mathematics_and_are_left_out_of_no_legend():
    odd = r"$\frac{$ _x"
    rows = [row(model=name, trained_on=odd, dataset=odd, compression=odd) for name in ("_best", odd, "x" * 9999)]
    theme = figures.Theme(figures.LIGHT, [one["model"] for one in rows])
    for draw in (figures.compression_gap, figures.cross_compression):
        figure = draw(theme, rows)
        figure.canvas.draw()  # fails where one is read as mathematics
        texts = [text.get_text() for text in figure.findobj(figures.plt.Text)]
        assert any("_best" in text for text in texts) and max(map(len, texts)) < 300
    figures.plt.close("all")


def test_a_caption_is_text():
    shown = page._figure({"light": b"", "dark": b""}, "Samples", "Compressed is <script>alert(1)</script> here.")
    assert "<script" not in shown and "&lt;script&gt;" in shown


def test_a_name_that_tensorboard_does_not_take_costs_only_its_log(tmp_path, capsys):
    folder = tmp_path / "caf\udcc3\udca9"  # as "café" comes where the locale is not UTF-8
    written = log.Log(folder, True)
    written.open("none", 0)
    written.write(1, {"loss": 2.0})
    written.close()
    assert log.read_rows(folder / "metrics.jsonl") == [{"model": "none", "step": 1, "loss": 2.0}]
    assert "TensorBoard takes no such name" in capsys.readouterr().err


SCRIPT = """
import sys
from dataclasses import dataclass
from pathlib import Path
from training import files, options

@dataclass
class Said:
    '''What it is told.'''
    name: str = ""
    '''A folder.'''

def work(said):
    files.write_text(Path(said.name) / "results.json", f"{said.name} – done")
    print(files.shown(said.name), "–")

sys.exit(options.run(work, Said, "x.py"))
"""


def test_a_locale_without_utf_8_costs_nothing(tmp_path):
    (tmp_path / "x.py").write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": os.fspath(ROOT), "PYTHONIOENCODING": ""}
    words = [sys.executable, "x.py", "name=café"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.decode("ascii").strip() == r"caf\xe9 \u2013", done.stderr
    assert (tmp_path / "café" / "results.json").read_text(encoding="utf-8") == "café – done"


def text_files(path: Path) -> list[int]:
    """The lines of a module that open a text file and do not say how it is encoded."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        said = any(word.arg == "encoding" for word in node.keywords)
        strings = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        of_module = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in (
            "files",
            "Image",
            "av",
        )
        text = name in ("read_text", "write_text") and not of_module and isinstance(node.func, ast.Attribute)
        opens = name == "open" and not of_module and not any("b" in mode for mode in strings if len(mode) < 4)
        opens = opens and (isinstance(node.func, ast.Name) or any(mode in ("r", "w", "a", "x") for mode in strings))
        if (text or opens) and not said:
            found.append(node.lineno)
    return found


def test_every_text_file_says_its_encoding(tmp_path):
    modules = [
        path for room in ("add_ops", "benchmarks", "examples", "training") for path in (ROOT / room).rglob("*.py")
    ]
    assert len(modules) > 50 and not {path: lines for path in modules if (lines := text_files(path))}
    (tmp_path / "a.py").write_text("open(x)\nopen(x, 'rb')\np.open('a')\np.read_text()\nopen(x, encoding='utf-8')\n")
    assert text_files(tmp_path / "a.py") == [1, 3, 4]
