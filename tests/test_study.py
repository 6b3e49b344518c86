"""The page and the table from small runs, and that the study skips what is done."""

import json
from html.parser import HTMLParser

import pandas as pd
import pytest
from test_training import Folder, base, config  # noqa: F401

from rspo_lab import report, study
from rspo_lab.notebook import run_notebook
from rspo_lab.training import train


class Pictures(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attributes):
        if tag in ("img", "a"):
            self.sources.append(dict(attributes).get("src") or dict(attributes)["href"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):  # noqa: F811
    """A study of two 2-step runs and one measurement, by the study's own jobs."""
    root = tmp_path_factory.mktemp("runs") / "study"
    small = {"model": base, "task": "sudoku", "steps": 2, "prompts": 2, "group": 4, "eval_every": 1, "eval_problems": 8, "device": "cpu"}
    jobs = [study.Job("rspo", "02_train.ipynb", small), study.Job("raw_advantage", "02_train.ipynb", small | {"lam": 0.0})]
    assert study.run_jobs(jobs, root, at_once=2) == 0
    return root, jobs


def test_second_call_skips_and_says_so(finished, capsys):
    root, jobs = finished
    assert study.run_jobs(jobs, root, at_once=2) == 0
    said = capsys.readouterr().out
    assert said.count("already done, skipped") == 2


def test_page_shows_files_that_exist(finished):
    root, jobs = finished
    rspo, raw = (job.path(root) for job in jobs)
    gap = run_notebook(
        study.NOTEBOOKS / "04_logratio_gap.ipynb", {"trained": str(rspo), "prompts": 2, "group": 2}, runs=root, report=lambda line: None
    ).path
    page = report.study_page(root, {"RSPO": rspo, "raw": raw}, gap, gap)
    pictures = Pictures()
    pictures.feed(page.read_text())
    assert len(pictures.sources) >= 8 and all((root / source).is_file() for source in pictures.sources)
    assert (root / "figures/learning.csv").is_file() and "runs/" not in "".join(pictures.sources)


def test_grid_table_by_hand(tmp_path):
    """Two seeds of one setting: mean, Student interval with 1 degree of freedom, and gain in points."""
    paths = []
    for seed, rates in enumerate(((0.5, 0.4, 0.6), (0.5, 0.7, 0.8))):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"task": "sudoku", "lam": 0.1, "lr": 1e-3, "seed": seed, "eval_problems": 10}))
        records = [{"step": i, "eval_solve_rate": r} for i, r in enumerate(rates)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (folder / "timing.jsonl").write_text(json.dumps({"rollout_s": 60.0, "update_s": 60.0}) + "\n")
        paths.append(folder)
    (row,) = report.grid_table(paths).to_dict("records")
    assert row["seeds"] == 2 and row["after"] == 70 and row["gain"] == 20 and row["minutes_a_seed"] == 2
    assert row["after_high"] == pytest.approx(70 + 12.706 * 10, abs=0.1)


def test_a_failing_run_fails_the_study(tmp_path, capsys):
    bad = study.Job("bad", "02_train.ipynb", {"model": "/nowhere", "steps": 1})
    assert study.run_jobs([bad], tmp_path / "study", at_once=1) == 2
    assert "no model at /nowhere" in capsys.readouterr().out


def test_grid_and_pair_share_their_runs(tmp_path):
    """The pair that the study trains is the grid's seed 0 at the shared rate: nothing is trained twice."""
    places = {job.path(tmp_path) for job in study.GRID}
    assert study.RSPO.path(tmp_path) in places and study.RAW.path(tmp_path) in places and len(places) == len(study.GRID)


def test_trained_histories_read_back(base, tmp_path):  # noqa: F811
    history = train(config(base, steps=1), Folder(tmp_path / "run"))
    assert report.history(tmp_path / "run") == history
    assert isinstance(report.solve_rates("x", tmp_path / "run", history), dict) and pd.DataFrame(history).shape[0] == 2
