#!/usr/bin/env bash
# papermill 2.7.0: a parameter annotated `int | None` is no parameter to it.
#
# `inspect_notebook` leaves it out, and a value given for it is warned of as unknown, though it is
# then injected and used.  `int` and `list[int]` beside it are seen.
#
# Seen on Python 3.11:
#   inspect_notebook finds: sizes, steps
#   warned: Passed unknown parameter: seed
#   the notebook printed: 5 [2, 4] 7
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet papermill==2.7.0 ipykernel==7.4.0
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import logging
from importlib.metadata import version

import nbformat
import papermill

DECLARED = "steps: int = 3\nsizes: list[int] = [1]\nseed: int | None = None"
warned = []


class Kept(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())


logging.getLogger("papermill").addHandler(Kept())
cells = [
    nbformat.v4.new_code_cell(DECLARED, metadata={"tags": ["parameters"]}),
    nbformat.v4.new_code_cell("print(steps, sizes, seed)"),
]
book = nbformat.v4.new_notebook(cells=cells)
book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
nbformat.write(book, "in.ipynb")

print("papermill", version("papermill"))
seen = sorted(papermill.inspect_notebook("in.ipynb"))
print("declared:", DECLARED.replace("\n", "; "))
print("inspect_notebook finds:", ", ".join(seen))
given = {"steps": 5, "sizes": [2, 4], "seed": 7}
out = papermill.execute_notebook("in.ipynb", "out.ipynb", parameters=given, progress_bar=False)
printed = out.cells[-1].outputs[0].text.strip()
print("warned:", "; ".join(warned))
print("the notebook printed:", printed)
assert seen == ["sizes", "steps"], "inspect_notebook finds other parameters now"
assert warned == ["Passed unknown parameter: seed"], "it warns otherwise now"
assert printed == "5 [2, 4] 7", "it injects otherwise now"
PYTHON
