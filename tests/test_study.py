"""The page and the table from small runs, and that the study skips what is done."""

import json
from html.parser import HTMLParser

import pandas as pd
import pytest
from test_training import Folder, base, config  # noqa: F401

from rspo_lab import report, study
from rspo_lab.cli import main
from rspo_lab.config import TrainConfig
from rspo_lab.notebook import run_notebook
from rspo_lab.parameters import complete, declared
from rspo_lab.training import train


class Pictures(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attributes):
        if tag in ("img", "a"):
            self.sources.append(dict(attributes).get("src") or dict(attributes)["href"])


SHEET = """
title: A small study
runs:
  rspo:
    notebook: 02_train.ipynb
    seeds: [0, 1]
    parameters: &arm {model: base-sudoku, task: sudoku, steps: 2, prompts: 2, group: 4, eval_every: 1, eval_problems: 8, device: cpu}
  raw_advantage: {notebook: 02_train.ipynb, seeds: [0, 1], parameters: {<<: *arm, lam: 0.0}}
  late:
    notebook: 03_estimator_variance.ipynb
    parameters: {trained: "@rspo", designs: [count, bsc, one_step], views: [1, 2], prompts: 2, group: 4, redraws: 50,
                 schemes: [count, auto + two-level + allocated], gradient_views: [2], gradient_redraws: 3}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two arms of two seeds and one measurement, from its file."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "study.yaml").write_text(SHEET)
    assert study.run_study(runs / "study.yaml", runs) == 0
    waves, _ = study.read_study(runs / "study.yaml", runs / "study")
    return runs / "study", waves[0]


def test_a_study_file_ends_in_one_page_and_one_table(finished):
    root, _ = finished
    pictures = Pictures()
    pictures.feed((root / "index.html").read_text())
    assert all((root / source).is_file() for source in pictures.sources)
    assert {"figures/arms.png", "figures/efficiency.png"} <= set(pictures.sources)
    results = pd.read_parquet(root / "results.parquet")
    assert list(results) == ["task", "policy", "design", "views", "cost", "quantity", "value", "stderr"]
    assert set(results["policy"]) == {"late"} and {"var_gradient", "var_rollouts", "share_token_d", "reliability"} <= set(
        results["quantity"]
    )
    assert set(results.loc[results["design"] == "one_step", "views"]) == {1}  # two views of it are refused, and left out
    arms = pd.read_csv(root / "figures/arms.csv").set_index("arm")
    assert list(arms.index) == ["rspo", "raw_advantage"] and (arms["seeds"] == 2).all()


def test_arm_curves_add_up_what_was_spent(finished):
    root, jobs = finished
    path = jobs[0].path(root)
    curve, records = report.arm_curve(path), report.history(path)
    assert curve["step"].tolist() == [0, 1, 2] and curve["rate"].tolist() == [r["eval_solve_rate"] for r in records]
    assert curve["forwards"].tolist() == pytest.approx([0, records[1]["forwards"], records[1]["forwards"] + records[2]["forwards"]])
    assert curve["seconds"].is_monotonic_increasing and curve["seconds"].iloc[0] == 0
    assert records[1]["forwards"] == pytest.approx(4 * records[1]["forward_passes"])  # one level: reference, policy, backward (2)


def test_arms_table_by_hand(tmp_path):
    """Two arms of two seeds: final rates 60, 80 and 70, 100; the paired difference is 15 +- 12.706 * 5."""
    arms = {}
    for arm, finals in (("a", (0.6, 0.8)), ("b", (0.7, 1.0))):
        for seed, final in enumerate(finals):
            folder = tmp_path / f"{arm}{seed}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"seed": seed}))
            records = [
                {"step": 0, "eval_solve_rate": 0.5},
                {"step": 1, "forwards": 3.0},
                {"step": 2, "forwards": 4.0, "eval_solve_rate": final},
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
            (folder / "timing.jsonl").write_text("".join(json.dumps({"step": i, "update_s": 2.0}) + "\n" for i in (1, 2)))
            arms.setdefault(arm, []).append(folder)
    a, b = report.arms_table(arms).to_dict("records")
    assert a["final, %"].startswith("70.0 [") and a["each seed"] == "60.0 80.0" and a["final over the first, points"] == ""
    assert b["final over the first, points"] == "+15.0 [-48.5, +78.5]" and b["forwards a completion"] == "7" and b["update s"] == "4"


@pytest.mark.parametrize("file", sorted((study.NOTEBOOKS / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_committed_studies_are_valid(file, tmp_path):
    waves, title = study.read_study(file, tmp_path)
    places = [job.path(tmp_path) for jobs in waves for job in jobs]
    assert title and len(set(places)) == len(places)
    for job in waves[0]:
        if job.notebook == "02_train.ipynb":
            TrainConfig(**complete(declared(study.NOTEBOOKS / job.notebook), job.given))


def test_runs_wait_for_the_runs_that_they_name(tmp_path):
    sheet = SHEET + '  later: {notebook: 04_logratio_gap.ipynb, parameters: {trained: "@late"}}\n'
    (tmp_path / "chain.yaml").write_text(sheet)
    waves, _ = study.read_study(tmp_path / "chain.yaml", tmp_path)
    assert [{job.name for job in jobs} for jobs in waves] == [{"rspo", "raw_advantage"}, {"late"}, {"later"}]
    assert waves[2][0].given["trained"] == str(waves[1][0].path(tmp_path))


def test_a_page_without_common_views_or_with_seeds_of_a_measurement(finished, tmp_path):
    """Two seeds of one measurement, and one at other views: the page is written, with the tables and without that figure."""
    root, _ = finished
    (late,) = (root / "late").iterdir()
    results, runs = pd.read_parquet(late / "results.parquet"), []
    for seed, views in ((0, 2), (1, 2), (2, 4)):
        folder = tmp_path / f"m/{seed}"
        folder.mkdir(parents=True)
        (folder / "params.json").write_text(json.dumps({"seed": seed}))
        (folder / "provenance.json").write_text("{}")
        results[results["views"] == 2].assign(views=views).to_parquet(folder / "results.parquet")
        runs.append(("m", folder))
    page = report.sheet_page(tmp_path, "t", runs)
    assert "m (seed 1)" in page.read_text() and not (tmp_path / "figures/efficiency.png").exists()
    assert len(pd.read_parquet(tmp_path / "results.parquet")["policy"].unique()) == 3


@pytest.mark.parametrize("change, said", [
    (("title: A small study", ""), "a study is `title: text`"), (("seeds: [0, 1]", "sedes: [0, 1]"), "'rspo' takes notebook, seeds"),
    (("02_train", "2_train"), "there is no notebook '2_train.ipynb'"), (("@rspo", "@rsop"), "'late': @rsop names no run above it"),
    (("lam: 0.0", "lamm: 0.0"), "'raw_advantage': unknown parameter 'lamm'"),
])  # fmt: skip
def test_a_bad_study_file_is_refused_before_anything_runs(change, said, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(SHEET.replace(*change, 1))
    assert main(["study", str(tmp_path / "bad.yaml"), "--runs", str(tmp_path / "runs")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_second_call_skips_and_says_so(finished, capsys):
    root, jobs = finished
    assert study.run_jobs(jobs, root, at_once=2) == 0
    said = capsys.readouterr().out
    assert said.count("already done, skipped") == 4


def test_page_shows_files_that_exist(finished):
    root, jobs = finished
    rspo, raw = (job.path(root) for job in jobs[::2])
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
