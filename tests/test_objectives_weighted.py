"""Losses that weigh scores: their gradients against formulas written out, float64."""

from dataclasses import replace

import pytest
import torch
from evidence import slope, slope_of_draws, sums, toy

from rspo_lab.advantages import ADVANTAGES
from rspo_lab.estimators import token_logps
from rspo_lab.masks.designs import design
from rspo_lab.objectives import METHODS, Evidence, rspo
from rspo_lab.objectives.weighted import (
    damped_negatives,
    justgrpo,
    positives_only,
    reinforce,
    reinforce_kl,
    rft,
    wd1,
)
from rspo_lab.oracle import subset_tables

CLOSE = {"atol": 1e-10, "rtol": 0}


def by_weights(e, *weights):
    """The derivative of -(sum of weight * score)."""
    return -slope_of_draws(e, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize(
    "loss, weights",
    [
        (reinforce, (1.2, -0.7, 0.4, -1.1)),
        (positives_only, (1.2, 0.0, 0.4, 0.0)),
        (damped_negatives, (1.2, -0.7 * 0.3, 0.4, -1.1 * 0.3)),
        (rft, (2.0, 0.0, 2.0, 0.0)),  # the mean over the two that are solved
    ],
)
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_weights_by_hand(loss, weights, unit):
    e = toy()
    per = (3, 2, 3, 1) if unit == "token" else (1, 1, 1, 1)
    wanted = by_weights(e, *(w / 4 / u for w, u in zip(weights, per)))
    assert torch.allclose(slope(loss(e, score_unit=unit), e), wanted, **CLOSE)


def test_rft_of_nothing_solved_changes_nothing():
    e = replace(toy(), reward=torch.tensor([0.9, 0.0, 0.5, 0.25]))
    assert (slope(rft(e), e) == 0).all()


def test_damped_negatives_are_between_its_neighbours():
    e = toy()
    assert torch.equal(slope(damped_negatives(e, factor=0.0), e), slope(positives_only(e), e))
    assert torch.equal(slope(damped_negatives(e, factor=1.0), e), slope(reinforce(e), e))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_reinforce_kl_by_hand(kind):
    """The penalty's gradient: beta/B times 1, d, or 1 - exp(-d), d the mean of two replicates."""
    e = toy()
    d = [p - r for p, r in zip(sums(e, e.policy), sums(e, e.reference))]
    d = torch.tensor(d, dtype=torch.float64)
    pull = {"k1": torch.ones_like(d), "k2": d, "k3": 1 - (-d).exp()}[kind]
    wanted = slope_of_draws(e, (0.3 * pull - e.advantage) / 4)
    loss = reinforce_kl(e, beta=0.3, kind=kind)
    assert d.abs().min() > 0.05 and torch.allclose(slope(loss, e), wanted, **CLOSE)


def test_reinforce_kl_of_k2_is_rspo_without_centring():
    e = toy()
    theirs = rspo(e, lam=0.3, scope="none")
    assert torch.allclose(slope(reinforce_kl(e, beta=0.3), e), slope(theirs, e), **CLOSE)


def test_wd1_by_hand():
    """Two groups of two: softmax weights written out, the mean over groups."""
    e = toy()
    up = torch.tensor([2 * 1.2, 2 * -0.7, 2 * 0.4, 2 * -1.1], dtype=torch.float64).exp()
    down = 1 / up
    weights = [
        up[i] / (up[i] + up[j]) - down[i] / (down[i] + down[j])
        for i, j in ((0, 1), (1, 0), (2, 3), (3, 2))
    ]
    assert torch.allclose(slope(wd1(e, psi=2.0), e), by_weights(e, *(w / 2 for w in weights)))


def test_wd1_is_the_softmax_advantage_times_the_group():
    """Of centred rewards: `reinforce` with advantage "softmax", whose mean is over completions."""
    e = toy()
    centred = replace(e, advantage=ADVANTAGES["mean_centred"](e.reward, 2))
    theirs = replace(e, advantage=2 * ADVANTAGES["softmax"](e.reward, 2))
    assert torch.allclose(slope(wd1(centred), e), slope(reinforce(theirs), e), **CLOSE)


def test_wd1_of_agreeing_rewards_changes_nothing():
    e = replace(toy(), advantage=torch.zeros(4, dtype=torch.float64))
    assert slope(wd1(e), e).abs().max() < 1e-15


def test_rows_of_one_loss_differ_by_their_design():
    for name in ("rspo", "reinforce"):
        elbo, path = METHODS["reinforce_elbo" if name == "reinforce" else name], f"{name}_path"
        assert METHODS[path].loss is elbo.loss and METHODS[path].design == "path"


def test_justgrpo_by_hand():
    """Over the 3 tokens of the canvas and the 3 of 4 completions that have an advantage."""
    e = replace(toy(), advantage=torch.tensor([1.2, 0.0, 0.4, -1.1], dtype=torch.float64))
    wanted = by_weights(e, 1.2 / 9, 0.0, 0.4 / 9, -1.1 / 9)
    assert torch.allclose(slope(justgrpo(e), e), wanted, **CLOSE)


def test_justgrpo_raises_log_p_from_left_to_right(small):
    """One completion with A = 1: the loss is -(log p of the chain rule)/L, written with the table
    of all hidden sets.
    """
    row = METHODS["justgrpo"]
    batch = small.batch.rows([0])
    masks = design(row.design)(batch.valid, row.views, generator=torch.Generator())
    e = Evidence(
        policy=token_logps(small.policy, batch, masks),
        reference=None,
        old=None,
        masks=masks,
        advantage=torch.ones(1, dtype=torch.float64),
        reward=torch.ones(1),
        group=torch.zeros(1, dtype=torch.long),
        valid=batch.valid,
    )
    table = subset_tables(small.policy, batch)[0]
    chain = sum(table[0b1111 & ~(2**token - 1), token] for token in range(4))
    loss = row.loss(e).value
    assert loss.item() == pytest.approx(-chain.item() / 4, abs=1e-12)
    found, wanted = (torch.autograd.grad(x, small.policy.logits)[0] for x in (loss, -chain / 4))
    assert torch.allclose(found, wanted, atol=1e-12) and wanted.abs().max() > 1e-3
