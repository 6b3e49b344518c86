"""The main job on the tiny models, the grid of seeds behind the claims, and studies from files: notebook runs, then one page.

A run is a subprocess of the command line with one thread, so two cores do two at a time and results do not depend on how
many run; finished runs are skipped.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rspo_lab.files import read_json, replacing
from rspo_lab.parameters import complete, declared
from rspo_lab.runs import run_path

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SUDOKU = {
    "model": "base-sudoku", "task": "sudoku", "prompts": 64, "group": 16, "steps": 300, "slice_size": 2048,
    "eval_every": 25, "eval_problems": 256,
}  # fmt: skip
COUNTDOWN = {"model": "base-countdown", "task": "countdown", "prompts": 32, "steps": 450, "eval_every": 50, "eval_problems": 192}
RATE = 3e-4  # the learning rate of the pair that `study` trains


@dataclass(frozen=True)
class Job:
    """One notebook run: its folder's name, the notebook and the parameters that differ from its defaults."""

    name: str
    notebook: str
    given: dict[str, Any] = field(default_factory=dict)

    def path(self, root: Path) -> Path:
        source = NOTEBOOKS / self.notebook
        return run_path(source, complete(declared(source), self.given), root, self.name)


RSPO = Job("rspo", "02_train.ipynb", SUDOKU | {"lr": RATE})
RAW = Job("raw_advantage", "02_train.ipynb", SUDOKU | {"lr": RATE, "lam": 0.0})
SEEDS = (0, 1, 2)
GRID = [
    *(Job("rspo", "02_train.ipynb", SUDOKU | {"lr": RATE, "seed": seed}) for seed in SEEDS),
    *(Job("raw_advantage", "02_train.ipynb", SUDOKU | {"lr": RATE, "lam": 0.0, "seed": seed}) for seed in SEEDS),
    *(Job("countdown", "02_train.ipynb", COUNTDOWN | {"seed": seed}) for seed in SEEDS),
    *(Job("raw_advantage", "02_train.ipynb", SUDOKU | {"lr": lr, "lam": 0.0, "seed": seed}) for lr in (1e-4, 3e-5) for seed in SEEDS),
    *(Job("rspo", "02_train.ipynb", SUDOKU | {"lr": lr, "seed": seed}) for lr in (1e-4, 1e-3) for seed in SEEDS),
]


def study(runs: Path) -> int:
    """Train with RSPO and with the raw advantage, measure variance and gap on the former; runs/study/index.html."""
    root, began = (runs / "study").resolve(), time.monotonic()
    measured = {"trained": str(RSPO.path(root))}
    variance = Job("variance", "03_estimator_variance.ipynb", measured)
    gap = Job("gap", "04_logratio_gap.ipynb", measured | {"prompts": 32})
    for jobs in ([RSPO, RAW], [variance, gap]):
        if code := run_jobs(jobs, root, at_once=2):
            return code
    from rspo_lab.report import study_page

    page = study_page(root, {"RSPO": RSPO.path(root), "raw advantage (λ = 0)": RAW.path(root)}, variance.path(root), gap.path(root))
    print(f"all done in {time.monotonic() - began:.0f} s: {page}")
    return 0


def grid(runs: Path) -> int:
    """Every seed and learning rate behind the README's claims (about an hour on 2 cores), and their table in runs/study/."""
    root = (runs / "study").resolve()
    if code := run_jobs(GRID, root, at_once=os.cpu_count() or 1):
        return code
    from rspo_lab.report import grid_table

    table = grid_table([job.path(root) for job in GRID])
    with replacing(root / "grid.csv") as path:
        table.to_csv(path, index=False)
    print(table.to_string(index=False))
    return 0


def run_study(file: Path, runs: Path) -> int:
    """All runs of a study's file, then its page, tables and results.parquet in runs/<name of the file>/."""
    root, began = (runs / file.stem).resolve(), time.monotonic()
    waves, title = read_study(file, root)
    for jobs in waves:
        if code := run_jobs(jobs, root, at_once=os.cpu_count() or 1):
            return code
    from rspo_lab.report import sheet_page

    page = sheet_page(root, title, [(job.name, job.path(root)) for jobs in waves for job in jobs])
    print(f"all done in {time.monotonic() - began:.0f} s: {page}")
    return 0


def read_study(file: Path, root: Path) -> tuple[list[list[Job]], str]:
    """(runs that need nothing, those that need one of these, and so on; the title) of a YAML file.

    `title: text` and `runs: {name: {notebook: file.ipynb, seeds: [0, 1], parameters: {...}}}`; a parameter "@name" is the folder of
    the run of that name.  ValueError, naming the run, for anything else and for parameters that the notebook does not take.
    """
    sheet = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(sheet, dict) or set(sheet) != {"title", "runs"} or not isinstance(sheet["runs"], dict):
        raise ValueError(f"{file}: a study is `title: text` and `runs:` with a name for every run")
    waves, places = {}, {}
    for name, run in sheet["runs"].items():
        if not isinstance(run, dict) or not {"notebook"} <= set(run) <= {"notebook", "seeds", "parameters"}:
            raise ValueError(f"{file}: run {name!r} takes notebook, seeds and parameters")
        if not (NOTEBOOKS / run["notebook"]).is_file():
            raise ValueError(f"{file}: run {name!r}: there is no notebook {run['notebook']!r} in {NOTEBOOKS}")
        given, wave = dict(run.get("parameters") or {}), 0
        for parameter, value in given.items():
            if isinstance(value, str) and value.startswith("@"):
                if value[1:] not in places:
                    raise ValueError(f"{file}: run {name!r}: {value} names no run above it")
                given[parameter], after = places[value[1:]]
                wave = max(wave, after + 1)
        for seed in run.get("seeds") or [None]:
            job = Job(str(name), run["notebook"], given if seed is None else given | {"seed": seed})
            try:
                place = job.path(root)
            except ValueError as error:
                raise ValueError(f"{file}: run {name!r}: {error}") from None
            places.setdefault(str(name), (str(place), wave))
            waves.setdefault(wave, []).append(job)
    return [waves[wave] for wave in sorted(waves)], str(sheet["title"])


def run_jobs(jobs: list[Job], root: Path, *, at_once: int) -> int:
    """Run what is not done yet, `at_once` side by side; the first code that is not 0, once all have ended."""
    with ThreadPoolExecutor(at_once) as pool:
        codes = list(pool.map(lambda job: _run(job, root), jobs))
    return next((code for code in codes if code), 0)


def _run(job: Job, root: Path) -> int:
    path = job.path(root)
    label = f"{job.name}/{path.name}"
    if read_json(path / "status.json").get("state") == "done":
        _say(f"{label}: already done, skipped ({path})")
        return 0
    words = [w for name, value in job.given.items() for w in ("-p", name, str(value))]
    command = [sys.executable, "-m", "rspo_lab.cli", "run", str(NOTEBOOKS / job.notebook), "--runs", str(root), "--name", job.name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command + words, env=environment, text=True, **pipe) as process:
        for line in process.stdout:
            _say(f"{label}: {line.rstrip()}")
    return process.returncode


def _say(line: str) -> None:
    """One write, so that lines of jobs that run side by side do not mix."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
