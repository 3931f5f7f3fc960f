"""What the losses' modules share: each is its function with the options kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Generator, Tensor, nn


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{value.dtype} {tuple(value.shape)}>"
    return f"<generator on {value.device}>" if isinstance(value, Generator) else repr(value)


class FunctionModule(nn.Module):
    """Keeps the options of a function as attributes of their names, and shows every one.

    A tensor among them becomes a buffer: it goes where the module goes, and into its ``state_dict``, since it may have
    been drawn at random. Its dtype stays when the module's changes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FunctionModule:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.options.items())
