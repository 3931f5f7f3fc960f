"""The README's examples run as printed, in one session."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_every_python_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 5 and names["attention"].shape == (8, 16, 16) and names["vectors"].shape == (8, 2, 32)
    assert names["student"].grad.abs().sum() > 0 and names["x"].grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in names["distil"].parameters())
    assert all(features.grad is not None for features in names["student_maps"][1:]) and len(names["terms"]) == 6
