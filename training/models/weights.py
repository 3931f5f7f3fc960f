"""Files of weights, opened here alone: read without running what they carry, fitted to a timm model whoever named them.

No project and no training loop is named. Whatever wraps the tensors – dictionaries, lists, modules pickled whole,
``DataParallel``, averaging, Lightning – becomes part of their dotted names, and the prefix under which most of the
model's names are found with fitting shapes is taken off.
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import BrokenFile, check_unpacked, shown
from . import pickles

HEAD = re.compile(r"(?:last_linear|fc|classifier|head)(?:\.\d+)?\.(weight|bias)")
WRAPPED = re.compile(r"(?:^|(?<=\.))_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")  # at any depth
AVERAGED = re.compile(r"((?<![A-Za-z])(ema|swa|averaged?)|(?<![A-Z])(EMA|Ema|SWA|Swa|Averaged?))(?![a-z])")
POSITIONS = re.compile(r"(?:.*\.)?(?:pos_embed|relative_position_bias_table)")  # whose shape follows the image size
Tensors = Mapping[str, Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTER = "num_batches_tracked"  # of batch normalisation; older files have none, and evaluation reads none
LISTED = 6  # names that a message shows
DEEPEST = 100  # containers within each other
MANY = 100_000  # names up to which what a file holds in several places gets a name for each
MOST_TENSORS = 2**16  # of a file; models that timm makes have hundreds
MOST_CHARACTERS = 2**24  # of all names together
HOLDING = Tensor | Mapping | list | tuple | set | frozenset | pickles.Inert
FOREIGN = {  # how files begin that are mistaken for weights, and what to do about them
    rb"version https://git-lfs": "a pointer of Git LFS, not the file: git lfs pull",
    rb"\s*<": "a page of the web, not the file: download it again",
    rb"\s*[{[]": "JSON, not weights; of an index, put the shards that it names into one file",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!": "an archive: unpack it",
    rb"(?s:\x80[\2-\5](?!.{,20}\xfc\x9cF\xf9))": "a plain pickle: load it in Python and torch.save its tensors by name",
    rb"[\s -~]+\Z": "text, not weights",
}


def read_torch(path: str | Path) -> object:
    """What ``torch.save`` wrote to a file, in its zip format or the older one, or safetensors, on the CPU.

    Nothing of it is run: tensors and plain containers are as they were saved, every other object is an inert shell.

    Raises:
        ValueError: no such file, or not such a file.
    """
    if not (path := Path(path)).is_file():
        raise ValueError(f"weights: no file '{shown(path)}'")
    beginning = b""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes whose sources are not those of today
            beginning = file.read(512)
            if beginning[8:9] == b"{":  # eight bytes of length, then JSON: only safetensors begin so
                with safe_open(path, "pt") as header:
                    _check_count(len(header.keys()))
                return load_file(path)
            if beginning[:2] == b"PK":
                _check_zip(path)
            elif _is_tar(path):  # torch would unpack it: links, devices and all
                raise BrokenFile("an archive: unpack it")
            file.seek(0)  # latin1 reads the byte strings of Python 2, too
            return torch.load(
                file, map_location="cpu", weights_only=False, pickle_module=pickles.MODULE, encoding="latin1"
            )
    except Exception as error:  # torch answers foreign bytes with whatever error they happen to cause
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, BrokenFile) and beginning[8:9] != b"{":
            reason = next((what for start, what in FOREIGN.items() if re.match(start, beginning)), reason)
        got = f"got: {_shown(reason, 300)}"
        raise ValueError(f"weights {shown(path)}: expected a safetensors or torch file of weights, {got}") from error


def _is_tar(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True


def _check_count(count: int) -> None:
    if count > MOST_TENSORS:
        raise BrokenFile(f"{count} tensors, more than {MOST_TENSORS}")


def _check_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise BrokenFile("a file that is damaged or was not downloaded to its end")
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            raise BrokenFile("a TorchScript program, which would have to be run")
        if "data.pkl" not in names:
            raise BrokenFile(f"an archive of {_listed(archive.namelist()) or 'nothing'}: unpack it")
        _check_count(len(archive.namelist()))
        check_unpacked(archive, path)  # torch packs nothing
        if any(info.CRC for info in archive.infolist()) and (damaged := archive.testzip()):  # torch may write none
            raise BrokenFile(f"a damaged file: {damaged} in it is not as it was written")


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a safetensors file tells about itself; empty for other files."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def _shown(name: str, most: int = 120) -> str:
    """A word of a file, which may be anything, for a message."""
    text = shown(name.encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= most else f"{text[:most]}…"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(_shown, names[:LISTED])) + (", …" if len(names) > LISTED else "")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file that :func:`read_torch` reads, by dotted names, in the file's order.

    ``{"state_dict": {"conv1.weight": w}, "step": 3}`` gives ``state_dict.conv1.weight``; items of lists are named by
    their index, tensors of a module that was pickled whole as in its ``state_dict()``.

    Raises:
        ValueError: no such file, not a file of weights, or no tensors in it.
    """
    return {name: value for name, (value, _) in _read_named(path).items()}


def _read_named(path: str | Path) -> dict[str, tuple[Tensor, str]]:
    contents = read_torch(path)
    try:
        named = dict(_named(contents))
    except Exception as error:  # of odd keys
        raise ValueError(f"weights {shown(path)}: {_shown(str(error), 300)}") from error
    if not named:
        arrays = "arrays of NumPy are to be made tensors by torch.from_numpy"
        raise ValueError(f"weights {shown(path)}: expected tensors by name (a state_dict), found none; {arrays}")
    return named


def _named(contents: object) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    """Tensors by name, each with the name of the mapping, list or whole module that it lies in.

    Raises:
        ValueError: containers are nested too deeply, or the names are too long to be written out.
    """
    seen, names, characters = set[int](), 0, 0
    waiting = [("", "", contents, False, ())] if isinstance(contents, HOLDING) else []
    while waiting:
        container, prefix, value, in_module, above = waiting.pop()
        if isinstance(value, Tensor):
            yield prefix[:-1], (value.detach(), container)
            continue
        known = above if names <= MANY else seen  # pickles may hold themselves, and a part in many places
        if id(value) in known:
            continue
        seen.add(id(value))
        is_module = isinstance(value, pickles.Inert) and {"_parameters", "_modules"} <= value.contents.keys()
        if is_module:
            kinds = ("_parameters", "_buffers", "_modules")
            held = [dict.items(part) for kind in kinds if isinstance(part := value.contents.get(kind), dict)]
            unsaved = value.contents.get("_non_persistent_buffers_set")
            unsaved = unsaved if isinstance(unsaved, set) else set()
            items = [item for part in held for item in part if item[0] not in unsaved]
        elif isinstance(value, pickles.Inert | Mapping):
            items = list(dict.items(value.contents if isinstance(value, pickles.Inert) else value))
        else:
            items = list(enumerate(value))
        if len(above) >= DEEPEST:
            raise ValueError(f"expected containers at most {DEEPEST} deep")
        names += len(items)
        inside = container if in_module and is_module else prefix
        above = (*above, id(value))
        for name, part in reversed(items):
            if isinstance(part, HOLDING):
                place = f"{prefix}{name if isinstance(name, str) else reprlib.repr(name)}."
                if (characters := characters + len(place)) > MOST_CHARACTERS:
                    raise ValueError(f"expected names of at most {MOST_CHARACTERS} characters together, got more")
                waiting.append((inside, place, part, is_module, above))


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
        before = f", without the prefix '{_shown(self.prefix)}'" if self.prefix else ""
        assumed = "".join(f"; {assumption}" for assumption in self.assumed)
        lines = [f"weights {shown(self.path)}: {self.loaded} of {self.total} tensors{before}{assumed}"]
        for kind, names in (("not used", self.unused), ("not found", self.missing), ("left out", self.left_out)):
            if names:
                lines.append(f"  {kind} ({len(names)}): {', '.join(map(_shown, names))}")
        return "\n".join(lines)


def load_into(backbone: nn.Module, path: str | Path, *, fake_class: int = 1, prefix: str | None = None) -> Fit:
    """Load a file into a timm model with two classes; a head that does not fit is left out.

    A head with one output z, trained with a sigmoid, becomes the two-class head of the same probabilities: 0 and z.
    Positions of another image size are resampled as timm does it.

    Args:
        backbone: the model, whose class 1 is fake.
        path: safetensors or torch file.
        fake_class: the file's class of fakes; of a head with one output: 1 where it is high for fakes, 0 for reals.
        prefix: what stands before the names of the network to take; None: of those that fit best the averaged one,
            else the shortest, else the file's first.

    Raises:
        ValueError: the file cannot be read, or lacks a tensor of the model (other than the head and the counters of
            batch normalisation), or has one of another shape or that is no finite floats, or nothing has the prefix.
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
    prefix, assumed = _prefix(file, own, in_head, prefix)
    fit = Fit(Path(path), 0, len(own), prefix, assumed=assumed)
    places = {name: [prefix + name] for name in own if prefix + name in file}
    if heads and not in_head & places.keys():
        places |= _foreign_head(file, prefix, heads[0], own)
        if beside := [name for names in places.values() for name in names if not name.startswith(prefix)]:
            fit.assumed.append(f"the head is {', '.join(map(_shown, beside))}")
    resampled, size = _resampled(backbone, {name: file[held[0]] for name, held in places.items()}, own)
    if resampled:
        fit.assumed.append(f"{size}, resampled: {_listed([*resampled])}")
    fitting, wrong, one_output = {}, [], False
    for name, candidates in places.items():
        for place in candidates:
            fitted = _fitted(value := resampled.get(name, file[place]), own[name], name in in_head)
            if isinstance(fitted, Tensor) and len(candidates) == 1:
                fitting[name] = fitted
                one_output |= value.shape[:1] != own[name].shape[:1]
            elif not name.endswith(COUNTER):
                why = "one layer of several" if isinstance(fitted, Tensor) else fitted
                other_head = name in in_head and (len(candidates) > 1 or value.shape != own[name].shape)
                (fit.left_out if other_head else wrong).append(f"{place}: {why}")
    taken = {place for candidates in places.values() for place in candidates}
    used = {named[place][1] for place in taken}
    fit.unused = [place for place, (_, container) in named.items() if container in used and place not in taken]
    fit.missing = [name for name in own if name not in fitting and name not in in_head]
    absent = [name for name in fit.missing if name not in places and not name.endswith(COUNTER)]
    if wrong := wrong + absent:
        names = _listed(wrong) + (f"; {size}" if size else "")
        raise ValueError(f"weights {shown(path)}: {len(wrong)} tensors missing or of another shape or kind: {names}")
    fit.head = {name for name in in_head if not name.endswith(COUNTER)} <= fitting.keys()
    if not fit.left_out:
        fit.missing += sorted(in_head - fitting.keys())
    if fit.head:
        one = f"the one output is high for {('reals', 'fakes')[fake_class]}"
        fit.assumed.append(one if one_output else f"its class {fake_class} is fake")
    if fake_class == 0:
        fitting |= {name: fitting[name].flip(0) for name in in_head & fitting.keys() if own[name].shape[:1] == (2,)}
    fit.loaded = len(fitting)
    backbone.load_state_dict(fitting, strict=False)
    return fit


def _prefix(file: Tensors, own: Tensors, in_head: set[str], given: str | None) -> tuple[str, list[str]]:
    """The prefix under which most of the model's tensors fit, and what is to be said about it."""
    fitting, found = Counter(), Counter()
    longest = max(map(len, own))
    for place, value in file.items():
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", place))):
            if len(place) - start <= longest and (name := place[start:]) in own:
                found[place[:start]] += 1
                fitting[place[:start]] += isinstance(_fitted(value, own[name], name in in_head), Tensor)
    given = given and f"{given.removesuffix('.')}."
    if given not in (None, *found):
        there = _listed([repr(prefix) for prefix, _ in found.most_common()]) or "none"
        raise ValueError(f"prefix: expected one of the file's, {there}; got {_shown(repr(given))}")
    found = found if given is None else {given: found[given]}
    if not found:
        return "", []
    most = max((fitting[prefix], found[prefix]) for prefix in found)
    best = sorted((prefix for prefix in found if (fitting[prefix], found[prefix]) == most), key=len)
    chosen = next((prefix for prefix in best if AVERAGED.search(prefix)), best[0])
    said = ["averaged weights"] if AVERAGED.search(chosen) else []
    if others := [repr(prefix) for prefix in best if prefix != chosen]:
        said.append(f"not those under {_listed(others)}, which fit as well: prefix= takes another")
    for prefix in found:
        if AVERAGED.search(prefix) and most[0] / 2 < fitting[prefix] < most[0]:
            said.append(f"not the averaged ones under {_shown(repr(prefix))}: {fitting[prefix]} fit, not {most[0]}")
    return chosen, said


def _foreign_head(file: Tensors, prefix: str, head: str, own: Tensors) -> dict[str, list[str]]:
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


def _resampled(backbone: nn.Module, file: Tensors, own: Tensors) -> tuple[Tensors, str]:
    """Positions of another image size in the model's shape, as far as timm brings them into it; and that size."""
    wrong = {n: value for n, value in file.items() if POSITIONS.fullmatch(n) and value.shape != own[n].shape}
    wrong = {n: value for n, value in wrong.items() if value.layout == torch.strided and _is_whole(value)}
    size, patches = "trained at another image size" if wrong else "", getattr(backbone, "patch_embed", None)
    if "pos_embed" in wrong and hasattr(patches, "num_patches"):
        more = (wrong["pos_embed"].numel() - own["pos_embed"].numel()) // own["pos_embed"].shape[-1]
        size += f" of {math.isqrt(max(patches.num_patches + more, 0)) * patches.patch_size[0]} px"
    try:
        return sys.modules[type(backbone).__module__].checkpoint_filter_fn(wrong, backbone) if wrong else {}, size
    except Exception:  # no such function, or none for these
        return {}, size


def _is_whole(value: Tensor) -> bool:
    """Whether there are as many numbers as it says: a few may be expanded to more than fit into memory."""
    return value.numel() <= value.untyped_storage().nbytes()


def _fitted(value: Tensor, own: Tensor, in_head: bool) -> Tensor | str:
    """A tensor as the model's: a 1×1 kernel that is flat, one output as two; or in words what it is instead."""
    if value.layout != torch.strided:
        return "sparse, not dense"
    if own.is_floating_point() and value.dtype not in FLOATS:
        return f"{str(value.dtype).removeprefix('torch.')}, not floats"
    shape = tuple(value.shape)
    if value.shape[2:] in ((), (1, 1)) and own.shape[2:] in ((), (1, 1)):
        value = value.reshape(value.shape[:2] + own.shape[2:])
    if in_head and value.shape == (1, *own.shape[1:]) and own.shape[:1] == (2,):
        value = torch.cat([torch.zeros_like(value), value])
    if value.shape != own.shape:
        return f"{shape}, the model's is {tuple(own.shape)}"
    return value if (value := value.to(own.dtype)).isfinite().all() else "values that are not finite"
