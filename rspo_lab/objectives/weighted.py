"""Losses that weigh each completion's score: RSPO, the raw advantage, and what is between.

The paper's equation is in each docstring, with what is read differently here.  Shapes: R
replicates, B completions.  Nats.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rspo_lab.objectives.contract import Evidence, Loss, Scope, log_ratio, relative_score, score

Unit = Literal["sequence", "token"]


def rspo(
    e: Evidence,
    *,
    lam: float,
    scope: Scope = "batch",
    residual: Literal["shared", "leave_one_out"] = "shared",
    score_unit: Unit = "sequence",
    use_reference: bool = True,  # False: d is the score itself, without a reference
) -> Loss:
    """-mean sg(A - lam d_hat) d_hat, d_hat of `relative_score`.  (RSPO, arXiv:2605.10218, Eq. 3.3)

    Its gradient is that of lam/2 mean (d_hat - A/lam)^2, a centred quadratic penalty beside the
    advantage-weighted score: lam = 0 is `reinforce`.

    With residual "shared" the estimate is multiplied with itself, so the expected gradient carries
    lam/2 mean_i (1 - n_i/B) grad Var[estimate_i] beside that of the true square: Var[d]/R for
    independent replicates, n_i of the B rows of one centre on the draws of row i (1, or more where
    equal completions share them; without a centre the factor is 1).  "leave_one_out" weighs each
    replicate by the others' estimate; it is unbiased for independent replicates and needs R >= 2.
    """
    d = log_ratio(e, score_unit) if use_reference else score(e, score_unit)
    terms = relative_score(d, e.advantage, lam=lam, scope=scope, group=e.group, residual=residual)
    informed = (e.advantage != 0).sum().clamp(min=1)
    log = {
        "weight_rms": terms.weight.mean(0).square().mean().sqrt().item(),
        "sign_flips": (terms.flipped.sum() / informed).item(),
    }
    return Loss(-(terms.weight * terms.d_hat).mean(), log)


def reinforce(e: Evidence, *, score_unit: Unit = "sequence") -> Loss:
    """-mean A score: the raw advantage times the score, the gradient of `rspo` at lam = 0.

    On the ELBO's designs it is `reinforce_elbo`, on the rollout's own path `reinforce_path`.  The
    reference drops out; it is scored for the record only.
    """
    return _weighted(e, e.advantage, score_unit)


def positives_only(e: Evidence, *, score_unit: Unit = "sequence") -> Loss:
    """-mean max(A, 0) score: completions below their group's mean are left alone.  (ours)"""
    return _weighted(e, e.advantage.clamp(min=0), score_unit)


def damped_negatives(
    e: Evidence,
    *,
    score_unit: Unit = "sequence",
    factor: float = 0.3,  # of negative advantages; 0: positives_only, 1: reinforce
) -> Loss:
    """-mean (max(A, 0) + factor min(A, 0)) score.  (ours)"""
    weight = e.advantage.clamp(min=0) + factor * e.advantage.clamp(max=0)
    return _weighted(e, weight, score_unit)


def rft(e: Evidence, *, score_unit: Unit = "sequence") -> Loss:
    """-(mean score of the completions with reward 1): fine-tuning on what was solved.

    (rejection-sampling fine-tuning, arXiv:2308.01825, whose set is deduplicated; here completions
    that were drawn twice count twice.)  0 where nothing was solved.
    """
    solved = (e.reward == 1).to(e.policy)
    return _weighted(e, solved * len(solved) / solved.sum().clamp(min=1), score_unit)


def reinforce_kl(
    e: Evidence,
    *,
    score_unit: Unit = "sequence",
    beta: float = 0.01,  # of the penalty
    kind: Literal["k1", "k2", "k3"] = "k2",  # d, d^2/2, or exp(-d) - 1 + d
) -> Loss:
    """-mean A score + beta mean k(d), d the mean over replicates of ELBO_theta - ELBO_ref.

    The penalties are three estimates of KL(policy, reference) from completions of the policy
    (Schulman, "Approximating KL divergence", 2020), with d for the log-ratio.  What they do is
    their gradient, in multiples of grad d per completion.  k1: beta, whatever d is, so it lowers
    all scores alike.  k2: beta d, a pull to the reference that grows with d: this is `rspo` with
    scope "none" and lam = beta.  k3: beta (1 - exp(-d)), at most beta where d > 0, exponential
    where d < 0.
    """
    d = log_ratio(e, score_unit).mean(0)
    penalty = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}[kind]
    ascent = _weighted(e, e.advantage, score_unit)
    value = ascent.value + beta * penalty.mean()
    return Loss(value, ascent.log | {"penalty": penalty.mean().item()})


def wd1(
    e: Evidence,
    *,
    score_unit: Unit = "sequence",
    psi: float = 1.0,  # inverse temperature of the weights
) -> Loss:
    """sum over a group of (w- - w+) score, w+- = softmax(+-psi A) in the group; mean over groups.

    (wd1, arXiv:2507.08838, psi = 1 in its code.)  A = R - group mean, scores of one step,
    summed over tokens.  Its code takes the softmax over one device's batch, which is one group.  No
    prompt token is masked here; there 15 % are.  The published sampler draws from a mixture with
    the reference; ours from the policy.
    """
    same = e.group[:, None] == e.group
    logits = (psi * e.advantage).expand_as(same)

    def softmax(logits):
        return logits.masked_fill(~same, -torch.inf).softmax(1).diagonal()

    weight = softmax(logits) - softmax(-logits)
    return _weighted(e, weight * len(weight) / len(e.group.unique()), score_unit)


def justgrpo(e: Evidence) -> Loss:
    """-(sum of A log p) / (L informative), log p from left to right, L tokens of the canvas.

    (JustGRPO, arXiv:2601.15165, and its code, whose ratio is to the policy itself, so 1, and its
    clip never binds.)  informative: how many completions have A != 0.  Their rollouts are written
    from left to right too: `-p block 1`.  There all L tokens are scored, here the valid ones.
    """
    informative = (e.advantage != 0).sum().clamp(min=1)
    weight = e.advantage * len(e.advantage) / informative / e.valid.shape[1]
    return _weighted(e, weight, "sequence")


def _weighted(e: Evidence, weight: Float[Tensor, " B"], unit: Unit) -> Loss:
    """-mean of weight * score over replicates and completions."""
    log = {"weight_rms": weight.square().mean().sqrt().item(), "sign_flips": 0.0}
    return Loss(-(weight * score(e, unit)).mean(), log)
