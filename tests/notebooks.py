"""Runs the notebooks in examples/ in kernels of their own.

python -m tests.notebooks [NAME ...]     runs them where they are, and keeps their outputs
"""

import sys
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).parents[1] / "examples"
PATHS = sorted(FOLDER.glob("*.ipynb"))


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in that folder; nbclient.exceptions.CellExecutionError at an error."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources, record_timing=False).execute()
    notebook.metadata.language_info = {"name": "python"}  # and not the version that happened to run it
    return notebook


def main() -> None:
    for path in PATHS:
        if not sys.argv[1:] or path.name in sys.argv[1:]:
            nbformat.write(run(path, FOLDER), path)
            print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
