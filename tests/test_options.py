"""The one way to say options: every spelling, every command, and what is said of wrong ones."""

import importlib
import multiprocessing
import os
import runpy
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from unittest.mock import patch

import pytest

from training import evaluate, export, options, predict, prepare, study, train
from training.config import EMBEDDED, Config
from training.data import embedded
from training.models.distillers import DISTILLERS
from training.options import POSITIONAL, read

COMMANDS = {
    "train.py": (train, Config),
    "prepare.py": (prepare, prepare.Options),
    "predict.py": (predict, predict.Options),
    "evaluate.py": (evaluate, evaluate.Options),
    "export.py": (export, export.Options),
    "study.py": (study, study.StudyConfig),
}
CONFIGS = sorted(EMBEDDED.parent.glob("*.yaml"))


@dataclass(kw_only=True)
class Example:
    """An example."""

    files: list[str] = field(default_factory=list, metadata=POSITIONAL)
    """Files."""
    rate: float = 1.0
    """Rate."""
    name: str | None = "x"
    """Name."""
    levels: list[int] = field(default_factory=lambda: [23])
    """Levels."""
    fast: bool = False
    """Fast."""
    image_size: int = 64
    """Side."""
    weights: list[float] = field(default_factory=lambda: [1.0])
    """Weights."""


def example(*words):
    return read(words, Example, "example.py")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rate=1e-4 --fast a.mp4", {"rate": 1e-4, "fast": True, "files": ["a.mp4"]}),
        ("--rate 1e-4 --fast=true b", {"rate": 1e-4, "fast": True, "files": ["b"]}),
        ("--rate=2 --fast false b c", {"rate": 2.0, "fast": False, "files": ["b", "c"]}),
        ("b --levels 23 40 --name 2024", {"levels": [23, 40], "name": "2024", "files": ["b"]}),
        ("levels=[10,20] levels=[30] name=null", {"levels": [30], "name": None}),
        ("--image-size 32 --files a.mp4 b.mp4", {"image_size": 32, "files": ["a.mp4", "b.mp4"]}),
        ("files=[a,b]", {"files": ["a", "b"]}),
        ("-- --odd.mp4 rate=3.mp4", {"files": ["--odd.mp4", "rate=3.mp4"]}),
        ("1.mp4 null", {"files": ["1.mp4", "null"]}),
        ("--fast No a", {"fast": False, "files": ["a"]}),
        ("fast=YES image-size=3", {"fast": True, "image_size": 3}),
    ],
)
def test_spellings(words, expected):
    found = example(*words.split())
    assert {name: getattr(found, name) for name in expected} == expected


def test_names_with_blanks_brackets_and_equal_signs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("take=2.mp4").touch()
    names = ["[a b], c.mp4", "take=2.mp4", "./x=y.mp4"]
    assert example("a.mp4", *names).files == ["a.mp4", *names]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rat=1", "unknown key 'rat' in the command line; did you mean 'rate'"),
        ("--rate", "rate: expected a value after '--rate'"),
        ("--rate --fast", "rate: expected a value"),
        ("rate=fast", "rate"),
        ("levels=[a]", "levels"),
        ("--config nowhere.yaml", "config nowhere.yaml: cannot be read"),
        ("name=", "name: expected a value after 'name='"),
        ("rate=null", "rate: Expected a float. Got value: None, in the command line"),
        ("rate=inf", "rate: Expected a float. Got value: inf"),
        ("weights=[1,nan]", "weights: "),
        ("files=[a,]  b --files c", "files: expected once, with or without its key, got b as well"),
    ],
)
def test_wrong_words_are_one_line(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        example(*words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "just words", "rate: 1\nrate: 2", 3000 * "["])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config .*bad\.yaml: ") as caught:
        example("--config", str(tmp_path / "bad.yaml"))
    assert "\n" not in str(caught.value)


def test_a_file_holds_and_later_words_override_it(tmp_path):
    (tmp_path / "a.yaml").write_text("rate: 3\nlevels: [1]\n")
    found = example("--config", str(tmp_path / "a.yaml"), "rate=4")
    assert (found.rate, found.levels, found.image_size) == (4.0, [1], 64)
    (tmp_path / "b.yaml").write_text("imagesize: 3\n")
    with pytest.raises(ValueError, match=r"'imagesize' in .*b.yaml; did you mean 'image_size'"):
        example(f"config={tmp_path / 'b.yaml'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: null", "rate: Expected a float. Got value: None"),
        ("rate: .nan", "rate"),
        ("levels: [x]", "levels"),
        ('name: ""', "name: "),
    ],
)
def test_values_of_a_file_are_checked_and_the_file_is_named(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"{message}.*") as caught:
        example("--config", str(tmp_path / "a.yaml"))
    with pytest.raises(ValueError, match=f"{message}.* in .*a.yaml"):
        options.load(tmp_path / "a.yaml", Example)
    assert "\n" not in str(caught.value)


def test_a_file_may_say_one_word_for_a_list_and_a_number_for_a_name(tmp_path):
    (tmp_path / "a.yaml").write_text("files: a\nlevels: 23\nname: 2024\nfast: yes\nrate: 1e-4\n")
    found = example("--config", str(tmp_path / "a.yaml"))
    assert (found.files, found.levels, found.name, found.fast, found.rate) == (["a"], [23], "2024", True, 1e-4)


def test_status_and_message_of_a_command(capsys):
    def work(given):
        outcome = {
            "a": None,
            "b": 1,
            "c": ValueError("x: wrong"),
            "d": options.Stopped("nan"),
            "e": KeyboardInterrupt(),
        }
        if isinstance(result := outcome[given.name], BaseException):
            raise result
        return result

    found = {name: options.run(work, Example, "example.py", [f"name={name}"]) for name in "abcde"}
    assert found == {"a": 0, "b": 1, "c": 2, "d": 1, "e": 130}
    assert capsys.readouterr().err.splitlines() == [
        "error: x: wrong", "error: nan", "interrupted; the same command continues",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_of_every_command(name, capsys):
    command, kind = COMMANDS[name]
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and f"python training/{name}" in text and "--config" in text
    for f in fields(kind):
        explanation = text.partition(f" --{f.name} ")[2].partition(" ")[2]
        assert explanation and not explanation.startswith("(type"), f.name


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_key_of_every_command(name, capsys):
    assert COMMANDS[name][0].main(["workes=1"]) == 2
    assert "error: unknown key 'workes' in the command line; did you mean '" in capsys.readouterr().err


def _script(path, root, folder):
    """In a process of its own: the command as a script, from elsewhere, with nothing of the project on the path."""
    os.chdir(folder)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    for name in [name for name in sys.modules if name.partition(".")[0] == "training"]:
        del sys.modules[name]
    sys.argv = [path, "nowhere=1"]
    with open("said", "w") as sys.stderr:
        runpy.run_path(path, run_name="__main__")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="only a fork starts at once")
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_run_as_scripts_from_elsewhere(name, tmp_path):
    path = Path(COMMANDS[name][0].__file__)
    process = multiprocessing.get_context("fork").Process(target=_script, args=(str(path), path.parents[1], tmp_path))
    process.start()
    process.join(60)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 2 and said.startswith("error: unknown key 'nowhere'") and said.count("\n") == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations(path, tmp_path):
    kind = study.StudyConfig if path.stem.startswith("study") else Config
    config = read(["--config", str(path)], kind, "x.py")
    assert config.name == path.stem
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert options.load(tmp_path / "saved.yaml", kind) == config
    assert read(["--config", str(tmp_path / "saved.yaml")], kind, "x.py") == config


def test_the_shipped_runs_are_those_the_readme_tells_of():
    job = read([], Config, "train.py", EMBEDDED)
    assert (job.test_clips, job.compression, job.seed, job.students) == (3000, "c36", 0, ["none", "add"])
    compared = read([], study.StudyConfig, "study.py", study.DEFAULT)
    assert len(compared.students) == 11 and set(compared.students) == set(DISTILLERS)
    assert len(embedded.FOLDED) == len(set(embedded.FOLDED)) == 15


def test_paper_numbers_of_resnet50():
    config = read(["--config", str(EMBEDDED.with_name("resnet50_ffpp_c40.yaml")), "lr=5"], Config, "train.py")
    assert (config.image_size, config.batch_size, config.epochs, config.warmup_epochs) == (128, 144, 32, 3)
    assert config.frequency_weights == [0, 1, 2, 0.25] and config.multi_view_weights == [0, 0.5, 2.5, 2]
    assert (config.views, config.attention_gamma, config.contrast, config.margin) == (12, 100, 50, 0.012)
    assert config.multi_view_scale == 16 and config.lr == 5, "a later argument overrides the file"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("epochs=0", "epochs: expected at least 1, got 0"),
        ("distance=l3", "distance"),
        ("frequency_weights=[1,2]", "expected four weights"),
        ("students=[add,add]", "different distillers"),
        ("fingerprint=[1]", "fingerprint: expected the least and the greatest"),
        ("name=.", "name: expected the name of a folder below out"),
        ("name=../x", "name: expected the name of a folder below out"),
        ("name=a/../../x", "name: expected the name of a folder below out"),
        ("name=/x", "name: expected the name of a folder below out"),
        ("name=a\x1bb", "name: expected the name of a folder below out"),
        (f"name=a/{'é' * 101}", "name: expected parts of at most 200 bytes, got one of 202"),
        ("lr=-1", "lr: expected above 0, got -1"),
        ("rise=2", "rise: expected between 0 and 1"),
        ("workers=-1", "workers: expected at least 0, got -1"),
        ("seed=-1", "seed: expected at least 0"),
        ("image_size=31", "image_size: expected an even side"),
        ("image_size=4098", "image_size: expected at most 4096, got 4098"),
        ("bins=0", "bins: expected at least 1 or null"),
        ("frequency_weights=[0,1,2,-4]", "frequency_weights: expected four weights >= 0"),
    ],
)
def test_values_of_a_run_are_checked(words, message):
    with pytest.raises(ValueError, match=message):
        read(words.split(), Config, "train.py")


def test_without_a_file_the_main_job_holds():
    config = read([], Config, "train.py", EMBEDDED)
    assert config.name == "embedded" and config.coordinates == "unit"
    words = ["--config", str(EMBEDDED.with_name("xception_ffpp_c40.yaml"))]
    assert read(words, Config, "train.py", EMBEDDED).coordinates == "index"


@contextmanager
def unread():
    """Standard output and errors are pipes that nobody reads; closing them writes what they still hold."""
    with ExitStack() as streams:  # no fixture: between set-up and call pytest puts its own streams back
        for name in ("stdout", "stderr"):
            reader, writer = os.pipe()
            os.close(reader)
            streams.enter_context(patch.object(sys, name, streams.enter_context(open(writer, "w"))))
        yield


def test_what_nobody_reads_does_not_end_the_work():
    done = []

    def work(_: Example) -> int:
        for step in range(3):
            print("said", flush=True)
            print("and noted", file=sys.stderr, flush=True)
            done.append(step)
        assert not sys.stderr.isatty()  # as a progress bar asks
        print("buffered")
        return 1

    with unread():
        assert options.run(work, Example, "example.py", []) == 1 and done == [0, 1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="is about a disk that is full")
def test_an_output_that_cannot_be_written_is_an_error(capsys):
    with open("/dev/full", "w") as full, open(os.devnull, "w") as nowhere, patch.object(sys, "stdout", full):
        assert options.run(lambda _: print("lost"), Example, "example.py", []) == 2
        os.dup2(nowhere.fileno(), full.fileno())  # or closing it would fail
    assert "No space left" in capsys.readouterr().err


MAINS = [f"training.{name[:-3]}" for name in COMMANDS] + ["training.report.simulate"]
MAINS += [f"benchmarks.{name}" for name in ("runner", "directions", "point_sets", "warm")]


@pytest.mark.parametrize("module", MAINS)
def test_help_that_nobody_reads_is_no_error(module, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    main = importlib.import_module(module).main
    with unread(), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


def test_a_report_that_nobody_reads_is_no_error():
    main = importlib.import_module("add_ops.__main__").main
    with unread():
        assert main() == 0
