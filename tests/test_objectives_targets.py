"""Losses with targets or ranks: gradients by hand, and where they are RSPO or a policy gradient."""

import math
from dataclasses import replace

import pytest
import torch
from evidence import slope, slope_of_draws, sums, toy

from rspo_lab.objectives import rspo
from rspo_lab.objectives.targets import gdsd, trafl, vrpo

CLOSE = {"atol": 1e-10, "rtol": 0}
USED = torch.tensor([3, 2, 3, 1], dtype=torch.float64)


def log_ratios(e) -> list[float]:
    return [p - r for p, r in zip(sums(e, e.policy), sums(e, e.reference))]


def test_vrpo_by_hand():
    """Three completions of one prompt with rewards 1, 0, 1/4, one of another: three pairs, each
    with the slope -beta sigmoid(-beta (d_w - d_l)) / 3 for the winner, and its negative.
    """
    e = replace(
        toy(),
        reward=torch.tensor([1.0, 0.0, 0.25, 1.0]),
        group=torch.tensor([5, 5, 5, 2]),
    )
    d = log_ratios(e)
    by_row = [0.0] * 4
    for winner, loser in ((0, 1), (0, 2), (2, 1)):
        push = 0.7 / (1 + math.exp(0.7 * (d[winner] - d[loser]))) / 3
        by_row[winner] -= push
        by_row[loser] += push
    loss = vrpo(e, beta=0.7)
    wanted = slope_of_draws(e, torch.tensor(by_row, dtype=torch.float64))
    assert torch.allclose(slope(loss, e), wanted, **CLOSE) and loss.log["pairs"] == 3


def test_vrpo_without_pairs_changes_nothing():
    e = replace(toy(), reward=torch.ones(4))
    loss = vrpo(e)
    assert loss.value.item() == 0 and (slope(loss, e) == 0).all()


def test_trafl_by_hand():
    """Residuals of two groups of two; log Z is best, so a residual is half the gap's difference."""
    e = toy()
    gap = [(x - 4.0 * a.item()) / u for x, a, u in zip(log_ratios(e), e.advantage, USED.tolist())]
    by_row = [
        2 * (gap[i] - gap[j]) / 2 / USED[i].item() / 4 for i, j in ((0, 1), (1, 0), (2, 3), (3, 2))
    ]
    wanted = slope_of_draws(e, torch.tensor(by_row, dtype=torch.float64))
    assert torch.allclose(slope(trafl(e, beta=4.0), e), wanted, **CLOSE)


def test_trafl_is_rspo_centred_per_group_at_equal_lengths():
    """Of a group whose advantages sum to 0: 2 beta / u^2 times RSPO with lam = 1/beta."""
    e = replace(
        toy(),
        valid=torch.ones(4, 3, dtype=torch.bool),
        advantage=torch.tensor([0.5, -0.5, -1.0, 1.0], dtype=torch.float64),
    )
    theirs = slope(rspo(e, lam=0.25, scope="group"), e) * 2 * 4 / 9
    assert torch.allclose(slope(trafl(e, beta=4.0), e), theirs, **CLOSE)


@pytest.mark.parametrize("clip", [0.0, 0.3, 4e-4])
def test_gdsd_by_hand(clip):
    """Replicate by replicate: (c/u - psi A)^2 with the summed change c cut, and k2 over u."""
    e = toy()
    wanted, free = torch.zeros_like(e.policy), 0
    for replicate, row in ((r, b) for r in range(2) for b in range(4)):
        views = (e.masks.replicate == replicate).nonzero()[:, 0]
        weight = (e.masks.weight[views, row, None] * e.masks.scored[views, row]).detach()
        change, d = (
            (weight * (e.policy - other)[views, row]).sum().item() for other in (e.old, e.reference)
        )
        used, inside = (
            USED[row].item(),
            not clip or math.log(1 - clip) < change < math.log(1 + clip),
        )
        free += inside
        residual = change / used - 2.0 * e.advantage[row].item()
        by_draw = 2 * residual / used * inside / 4 + 0.3 * d / used / 8
        wanted[views, row] = by_draw * weight
    loss = gdsd(e, psi=2.0, clip=clip, beta=0.3)
    assert torch.allclose(slope(loss, e), wanted.detach(), **CLOSE)
    assert loss.log["clipped"] == 1 - free / 8 and {0.0: 8, 4e-4: 0}.get(clip, free) == free
    assert clip != 0.3 or 0 < free < 8


def test_gdsd_at_ratio_one_is_a_policy_gradient_of_slope_two_psi_over_u():
    e = replace(toy(), old=toy().policy.detach())
    weights = -2 * 3.0 * e.advantage / USED / 4 * 2  # summed over two replicates
    assert torch.allclose(slope(gdsd(e, psi=3.0, beta=0.0), e), slope_of_draws(e, weights), **CLOSE)
