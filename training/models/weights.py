"""Files of weights, opened here alone: read without running what they carry, fitted to a timm model whoever named them.

No project and no training loop is named. Whatever wraps the tensors – dictionaries, lists, modules pickled whole,
``DataParallel``, averaging, Lightning – becomes part of their dotted names, and the prefix under which most of the
model's names are found with fitting shapes is taken off.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import shown

HEAD = re.compile(r"(?:last_linear|fc|classifier|head)(?:\.\d+)?\.(weight|bias)")
WRAPPED = re.compile(r"(?:^|(?<=\.))_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")  # at any depth
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?)(?![a-z])", re.IGNORECASE)
COUNTER = "num_batches_tracked"  # of batch normalisation; older files have none, and evaluation reads none
LISTED = 6  # names that an error message shows


# ------------------------------------------------------------------------------------------------------------- reading


class _Inert:
    """Stands in for every other class and function of a pickle: it takes what it is given and does nothing."""

    dump_patches = False  # which torch asks of the classes of old files

    def __new__(cls, *arguments: object, **_: object) -> _Inert:
        self = super().__new__(cls)
        self.contents = dict(enumerate(arguments))
        return self

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # a pair where the object has slots
            self.contents |= part if isinstance(part, Mapping) else {len(self.contents): part}

    def __setitem__(self, key: object, value: object) -> None:
        self.contents[key] = value

    def append(self, value: object) -> None:
        self.contents[len(self.contents)] = value

    def extend(self, values: Iterable) -> None:
        for value in values:
            self.append(value)


class _Allowed:
    """A function or class that a pickle may call, in a shell whose attributes the pickle cannot set."""

    __slots__ = ("call",)

    def __init__(self, call: Callable) -> None:
        self.call = call

    def __call__(self, *arguments: object) -> object:
        return self.call(*arguments)

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("a state for a function")


REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
BUILTIN = (set, frozenset, slice, complex, bytes, bytearray)
ALLOWED = {
    **{f"torch._utils.{name}": getattr(torch._utils, name) for name in REBUILD},
    **{f"builtins.{kind.__name__}": kind for kind in BUILTIN},
    **{f"collections.{kind.__name__}": kind for kind in (OrderedDict, Counter, defaultdict)},
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, _, arguments, __: rebuild(*arguments),  # has attributes
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # how older protocols write bytes
    "builtins.getattr": lambda *_: _Inert,  # a class within a class
}


class _Unpickler(pickle.Unpickler):
    """Looks up nothing but plain containers and what builds tensors.

    torch's own ``weights_only`` goes as far, but not with modules pickled whole by the torch of 2018 (the released
    detectors of FaceForensics++) nor with the newer pickle protocols.
    """

    def find_class(self, module: str, name: str) -> object:
        module = "builtins" if module == "__builtin__" else module
        if call := ALLOWED.get(f"{module}.{name}"):
            return _Allowed(call)
        found = getattr(torch, name, None) if module == "torch" else None
        return found if isinstance(found, torch.dtype) else _Inert


_PICKLE = SimpleNamespace(
    __name__="inert", Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load()
)


def read_torch(path: str | Path) -> object:
    """What ``torch.save`` wrote to a file, in its zip format or the older one, or safetensors, on the CPU.

    Nothing of it is run: tensors and plain containers are as they were saved, every other object is an inert shell.

    Raises:
        ValueError: no such file, or not such a file.
    """
    if not (path := Path(path)).is_file():
        raise ValueError(f"weights: no file '{shown(path)}'")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes whose sources are not those of today
            beginning = file.read(9)
            if beginning[8:] == b"{":  # eight bytes of length, then JSON: only safetensors begin so
                return load_file(path)
            file.seek(0)
            if beginning[:2] == b"PK" and "constants.pkl" in torch._C.PyTorchFileReader(file).get_all_records():
                raise ValueError("a TorchScript program, which would have to be run")
            file.seek(0)  # latin1 reads the byte strings of Python 2, too
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE, encoding="latin1")
    except Exception as error:  # torch answers foreign bytes with whatever error they happen to cause
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"weights {shown(path)}: expected a safetensors or torch file of weights, got: {reason}"
        ) from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a safetensors file tells about itself; empty for other files."""
    with Path(path).open("rb") as file:
        beginning = file.read(9)
        if beginning[8:] != b"{":
            return {}
        header = b"{" + file.read(min(int.from_bytes(beginning[:8], "little"), 10**8) - 1)  # the format's own limit
    try:
        return json.loads(header).get("__metadata__", {})
    except ValueError:
        return {}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file that :func:`read_torch` reads, by dotted names, in the file's order.

    ``{"state_dict": {"conv1.weight": w}, "step": 3}`` gives ``state_dict.conv1.weight``; items of lists are named by
    their index, tensors of a module that was pickled whole as in its ``state_dict()``.

    Raises:
        ValueError: no such file, not a file of weights, or no tensors in it.
    """
    return {name: value for name, (value, _) in _read_named(path).items()}


def _read_named(path: str | Path) -> dict[str, tuple[Tensor, str]]:
    if not (named := dict(_named(read_torch(path)))):
        raise ValueError(f"weights {shown(path)}: expected tensors by name (a state_dict), found none")
    return named


def _named(contents: object) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    """Tensors by name, each with the name of the mapping, list or whole module that it lies in."""
    seen: set[int] = set()  # pickles may hold themselves
    waiting = [("", "", contents, False)]
    while waiting:
        container, prefix, value, in_module = waiting.pop()
        if isinstance(value, Tensor):
            yield prefix[:-1], (value.detach(), container)
            continue
        if id(value) in seen or not isinstance(value, Mapping | list | tuple | set | frozenset | _Inert):
            continue
        seen.add(id(value))
        is_module = isinstance(value, _Inert) and {"_parameters", "_modules"} <= value.contents.keys()
        if is_module:
            held = [value.contents.get(kind) or {} for kind in ("_parameters", "_buffers", "_modules")]
            unsaved = value.contents.get("_non_persistent_buffers_set") or ()
            items = [item for kind in held for item in kind.items() if item[0] not in unsaved]
        elif isinstance(value, _Inert | Mapping):
            items = list((value.contents if isinstance(value, _Inert) else value).items())
        else:
            items = list(enumerate(value))
        inside = container if in_module and is_module else prefix
        waiting += [(inside, f"{prefix}{name}.", part, is_module) for name, part in reversed(items)]


# ------------------------------------------------------------------------------------------------------------- fitting


@dataclass
class Fit:
    """How a file fitted a model.

    Attributes:
        path: the file.
        loaded: how many of the model's tensors were found.
        total: how many it has.
        prefix: what stood before every used name in the file.
        unused: names beside the used ones in the file that the model has no place for.
        missing: names in the model that the file does not have; they keep their values.
        left_out: of the head, of another shape or of more than one layer: the model's keeps its values.
        head: whether the two-class head was loaded.
        assumed: what was taken for granted, in words.
    """

    path: Path
    loaded: int
    total: int
    prefix: str
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    head: bool = True
    assumed: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.unused or self.missing or self.left_out)

    def __str__(self) -> str:
        before = f", without the prefix '{self.prefix}'" if self.prefix else ""
        assumed = "".join(f"; {assumption}" for assumption in self.assumed)
        lines = [f"weights {shown(self.path)}: {self.loaded} of {self.total} tensors{before}{assumed}"]
        for kind, names in (("not used", self.unused), ("not found", self.missing), ("left out", self.left_out)):
            if names:
                lines.append(f"  {kind} ({len(names)}): {', '.join(names)}")
        return "\n".join(lines)


def load_into(backbone: nn.Module, path: str | Path, *, fake_class: int = 1) -> Fit:
    """Load a file into a timm model with two classes; a head that does not fit is left out.

    A head with one output z, trained with a sigmoid, becomes the two-class head of the same probabilities: 0 and z.

    Args:
        backbone: the model, whose class 1 is fake.
        path: safetensors or torch file.
        fake_class: the file's class of fakes; of a head with one output: 1 where it is high for fakes, 0 for reals.

    Raises:
        ValueError: the file cannot be read, or lacks a tensor of the model (other than the head and the counters of
            batch normalisation), or has one of another shape.
    """
    if fake_class not in (0, 1):
        raise ValueError(f"fake_class: expected 0 or 1, got {fake_class!r}")
    own = backbone.state_dict()
    classifiers = backbone.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    heads = [f"{name}." for name, module in backbone.named_modules() if any(module is head for head in classifiers)]
    in_head = {name for name in own if name.startswith(tuple(heads))}
    named = {WRAPPED.sub("", name): held for name, held in _read_named(path).items()}
    file = {name: value for name, (value, _) in named.items()}
    prefix, others = _prefix(file, own, in_head)
    fit = Fit(Path(path), 0, len(own), prefix)
    if AVERAGED.search(prefix):
        fit.assumed.append("averaged weights")
    if others:
        fit.assumed.append(f"not those under {', '.join(map(repr, others))}, which fit as well")

    places = {name: [prefix + name] for name in own if prefix + name in file}
    if heads and not in_head & places.keys():
        places |= _foreign_head(file, prefix, heads[0], own)
        if beside := [name for names in places.values() for name in names if not name.startswith(prefix)]:
            fit.assumed.append(f"the head is {', '.join(beside)}")
    fitting, misshapen, one_output = {}, [], False
    for name, candidates in places.items():
        for place in candidates:
            fitted = _fitted(value := file[place], own[name], name in in_head)
            if fitted is not None and len(candidates) == 1:
                fitting[name] = fitted
                one_output |= value.shape[:1] != own[name].shape[:1]
                continue
            shapes = f"{place}: {tuple(value.shape)}, the model's is {tuple(own[name].shape)}"
            (fit.left_out if name in in_head else misshapen).append(shapes)
    taken = {place for candidates in places.values() for place in candidates}
    used = {named[place][1] for place in taken}
    fit.unused = [place for place, (_, container) in named.items() if container in used and place not in taken]
    fit.missing = [name for name in own if name not in fitting and name not in in_head]
    needed = [name for name in fit.missing if not name.endswith(COUNTER)]
    if needed:
        examples = ", ".join(needed[:LISTED]) + (", …" if len(needed) > LISTED else "")
        wrong = f"; of another shape: {', '.join(misshapen[:LISTED])}" if misshapen else ""
        raise ValueError(
            f"weights {shown(path)}: {len(needed)} tensors are missing or of another shape: {examples}{wrong}"
        )
    fit.head = {name for name in in_head if not name.endswith(COUNTER)} <= fitting.keys()
    if not fit.left_out:
        fit.missing += sorted(in_head - fitting.keys())
    if fit.head:
        kinds = ("the one output is high for reals", "the one output is high for fakes")
        fit.assumed.append(kinds[fake_class] if one_output else f"its class {fake_class} is fake")
    if fake_class == 0:
        for name in in_head & fitting.keys():
            if own[name].shape[:1] == (2,):
                fitting[name] = fitting[name].flip(0)
    fit.loaded = len(fitting)
    backbone.load_state_dict(fitting, strict=False)
    return fit


def _prefix(file: Mapping[str, Tensor], own: Mapping[str, Tensor], in_head: set[str]) -> tuple[str, list[str]]:
    """The prefix under which most of the model's tensors fit, averaged weights first, and those that fit as well."""
    fitting, found = Counter(), Counter()
    for place, value in file.items():
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", place))):
            if (name := place[start:]) in own:
                found[place[:start]] += 1
                fitting[place[:start]] += _fitted(value, own[name], name in in_head) is not None
    if not found:
        return "", []
    most = max((fitting[prefix], found[prefix]) for prefix in found)
    best = sorted((prefix for prefix in found if (fitting[prefix], found[prefix]) == most), key=lambda p: (len(p), p))
    chosen = next((prefix for prefix in best if AVERAGED.search(prefix)), best[0])
    return chosen, [prefix for prefix in best if prefix != chosen]


def _foreign_head(
    file: Mapping[str, Tensor], prefix: str, head: str, own: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """A head of another name, under the prefix or, beside the backbone, under a part of it; several are candidates."""
    parts = prefix.split(".")
    for length in range(len(parts) - 1, -1, -1):
        outer = "".join(f"{part}." for part in parts[:length])
        places: dict[str, list[str]] = {}
        for place in file:
            match = HEAD.fullmatch(place[len(outer) :]) if place.startswith(outer) else None
            if match and head + match[1] in own:
                places.setdefault(head + match[1], []).append(place)
        if places:
            return places
    return {}


def _fitted(value: Tensor, own: Tensor, in_head: bool) -> Tensor | None:
    """A tensor in the shape of the model's: a 1×1 kernel that is flat, one output as two; None: it is of another."""
    if value.ndim == 2 and own.shape[2:] == (1, 1):
        value = value[:, :, None, None]
    elif value.ndim == 4 and own.ndim == 2 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]
    if in_head and value.shape[:1] == (1,) and own.shape[:1] == (2,):
        value = torch.cat([torch.zeros_like(value), value])
    return value if value.shape == own.shape else None
