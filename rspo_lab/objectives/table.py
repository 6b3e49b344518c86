"""The table of methods: each an objective, and what goes with it by default."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from inspect import Parameter, signature

from rspo_lab.objectives.contract import Loss
from rspo_lab.objectives.ratio import diffu_grpo, espo
from rspo_lab.objectives.weighted import (
    damped_negatives,
    positives_only,
    reinforce,
    reinforce_kl,
    rft,
    rspo,
    wd1,
)


@dataclass(frozen=True)
class Method:
    """One row of the table of methods: an objective, and what goes with it by default.

    loss: a function `name(evidence, *, hyperparameters...) -> Loss`; rows may share one.
        Keyword-only arguments that are named like a field of the training configuration (lam,
        scope, score_unit ...) get that field's value; the others are the method's own and have a
        default.
    """

    loss: Callable[..., Loss]
    advantage: str = "standardized"  # a name of advantages.ADVANTAGES
    design: str = "count"  # a name of masks.DESIGNS or masks.path.PATH_DESIGNS
    views: int = 2  # masked views per distinct completion; 1 for designs without randomness
    inner_steps: int = 1  # updates on one rollout
    branches: int = 0  # completions from one random state of every rollout, for `process_reward`
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
    "rspo_path": Method(rspo, design="path", views=1),
    "reinforce_elbo": Method(reinforce),
    "reinforce_path": Method(reinforce, design="path", views=1),
    "positives_only": Method(positives_only),
    "damped_negatives": Method(damped_negatives),
    "rft": Method(rft),
    "reinforce_kl": Method(reinforce_kl),
    "diffu_grpo": Method(
        diffu_grpo, advantage="mean_centred", design="one_step", views=1, inner_steps=8, old=True
    ),
    "wd1": Method(
        wd1,
        advantage="mean_centred",
        design="one_step",
        views=1,
        inner_steps=8,
        reference=False,
    ),
    "espo": Method(
        espo, advantage="leave_one_out", design="coupled", views=4, inner_steps=8, old=True
    ),
}
