"""Names from elsewhere do no harm where they are written: files, terminals, spreadsheets, figures and pages."""

import ast
import csv
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from untrusted import Even, picture

from training import evaluate, files, predict
from training.data import manifest
from training.data.sources.common import Video, usable
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
    target = predict.free_name(Path(name), set())
    (tmp_path / target).touch()
    assert target.suffix == ".png"


def test_a_name_of_many_parts_is_refused_before_the_work(tmp_path):
    videos = [Video("set", "real", "a/" * n + "b", 0, "train", "raw", {"raw": tmp_path}, "t") for n in (900, 1100)]
    kept, refused = usable(videos)
    assert kept == videos[:1] and refused == [(tmp_path, "its name has 2210 bytes, expected at most 2000")]


# ------------------------------------------------------------------------------------------------- written for others


@pytest.mark.parametrize(
    "text", [EVIL, "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", *(f"{sign}1" for sign in "＝＋－＠")]
)
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
    shown = page.captioned({"light": b"", "dark": b""}, "Samples", "Compressed is <script>alert(1)</script> here.")
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
