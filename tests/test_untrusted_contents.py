"""What files from elsewhere hold takes no more time or memory than it may, and is believed only where it can be."""

import io
import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow
import pytest
import timm
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from untrusted import Even, picture

from training import evaluate, files, options, predict
from training.config import Config
from training.data import crops, frames, manifest, sources, tables
from training.models import checkpoints, weights
from training.models.weights import load_into, read_weights


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
    monkeypatch.setattr(tables, "MAX_COLUMNS", 1)
    with pytest.raises(ValueError, match=r"a\.parquet: .*expected at most 1 columns, got 2"):
        tables.read(tmp_path / "a.parquet")


def test_blank_lines_above_a_csv_take_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_BYTES", 2**21)  # for which room is made
    (tmp_path / "a.csv").write_text(" \n" * 2**19 + "a,b\n1,2\n")
    tracemalloc.start()
    try:
        assert list(tables.read(tmp_path / "a.csv")) == ["a", "b"]
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def repeated(path: Path, text: str, rows: int) -> Path:
    """A parquet file of a text that stands in every row, and in the file once."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), pyarrow.array([text]))
    parquet.write_table(pyarrow.table({"a": texts, "b": pyarrow.array([["x"]] * rows)}), path)
    return path


def test_a_few_bytes_of_parquet_do_not_become_gigabytes(tmp_path):
    table = tables.read(repeated(tmp_path / "a.parquet", "x" * 100, 1000))
    assert list(table) == ["a"] and (table["a"] == "x" * 100).all(), "lists are left out"
    with pytest.raises(ValueError, match=r"a\.parquet: .* bytes that stand for 1000000000 of text$"):
        tables.read(repeated(tmp_path / "a.parquet", "x" * 100_000, 10_000))
    plain = pyarrow.table({"a": pyarrow.array(["x" * 1_000_000] * 280)})
    parquet.write_table(plain, tmp_path / "b.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=r"b\.parquet: .* bytes that unpack to 280"):
        tables.read(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("limit", "content", "said"),
    [
        ({"MAX_BYTES": 20}, "a,b\n" + "1,2\n" * 9, "expected at most 20 bytes"),
        ({"MAX_TEXT_CELLS": 20}, "a;b;c\n" + "1;2;3\n" * 9, "expected at most 20 cells"),
        ({"MAX_COLUMNS": 2}, "a;b;c\n" + "1;2;3\n" * 9, "expected at most 2 columns, got 3"),
        ({"LONGEST_LINE": 20}, "a,b\n1," + "2" * 40 + "\n", "expected lines of at most 20 bytes"),
        ({"LONGEST_LINE": 20}, "a,b\r\n" + "1234567,2\r" * 9, ""),
    ],
)
def test_a_csv_larger_than_is_read(tmp_path, monkeypatch, limit, content, said):
    (tmp_path / "a.csv").write_text(content)
    assert len(tables.read(tmp_path / "a.csv")) in (1, 9)
    for name, value in limit.items():
        monkeypatch.setattr(tables, name, value)
    if said:
        with pytest.raises(ValueError, match=rf"^table {tmp_path}/a\.csv: {said}"):
            tables.read(tmp_path / "a.csv")
    else:
        assert len(tables.read(tmp_path / "a.csv")) == 9


def test_a_json_of_more_than_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[[], {}, 1]")
    assert files.read_json(tmp_path / "a.json") == [[], {}, 1]
    for name, value, said in (("MOST_VALUES", 4, "at most 4 values"), ("MOST_JSON", 10, "at most 10 bytes")):
        monkeypatch.setattr(files, name, value)
        with pytest.raises(ValueError, match=said):
            files.read_json(tmp_path / "a.json")


def test_devices_that_never_end_and_pipes_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match=r"^table /dev/zero: expected at most 10 bytes, got more"):
        tables.read("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for read in (tables.read, options.mapping):
        with pytest.raises(ValueError, match=r"pipe.*: expected a file, got a pipe"):
            read(tmp_path / "pipe")


def test_arrays_that_inflate_or_claim_more_than_there_is(tmp_path):
    header = io.BytesIO()
    fact = {"descr": "|u1", "fortran_order": False, "shape": (10**14,)}
    np.lib.format.write_array_header_1_0(header, fact)
    for content, said in ((bytes(10_000_000), "that unpacks to"), (header.getvalue(), "Unable to allocate")):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", content)
        with pytest.raises(ValueError, match=rf"a\.npz is damaged; remove it, and it is made again: .*{said}"):
            files.read_npz(tmp_path / "a.npz")


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
        json.dumps({"name": "resnet18", "image_size": 64, "mean": [0.5], "std": [0.5], "more": "x" * 10_000}),
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
    """A file as torch.save writes it, of a pickle by opcodes and a storage of one number."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": code, "version": b"3\n", "byteorder": b"little", "data/0": bytes(4)}.items():
            archive.writestr(f"a/{name}", content)
    return path


def doubled(times: int) -> bytes:
    """A pair of a pair of … of None, each holding the one before twice."""
    return b"N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times))


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def expanded(*shape: int) -> bytes:
    """A tensor of one number that stands at every place."""
    sizes, strides = (
        b"(" + b"J%b" * len(shape) % tuple(struct.pack("<i", n) for n in part) + b"t"
        for part in (shape, [0] * len(shape))
    )
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\1tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\0"
        + sizes
        + strides
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def again(function: bytes, argument: bytes, call: bytes) -> bytes:
    """A list of what comes of the same call a thousand times."""
    return function + b"q\0" + argument + b"q\1](" + call * 1000 + b"e."


def frozen(times: int) -> bytes:
    """A frozen set that holds the one before, and holds it within a tuple."""
    step = b"q\1c__builtin__\nfrozenset\n]h\1ah\1\x85a\x85R"
    return b"c__builtin__\nfrozenset\n]Na\x85R" + step * times


WIDE = b"c__builtin__\nset\n" + expanded(2**30)  # of which a set would make as many tensors


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (again(b"c_codecs\nencode\n", text("k" * 10_000), b"h\0h\1X\0\0\0\0\x86R"), "copy far more than there is"),
        (again(b"c__builtin__\nset\n", b"](" + b"N" * 5000 + b"e", b"h\0h\1\x85R"), "copy far more than there is"),
        (again(b"c__builtin__\nset\n", b"](" + b"N" * 5000 + b"e", b"(h\0h\1o"), "copy far more than there is"),
        (again(b"c__main__\nA\n", b"(" + b"N" * 5000 + b"t", b"h\0h\1R"), "copy far more than there is"),
        (again(b"c__main__\nA\n", b"(" + b"N" * 5000 + b"t", b"h\0h\1\x81"), "copy far more than there is"),
        (
            again(
                b"c__main__\nA\n",
                b"}(" + b"".join(b"M%bN" % struct.pack("<H", n) for n in range(5000)) + b"u",
                b"h\0)\x81h\1b",
            ),
            "copy far more than there is",
        ),
        (WIDE + b"\x85R.", "set of Tensor"),
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nset\nN" + expanded(2**30) + b"NtR.",
            "a tensor of Tensor",
        ),
        (expanded(2**30) + b"K\0K\1s.", "items or a state for Tensor"),
        (expanded(1) + b"(K\0tb.", "items or a state for Tensor"),
        (b"}(" + frozen(60) + b"N" + frozen(60) + b"Nu.", "unhashable"),
        (b"c__builtin__\nslice\nN" + doubled(60) + b"\x86R.", "a slice of other things"),
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


def test_names_take_no_more_memory_than_they_may(tmp_path, monkeypatch):
    torch.save({"k" * 100: {i: torch.zeros(1) for i in range(9)}}, tmp_path / "a.pth")
    assert list(read_weights(tmp_path / "a.pth"))[8] == "k" * 100 + ".8"
    monkeypatch.setattr(weights, "MOST_CHARACTERS", 1000)
    with pytest.raises(ValueError, match=r"^weights .*a\.pth: expected names of at most 1000 characters together"):
        read_weights(tmp_path / "a.pth")


def test_odd_keys_are_named_in_short_or_refused_with_the_file(tmp_path):
    torch.save({("k" * 10_000,) * 1000: torch.zeros(1)}, tmp_path / "a.pth")
    assert len(next(iter(read_weights(tmp_path / "a.pth")))) < 1000
    torch.save({10**5000: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"^weights .*a\.pth: Exceeds the limit"):
        read_weights(tmp_path / "a.pth")


def test_attributes_of_a_parameter_are_left_out(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.detach = "mine"
    torch.save({"a": parameter}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth")["a"].tolist() == [1, 1]


def test_a_number_is_not_expanded_to_positions(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=64, depth=1)
    positions = torch.zeros(1, 37, 192)
    for value, loads in (
        (positions, True),
        (torch.zeros(1, 1, 1).expand(1, 37, 192), False),
    ):
        torch.save(model.state_dict() | {"pos_embed": value}, tmp_path / "a.pth")
        if loads:
            load_into(model, tmp_path / "a.pth")
        else:
            with pytest.raises(ValueError, match=r"pos_embed: \(1, 37, 192\), the model's is \(1, 17, 192\)"):
                load_into(model, tmp_path / "a.pth")


def test_a_small_file_makes_no_large_model(tmp_path):
    note = json.dumps({"name": "resnet18", "image_size": 224, "mean": [0.5], "std": [0.5]})
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"add_ops": note})
    with pytest.raises(ValueError, match=r"^weights .*: expected \d+ numbers of 'resnet18', got \d+ bytes$"):
        checkpoints.find_one_trained(tmp_path / "a.safetensors").load()


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
        ("name: " + "a" * 70_000, "cannot be read: expected at most 65536 bytes, got more"),
        ("~", "expected 'key: value' lines, got NoneType"),
        ("", "expected 'key: value' lines, got NoneType"),
        ("? [a, b]\n: 1", "cannot be read: while constructing a mapping"),
        ("lr: [" + "1, " * 9999 + "]", "lr: "),
        ("crfs: [" + "1, " * 1500 + "]", "crfs: expected at most 1000 values, got 1500, in "),
        ("crfs: '[" + "1, " * 1500 + "]'", "crfs: expected at most 1000 values, got "),
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
