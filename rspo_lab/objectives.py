"""Policy objectives as pure functions of score draws and advantages; each returns a loss to
minimise.

Shapes: R replicates (independent mask draws of one estimate), B sequences.  Scores and log-ratios
in nats, in the unit (summed or per token) that `lam` was chosen for.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    value: Float[Tensor, ""]
    log: dict[str, float]


def rspo(
    d: Float[Tensor, "R B"],
    advantage: Float[Tensor, " B"],
    *,
    lam: float,
    scope: Int[Tensor, " B"] | Literal["batch", "none"] = "batch",
    residual: Literal["shared", "leave_one_out"] = "shared",
) -> Loss:
    """-mean sg(A - lam d_hat) d_hat,  d_hat = d - sg(mean of d over its scope).  (RSPO,
    arXiv:2605.10218, Eq. 3.3)

    Its gradient is that of lam/2 mean (d_hat - A/lam)^2: A/lam is the target log-ratio, A/lam -
    d_hat the gap, and A - lam d_hat the residual weight.  lam = 0 is `reinforce_elbo`.

    d: draws of log pi_theta(y|x) / pi_ref(y|x) on masks that both share; the estimate is their mean
    over R.
    scope: rows that share a centre: "batch" (all), "none" (no centring), or an id a row (prompt
    groups).
    residual: "shared" multiplies the estimate with itself, so its expectation carries lam/2 grad
    Var[estimate], Var[d]/R
        for independent replicates, beside the gradient of the true square; "leave_one_out" weighs
        each replicate by the others' estimate, which is unbiased when replicates are independent
        and needs R >= 2.
    The log's sign_flips is the share of rows with A != 0 whose weight A - lam d_hat has the other
    sign.
    """
    if lam < 0:
        raise ValueError(f"lam must be >= 0, not {lam}: a negative one pushes away from the target")
    if residual == "leave_one_out":
        if len(d) < 2:
            raise ValueError(
                "residual='leave_one_out' needs at least 2 replicates: raise views, or take a design of several"
            )
        estimate = (d.sum(0) - d) / (len(d) - 1)
    elif residual == "shared":
        estimate = d.mean(0).expand_as(d)
    else:
        raise ValueError(f"residual must be 'shared' or 'leave_one_out', not {residual!r}")
    weight = (advantage - lam * (estimate - centre(estimate, scope))).detach()
    d_hat = d - centre(d, scope).detach()
    told = advantage != 0
    flipped = ((weight.mean(0) * advantage < 0).sum() / told.sum().clamp(min=1)).item()
    return Loss(
        -(weight * d_hat).mean(),
        {"weight_rms": weight.mean(0).square().mean().sqrt().item(), "sign_flips": flipped},
    )


def reinforce_elbo(score: Float[Tensor, "R B"], advantage: Float[Tensor, " B"]) -> Loss:
    """-mean A score: advantage-weighted ELBO ascent, the gradient of `rspo` at lam = 0 (the
    reference drops out).
    """
    return Loss(
        -(advantage * score).mean(),
        {"weight_rms": advantage.square().mean().sqrt().item(), "sign_flips": 0.0},
    )


def _rspo(config, score, reference, advantage) -> Loss:
    d = score - reference if config.use_reference else score
    return rspo(d, advantage, lam=config.lam, scope=config.scope_of(d), residual=config.residual)


def _reinforce_elbo(config, score, reference, advantage) -> Loss:
    return reinforce_elbo(score, advantage)


# name: recipe(config, score, reference, advantage) of a training run; score has the gradient, both
# are (R, B) in the config's unit
RECIPES = {"rspo": _rspo, "reinforce_elbo": _reinforce_elbo}


def centre(d: Float[Tensor, "R B"], scope) -> Float[Tensor, "R B"]:
    """The mean of d over the rows of its scope, for every row."""
    if isinstance(scope, str):
        if scope not in ("batch", "none"):
            raise ValueError(f"scope must be 'batch', 'none' or an id a row, not {scope!r}")
        return d.mean(1, keepdim=True).expand_as(d) if scope == "batch" else torch.zeros_like(d)
    size = torch.bincount(scope).to(d)
    total = d.new_zeros(len(d), len(size)).index_add(1, scope, d)
    return (total / size.clamp(min=1))[:, scope]
