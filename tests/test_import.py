"""`import cupy_roialign` needs NumPy alone, and brings nothing else."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "cupy", "scipy", "matplotlib", "jax", "tensorflow", "ml_dtypes", "pandas"]
HEAVY += ["cuda", "nbclient", "nbformat", "onnx", "onnxruntime", "onnxscript", "skimage", "tqdm"]

# Refuses the heavy libraries, as on a machine that has not got them, and tells which were asked for.
GUARD = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy}:
            raise ModuleNotFoundError("refused: " + name)
sys.meta_path.insert(0, Refuse())
"""


def run(code, guard=True):
    code = (GUARD.replace("{heavy}", repr(HEAVY)) if guard else "") + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_works_with_numpy_alone():
    done = run(
        "import numpy as np, cupy_roialign as cr\n"
        "out, pullback = cr.vjp(cr.roi_align, np.ones((1, 2, 8, 8)), np.array([[0, 1, 1, 6, 6.0]]), 3)\n"
        "assert (out == 1).all() and pullback(out)[0].sum() == 18\n"
        f"assert not set(sys.modules) & set({HEAVY!r})\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["torch", "matplotlib"])
def test_the_guard_catches(name):
    pytest.importorskip(name)
    done = run(f"import cupy_roialign, {name}")
    assert done.returncode != 0
    assert f"refused: {name}" in done.stderr
    assert (
        run(f"import {name}; assert {name!r} in sys.modules".replace("sys", "__import__('sys')"), False).returncode == 0
    )


def test_so_do_the_tests_for_a_gpu_until_they_run(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    done = run("import pytest\nsys.exit(pytest.main(['-q', '-m', 'gpu', '--collect-only', '-p', 'no:cacheprovider']))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_gpu.py::test_a_captured_graph" in done.stdout


def test_adds_little_to_the_import_of_numpy():
    """The goal is 50 ms; what is measured here is the time inside one process, after NumPy's own import."""
    code = "import numpy, time\nstart = time.perf_counter()\nimport cupy_roialign\nprint(time.perf_counter() - start)\n"
    times = [float(run(code, guard=False).stdout) for _ in range(5)]
    assert statistics.median(times) < 0.05, times


def test_public_names():
    import cupy_roialign

    operators = {"crop_and_resize", "roi_align", "roi_crop", "vjp"}
    assert set(cupy_roialign.__all__) == {*operators, "checked", "get_num_threads", "set_num_threads"}
    assert all(getattr(cupy_roialign, name).__doc__ for name in cupy_roialign.__all__)
