"""The notebooks in examples/ run, and say what is committed."""

import re
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

from tests import notebooks  # noqa: E402

ROOT = Path(__file__).parents[1]
every_notebook = pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in notebooks.PATHS])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cell):
    """What a cell printed, and for everything that it showed the kinds and the text."""
    printed, shown = {}, []
    for output in cell.outputs:
        if output.output_type == "stream":  # comes in pieces, as it happens
            printed[output.name] = printed.get(output.name, "") + output.text
        else:
            shown.append((sorted(output.data), output.data.get("text/markdown"), output.data.get("text/plain")))
    return printed, shown


def check(notebook):
    """What holds for a notebook that has been run, here or by who committed it."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        printed, shown = said(cell)
        assert "stderr" not in printed, printed["stderr"]
        if "plt.show()" in cell.source:
            assert any("image/png" in kinds for kinds, _, _ in shown)
        if "print(" in cell.source:
            assert printed


def test_there_are_five():
    assert [path.name[0] for path in notebooks.PATHS] == list("12345")


@every_notebook
def test_says_what_is_committed(path, tmp_path):
    committed = nbformat.read(path, as_version=4)
    if any("import torch" in cell.source for cell in committed.cells):
        pytest.importorskip("torch")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    ran = notebooks.run(path, tmp_path / "examples")
    check(ran)
    for cell, before in zip(code_cells(ran), code_cells(committed), strict=True):
        if "varies" not in cell.metadata.get("tags", ()):
            assert said(cell) == said(before), cell.source


@every_notebook
def test_is_committed_as_it_was_run(path):
    notebook = nbformat.read(path, as_version=4)
    check(notebook)
    assert path.stat().st_size < 1.5e6
    for cell in notebook.cells:
        texts = [cell.source]
        for printed, shown in [said(cell)] if cell.cell_type == "code" else []:
            texts += [*printed.values(), *(str(texts) for _, *texts in shown)]
        for text in texts:
            assert not re.search(r"/(home|root|tmp|work|usr|Users|mnt|opt)/|[A-Z]:\\", text), text
    varying = [cell for cell in code_cells(notebook) if "varies" in cell.metadata.get("tags", ())]
    assert "computed with" in varying[0].outputs[0].text
    assert len(varying) <= 2


@every_notebook
def test_links(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(((?!http)[^)]+)\)", cell.source):
                assert (path.parent / link).is_file(), link
