"""Losses of the clipped ratio to the rollout's policy: gradients by hand, and at ratio 1."""

import math
from dataclasses import replace

import pytest
import torch
from evidence import slope, slope_of_draws, sums, toy

from rspo_lab.objectives import rspo
from rspo_lab.objectives.ratio import diffu_grpo, espo
from rspo_lab.objectives.weighted import reinforce

CLOSE = {"atol": 1e-10, "rtol": 0}
USED = torch.tensor([3, 2, 3, 1], dtype=torch.float64)


def at_ratio_one(e):
    """The evidence of a first update: the rollout's policy is the policy."""
    return replace(e, old=e.policy.detach().clone())


def clipped_slope(change: float, advantage: float, clip: float) -> float:
    """The derivative of min(rho A, clip(rho) A) by the change, rho = exp(change): rho A, or 0 where
    rho has passed the bound on the side that A asks for.
    """
    rho = math.exp(change)
    passed = rho > 1 + clip if advantage > 0 else rho < 1 - clip
    return 0.0 if passed else rho * advantage


def token_scores(e, token_logp) -> dict[tuple, float]:
    """The weighted log-prob of every (replicate, row, token) that is scored, by loops."""
    total = {}
    for view, row, token in e.masks.scored.nonzero().tolist():
        key = (e.masks.replicate[view].item(), row, token)
        term = e.masks.weight[view, row].item() * token_logp[view, row, token].item()
        total[key] = total.get(key, 0.0) + term
    return total


def slope_of_tokens(e, by_token: dict[tuple, float]) -> torch.Tensor:
    """The derivative by every view's log-prob, given that by every token's score."""
    wanted = torch.zeros_like(e.policy)
    for view, row, token in e.masks.scored.nonzero().tolist():
        key = (e.masks.replicate[view].item(), row, token)
        wanted[view, row, token] = e.masks.weight[view, row].item() * by_token[key]
    return wanted.detach()


@pytest.mark.parametrize("clip", [0.02, 0.5])
def test_diffu_grpo_by_hand(clip):
    """Token by token; at 0.02 some are clipped, on both sides."""
    e = toy()
    policy, old, reference = (token_scores(e, x) for x in (e.policy, e.old, e.reference))
    by_token, free = {}, 0
    for key, s in policy.items():
        gain = clipped_slope(s - old[key], e.advantage[key[1]].item(), clip)
        free += gain != 0
        k3 = 1 - math.exp(reference[key] - s)
        by_token[key] = (-gain + 0.3 * k3) / len(policy)
    loss = diffu_grpo(e, clip=clip, beta=0.3)
    assert torch.allclose(slope(loss, e), slope_of_tokens(e, by_token), **CLOSE)
    assert loss.log["clipped"] == pytest.approx(1 - free / len(policy))
    assert (0.2 < loss.log["clipped"] < 0.8) if clip == 0.02 else free


def test_diffu_grpo_at_ratio_one_is_the_mean_over_tokens_of_the_advantage():
    e = at_ratio_one(toy())
    scores = token_scores(e, e.policy)
    plain = {key: -e.advantage[key[1]].item() / len(scores) for key in scores}
    loss = diffu_grpo(e, beta=0.0)
    assert torch.allclose(slope(loss, e), slope_of_tokens(e, plain), **CLOSE)


@pytest.mark.parametrize("clip", [0.02, 0.2])
def test_espo_by_hand(clip):
    """Sequence by sequence: the ratio of summed scores per valid token, k2 over it too."""
    e = toy()
    policy, old, reference = (sums(e, x) for x in (e.policy, e.old, e.reference))
    by_row, free = [], 0
    for row, used in enumerate(USED.tolist()):
        gain = clipped_slope((policy[row] - old[row]) / used, e.advantage[row].item(), clip)
        free += gain != 0
        by_row.append((-gain + 0.3 * (policy[row] - reference[row])) / used / 4)
    loss = espo(e, clip=clip, beta=0.3)
    wanted = slope_of_draws(e, torch.tensor(by_row, dtype=torch.float64))
    assert torch.allclose(slope(loss, e), wanted, **CLOSE)
    assert loss.log["clipped"] == 1 - free / 4 and (free < 4) is (clip == 0.02) and free


def test_espo_at_ratio_one_is_rspo_without_centring_over_u():
    """Row by row 1/u of RSPO's gradient, lam = beta; at equal lengths the same direction."""
    e = at_ratio_one(toy())
    theirs = slope(rspo(e, lam=0.3, scope="none"), e) / USED[:, None]
    assert torch.allclose(slope(espo(e, beta=0.3), e), theirs, **CLOSE)
    plain = slope(reinforce(e, score_unit="token"), e)
    assert torch.allclose(slope(espo(e, beta=0.0), e), plain, **CLOSE)
