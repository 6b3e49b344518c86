"""The plugin of exact scores: no noise, and the oracle's own values."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rspo_lab import masks, plugins
from rspo_lab.estimators import elbo_draws, token_logps
from rspo_lab.objectives import METHODS, Evidence
from rspo_lab.oracle import exact_elbo, exact_logp
from rspo_lab.tasks import task as task_named

PLUGIN = Path(__file__).parent.parent / "notebooks/studies/exact_scores.py"


@pytest.fixture
def exact(small):
    """(denoiser, batch, masks of all subsets); the tables are as before after the test."""
    before = {table: dict(entries) for table, entries in plugins.TABLES.items()}
    if "all_subsets" not in masks.DESIGNS:  # another test of this process may have loaded it
        plugins.load_plugins(PLUGIN)
    policy, batch = small.policy, small.batch
    drawn = masks.DESIGNS["all_subsets"](batch.valid, 1, generator=torch.Generator())
    yield policy, batch, drawn
    for table, entries in plugins.TABLES.items():
        entries.clear()
        entries.update(before[table])


def test_all_subsets_give_the_exact_elbo(exact):
    policy, batch, drawn = exact
    assert drawn.hidden.any(-1).sum(0).tolist() == [15, 15, 7]
    torch.testing.assert_close(elbo_draws(policy, batch, drawn)[0], exact_elbo(policy, batch))


def test_the_loss_is_the_oracles_random_order_likelihood(exact):
    policy, batch, drawn = exact
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    seen = Evidence(
        policy=token_logps(policy, batch, drawn),
        reference=None,
        old=None,
        masks=drawn,
        advantage=advantage,
        reward=advantage,
        group=torch.zeros(3, dtype=torch.long),
        valid=batch.valid,
    )
    loss = METHODS["exact_random_order"].loss(seen).value
    expected = -(advantage * exact_logp(policy, batch)).mean()
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, policy.logits)
    (theirs,) = torch.autograd.grad(expected, policy.logits)
    torch.testing.assert_close(ours, theirs)
    other = METHODS["exact_random_order"].loss(replace(seen, advantage=-advantage)).value
    assert other != loss


def test_short_puzzles(exact):
    short = task_named("sudoku_short")
    found = short.examples("train", 20, seed=0)
    assert len(found) == 20 and {e.puzzle.count("0") for e in found} == {6}
