"""The embedded base models leave RL room both ways, and pretraining is reproducible."""

from pathlib import Path

import pytest
import torch

from rspo_lab.decoding import solve_rate
from rspo_lab.models.loading import load, tiny
from rspo_lab.pretraining import decoding, decoding_table, pretrain
from rspo_lab.tasks import countdown, sudoku

DATA = Path(__file__).parent.parent / "data"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, task, low, high",
    [("base-sudoku", sudoku, 0.40, 0.75), ("base-countdown", countdown, 0.15, 0.30)],
)
def test_embedded_models_solve_the_stated_share(name, task, low, high):
    """Greedy, one token a step, on held-out problems; each at most 2 MB."""
    model = load(name)
    assert low <= solve_rate(model, task, task.examples("test", 192, seed=0), seed=0) <= high
    assert sum(p.stat().st_size for p in (DATA / name).iterdir()) < 2e6


@pytest.mark.slow
def test_pretraining_learns_and_repeats():
    runs = []
    for _ in range(2):
        model = tiny(sudoku.COMPACT_CHARS, seed=0, layers=1, width=32)
        settings = dict(
            steps=30, batch_size=16, lr=3e-3, seed=0, stop_at=1.0, eval_every=10, problems=4
        )
        runs.append(
            (
                pretrain(model, sudoku, **settings),
                torch.cat([p.flatten() for p in model.parameters()]),
            )
        )
    (first, weights), (second, same) = runs
    assert first == second and torch.equal(weights, same)
    assert [r["step"] for r in first] == [10, 20, 30] and first[-1]["loss"] < 0.8 * first[0]["loss"]


def test_decoding_shows_every_step():
    model = tiny(sudoku.COMPACT_CHARS, seed=0, layers=1, width=32)
    example = sudoku.examples("test", 1, seed=0)[0]
    frame = decoding(model, sudoku, example, seed=0)
    written = frame[frame["step"] >= 0]
    assert len(frame) == 16 and sorted(written["step"]) == list(range(example.puzzle.count("0")))
    table = decoding_table(model, sudoku, problems=4, seed=0)
    assert table["forwards"].max() <= 16 and (table["n"] == 4).all()
