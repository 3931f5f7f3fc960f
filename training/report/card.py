"""A folder for the Hugging Face Hub: the weights, what one must know to use them, and a model card."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import add_ops

from ..files import read_json, shown, write_text
from ..models.checkpoints import Trained, save_weights
from ..models.detector import Detector
from ..models.hub import CONFIG, WEIGHTS

COLUMNS = {"auc": "AUC", "accuracy": "accuracy", "eer": "equal error rate"}


def write_folder(folder: Path, trained: Trained, model: Detector, facts: dict[str, str]) -> None:
    """Write model.safetensors, config.json and README.md, a card.

    Args:
        model: ``trained``, loaded.
        facts: what an exported file says of itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / WEIGHTS)
    config = {
        "architecture": model.name,
        "num_classes": 2,
        "label_names": ["real", "fake"],
        "image_size": model.image_size,
    }
    config |= {
        "mean": list(model.mean),
        "std": list(model.std),
        "crop": facts["crop"],
        "trained_on": trained.trained_on,
    }
    write_text(folder / CONFIG, json.dumps(config | {"add_ops": add_ops.__version__}, indent=1) + "\n")
    write_text(folder / "README.md", _card(trained, facts))


def _measured(trained: Trained) -> list[str] | None:
    """What the run that trained the model found on its test split; None where no run says so, or in another form."""
    file = trained.path.resolve().parents[1] / "results.json"
    if trained.config is None or not file.is_file():
        return None
    try:
        found = read_json(file)
        return _table(found) if found["models"] else None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return None


def _number(cell: dict[str, float | None]) -> str:
    if cell["value"] is None:
        return "–"
    interval = f" [{cell['low']:.3f}, {cell['high']:.3f}]" if cell["low"] is not None else ""
    return f"{cell['value']:.3f}{interval}"


def _text(words: str) -> str:
    """Words of a run, perhaps a stranger's, as text of a Markdown page and of one cell of its tables."""
    return html.escape(shown(words), quote=False).replace("|", "\\|")


def _table(found: dict[str, Any]) -> list[str]:
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, values in found["models"].items():
        lines.append(f"| {_text(name)} | {' | '.join(_number(values[metric]) for metric in COLUMNS)} |")
    facts = found.get("facts", {})
    when = " · ".join(_text(facts[name]) for name in ("Finished", "Device", "Versions") if name in facts)
    return [
        *lines,
        "",
        *map(_text, found.get("verdicts", [])),
        "",
        f"95 % intervals over sources; one training run per model. {when}",
    ]


def _card(trained: Trained, facts: dict[str, str]) -> str:
    run = trained.config
    data = Path(run.manifest).name if run and run.manifest else "the embedded set of add_ops: photographs, not faces"
    origin = f"Method: {trained.role}. Trained on: {data}, in the quality {trained.trained_on}."
    nothing = ["Nothing was measured where this model comes from. Do so before you use it."]
    return CARD.format(
        architecture=trained.architecture,
        origin=_text(origin) if run else "",
        facts="\n".join(f"- {name}: {facts[name]}" for name in ("input", "output", "crop")),
        measured="\n".join(_measured(trained) or nothing),
    )


CARD = """\
---
library_name: timm
pipeline_tag: image-classification
tags: [deepfake-detection, knowledge-distillation, add_ops]
---
# {architecture}, a detector of compressed deepfakes

{origin}
Made with add_ops, which implements ADD (Le & Woo, AAAI 2022, https://arxiv.org/abs/2112.03553).

## Use

```sh
python training/predict.py clip.mp4 --checkpoint hf://USER/NAME
```

{facts}

## Measured

{measured}

## Intended use and limits

- For research on detection under compression, and as one hint among others for a person who looks.
- A score is no proof. It must not decide alone about a person, an accusation, or the removal of what someone published;
  and a low score does not show that a clip is genuine.
- It knows the forgeries, the faces and the compressions of its training set. On others it may be no better than
  guessing, and new generators appear: measure it on data like yours first, by `training/evaluate.py`.
- Errors may differ between groups of people; the figures above do not show that.
- Probabilities are not calibrated to how rare fakes are where you use it.
"""
