"""`make demo`: it says what it did, and the picture shows a photo and crops."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_demo(tmp_path):
    pytest.importorskip("skimage")
    plt = pytest.importorskip("matplotlib.pyplot")
    picture = tmp_path / "folder" / "crops.png"
    command = [sys.executable, ROOT / "examples" / "crops.py", "--output", picture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["photo"] + ["box"] * 4 + ["crops"] * 6 + ["time", "picture"]
    assert lines[0].endswith("451 x 300 pixels, uint8")
    assert all("(4, 3, 20, 20), float32" in line for line in lines[5:11])
    assert lines[-1].endswith(str(picture))
    pixels = plt.imread(picture)
    assert pixels.shape[:2] == (560, 1200)
    assert len({tuple(color) for color in (pixels[::3, ::3, :3].reshape(-1, 3) * 255).astype(int)}) > 5000
