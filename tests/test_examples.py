"""The examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from skimage import io

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_colour_transfer_brings_the_colours_together(tmp_path):
    generator = np.random.default_rng(0)
    for name, offset, size in (("picture.png", 0, (40, 60, 3)), ("colours.png", 120, (30, 30, 3))):
        picture = generator.integers(0, 100, size, dtype=np.uint8) + np.uint8(offset)
        io.imsave(tmp_path / name, picture, check_contrast=False)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "colour_transfer.py", "picture.png", "colours.png", "result.png"],
        cwd=tmp_path, env={**os.environ, "MPLBACKEND": "Agg"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    distances = [float(value) for value in re.findall(r"distance (\S+)", done.stdout)]
    assert len(distances) == 4 and distances[0] > 0.1 and distances[-1] < 0.1 * distances[0]
    assert io.imread(tmp_path / "result.png").ndim == 3
