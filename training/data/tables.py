"""The one place that opens tables, CSV and parquet, and reads labels, splits and boxes from them."""

from __future__ import annotations

import csv
import difflib
import io
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas
import pyarrow
from pyarrow import compute, parquet

from ..files import read_bytes, shown

LABELS = dict.fromkeys(("real", "original", "genuine", "pristine"), 0)
LABELS |= dict.fromkeys(("fake", "forged", "manipulated", "deepfake", "synthetic"), 1)
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test"}
MAX_BYTES = 2**29
MAX_CELLS = 2**29  # of a parquet file
MAX_TEXT_CELLS = 2**25  # of a CSV file, each of which takes about sixty bytes of memory
MAX_COLUMNS = 2**12  # each costs as much as many rows
LONGEST_LINE = 2**20  # bytes, of a CSV file
NOTHING = ("none", "nan", "null")  # what scripts write into a cell without a name
BOX = ("frame", "left", "top", "right", "bottom")

SPREADSHEET = "a spreadsheet; save it as CSV"
NO_TABLES = {  # by what they begin with
    b"\xd0\xcf\x11\xe0": SPREADSHEET,
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
}
CONTROLS = bytes({*range(9), *range(14, 32)})  # no text has them

# ------------------------------------------------------------------------------------------------------------- reading


def read(path: str | Path, name: str = "table") -> pandas.DataFrame:
    """A CSV or parquet file, told apart by content.

    Args:
        path: CSV has a header line, one of ``, ; | tab`` between cells, and is UTF-8, Windows-1252, or UTF-16 with its
            mark.
        name: what messages call the table.

    Returns:
        Column names are stripped and lower-cased; columns without a name are left out. Cells of CSV are the text as
        written without surrounding blanks; parquet keeps its types, but what is missing among texts is "".

    Raises:
        ValueError: no such file, not a table, no rows, rows of unequal length, or column names that become equal.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError("expected a CSV or parquet file, got a folder")
        content = read_bytes(path, MAX_BYTES)
        table = _parquet(content) if content.startswith(b"PAR1") else _csv(content)
        table.columns = pandas.Index([str(column).strip().lower() for column in table], dtype=object)
        table = table.loc[:, table.columns != ""]
        if again := sorted(set(table.columns[table.columns.duplicated()])):
            raise ValueError(f"expected different names of columns, got {quoted(again)} more than once")
        if table.empty:
            raise ValueError("expected rows below the header, got none")
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no file '{shown(path)}'") from error
    except OSError as error:
        raise ValueError(f"{name} {shown(path)}: expected a CSV or parquet file, got: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{name} {shown(path)}: {error}") from error
    return table


def _parquet(content: bytes) -> pandas.DataFrame:
    try:  # from memory, for a path may look like a URL, or like a set with columns in the names of its folders
        table = _arrow(content).to_pandas()
        table = table.reset_index(drop=not any(table.index.names))
    except Exception as error:  # pyarrow has a family of its own
        raise ValueError(f"expected a whole parquet file, got: {str(error).partition(chr(10))[0]}") from error
    for column, values in table.items():
        if isinstance(values.dtype, pandas.CategoricalDtype):
            kind = values.cat.categories.dtype
            values = values.astype(kind if isinstance(kind, pandas.StringDtype) else object)
        if values.dtype == object or isinstance(values.dtype, pandas.StringDtype):
            table[column] = values.where(values.notna(), "")
    return table


def _arrow(content: bytes) -> pyarrow.Table:
    """The columns of a parquet file but for lists; a few of its bytes may stand for any number of cells and texts.

    Raises:
        ValueError: it has far more of them than such a file of pairs.
    """
    told = parquet.read_metadata(io.BytesIO(content))
    most = min(MAX_CELLS, 2**24 + 64 * len(content))
    _check_columns(told.num_columns)
    if told.num_rows * told.num_columns > most:
        raise ValueError(f"at most {most} cells, not {told.num_rows} rows of {told.num_columns}")
    unpacked = sum(told.row_group(i).total_byte_size for i in range(told.num_row_groups))
    if unpacked > 2**28 + 64 * len(content):
        raise ValueError(f"{len(content)} bytes that unpack to {unpacked}")
    columns = [told.schema.column(i) for i in range(told.num_columns)]
    flat = [column for column in columns if column.path == column.name and not column.max_repetition_level]
    texts = [c.name for c in flat if c.physical_type == "BYTE_ARRAY" and c.logical_type.type in ("STRING", "NONE")]
    chosen = None if len(flat) == len(columns) else [column.name for column in flat]
    table = parquet.read_table(io.BytesIO(content), columns=chosen, read_dictionary=texts)  # each text is held once
    written_out = 0
    for column in table.columns:
        for part in column.chunks if pyarrow.types.is_dictionary(column.type) else ():
            if pyarrow.types.is_string(part.dictionary.type) or pyarrow.types.is_binary(part.dictionary.type):
                lengths = compute.binary_length(part.dictionary).to_numpy(zero_copy_only=False)
                written_out += int(lengths[part.indices.drop_null().to_numpy(zero_copy_only=False)].sum())
    if written_out > 2**28 + 256 * len(content):
        raise ValueError(f"{len(content)} bytes that stand for {written_out} of text")
    return table


def _check_columns(count: int) -> None:
    if count > MAX_COLUMNS:
        raise ValueError(f"expected at most {MAX_COLUMNS} columns, got {count}")


def _csv(content: bytes) -> pandas.DataFrame:
    for start in range(0, len(content) - LONGEST_LINE, LONGEST_LINE):
        if content.find(b"\n", start, end := start + LONGEST_LINE) < 0 > content.find(b"\r", start, end):
            raise ValueError(f"expected lines of at most {LONGEST_LINE} bytes, got a longer one")
    if content.count(b"\n") + max(map(content.count, (b",", b";", b"\t", b"|"))) > MAX_TEXT_CELLS:
        raise ValueError(f"expected at most {MAX_TEXT_CELLS} cells, got more; of parquet it may be more")
    text = re.sub(r"\A(?>[^\S\r\n]*[\r\n]+)*+", "", _decoded(content))  # lines of blanks above the header
    if not text.strip():
        raise ValueError("expected a header line and rows, got an empty file")
    told = re.match(r"sep=([,;\t|])[\r\n]+", text)  # as Excel writes it
    text = text[told.end() :] if told else text
    delimiter = told[1] if told else max(",;\t|", key=lambda mark: len(next(_cells(text[:100_000], mark))))
    reader = _cells(text, delimiter, strict=True)
    try:
        header, *rows = [list(map(str.strip, row)) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"expected CSV, got in line {reader.line_num}: {error}; is a quote not closed?") from error
    _check_columns(len(header))
    while rows and not any(rows[-1]):  # spreadsheets leave ",,," below
        rows.pop()
    widths = np.array([len(row) for row in rows], int)
    if wrong := [f"{n} in {_rows(np.flatnonzero(widths == n))}" for n in np.unique(widths) if n != len(header)]:
        raise ValueError(f"expected {len(header)} cells in each row, as in the header, got {'; '.join(wrong)}")
    return pandas.DataFrame(rows, columns=header, dtype=str)


def _cells(text: str, delimiter: str, strict: bool = False) -> csv.reader:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=strict)


def _decoded(content: bytes) -> str:
    for beginning, what in NO_TABLES.items():
        if content.startswith(beginning):
            sheet = b"xl/workbook" in content or b"opendocument.spreadsheet" in content
            raise ValueError(f"expected a CSV or parquet file, got {SPREADSHEET if sheet else what}")
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ("utf-16",) if marked else ("utf-8-sig", "cp1252", "latin-1"):
        try:
            text = content.decode(encoding).rstrip("\x1a")  # the end of a file in CP/M and DOS
        except UnicodeDecodeError:
            continue
        if len(plain := text.encode()) == len(plain.translate(None, CONTROLS)):
            return text
    raise ValueError("expected a CSV or parquet file, got a binary one")


# ------------------------------------------------------------------------------------------------------------ problems


class Problems:
    """Everything that is wrong with a table, said at once.

    Args:
        where: names the table at the beginning of the message.
    """

    def __init__(self, where: str) -> None:
        self.where, self.part, self.lines = where, "", []

    def of(self, part: str) -> Problems:
        """For one of several files of the table: what is added there is added here, with the name of the part."""
        problems = Problems(self.where)
        problems.part, problems.lines = f"{part}: ", self.lines
        return problems

    def add(self, column: str, rows: Sequence[bool] | Sequence[int] | None, said: str) -> None:
        """Add one problem, unless no row has it.

        Args:
            column: that has it.
            rows: a mask over all rows, or positions from 0; None: it is of no certain rows.
            said: what was expected, and examples of what was got.
        """
        if rows is None:
            self.lines.append(f"{self.part}{column}: {said}")
        elif len(rows := np.asarray(rows)) and (rows.dtype != bool or rows.any()):
            positions = np.flatnonzero(rows) if rows.dtype == bool else np.unique(rows)
            self.lines.append(f"{self.part}{column}, {_rows(positions)}: {said}")

    def check(self) -> None:
        """Raise one ValueError with a line for each problem, if there is any; rows count from 1 below the header."""
        if len(self.lines) == 1:
            raise ValueError(f"{self.where}: {self.lines[0]}")
        if self.lines:
            raise ValueError("\n  ".join([f"{self.where}: {len(self.lines)} problems", *self.lines]))


def some(texts: Iterable[object], most: int = 3) -> str:
    """The first few and the number of the others: ``a, b, c and 5 more``."""
    texts = [str(text) for text in texts]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def quoted(values: Iterable[object], most: int = 3) -> str:
    """:func:`some` values in quotes, fit for a line."""
    return some(("'" + "\\n".join(shown(value).splitlines()) + "'" for value in values), most)


def _rows(positions: np.ndarray) -> str:
    """Rising positions from 0 as rows from 1: ``rows 3, 7–9, 14 and 5 more``."""
    most = 5
    breaks = np.flatnonzero(np.diff(positions) > 1)
    firsts = positions[np.concatenate([[0], breaks + 1])][:most]
    lasts = positions[np.concatenate([breaks, [len(positions) - 1]])][:most]
    spans = [f"{a + 1}" if a == b else f"{a + 1}–{b + 1}" for a, b in zip(firsts, lasts, strict=True)]
    more = len(positions) - int((lasts - firsts + 1).sum())
    return f"row{'s' if len(positions) > 1 else ''} {', '.join(spans)}" + (f" and {more} more" if more else "")


# ------------------------------------------------------------------------------------------------------------- columns


def require(table: pandas.DataFrame, columns: Sequence[str], problems: Problems) -> None:
    """Add to the problems, in one line, the columns that a table should have and has not, and what it has."""
    if missing := [column for column in columns if column not in table]:
        near = {column: difflib.get_close_matches(column, list(table), 1) for column in missing}
        hints = "".join(f", '{found[0]}' is near '{column}'" for column, found in near.items() if found)
        said = f"expected {list(columns)}, missing {missing}, got {quoted(table, 20)}{hints}"
        problems.add("columns", None, said)


def text(column: pandas.Series) -> pandas.Series:
    """A column as str without surrounding blanks, "" where it is missing."""
    return column.astype(str).where(column.notna(), "").str.strip()


def names(column: pandas.Series) -> pandas.Series:
    """:func:`text` of a column that names something or nothing, "" also where it says ``None``, ``nan`` or ``null``."""
    cells = text(column)
    return cells.where(~cells.str.lower().isin(NOTHING), "")


def spellings(path: str) -> list[str]:
    """A path as written, then with Windows' separators taken, each also in the other normal forms of Unicode.

    macOS gives names out in another form than people type, and a copy on another system keeps it.
    """
    written = (path, path.replace("\\", "/"))
    return list(dict.fromkeys(s for w in written for s in (w, *(unicodedata.normalize(f, w) for f in ("NFC", "NFD")))))


def labels(column: pandas.Series, problems: Problems) -> np.ndarray:
    """Labels ``(N,)`` int64, 1 = fake, from numbers or words; -1 where that is a problem."""
    return _understood(column, problems, _label, "0 or real, 1 or fake (true may mean either)", -1).astype(np.int64)


def splits(column: pandas.Series, problems: Problems) -> np.ndarray:
    """Splits ``(N,)`` of str, ``train``, ``val`` or ``test``, in the words in use; "" where that is a problem."""
    return _understood(column, problems, SPLITS.get, "train, val or test", "").astype(str)


def _label(word: str) -> int | None:
    """Of a word in lower case; ``true`` is none, for it says "fake" here and "genuine" there."""
    if word in LABELS:
        return LABELS[word]
    try:
        return {0.0: 0, 1.0: 1}.get(float(word))
    except ValueError:
        return None


def _understood(
    column: pandas.Series, problems: Problems, meaning: Callable[[str], object], expected: str, otherwise: object
) -> np.ndarray:
    codes, words = pandas.factorize(text(column).str.lower())
    values = [meaning(word) for word in words]
    unknown = [code for code, (word, value) in enumerate(zip(words, values, strict=True)) if word and value is None]
    problems.add(column.name, words[codes] == "", "empty")
    problems.add(column.name, np.isin(codes, unknown), f"expected {expected}, got {quoted(words[unknown])}")
    return np.array([otherwise if value is None else value for value in values])[codes]


@cache
def read_boxes(path: str | Path) -> dict[str, np.ndarray]:
    """Boxes by video from a table: video (its path below the source), frame, left, top, right, bottom; read once.

    Returns:
        For each video, as :func:`plain_path` writes it, ``(T, 5)`` float64 by rising frame: its number, and the box in
        pixels.

    Raises:
        ValueError: it is no such table, or a box is no box; every problem is listed.
    """
    table = read(path, "detector_file")
    problems = Problems(f"detector_file {shown(path)}")
    require(table, ("video", *BOX), problems)
    problems.check()
    video = text(table["video"])
    problems.add("video", video == "", "empty")
    video = video.map(plain_path)
    numbers = pandas.DataFrame({column: _numbers(table[column], problems) for column in BOX})
    problems.add("right", numbers["right"] <= numbers["left"], "expected more than left")
    problems.add("bottom", numbers["bottom"] <= numbers["top"], "expected more than top")
    again = numbers.assign(video=video).duplicated(["video", "frame"]) & numbers["frame"].notna()
    problems.add("frame", again, "expected one box in a frame, got another")
    problems.check()
    return {name: rows.to_numpy(float) for name, rows in numbers.sort_values("frame").groupby(video)}


def plain_path(path: str) -> str:
    """A path with ``/`` between its parts and without ``.``, however a system or a script wrote it."""
    return posixpath.normpath(path.replace("\\", "/"))


def _numbers(column: pandas.Series, problems: Problems) -> np.ndarray:
    values = pandas.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
    wrong = ~np.isfinite(values)
    problems.add(column.name, wrong, f"expected a number, got {quoted(column[wrong].unique())}")
    return values
