"""A user's own methods, designs and tasks from a file; what goes wrong names file and line."""

import json
import subprocess
import sys

import pytest
import torch

from rspo_lab.config import TrainConfig
from rspo_lab.masks import DESIGNS
from rspo_lab.masks.designs import design
from rspo_lab.objectives import METHODS
from rspo_lab.plugins import _LOADED, TABLES, load_plugins
from rspo_lab.tasks import TASKS

MINE = '''
import torch
from rspo_lab.masks import DESIGNS, Masks
from rspo_lab.objectives import METHODS, Evidence, Loss, Method, log_ratio, relative_score
from rspo_lab.tasks import TASKS, sudoku


def bounded(e: Evidence, *, lam: float, bound: float = 5.0) -> Loss:
    """RSPO whose estimate counts up to `bound` nats in the weight."""
    terms = relative_score(log_ratio(e), e.advantage, lam=lam)
    weight = e.advantage - lam * terms.estimate.clamp(-bound, bound)
    return Loss(-(weight * terms.d_hat).mean(), {"bound": bound})


def halves(valid, views, *, generator):
    """Every token hidden with probability 1/2; a biased score, for it sees few sizes."""
    hidden = (torch.rand((views, *valid.shape), generator=generator) < 0.5) & valid
    return Masks(hidden, torch.full(hidden.shape[:2], 2.0).double(), torch.arange(views))


METHODS["bounded"] = Method(bounded, design="halves", advantage="mean_centred", inner_steps=2)
DESIGNS["halves"] = halves
TASKS["puzzle"] = sudoku
'''


@pytest.fixture
def mine(tmp_path):
    """The file of plugins; the tables are as before after the test."""
    before = {table: dict(entries) for table, entries in TABLES.items()}
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    yield file
    _LOADED.clear()
    for table, entries in TABLES.items():
        entries.clear()
        entries.update(before[table])


def config(file, **changes):
    values = {
        "model": "base-sudoku",
        "task": "puzzle",
        "objective": "bounded",
        "plugins": str(file),
    }
    return TrainConfig(**values | changes)


def test_methods_designs_and_tasks_come_by_name(mine):
    chosen = config(mine, hyper={"bound": 3.0}, lam=0.2)
    assert chosen.hyperparameters == {"lam": 0.2, "bound": 3.0}
    assert (chosen.design, chosen.advantage, chosen.inner_steps) == ("halves", "mean_centred", 2)
    assert config(mine, design="count", inner_steps=1).design == "count"
    masks = design("halves")(torch.ones(2, 5, dtype=torch.bool), 3, generator=torch.Generator())
    assert masks.hidden.shape == (3, 2, 5) and "puzzle" in TASKS


def test_a_changed_file_is_run_again_and_an_unchanged_one_is_not(mine):
    load_plugins(mine)
    first = METHODS["bounded"]
    load_plugins(mine)
    assert METHODS["bounded"] is first
    mine.write_text(
        MINE.replace("bound: float = 5.0", "bound: float = 9.0").replace("puzzle", "riddle")
    )
    load_plugins(mine)
    assert METHODS["bounded"].own({"lam"})["bound"].default == 9.0
    assert "riddle" in TASKS and "puzzle" not in TASKS


@pytest.mark.parametrize(
    "text, match",
    [
        ("x = 1\ny = 1 / 0\n", r"mine.py, line 2: ZeroDivisionError"),
        ("def f(:\n", r"mine.py, line 1: SyntaxError"),
        ("import no_such_module\n", r"mine.py, line 1: ModuleNotFoundError"),
        (MINE.replace('METHODS["bounded"]', 'METHODS["rspo"]'), "METHODS has 'rspo' already"),
    ],
)
def test_a_bad_file_is_one_error_and_leaves_nothing_behind(mine, text, match):
    before = {table: dict(entries) for table, entries in TABLES.items()}
    mine.write_text(text)
    with pytest.raises(ValueError, match=match):
        load_plugins(mine)
    assert {table: dict(entries) for table, entries in TABLES.items()} == before
    with pytest.raises(FileNotFoundError, match="no file of plugins at nowhere.py"):
        load_plugins("nowhere.py")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"hyper": {"bond": 3.0}}, "bounded takes no 'bond': did you mean 'bound'"),
        ({"hyper": {"bound": "far"}}, "parameter bound: given 'far', expected float"),
        ({"hyper": {"lam": 0.1}}, "bounded takes no 'lam'.*it takes bound"),
        ({"objective": "rspo", "hyper": {"bound": 1.0}}, "rspo takes no 'bound'.*use_reference"),
        ({"objective": "bonded"}, "objective must be one of rspo, reinforce_elbo, bounded"),
    ],
)
def test_hyperparameters_are_checked(mine, changes, match):
    with pytest.raises(ValueError, match=match):
        config(mine, **changes)


@pytest.mark.slow
def test_training_from_the_command_line_uses_and_keeps_the_file(mine, tmp_path):
    """Method, design, own hyperparameter; the run keeps the file, its policies load again."""
    words = ["train", "--run", str(tmp_path / "run")]
    given = {
        "plugins": mine,
        "task": "puzzle",
        "model": "base-sudoku",
        "objective": "bounded",
        "hyper": '{"bound": 2.5}',
        "steps": 2,
        "prompts": 2,
        "group": 2,
        "eval_problems": 2,
        "device": "cpu",
    }
    for name, value in given.items():
        words += ["-p", name, str(value)]
    subprocess.run([sys.executable, "-m", "rspo_lab.cli", *words], check=True, capture_output=True)
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert [r.get("bound") for r in records] == [None, 2.5, 2.5]
    assert (tmp_path / "run/plugins.py").read_text() == MINE
    assert json.loads((tmp_path / "run/config.json").read_text())["design"] == "halves"
    assert "halves" not in DESIGNS  # until a run that names the file is read
    from rspo_lab.policies import trained_run

    assert trained_run(tmp_path / "run").config.design == "halves" and "halves" in DESIGNS
