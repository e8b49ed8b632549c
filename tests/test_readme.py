"""README and the pages in docs/ tell the truth: programs run, tables and numbers are right, what they name exists."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
CONVENTIONS = (DOCS / "conventions.md").read_text()
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
ELSEWHERE = re.compile(r"# (before: |needs )\S")  # the first line of a program for another library or machine
OPTIONAL = ("torch", "onnx", "onnxruntime", "onnxscript", "skimage")


def programs(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


# what torch's exporter to ONNX warns of is its own
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:onnx", "ignore::DeprecationWarning:torch", "ignore::FutureWarning"
)
@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES if programs(page)])
def test_programs(page, capsys):
    """Those of a page run one after another, and print what the comments behind `print` say."""
    names, promised = {"__name__": page.stem}, []
    for number, program in enumerate(programs(page), start=1):
        code = compile(program, f"{page.name}, program {number}", "exec")
        if not ELSEWHERE.match(program):
            try:
                exec(code, names)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                pytest.skip(f"no {error.name}")
            promised += re.findall(r"print\(.*\) +# (.*)", program)
    assert capsys.readouterr().out.splitlines() == promised
    assert promised or all(map(ELSEWHERE.match, programs(page)))


def test_there_are_programs():
    assert sum(len(programs(page)) for page in PAGES) >= 30
    marked = [program for page in PAGES for program in programs(page) if ELSEWHERE.match(program)]
    assert len(marked) <= 14
    for page in PAGES:  # none is written so that `programs` does not see it
        assert len(programs(page)) == len(re.findall(r"``` *py|~~~", page.read_text()))


COLUMNS = np.tile(np.arange(11.0), (1, 1, 11, 1))  # each pixel holds the number of its column
ONE = np.array([0])
BOX = np.array([[2.0, 2.0, 8.0, 8.0]])


def along_x(crops):
    return crops[0, 0, 0].tolist()


def test_table_of_positions():
    for cell in (
        "2, 5, 8: from corner",
        "2.5, 4.5, 6.5: the centres of the bins",
        "2 and 3, 4 and 5, 6 and 7",
        "2.5 and 3.5, 4.5 and 5.5",
    ):
        assert cell in CONVENTIONS
    assert along_x(cr.crop_and_resize(COLUMNS, np.array([[0.2, 0.2, 0.8, 0.8]]), ONE, 3)) == [2, 5, 8]
    assert along_x(cr.roi_crop(COLUMNS, BOX, ONE, 3)) == [2.5, 4.5, 6.5]
    assert along_x(cr.roi_crop(COLUMNS, BOX, ONE, 3, transform_fpcoor=False)) == [2, 5, 8]
    means = {True: [2.5, 4.5, 6.5], False: [3, 5, 7]}
    single = {True: [2, 3, 4, 5, 6, 7], False: [2.5, 3.5, 4.5, 5.5, 6.5, 7.5]}
    for aligned in (True, False):
        assert along_x(cr.roi_align(COLUMNS, BOX, 3, 1.0, 2, aligned, batch_indices=ONE)) == means[aligned]
        # six bins of one sample are the same samples, not averaged
        assert along_x(cr.roi_align(COLUMNS, BOX, 6, 1.0, 1, aligned, batch_indices=ONE)) == single[aligned]


def test_links():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"


def test_files_and_targets():
    assert (ROOT / "benchmarks/results/cpu.json").is_file()
    targets = (ROOT / "Makefile").read_text()
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"(?:`|^ +)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert f"\n{target}:" in targets, f"{page.name}: make {target}"
    named = set(re.findall(r"(?:`|^    )make ([a-z]+)", README, re.MULTILINE))
    assert {"demo", "test", "bench", "docs"} <= named


def test_readme_is_short():
    """It is what a new user reads; what is longer has a page in docs/, which README names."""
    assert len(README.splitlines()) <= 120
    named = set(re.findall(r"\]\(docs/(\w+)\.md\)", README))
    assert {page.stem for page in DOCS.glob("*.md")} - {"index", "api", "changes"} == named


def test_extras():
    """What a page says to install, setup.cfg has."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for page in PAGES:
        for names in re.findall(r"`[^`\n]*\.\[([\w,]+)\]", page.read_text()):
            assert set(names.split(",")) <= set(config["options.extras_require"]), f"{page.name}: {names}"


def test_commands():
    from cupy_roialign import __main__

    for page in (README, (DOCS / "gpu.md").read_text()):
        named = re.findall(r"python -m cupy_roialign *(\w*) +#", page)
        assert named == ["", "warmup"]
    for name in named:
        with pytest.raises(SystemExit, match="0"):
            __main__.main([*name.split(), "--help"])


def test_table_of_times_is_the_measured_one():
    from benchmarks.report import PAGES, read, section

    for page, (name, *_) in PAGES.items():
        assert section(read(name), page) in (ROOT / page).read_text()


def test_command_of_the_benchmark():
    from benchmarks.__main__ import arguments, specs

    (text,) = re.findall(r"`python -m benchmarks (--[^`]+)`", (DOCS / "speed.md").read_text())
    chosen = arguments(text.split())[1]
    assert specs(chosen)["own"]["K"] == 512


def test_numbers_of_stored_cases():
    from tests.test_golden import COUNTS, load

    assert f"{sum(COUNTS.values())} stored cases" in CONVENTIONS
    pages = {
        "seed_roi_align": "from_roialign_pytorch",
        "tensorflow_crop_and_resize": "from_tensorflow",
        "torchvision_roi_align": "from_torchvision",
        "onnx_roialign": "from_onnx",
    }
    for name, page in pages.items():
        text = " ".join((DOCS / f"{page}.md").read_text().split())
        assert f"{COUNTS[name]} stored cases" in text
        on_an_edge = sum(fields["near_edge"].sum() for fields in load(name).values() if "near_edge" in fields)
        assert f"{on_an_edge} of the stored boxes" in text


def has_code(path):
    """Whether a module is more than a docstring."""
    return not all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


def test_code_map():
    """docs/contributing.md says of every file what it does, and of none that is not there."""
    text = (DOCS / "contributing.md").read_text()
    code_map = text.split("\n## Code map\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+`) \| (.+) \|$", code_map, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    package = ROOT / "cupy_roialign"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if has_code(path)}
    files |= {f"cuda/{path.name}" for path in (ROOT / "cuda").iterdir() if path.is_file()}
    assert sorted(named) == sorted(files)


def test_pages_are_built(tmp_path):
    """`make docs`: a link that leads nowhere is a warning, and a warning is an error."""
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "cache", DOCS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    built = {path.stem: path.read_text() for path in tmp_path.glob("*.html")}
    assert {page.stem for page in DOCS.glob("*.md")} <= set(built)
    for name in cr.__all__:
        assert f'id="cupy_roialign.{name}"' in built["api"]
    for text in built.values():  # a reader's browser asks nobody else
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//", text)


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, DOCS / "draw_conventions.py", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    page = (DOCS / "conventions.md").read_text()
    drawn = {f"conventions/{path.name}" for path in tmp_path.iterdir()}
    assert drawn == set(re.findall(r"\]\((.*?\.svg)\)", page))
    assert all((DOCS / path).is_file() for path in drawn)
