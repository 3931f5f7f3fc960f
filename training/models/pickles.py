"""Pickles read without running what they carry, in a time and memory that go with their size."""

from __future__ import annotations

import pickle
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import torch

LONG = 10_000  # items of a tuple, with those of the tuples in it


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

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("a state for a function")


def _of_items(kind: type, *arguments: object) -> bytes | bytearray:
    if arguments and not isinstance(arguments[0], str | bytes | bytearray | list | tuple):  # a number of zeros
        raise pickle.UnpicklingError(f"{kind.__name__} of {type(arguments[0]).__name__}")
    return kind(*arguments)


REBUILD = ("tensor", "tensor_v2", "tensor_v3", "qtensor", "parameter", "parameter_with_state")
BUILTIN = (set, frozenset, slice, complex)
ALLOWED = {
    **{f"torch._utils._rebuild_{name}": getattr(torch._utils, f"_rebuild_{name}") for name in REBUILD},
    "torch._utils._rebuild_sparse_tensor": lambda *_: torch.empty(0, 0, layout=torch.sparse_coo),  # to be named
    **{f"builtins.{kind.__name__}": kind for kind in BUILTIN},
    **{f"builtins.{kind.__name__}": partial(_of_items, kind) for kind in (bytes, bytearray)},
    **{f"collections.{kind.__name__}": kind for kind in (OrderedDict, Counter, defaultdict)},
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, _, arguments, __: rebuild(*arguments),  # has attributes
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # how older protocols write bytes
    "builtins.getattr": lambda *_: Inert,  # a class within a class
}


class _Unpickler(pickle._Unpickler):
    """Looks up only containers and what builds tensors; ``weights_only`` refuses modules pickled whole in 2018.

    In Python, for the memo of the one in C takes the memory that a few bytes name. A tuple that is long with the tuples
    in it written out becomes a list: it is no key of a dictionary then, whose hash may take for ever.
    """

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def load(self) -> object:
        self.nested: dict[int, tuple[tuple, int]] = {}  # tuples with tuples in them, and how long they are written out
        return super().load()

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
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray

    def find_class(self, module: str, name: str) -> object:
        module = "builtins" if module == "__builtin__" else module
        if call := ALLOWED.get(f"{module}.{name}"):
            return _Allowed(call)
        found = getattr(torch, name, None) if module == "torch" else None
        return found if isinstance(found, torch.dtype | torch.qscheme) else Inert


MODULE = SimpleNamespace(__name__="inert", Unpickler=_Unpickler, load=lambda f, **how: _Unpickler(f, **how).load())
"""What ``torch.load`` takes for the module ``pickle``."""
