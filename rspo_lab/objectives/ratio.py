"""Losses of the ratio to the rollout's policy, clipped: of tokens, or of whole completions.

The paper's equation is in each docstring, with what is read differently here.  At the first update
on a rollout the ratio is 1, and the gradient that of the advantage-weighted score.  Shapes: R
replicates, B completions, L completion tokens.  Nats.
"""

from jaxtyping import Float
from torch import Tensor

from rspo_lab.objectives.contract import Evidence, Loss, log_ratio, moved, token_scores


def diffu_grpo(
    e: Evidence,
    *,
    clip: float = 0.5,  # of the tokens' ratios to the rollout's policy
    beta: float = 0.04,  # of the penalty k3 of the tokens
) -> Loss:
    """mean over tokens of -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + beta (exp(r) - r - 1).

    rho = exp(s - s_old) and r = s_ref - s of a token's log-prob s, everything hidden at once.  (d1,
    arXiv:2504.12216, Eq. 3, and its code.)  The mean is over all valid tokens of the batch; d1's
    over those of a micro-batch.  d1 also masks 15 % of the prompt, redrawn per update; here the
    prompt stays, so all updates on a rollout see the same input.
    """
    return _clipped_tokens(e, clip, beta)


def espo(
    e: Evidence,
    *,
    clip: float = 0.2,  # of the ratio; the paper's is 0 for Countdown
    beta: float = 0.01,  # of k2; the paper's is 0.01 for Sudoku, 0.003 for Countdown
) -> Loss:
    """-mean min(rho A, clip(rho, 1 - clip, 1 + clip) A) + beta mean d^2 / (2u).

    rho = exp((ELBO - ELBO_old) / u) and d = ELBO - ELBO_ref, each the mean over replicates, summed
    nats.  (ESPO, arXiv:2512.03759, Eqs. 8-10, and its code.)  u is the number of valid tokens;
    ESPO scores the whole canvas, also what follows the end of text, and divides by its length.  At
    ratio 1 its gradient is that of (-A + beta d) ELBO / u: `rspo` with scope "none" and lam =
    beta, each completion divided by u.
    """
    used = e.valid.sum(1).to(e.policy)
    change = moved(e).mean(0) / used
    surrogate, clipped = _clipped(change, e.advantage, clip)
    penalty = log_ratio(e).mean(0).square() / (2 * used)
    log = {"penalty": penalty.mean().item(), "clipped": clipped}
    return Loss(-surrogate.mean() + beta * penalty.mean(), log)


def _clipped(
    change: Float[Tensor, "..."], advantage: Float[Tensor, "..."], clip: float
) -> tuple[Float[Tensor, "..."], float]:
    """(min(rho A, clip(rho) A) of rho = exp(change), the share of elements without a gradient)."""
    ratio = change.exp()
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantage
    beyond = bounded < ratio * advantage
    return (ratio * advantage).minimum(bounded), beyond.double().mean().item()


def _clipped_tokens(e: Evidence, clip: float, beta: float) -> Loss:
    """The mean over scored tokens of the clipped ratio's loss and of k3 against the reference."""
    assert e.old is not None and e.reference is not None
    policy, seen = token_scores(e.masks, e.policy)
    old, _ = token_scores(e.masks, e.old)
    reference, _ = token_scores(e.masks, e.reference)
    advantage = e.advantage[:, None].expand_as(policy)
    surrogate, clipped = _clipped((policy - old)[seen], advantage[seen], clip)
    r = (reference - policy)[seen]
    penalty = (r.exp() - r - 1).mean()
    log = {"penalty": penalty.item(), "clipped": clipped}
    return Loss(-surrogate.mean() + beta * penalty, log)
