"""Throw-away notebooks and run folders for tests."""

from pathlib import Path

import nbformat

PARAMETERS = """steps: int = 3  # how many; GPU: 2000
lam: float = 0.1
data: str | None = None"""


class Folder:
    """What training asks of a run."""

    def __init__(self, path):
        self.path, self.stopped, self.seen = Path(path), False, []
        self.path.mkdir(parents=True, exist_ok=True)

    def progress(self, done, total, note=""):
        self.seen.append(done)


def make(folder: Path, *cells: str, parameters: str = PARAMETERS, name: str = "demo.ipynb") -> Path:
    """A notebook of a parameters cell, a cell that starts the run, and these cells."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    start = f'from rspo_lab.runs.run import start_run\nrun = start_run("{name}", globals())'
    book = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, [start, *cells])])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, folder / name)
    return folder / name
