"""Losses with an upper bound for negatives: gradients by hand, and where the bounds meet."""

import math
from dataclasses import replace

import pytest
import torch
from evidence import slope, sums, toy
from test_estimators import count_support

from rspo_lab.estimators import token_logps
from rspo_lab.masks.base import Masks
from rspo_lab.objectives import Evidence
from rspo_lab.objectives.bounds import spg, stabledrl
from rspo_lab.objectives.weighted import reinforce

CLOSE = {"atol": 1e-10, "rtol": 0}
USED = (3, 2, 3, 1)


def slope_of_score(e, row: int, power: float, mix: float) -> torch.Tensor:
    """The derivative (M, L) of a completion's score per token, written token by token.

    Below: weight / (2 u) in each view.  Above: a token's share is log of the weighted mean over its
    views of q^power, over power and over how many tokens are seen.
    """
    scored, weight = e.masks.scored[:, row], e.masks.weight[:, row]
    below = weight[:, None] / 2 * scored / USED[row]
    if e.advantage[row] > 0:
        return below
    above = torch.zeros_like(below)
    tokens = [i for i in range(3) if scored[:, i].any()]
    for i in tokens:
        views = scored[:, i].nonzero()[:, 0].tolist()
        parts = [weight[v].item() * math.exp(power * e.policy[v, row, i].item()) for v in views]
        for v, part in zip(views, parts):
            above[v, i] = part / sum(parts) / len(tokens)
    return mix * above + (1 - mix) * below


@pytest.mark.parametrize("power, mix", [(1.5, 0.5), (1.0, 1.0), (2.0, 0.0)])
def test_spg_by_hand(power, mix):
    """-(A u s) / (sum of u), the lower bound for positives and the mixture for negatives."""
    e = toy()
    wanted = torch.zeros_like(e.policy)
    for row, used in enumerate(USED):
        score = slope_of_score(e, row, power, mix)
        wanted[:, row] = -e.advantage[row] * used * score / sum(USED)
    assert torch.allclose(slope(spg(e, power=power, mix=mix), e), wanted.detach(), **CLOSE)


def test_spg_pushes_negatives_down_from_above(small):
    """On every hidden set with its probability: as power goes to 0 the upper bound is the ELBO, and
    at power 4 the score of a negative is above it.
    """
    support, law = count_support(4)
    once = torch.zeros(len(law), dtype=torch.long)
    masks = Masks(support.hidden, support.weight * law[:, None], once)
    batch = small.batch.rows([0])
    e = Evidence(
        policy=token_logps(small.policy, batch, masks),
        reference=None,
        old=None,
        masks=masks,
        advantage=-torch.ones(1, dtype=torch.float64),
        reward=torch.zeros(1),
        group=torch.zeros(1, dtype=torch.long),
        valid=batch.valid,
    )
    plain = reinforce(e, score_unit="token").value
    near, far = (spg(e, power=p, mix=1.0).value for p in (1e-7, 4.0))
    gradient, wanted = (
        torch.autograd.grad(x, e.policy, retain_graph=True)[0] for x in (near, plain)
    )
    assert near.item() == pytest.approx(plain.item(), abs=1e-5) and far > plain + 0.1
    assert torch.allclose(gradient, wanted, atol=1e-5) and wanted.abs().max() > 1e-2


@pytest.mark.parametrize("clip", [1.05, 5.0])
def test_stabledrl_by_hand(clip):
    """Weights are the softmax over a group of two of the clipped log-ratios per token, and have no
    gradient; the clip cuts whatever the sign of A.
    """
    e = toy()
    policy, old = sums(e, e.policy), sums(e, e.old)
    raw = [math.exp((p - o) / u) for p, o, u in zip(policy, old, USED)]
    cut = [min(x, clip) for x in raw]
    wanted = torch.zeros_like(e.policy)
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        weight = cut[row] / (cut[row] + cut[other])
        wanted[:, row] = -weight * e.advantage[row] * slope_of_score(e, row, 1.5, 0.5) / 2
    assert torch.allclose(slope(stabledrl(e, clip=clip), e), wanted.detach(), **CLOSE)
    assert (cut != raw) is (clip == 1.05)


def test_stabledrl_at_ratio_one_on_the_elbo_is_its_policy_gradient():
    e = replace(toy(), old=toy().policy.detach())
    plain = slope(reinforce(e, score_unit="token"), e)
    assert torch.allclose(slope(stabledrl(e, mix=0.0), e), plain, **CLOSE)
