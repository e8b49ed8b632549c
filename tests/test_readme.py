"""README tells the truth: its programs run, its table of positions is right, what it names exists."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs(number, capsys):
    program = PROGRAMS[number]
    if "import torch" in program:
        pytest.importorskip("torch")
    exec(compile(program, f"README.md, program {number + 1}", "exec"), {})
    promised = re.findall(r"print\(.*\) +# (.*)", program)
    assert capsys.readouterr().out.splitlines() == promised
    assert promised


def test_there_are_programs():
    assert len(PROGRAMS) == 2


COLUMNS = np.tile(np.arange(11.0), (1, 1, 11, 1))  # each pixel holds the number of its column
ONE = np.array([0])
BOX = np.array([[2.0, 2.0, 8.0, 8.0]])


def along_x(crops):
    return crops[0, 0, 0].tolist()


def test_table_of_positions():
    for cell in (
        "2, 5, 8: from corner",
        "2.5, 4.5, 6.5: the middles",
        "2 and 3, 4 and 5, 6 and 7",
        "2.5 and 3.5, 4.5 and 5.5",
    ):
        assert cell in README
    assert along_x(cr.crop_and_resize(COLUMNS, np.array([[0.2, 0.2, 0.8, 0.8]]), ONE, 3)) == [2, 5, 8]
    assert along_x(cr.roi_crop(COLUMNS, BOX, ONE, 3)) == [2.5, 4.5, 6.5]
    assert along_x(cr.roi_crop(COLUMNS, BOX, ONE, 3, transform_fpcoor=False)) == [2, 5, 8]
    means = {True: [2.5, 4.5, 6.5], False: [3, 5, 7]}
    single = {True: [2, 3, 4, 5, 6, 7], False: [2.5, 3.5, 4.5, 5.5, 6.5, 7.5]}
    for aligned in (True, False):
        assert along_x(cr.roi_align(COLUMNS, BOX, 3, 1.0, 2, aligned, batch_indices=ONE)) == means[aligned]
        # six bins of one sample are the same samples, not averaged
        assert along_x(cr.roi_align(COLUMNS, BOX, 6, 1.0, 1, aligned, batch_indices=ONE)) == single[aligned]


def test_files_and_targets():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).is_file()
    assert (ROOT / "benchmarks/results/cpu.json").is_file()
    targets = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:`|^    )make ([a-z]+)", README, re.MULTILINE)
    assert {"demo", "test", "bench"} <= set(named)
    for target in named:
        assert f"\n{target}:" in targets


def test_commands():
    from cupy_roialign import __main__

    named = re.findall(r"python -m cupy_roialign *(\w*) +#", README)
    assert named == ["", "warmup"]
    for name in named:
        with pytest.raises(SystemExit, match="0"):
            __main__.main([*name.split(), "--help"])


def test_table_of_times_is_the_measured_one():
    from benchmarks.__main__ import markdown

    assert markdown(json.loads((ROOT / "benchmarks/results/cpu.json").read_text())) in README


def test_number_of_stored_cases():
    from tests.test_golden import COUNTS

    assert f"{sum(COUNTS.values())} stored cases" in README
