"""The README's own lines: its Python, its study, its commands."""

import dataclasses
import random
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from throwaway import Folder

from rspo_lab import objectives, tasks
from rspo_lab.cli import _joined, _parser
from rspo_lab.config import TrainConfig
from rspo_lab.masks import designs as masks
from rspo_lab.models import loading as model
from rspo_lab.sweeps.study import read_study
from rspo_lab.training import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def snippet(word: str) -> str:
    (found,) = [text for text in SNIPPETS if word in text]
    return found


def run(text: str, **names):
    """What the lines leave behind, given these names."""
    names["__name__"] = "readme"
    exec(compile(text, "README.md", "exec"), names)
    return names


def test_the_first_snippet_ends_in_gradients():
    names = run(snippet("policy = load("))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in names["policy"].parameters())
    assert names["d"].shape == (4, 16)


@pytest.mark.parametrize("word", ["COMPACT_LENGTH", 'DESIGNS["halves"]', 'RECIPES["clipped"]'])
def test_extensions_are_short(word):
    assert len([line for line in snippet(word).splitlines() if line]) <= 20


@pytest.fixture
def reverse(tmp_path, monkeypatch):
    """The README's task, and a base model of its characters; a folder to train in."""
    module = types.ModuleType("reverse")
    monkeypatch.setitem(sys.modules, "reverse", module)
    exec(compile(snippet("COMPACT_LENGTH"), "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(tasks.TASKS, "reverse", module)
    model.tiny(module.COMPACT_CHARS, seed=0, layers=1, width=16).save(tmp_path / "base")
    return module, tmp_path


def test_the_task(reverse):
    task, _ = reverse
    test, training = (task.examples(split, 100, seed=0) for split in ("test", "train"))
    assert len(set(test) & set(training)) == 0 and training[:10] == task.examples(
        "train", 10, seed=0
    )
    for example in random.Random(0).sample(test, 10):
        assert [
            task.reward(text, example) for text in (task.solutions(example)[0], example.id + "a")
        ] == [1.0, 0.0]


def test_task_design_and_objective_train_together(reverse, monkeypatch):
    monkeypatch.setattr(
        reverse[0], "reward", lambda text, example, **_: float(text < "d")
    )  # an untrained model never writes it backwards
    try:
        run(snippet('DESIGNS["halves"]'), **vars(masks))
        run(snippet('RECIPES["clipped"]'), **vars(objectives))
        base, small = (
            str(reverse[1] / "base"),
            {"steps": 2, "prompts": 4, "group": 4, "eval_problems": 8, "lr": 1e-2},
        )
        config = TrainConfig(
            model=base, task="reverse", design="halves", objective="clipped", device="cpu", **small
        )
        history = train(config, Folder(reverse[1] / "run"))
        assert [record["step"] for record in history] == [0, 1, 2] and history[-1][
            "gradient_norm"
        ] > 0
        with pytest.raises(ValueError, match="give an even number of views, not 3"):
            dataclasses.replace(config, views=3)
    finally:
        masks.DESIGNS.pop("halves", None)
        objectives.RECIPES.pop("clipped", None)


def test_halves_hide_every_token_once_a_pair():
    names = run(snippet('DESIGNS["halves"]'), torch=torch, Masks=masks.Masks, DESIGNS={})
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    made = names["halves"](valid, 6, generator=torch.Generator().manual_seed(0))
    assert (
        torch.equal(made.hidden.view(3, 2, 2, 5).sum(1), valid.long().expand(3, 2, 5))
        and made.replicates == 3
    )


def test_clipped_is_rspo_where_nothing_is_clipped():
    names = run(
        snippet('RECIPES["clipped"]'), centre=objectives.centre, Loss=objectives.Loss, RECIPES={}
    )
    config = TrainConfig(model="base-sudoku", task="sudoku", lam=0.3)
    score = torch.randn(
        3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    reference, advantage = (
        torch.zeros(3, 8, dtype=torch.float64),
        torch.linspace(-1, 1, 8, dtype=torch.float64),
    )
    ours, theirs = (
        f(config, score, reference, advantage).value
        for f in (names["clipped"], objectives.RECIPES["rspo"])
    )
    assert torch.allclose(
        *(torch.autograd.grad(value, score)[0] for value in (ours, theirs)), atol=1e-12
    )


def test_the_study_of_the_readme_is_valid(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "readme.yaml").write_text(text)
    study = read_study(tmp_path / "readme.yaml", tmp_path)
    assert [len(points) for points in study.waves] == [10, 1]


def test_commands_parse():
    """Every line of the README that calls rspo-lab is one that its parser takes."""
    lines = re.findall(r"^rspo-lab ([^#\n]+)", README, re.M)
    assert len(lines) >= 10
    for line in lines:
        assert _parser().parse_args(_joined(line.split())).command


def test_files_that_it_names_are_there():
    for place in re.findall(r"\]\((data/[\w./-]+)\)", README):
        assert (ROOT / place).is_file(), place
    for name in re.findall(r"^\| (\d\d_\w+) \|", README, re.M):
        assert (ROOT / "notebooks" / f"{name}.ipynb").is_file(), name
    studies = {path.stem for path in (ROOT / "notebooks/studies").glob("*.yaml")}
    table = README[
        README.index("| study | asks |") : README.index("rspo-lab sweep STUDY.yaml --dry-run")
    ]
    assert studies == {
        name for row in re.findall(r"^\| ([\w, ]+) \| \w", table, re.M) for name in row.split(", ")
    } - {"study"} | {"study"}
