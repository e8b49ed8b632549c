"""`make demo`: it says what it did, the picture shows a photo and crops, and its environment is a small one."""

import configparser
import re
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


def make(*arguments):
    """The commands that make would run."""
    command = ["make", "--no-print-directory", "--dry-run", "--always-make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout


def test_its_environment_is_its_own_and_has_no_torch():
    commands = make("demo").splitlines()
    assert all(".venv/" not in command for command in commands)
    assert commands[-1] == ".venv-demo/bin/python examples/crops.py"
    (install,) = (command for command in commands if " install " in command)
    ways = re.findall(r"-e '\.\[([\w,]+)\]'", install)
    assert ways == ["examples,cpu", "examples"]
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for extra in ways[0].split(","):
        required = config["options.extras_require"][extra].split()
        assert not [name for name in required if re.match("torch|cupy|onnx", name)]


def test_it_runs_without_torch(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    program = (
        "import runpy, sys\n"
        "for name in ('torch', 'cupy', 'numba'):\n    sys.modules[name] = None\n"
        f"sys.argv = ['crops.py', '--output', {str(tmp_path / 'crops.png')!r}]\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'crops.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "crops.png").is_file()


def test_make_clean_removes_it_and_git_does_not_see_it():
    assert ".venv-demo" in make("clean").split()
    assert ".venv-demo/" in (ROOT / ".gitignore").read_text().splitlines()
