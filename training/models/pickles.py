"""Pickles read without running what they carry, in a time and memory that go with their size."""

from __future__ import annotations

import os
import pickle
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import BinaryIO, ClassVar

import torch

LONG = 10_000  # items of a tuple, with those of the tuples in it
COPIED = 20  # items and characters that calls may copy, for each byte that is read
CONTAINERS = str | bytes | bytearray | list | tuple | dict | set | frozenset


class Inert:
    """Stands in for every other class and function of a pickle: it takes what it is given and does nothing."""

    dump_patches = False  # which torch asks of the classes of old files
    dtype = torch.uint8  # and of storages: UntypedStorage is bytes

    def __new__(cls, *arguments: object, **_: object) -> Inert:
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


class _Allowed:
    """A function or class that a pickle may call, in a shell whose attributes the pickle cannot set."""

    __slots__ = ("call",)

    def __init__(self, call: Callable) -> None:
        self.call = call

    def __call__(self, *arguments: object) -> object:
        return self.call(*arguments)


def _of_items(kind: type, *arguments: object) -> object:
    for argument in arguments:  # of a number so many zeros, of an expanded tensor items without end
        if not isinstance(argument, CONTAINERS | type | _Allowed | None):
            raise pickle.UnpicklingError(f"{kind.__name__} of {type(argument).__name__}")
    return kind(*arguments)


def _frozen(items: Iterable[object] = ()) -> frozenset | set:
    """A set of containers is not frozen: it is no key of a dictionary then, which may be compared for ever."""
    items = _of_items(list, items)
    return (set if any(isinstance(item, tuple | frozenset) for item in items) else frozenset)(items)


def _slice(*ends: object) -> slice:
    if not all(isinstance(end, int | None) for end in ends):
        raise pickle.UnpicklingError("a slice of other things than numbers")
    return slice(*ends)


def _of_type(rebuild: object, _: object, arguments: object, __: object) -> object:
    """A tensor that has attributes, without them."""
    if not (isinstance(rebuild, _Allowed) and isinstance(arguments, tuple)):
        raise pickle.UnpicklingError(f"a tensor of {type(arguments).__name__}")
    return rebuild(*arguments)


REBUILD = ("tensor", "tensor_v2", "tensor_v3", "qtensor", "parameter")
OF_ITEMS = (set, bytes, bytearray, OrderedDict, Counter, defaultdict, torch.Size)
ALLOWED = {
    **{f"torch._utils._rebuild_{name}": getattr(torch._utils, f"_rebuild_{name}") for name in REBUILD},
    "torch._utils._rebuild_parameter_with_state": lambda *parts: torch._utils._rebuild_parameter(*parts[:3]),
    "torch._utils._rebuild_sparse_tensor": lambda *_: torch.empty(0, 0, layout=torch.sparse_coo),  # to be named
    **{f"{kind.__module__}.{kind.__name__}": partial(_of_items, kind) for kind in OF_ITEMS},
    "builtins.frozenset": _frozen,
    "builtins.slice": _slice,
    "builtins.complex": complex,
    "torch.device": torch.device,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # how older protocols write bytes
    "builtins.getattr": lambda *_: Inert,  # a class within a class
}


FILLED = Inert | dict | list | set  # by opcodes that add items or a state; no tensor, storage or function


def _filling(code: bytes, place: Callable[[_Unpickler], object]) -> Callable[[_Unpickler], None]:
    """An opcode that adds items or a state to what lies at a place."""
    load = pickle._Unpickler.dispatch[code[0]]

    def checked(self: _Unpickler) -> None:
        if not isinstance(target := place(self), FILLED):
            kind = "a function" if isinstance(target, _Allowed) else type(target).__name__
            raise pickle.UnpicklingError(f"items or a state for {kind}")
        load(self)

    return checked


def _copying(
    load: Callable[[_Unpickler], None], arguments: Callable[[_Unpickler], list]
) -> Callable[[_Unpickler], None]:
    """An opcode that calls something, which may copy the arguments: a few bytes can do so again and again."""

    def counted(self: _Unpickler) -> None:
        waiting = list(arguments(self))
        while waiting:
            part = waiting.pop()
            self.left -= 1 + len(part) if isinstance(part, CONTAINERS) else 1
            waiting += part if isinstance(part, tuple) else ()
        if self.left < 0:
            raise pickle.UnpicklingError("calls that copy far more than there is")
        load(self)

    return counted


class _Unpickler(pickle._Unpickler):
    """Looks up only containers and what builds tensors; ``weights_only`` refuses modules pickled whole in 2018.

    In Python, for the memo of the one in C takes the memory that a few bytes name. A tuple that is long with the tuples
    in it written out becomes a list: it is no key of a dictionary then, whose hash may take for ever.

    Attributes:
        nested: tuples with tuples in them, and how long they are written out.
        left: items and characters that calls may still copy.
    """

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, **how: object) -> None:
        super().__init__(file, **how)
        place = file.tell()
        self.nested: dict[int, tuple[tuple, int]] = {}
        self.left = COPIED * file.seek(0, os.SEEK_END)
        file.seek(place)

    def _tuple(self, items: Sequence[object]) -> tuple | list:
        inner = [self.nested.get(id(item), (item, len(item)))[1] for item in items if type(item) is tuple]
        length = len(items) + sum(inner)
        if length > LONG:
            return list(items)
        made = tuple(items)
        if inner:
            self.nested[id(made)] = made, length
        return made

    def _load_tuple(self) -> None:
        items = self.pop_mark()
        self.append(self._tuple(items))

    def _load_tuple_of(self, count: int) -> None:
        self.stack[-count:] = [self._tuple(self.stack[-count:])]

    def _load_bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch[pickle.TUPLE[0]] = _load_tuple
    dispatch[pickle.TUPLE1[0]] = lambda self: self._load_tuple_of(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self._load_tuple_of(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self._load_tuple_of(3)

    def _load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(_frozen(items))

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray
    dispatch[pickle.FROZENSET[0]] = _load_frozenset

    def find_class(self, module: str, name: str) -> object:
        module = "builtins" if module == "__builtin__" else module
        if call := ALLOWED.get(f"{module}.{name}"):
            return _Allowed(call)
        found = getattr(torch, name, None) if module == "torch" else None
        return found if isinstance(found, torch.dtype | torch.qscheme) else Inert


for code in (pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS):
    _Unpickler.dispatch[code[0]] = _filling(code, lambda self: self.metastack[-1][-1])
for code, depth in ((pickle.APPEND, 2), (pickle.SETITEM, 3), (pickle.BUILD, 2)):
    _Unpickler.dispatch[code[0]] = _filling(code, lambda self, depth=depth: self.stack[-depth])
for code in (pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BUILD, pickle.OBJ, pickle.INST):
    arguments = (lambda self: self.stack) if code in (pickle.OBJ, pickle.INST) else (lambda self: self.stack[-2:])
    _Unpickler.dispatch[code[0]] = _copying(_Unpickler.dispatch[code[0]], arguments)

MODULE = SimpleNamespace(__name__="inert", Unpickler=_Unpickler, load=lambda f, **how: _Unpickler(f, **how).load())
"""What ``torch.load`` takes for the module ``pickle``."""
