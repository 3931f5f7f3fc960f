"""How every command reads its options: a dataclass, filled from ``key=value``, ``--key value`` and YAML files."""

from __future__ import annotations

import difflib
import json
import math
import re
import signal
import sys
import threading
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from add_ops._output import outliving_readers

from .files import read_bytes, shown_lines
from .interrupts import Stopped, during_imports

POSITIONAL = {"positional": True}  # metadata of a field that is also filled by words without a key
LARGEST_FILE = 2**16  # bytes of a YAML file; PyYAML takes a second for 10,000
MOST_ITEMS = 1000  # of a list; the parser of options takes seconds for more
LARGEST = 1_000_000  # characters of it with its aliases written out
O = TypeVar("O")  # noqa: E741 - a dataclass of options


# ------------------------------------------------------------------------------------------------------------- reading


@outliving_readers()
def run(
    work: Callable[[O], int | None],
    kind: type[O],
    command: str,
    argv: Sequence[str] | None = None,
    *,
    default: Path | None = None,
    after_interrupt: str = "the same command continues",
) -> int:
    """A whole command: read its options, do its work, and answer what goes wrong in one line.

    Args:
        work: returns the exit status; None is 0.
        kind: the dataclass of the options.
        command: file name of the command.
        argv: the words after the command; None: those this process was started with.
        default: YAML file that holds where ``--config`` is not given.
        after_interrupt: what Ctrl-C leaves.

    Returns:
        The exit status: that of ``work``, 1 where it was stopped, 2 for wrong usage or input, 130 after Ctrl-C. Output
        that nobody reads any more changes nothing.
    """
    importing = signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, during_imports)
    if importing and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a locale without "–" must not cost what was worked out
    try:
        about = sys.modules[work.__module__].__doc__
        status = work(read(sys.argv[1:] if argv is None else argv, kind, command, default, about)) or 0
        print(end="", flush=True)  # what a full disk does not take is an error
        return status
    except Stopped as error:
        status, said = 1, f"error: {error}"
    except (ValueError, OSError) as error:
        status, said = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, said = 130, f"interrupted; {after_interrupt}"
    print(shown_lines(said), file=sys.stderr)
    return status


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Examples as they stand, options folded."""


def read(argv: Sequence[str], kind: type[O], command: str, default: Path | None = None, about: str | None = None) -> O:
    """Options from the words of a command line; see :func:`run`. ``about`` is what ``--help`` says first.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range.
    """
    bare = [f for f in fields(kind) if f.metadata.get("positional")]
    usage = " ".join([f"python training/{command}", *(f"{f.name} …" for f in bare), "[key=value | --key value] …"])
    parser = _parser(kind, about or kind.__doc__, usage)
    given, loose = _pairs(argv, kind, bare)
    if default and "config" not in [key for key, _ in given]:
        parser.set_defaults(_values(parser, _of_file(default, kind), str(default)))
    pairs: list[tuple[str, str]] = []
    for key, value in given:
        if key == "config":
            _values(parser, of_file := _of_file(value, kind), value)  # so that what is wrong there is told of the file
            pairs += of_file
        else:
            pairs.append((key, value))
    values = _values(parser, pairs, "the command line")
    if loose:  # as they are: a name may have bytes that no parser takes
        name = bare[0].name
        if name in [key for key, _ in given] or (len(loose) > 1 and not _is_list(get_type_hints(kind)[name])):
            raise ValueError(f"{name}: expected once, with or without its key, got {' '.join(loose)} as well")
        values[name] = loose if _is_list(get_type_hints(kind)[name]) else loose[0]
    return _checked(kind, values, "the command line")


def load(path: str | Path, kind: type[O]) -> O:
    """Options that were saved with a run.

    Raises:
        ValueError: no YAML mapping, a key that is no option, or a value of the wrong type.
    """
    return _checked(kind, _values(_parser(kind, "", ""), _of_file(path, kind), str(path)), str(path))


def check_keys(keys: Sequence[str], where: str, kind: type) -> None:
    """Raise a ValueError for the first key that is no field of ``kind``, naming the nearest one."""
    known = [f.name for f in fields(kind)]
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key '{key}' in {where}; did you mean '{nearest}'?")


def mapping(path: str | Path) -> dict[str, Any]:
    """What stands in a YAML file of ``key: value`` lines.

    Raises:
        ValueError: it cannot be read, is too long, is no such file, has a key twice, or aliases make too much of it.
    """
    try:
        values = yaml.load(read_bytes(Path(path), LARGEST_FILE).decode("utf-8"), _Once)
        if _size(values, {}) > LARGEST:
            raise ValueError(f"expected at most {LARGEST} characters, its aliases make more of it")
    except Exception as error:  # PyYAML answers odd tags with whatever error they happen to cause
        odd = "" if isinstance(error, OSError | ValueError | yaml.YAMLError) else f"{type(error).__name__}: "
        raise ValueError(f"config {path}: cannot be read: {odd}{' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {path}: expected 'key: value' lines, got {type(values).__name__}")
    return values


class _Once(yaml.SafeLoader):
    """YAML in which no key stands twice: the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if again := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(problem=f"the key '{again[0]}' stands twice")
        if "<<" in keys:  # which aliases of aliases make as long as they like
            raise yaml.constructor.ConstructorError(problem="the key '<<', which merges others, is not read")
        return super().construct_mapping(node, deep)


def _size(value: object, known: dict[int, int | None]) -> int:
    """How many characters a value is about, written out; ``known`` are the sizes of the containers met before.

    Raises:
        ValueError: it holds itself.
    """
    if not isinstance(value, dict | list | tuple | set):
        return len(value) if isinstance(value, str | bytes) else 1
    if id(value) not in known:
        known[id(value)] = None
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    if (found := known[id(value)]) is None:
        raise ValueError("an alias stands within what it stands for")
    return found


def _parser(kind: type, about: str, usage: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        usage=usage.replace("%", "%%"),
        description=about.replace("``", "'"),
        formatter_class=_Formatter,
        default_env=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", type=str, help="YAML file of these options; later arguments override it.")
    kind.__init__.__annotations__ = get_type_hints(kind)  # inherited fields name types of other modules
    parser.add_class_arguments(kind, nested_key=None, as_group=False)
    return parser


def _of_file(path: str | Path, kind: type) -> list[tuple[str, str]]:
    """The options in a YAML file as they would stand on a command line."""
    values, hints = mapping(path), get_type_hints(kind)
    check_keys(list(values), str(path), kind)

    def text(key: str, value: object) -> str:
        hint = hints[key]
        if isinstance(value, dict | set | bytes) or (isinstance(value, list) and not _is_list(hint)):
            raise ValueError(
                f"{key}: expected one value, or a list where it has several, got {type(value).__name__}, in {path}"
            )
        if _is_list(hint) and not isinstance(value, list) and value is not None:
            value = [value]
        said = str(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        if _is_list(hint) and (count := 1 + said.rstrip(", ]").count(",")) > MOST_ITEMS:
            raise ValueError(f"{key}: expected at most {MOST_ITEMS} values, got {count}, in {path}")
        if "str" not in str(hint) and re.search("[&*]", said):  # it will be read as YAML once more
            raise ValueError(f"{key}: expected no aliases within a text, in {path}")
        return said

    return [(key, text(key, value)) for key, value in values.items()]


def _values(parser: ArgumentParser, pairs: list[tuple[str, str]], where: str) -> dict[str, Any]:
    try:
        namespace = parser.parse_args([f"--{key}={value}" if key != "help" else "--help" for key, value in pairs])
    except Exception as error:  # jsonargparse raises its own family
        said = re.sub(r'Parser key "(\w+)": ', r"\1: ", " ".join(str(error).split()))
        said = re.sub(r"<class '(\w+)'>", r"\1", said)
        said = said if len(said) <= 500 else f"{said[:500]}…"
        raise ValueError(f"{said}, in {where}") from error
    return {key: value for key, value in vars(namespace).items() if key != "config"}


def _checked(kind: type[O], values: dict[str, Any], where: str) -> O:
    """The options, none of them empty or not finite where that means nothing."""
    for f in fields(kind):
        value = values[f.name]
        several = value if isinstance(value, list) else [value]
        if "" in several and f.default != "":
            raise ValueError(f"{f.name}: expected a value, got nothing, in {where}")
        if any(isinstance(one, float) and not math.isfinite(one) for one in several):
            raise ValueError(f"{f.name}: expected finite numbers, got {value}, in {where}")
    return kind(**{f.name: values[f.name] for f in fields(kind)})


YES, NO = ("true", "yes", "on"), ("false", "no", "off")


def _pairs(argv: Sequence[str], kind: type, bare: list[Field]) -> tuple[list[tuple[str, str]], list[str]]:
    """Every spelling as ``(key, value)``, in order, and the words without a key; keys are checked on the way."""
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)} | {"config", "help"}
    result: list[tuple[str, str]] = []
    loose: list[str] = []
    queue = list(argv)

    def is_option(word: str) -> bool:
        key = re.match(r"([A-Za-z_][\w-]*)=", word)
        return (
            (word.startswith("--") and word != "--") or bool(key and key[1].replace("-", "_") in known) or word == "-h"
        )

    while queue:
        word = queue.pop(0)
        if word == "--":
            loose += queue
            break
        match = re.fullmatch(r"(?:--([A-Za-z][\w-]*)|([A-Za-z_][\w-]*)(?==))(?:=(.*))?", word, flags=re.DOTALL)
        key = "help" if word == "-h" else (match[1] or match[2]).replace("-", "_") if match else None
        if key is None or (match and match[2] and key not in known and bare and Path(word).exists()):
            loose.append(word)
            continue
        if key == "help":
            return [("help", "")], []
        if key not in known:
            check_keys([key], "the command line", kind)
        hint, value = str if key == "config" else hints[key], match[3]
        if value is not None:
            values = [value]
        elif hint is bool:
            values = [queue.pop(0).lower()] if queue and queue[0].lower() in (*YES, *NO) else ["true"]
        else:
            values = [queue.pop(0)] if queue and not is_option(queue[0]) else []
            while values and _is_list(hint) and queue and not is_option(queue[0]) and queue[0] != "--":
                values.append(queue.pop(0))
        if not values or values == [""]:
            raise ValueError(f"{key}: expected a value after '{word}'")
        result.append((key, _joined(values, hint)))
    if loose and not bare:
        raise ValueError(f"expected key=value or --key value, got '{loose[0]}'")
    return result, loose


def _is_list(hint: object) -> bool:
    return "list[" in str(hint)


def _joined(values: list[str], hint: object) -> str:
    """Words as one value; a single one in brackets is a list already."""
    first = values[0]
    if hint is bool:
        return "true" if first.lower() in YES else "false" if first.lower() in NO else first
    bracketed, absent = first[:1] + first[-1:] == "[]", first == "null" and "None" in str(hint)
    if not _is_list(hint) or (len(values) == 1 and (bracketed or absent)):
        return first
    return json.dumps(values) if "list[str]" in str(hint) else f"[{', '.join(values)}]"
