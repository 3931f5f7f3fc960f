"""Files of weights: read without running what they carry, and fitted to a timm backbone whoever named the tensors.

Formats met in the field, each with a test: timm and this project's own; torchvision ResNets; the ResNets of the
released ADD code (``state_dict`` beside an optimiser and a scheduler that was pickled whole); DeepfakeBench detectors
(``backbone.`` before every name, ``last_linear``); FaceForensics++ detectors (``model.``, ``last_linear.1``) and
Cadene's ``xception-b5690688``, whose pointwise kernels have no trailing 1×1. None of them needs to be named: the prefix
under which most names fit is taken off.
"""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training loops keep the weights in their checkpoints
HEAD = re.compile(r"(?:last_linear|fc|classifier|head)(?:\.\d+)?\.(weight|bias)")
COUNTER = "num_batches_tracked"  # of batch normalisation; older files have none, and evaluation reads none
LISTED = 6  # names that an error message shows


class _Inert:
    """Stands in for whatever a file pickled beside its tensors: it can be made and filled, and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _inert_mapping(*_: object) -> OrderedDict:
    return OrderedDict()  # for defaultdict, into which weights_only would refuse to put items


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or torch file (of the latter also those nested under ``state_dict``).

    Nothing in the file is run: torch reads it with ``weights_only``, and objects of other classes become inert.

    Raises:
        ValueError: no such file, or not a file of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights: no file '{path}'")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except Exception as error:  # torch answers foreign bytes with whatever error they happen to cause
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"weights {path}: expected a safetensors or torch file of weights, got: {reason}") from error
    while isinstance(state, dict) and not any(isinstance(value, Tensor) for value in state.values()):
        state = next((state[key] for key in WRAPPERS if key in state), None)
    if not isinstance(state, dict):
        raise ValueError(f"weights {path}: expected tensors by name (a state_dict), found none")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _read_torch(path: Path) -> object:
    others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    stubs = [(_inert_mapping if name == "collections.defaultdict" else _Inert, name) for name in others]
    with torch.serialization.safe_globals(stubs):
        return torch.load(path, map_location="cpu", weights_only=True)


@dataclass
class Fit:
    """How a file fitted a model.

    Attributes:
        path: the file.
        loaded: how many of the model's tensors were found.
        total: how many it has.
        prefix: what stood before every used name in the file.
        unused: names in the file that the model has no place for.
        missing: names in the model that the file does not have; they keep their values.
        left_out: of the head, of another shape: they keep their values, too.
        head: whether the two-class head was loaded.
    """

    path: Path
    loaded: int
    total: int
    prefix: str
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    head: bool = True

    @property
    def complete(self) -> bool:
        return not (self.unused or self.missing or self.left_out)

    def __str__(self) -> str:
        before = f", without the prefix '{self.prefix}'" if self.prefix else ""
        lines = [f"weights {self.path}: {self.loaded} of {self.total} tensors{before}"]
        for kind, names in (("not used", self.unused), ("not found", self.missing), ("left out", self.left_out)):
            if names:
                lines.append(f"  {kind} ({len(names)}): {', '.join(names)}")
        return "\n".join(lines)


def load_into(backbone: nn.Module, path: str | Path) -> Fit:
    """Load a file into a timm model; a head of another size is left out.

    Raises:
        ValueError: the file cannot be read, or lacks a tensor of the model (other than the head and the counters of
            batch normalisation), or has one of another shape.
    """
    state, own = read_weights(path), backbone.state_dict()
    head = next((name for name, module in backbone.named_modules() if module is backbone.get_classifier()), "")
    beginnings = {".".join(name.split(".")[:depth]) + "." for name in state for depth in (1, 2, 3)}
    prefixes = ["", *sorted(beginnings, key=lambda prefix: (len(prefix), prefix))]
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in state for name in own))

    fitting: dict[str, Tensor] = {}
    fit = Fit(Path(path), 0, len(own), prefix)
    misshapen = []
    for given, value in state.items():
        name = given.removeprefix(prefix)
        if name not in own and (match := HEAD.fullmatch(name)):
            name = f"{head}.{match[1]}"
        if not given.startswith(prefix) or name not in own or name in fitting:
            fit.unused.append(given)
            continue
        if value.ndim == 2 and own[name].shape[2:] == (1, 1):
            value = value[:, :, None, None]
        if value.shape == own[name].shape:
            fitting[name] = value
            continue
        shapes = f"{given}: {tuple(value.shape)}, the model's is {tuple(own[name].shape)}"
        (fit.left_out if name.startswith(f"{head}.") else misshapen).append(shapes)
    in_head = {name for name in own if name.startswith(f"{head}.")}
    fit.missing = [name for name in own if name not in fitting and name not in in_head]
    needed = [name for name in fit.missing if not name.endswith(COUNTER)]
    if needed:
        examples = ", ".join(needed[:LISTED]) + (", …" if len(needed) > LISTED else "")
        wrong = f"; of another shape: {', '.join(misshapen[:LISTED])}" if misshapen else ""
        raise ValueError(f"weights {path}: {len(needed)} tensors are missing or of another shape: {examples}{wrong}")
    fit.head = in_head <= fitting.keys()
    if not fit.left_out:
        fit.missing += sorted(in_head - fitting.keys())
    fit.loaded = len(fitting)
    backbone.load_state_dict(fitting, strict=False)
    return fit
