"""Models on the Hugging Face Hub: ``hf://user/name`` or ``hf://user/name@revision`` where a checkpoint is asked for."""

from __future__ import annotations

import re
from pathlib import Path

from ..files import shown

SCHEME = "hf://"
ADDRESS = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def local(path: str | Path) -> Path:
    """A path as it is; of an address on the Hub the file of weights, fetched unless it was before.

    Of a repository only the weights and ``config.json`` are taken, and of these nothing is run.

    Raises:
        ValueError: not an address, no such repository or no network, or no weights in it.
    """
    if not str(path).startswith(SCHEME):
        return Path(path)
    if not (found := ADDRESS.fullmatch(str(path))):
        raise ValueError(f"checkpoint {shown(str(path))}: expected hf://user/name or hf://user/name@revision")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            found["name"], revision=found["revision"], allow_patterns=[WEIGHTS, CONFIG]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"checkpoint {path}: cannot be fetched: {reason}") from error
    if not (file := Path(folder) / WEIGHTS).is_file():
        raise ValueError(f"checkpoint {path}: expected {WEIGHTS} in the repository, found none")
    return file


def weights_of_folder(path: Path) -> Path:
    """The file of weights of a folder as :mod:`training.report.card` writes it for the Hub; other paths as they are."""
    return path / WEIGHTS if (path / WEIGHTS).is_file() and (path / CONFIG).is_file() else path
