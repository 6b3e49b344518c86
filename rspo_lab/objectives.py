"""Policy objectives: pure functions of what one update has measured, and the table of methods.

Shapes: M masked views, R replicates (self-contained estimates), B completions (group-major), L
completion tokens.  Log-probabilities in nats.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rspo_lab.masks.base import Masks

Scope = Literal["batch", "group", "none"]


@dataclass(frozen=True)
class Evidence:
    """All that an objective may look at: one update's completions, scored on the views of `masks`.

    Token log-probs are log q(y_i | x, y without the view's hidden tokens) at the tokens that the
    view scores, 0 elsewhere; `masks.elbo` turns them into ELBO draws (R, B).
    """

    policy: Float[Tensor, "M B L"]  # the only tensor with a gradient
    reference: Float[Tensor, "M B L"] | None  # the frozen reference on the same views
    old: Float[Tensor, "M B L"] | None  # the policy that made the rollout, on the same views
    masks: Masks
    advantage: Float[Tensor, " B"]
    reward: Float[Tensor, " B"]
    group: Int[Tensor, " B"]  # which prompt a completion answers
    valid: Bool[Tensor, "B L"]
    old_log_ratio: Float[Tensor, " B"] | None = None  # two levels only, see `log_ratio`


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise, and what the training record says of it."""

    value: Float[Tensor, ""]
    log: dict[str, float]


@dataclass(frozen=True)
class RelativeScore:
    """How RSPO reads an update: the one home of target, gap, weight and sign flips."""

    d_hat: Float[Tensor, "R B"]  # centred draws of the log-ratio; a gradient flows through them
    target: Float[Tensor, " B"] | None  # A / lam, nats; None at lam = 0
    weight: Float[Tensor, "R B"]  # A - lam * estimate, without gradient
    flipped: Bool[Tensor, " B"]  # A != 0, and the weight has the other sign

    @property
    def estimate(self) -> Float[Tensor, " B"]:
        """The mean of `d_hat` over its replicates, without gradient."""
        return self.d_hat.detach().mean(0)

    @property
    def gap(self) -> Float[Tensor, " B"] | None:
        """Target less estimate, nats; None at lam = 0."""
        return None if self.target is None else self.target - self.estimate


def relative_score(
    d: Float[Tensor, "R B"],
    advantage: Float[Tensor, " B"],
    *,
    lam: float,
    scope: Scope = "batch",
    group: Int[Tensor, " B"] | None = None,
    residual: Literal["shared", "leave_one_out"] = "shared",
) -> RelativeScore:
    """d_hat = d - sg(mean of d over its scope), target A / lam, weight A - lam * estimate.

    The equation of RSPO (arXiv:2605.10218, Eq. 3.3), and its only home.

    d: draws of log pi_theta(y|x) / pi_ref(y|x), nats, in the unit that lam was chosen for.
    scope: the rows that share a centre: all ("batch"), those of one prompt ("group", which needs
        `group`), or no centring ("none").
    residual: the estimate in the weight is the mean over all replicates ("shared"), or over the
        others than its own ("leave_one_out").

    Raises ValueError for a negative lam, an unknown scope or residual, and for "leave_one_out" of
    a single replicate.
    """
    if lam < 0:
        raise ValueError(f"lam must be >= 0, not {lam}: a negative one pushes away from the target")
    d_hat = d - scope_mean(d, scope, group).detach()
    fixed = d.detach()
    if residual == "shared":
        estimate = fixed.mean(0).expand_as(fixed)
    elif residual != "leave_one_out":
        raise ValueError(f"residual must be 'shared' or 'leave_one_out', not {residual!r}")
    elif len(fixed) < 2:
        raise ValueError(
            "residual='leave_one_out' needs at least 2 replicates: raise views, or take a design "
            "that makes several"
        )
    else:
        estimate = (fixed.sum(0) - fixed) / (len(fixed) - 1)
    weight = advantage - lam * (estimate - scope_mean(estimate, scope, group))
    return RelativeScore(
        d_hat=d_hat,
        target=advantage / lam if lam > 0 else None,
        weight=weight,
        flipped=weight.mean(0) * advantage < 0,
    )


def scope_mean(
    d: Float[Tensor, "R B"], scope: Scope, group: Int[Tensor, " B"] | None = None
) -> Float[Tensor, "R B"]:
    """The mean of d over the rows of its scope, at every row; 0 for the scope "none"."""
    if scope == "none":
        return torch.zeros_like(d)
    if scope == "batch":
        return d.mean(1, keepdim=True).expand_as(d)
    if scope != "group" or group is None:
        raise ValueError(f"scope must be 'batch', 'none', or 'group' with ids, not {scope!r}")
    size = torch.bincount(group).to(d)
    total = d.new_zeros(len(d), len(size)).index_add(1, group, d)
    return (total / size.clamp(min=1))[:, group]


def score(e: Evidence, unit: Literal["sequence", "token"] = "sequence") -> Float[Tensor, "R B"]:
    """Draws of the policy's ELBO, nats: summed over tokens, or ("token") per valid token."""
    return in_unit(e.masks.elbo(e.policy), e.valid, unit)


def log_ratio(e: Evidence, unit: Literal["sequence", "token"] = "sequence") -> Float[Tensor, "R B"]:
    """Draws of d = ELBO_theta - ELBO_ref on shared views, nats; in `unit` as `score`.

    In two levels, d = (ELBO_theta - ELBO_old) on these views + `old_log_ratio`, which is
    ELBO_old - ELBO_ref on many others and the same for all updates on one rollout.
    """
    draws = e.masks.elbo(e.policy)
    if e.old_log_ratio is not None:
        d = draws - (e.masks.elbo(e.old) - e.old_log_ratio)  # pyright: ignore[reportArgumentType]
    else:
        d = draws - e.masks.elbo(e.reference)  # pyright: ignore[reportArgumentType]
    return in_unit(d, e.valid, unit)


def in_unit(
    draws: Float[Tensor, "R B"], valid: Bool[Tensor, "B L"], unit: Literal["sequence", "token"]
) -> Float[Tensor, "R B"]:
    """Summed nats as they are ("sequence"), or divided by the number of valid tokens ("token")."""
    return draws if unit == "sequence" else draws / valid.sum(1).to(draws)


def rspo(
    e: Evidence,
    *,
    lam: float,
    scope: Scope = "batch",
    residual: Literal["shared", "leave_one_out"] = "shared",
    score_unit: Literal["sequence", "token"] = "sequence",
    use_reference: bool = True,  # False: d is the score itself, without a reference
) -> Loss:
    """-mean sg(A - lam d_hat) d_hat, d_hat of `relative_score`.  (RSPO, arXiv:2605.10218, Eq. 3.3)

    Its gradient is that of lam/2 mean (d_hat - A/lam)^2, a centred quadratic penalty beside the
    advantage-weighted score: lam = 0 is `reinforce_elbo`.

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


def reinforce_elbo(e: Evidence, *, score_unit: Literal["sequence", "token"] = "sequence") -> Loss:
    """-mean A score: advantage-weighted ascent of the ELBO, the gradient of `rspo` at lam = 0.

    The raw advantage.  The reference drops out; it is scored for the record only.
    """
    log = {"weight_rms": e.advantage.square().mean().sqrt().item(), "sign_flips": 0.0}
    return Loss(-(e.advantage * score(e, score_unit)).mean(), log)


@dataclass(frozen=True)
class Method:
    """One row of the table of methods: an objective, and what goes with it by default.

    loss: a function `name(evidence, *, hyperparameters...) -> Loss`.  Keyword-only arguments that
    are named like a field of the training configuration (lam, scope, score_unit ...) get that
    field's value; the others are the method's own and have a default.
    """

    loss: Callable[..., Loss]
    advantage: str = "standardized"  # a name of advantages.ADVANTAGES
    design: str = "count"  # a name of masks.DESIGNS
    inner_steps: int = 1  # updates on one rollout
    old: bool = False  # whether the loss looks at the log-probs of the rollout's policy
    reference: bool = True  # whether the frozen reference is scored; without it no d is logged

    @property
    def hyperparameters(self) -> dict[str, Parameter]:
        """The keyword-only arguments of the loss, by name."""
        parameters = signature(self.loss).parameters
        return {name: p for name, p in parameters.items() if p.kind is Parameter.KEYWORD_ONLY}

    def own(self, shared: Collection[str]) -> dict[str, Parameter]:
        """The hyperparameters that are not named like one of `shared`."""
        return {name: p for name, p in self.hyperparameters.items() if name not in shared}


METHODS: dict[str, Method] = {
    "rspo": Method(rspo),
    "reinforce_elbo": Method(reinforce_elbo),
}
