"""The wheel: what is in it, and that it works where only it and NumPy are."""

import configparser
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copied = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "cupy_roialign", "cuda"]
    source.mkdir()
    for name in copied:  # a build leaves files in the tree
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_contents(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cupy_roialign").rglob("*.py")}
    sources = {f"cupy_roialign/cuda/{path.name}" for path in (ROOT / "cuda").iterdir()}
    assert names == modules | sources | {"cupy_roialign/py.typed"}
    assert len(sources) >= 7
    assert wheel.name == f"cupy_roialign-{cupy_roialign.__version__}-py3-none-any.whl"


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = archive.read(path).decode()
    for line in (
        "Name: cupy_roialign",
        f"Version: {cupy_roialign.__version__}",
        "Requires-Python: >=3.10",
        "License: MIT",
        "Description-Content-Type: text/markdown",
    ):
        assert line in metadata.splitlines()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(required) == 1
    assert required[0].startswith("Requires-Dist: numpy")
    for extra in ("cuda12", "cuda13", "torch", "onnx", "docs", "examples", "test"):
        assert f"Provides-Extra: {extra}" in metadata.splitlines()
    assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def test_the_version_is_in_one_place():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: cupy_roialign.__version__"


def test_works_where_only_it_and_numpy_are(wheel, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    # NumPy alone is lent to it, from where it lies for this test
    lent = tmp_path / "lent"
    lent.mkdir()
    packages = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (packages / name).exists():
            (lent / name).symlink_to(packages / name)
    (site / "lent.pth").write_text(f"{lent}\n")
    program = (
        "import cupy_roialign as cr, numpy as np\n"
        f"assert cr.__file__.startswith({str(home)!r}), cr.__file__\n"
        "box = np.array([[2, 2, 8, 8]], np.float32)\n"
        "columns = np.tile(np.arange(10, dtype=np.float32), (1, 1, 10, 1))\n"
        "print(cr.roi_crop(columns, box, np.array([0]), 3)[0, 0, 0])\n"
        "from cupy_roialign.gpu import kernels\n"
        "assert 'Arguments' in kernels.source('forward', kernels.every_types()[0])\n"
        "try:\n    import cupy_roialign.torch\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[2.5 4.5 6.5]", "No module named 'torch'"]
