"""`import cupy_roialign` needs NumPy alone, and brings nothing else; no module imports itself in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "cupy", "numba", "llvmlite", "scipy", "matplotlib", "jax", "tensorflow", "ml_dtypes", "pandas"]
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


# ---- circles ----

PACKAGE = Path(__file__).parents[1] / "cupy_roialign"


def files(root):
    """The file of each module of a package, by its full name; a package's own is its __init__."""
    found = {}
    for path in root.rglob("*.py"):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name, path, modules):
    """The modules that one imports, anywhere in its text, and the packages that run first for that.

    Those that it lies in itself have begun to run before it has.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    wanted = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            wanted |= inner & modules.keys()  # `from package import module` asks for the module alone
            wanted |= {base} if inner - modules.keys() else set()
            wanted |= {base} if inner & modules.keys() and not f"{name}.".startswith(f"{base}.") else set()
    found = set()
    for module in wanted & modules.keys():
        found.add(module)
        while "." in module:
            module = module.rpartition(".")[0]
            if not f"{name}.".startswith(f"{module}."):
                found.add(module)
    return found


def circle(root):
    """Some modules of a package of which each imports the next, and the last the first; or an empty list."""
    modules = files(root)
    graph = {name: sorted(imports(name, path, modules)) for name, path in modules.items()}
    done = set()

    def search(name, way):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in graph[name]:
            if found := search(other, [*way, name]):
                return found
        done.add(name)
        return []

    for name in graph:
        if found := search(name, []):
            return found
    return []


def test_no_module_imports_itself_in_a_circle():
    assert len(files(PACKAGE)) > 25
    assert not circle(PACKAGE)


CIRCLES = {
    "at the top": {"a.py": "from package import b", "b.py": "import package.a"},
    "in a function": {"a.py": "def f():\n    from package.b import g", "b.py": "def g():\n    from . import a"},
    "of itself": {"a.py": "from package.a import f"},
    "in a type check": {"a.py": "from . import b", "b.py": "if TYPE_CHECKING:\n    from package.a import f"},
    "by a package": {"a.py": "import package.sub.c", "sub/__init__.py": "from package import a", "sub/c.py": ""},
    "by a name of a package": {"sub/__init__.py": "from .c import f", "sub/c.py": "from package.sub import f"},
    "from above": {"a.py": "from .sub import c", "sub/__init__.py": "", "sub/c.py": "from .. import a"},
    "by the root": {"__init__.py": "from package.a import f", "a.py": "import package"},
}
NO_CIRCLES = {
    "a module of its package": {
        "sub/__init__.py": "from . import c\nfrom package.sub import d",
        "sub/c.py": "",
        "sub/d.py": "from package.sub import c",
    },
    "by its name at run time": {"a.py": "from package import b", "b.py": "import_module('package.a')"},
    "of another library": {"a.py": "import a, sub.package.a\nfrom torch import package"},
}


@pytest.mark.parametrize("text", [*CIRCLES.values(), *NO_CIRCLES.values()], ids=[*CIRCLES, *NO_CIRCLES])
def test_circles_are_found(text, tmp_path):
    root = tmp_path / "package"
    for name, lines in {"__init__.py": "from package import a" if "a.py" in text else "", **text}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines)
    assert bool(circle(root)) == (text in CIRCLES.values())


def test_so_do_the_tests_for_a_gpu_until_they_run(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    done = run("import pytest\nsys.exit(pytest.main(['-q', '-m', 'gpu', '--collect-only', '-p', 'no:cacheprovider']))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_gpu.py::test_a_captured_graph" in done.stdout


def test_adds_little_to_the_import_of_numpy():
    """The goal is 50 ms, where NumPy's own import takes 150 ms of the processor's time: what slows one slows both."""
    code = (
        "import time\ntimes = [time.process_time()]\n"
        "import numpy\ntimes.append(time.process_time())\n"
        "import cupy_roialign\ntimes.append(time.process_time())\n"
        "print(times[1] - times[0], times[2] - times[1])\n"
    )
    times = [[float(number) for number in run(code, guard=False).stdout.split()] for _ in range(8)]
    of_numpy, ours = map(min, zip(*times, strict=True))
    assert ours < of_numpy / 3, times


def test_public_names():
    import cupy_roialign

    operators = {"crop_and_resize", "roi_align", "roi_crop", "vjp"}
    assert set(cupy_roialign.__all__) == {*operators, "checked", "get_num_threads", "set_num_threads"}
    assert all(getattr(cupy_roialign, name).__doc__ for name in cupy_roialign.__all__)
