"""Scores of a rollout's own steps that need the model's full conditionals at each state.

Shapes: n states of as many completions, L completion tokens, V vocabulary.  Nats.

A completion y is written along a path, and its likelihood under the sampler is the sum over all
paths to it.  `StepLogp` scores the path.  `StepAgreement` scores y at the states of a path: at each
of them Pr[all that the step keeps are tokens of y], whichever they are, which is close to the
likelihood of y where the model's own path to y is taken (`StepLaw.agreement`).  A path of another
model will not do: where a policy that has become sure writes six tokens at once, its states say
little of how a reference writes them one after the other.  So a log-ratio of two models takes for
each the path of its own: the rollout's for the policy that made it, and for the reference the one
that it would take if its draws were y's tokens (`forced_path`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rspo_lab.batch import Batch
from rspo_lab.estimators import elbo_draws
from rspo_lab.masks.path import path
from rspo_lab.sampler_law import Sampler, StepLaw, step_law


class StepLogp(nn.Module):
    """A denoiser whose token log-probs of a rollout's state sum to that of the step made there.

    That is log Pr[the step writes exactly the tokens that it wrote, at exactly the positions where
    it wrote them]: log pi_T(y_i) at these, and at the other positions it could have written log of
    the chance that their draw is not kept (`sampler_law`).  So the sum over the states of a path is
    the log-probability of the path, whose gradient is an unbiased score of the sampler itself at
    almost every parameter.

    A step that the model could not make (a token of it no longer passes the threshold, or rounding
    says so) counts with its tokens alone: its law is 0, and without a derivative.

    model: has `conditionals`, a module if it is trained.  Batches carry their steps, and hidden
    sets are states of them.
    """

    def __init__(self, model: Any, sampler: Sampler) -> None:
        super().__init__()
        self.model = model
        self.sampler = sampler

    def forward(self, batch: Batch, hidden: Bool[Tensor, "n L"]) -> Float[Tensor, "n L"]:
        """The step's log-prob by position; 0 outside its block and where nothing is hidden."""
        law, written, quota = path_law(self.model, self.sampler, batch, hidden)
        terms = law.kept(written[:, None], quota)[:, 0]
        possible = terms.isfinite().all(1, keepdim=True)
        return torch.where(possible, terms, law.token.where(written, 0.0))

    def exact(self, batch: Batch, hidden: Bool[Tensor, "n L"]) -> Float[Tensor, "n L"]:
        """As `forward`, but -inf in its block for a step that the model could not make."""
        law, written, quota = path_law(self.model, self.sampler, batch, hidden)
        return law.kept(written[:, None], quota)[:, 0]


class StepAgreement(nn.Module):
    """A denoiser whose sum at a rollout's state is log Pr[all that the step keeps are tokens of y].

    The value stands at the first position that the step wrote; other positions hold 0.  It is
    finite wherever a step could write some token of y.  Summed over a path's states it estimates
    the sampler's log-likelihood of y: over the sampler's own paths to y it is at least that on
    average, over paths drawn by their share of the agreement at most.

    model: has `conditionals`, a module if it is trained.  Batches carry their steps, and hidden
    sets are states of them.
    """

    def __init__(self, model: Any, sampler: Sampler) -> None:
        super().__init__()
        self.model = model
        self.sampler = sampler

    def forward(self, batch: Batch, hidden: Bool[Tensor, "n L"]) -> Float[Tensor, "n L"]:
        """The agreement at the first position that the step wrote, 0 elsewhere."""
        law, written, quota = path_law(self.model, self.sampler, batch, hidden)
        first = written & (written.cumsum(1) == 1)
        return law.agreement(quota)[:, None].where(first, 0.0)


@torch.no_grad()
def agreement_log_ratio(
    policy: Any, reference: Any, batch: Batch, sampler: Sampler, *, slice_size: int = 2048
) -> Float[Tensor, " B"]:
    """An estimate of the sampler's log-ratio of policy to reference, each on a path of its own.

    The agreement along the rollout's path under the policy that made it, less that along the
    reference's forced path.  Not unbiased.  batch: the policy's rollouts, which carry their steps.
    """
    if batch.step is None or batch.surprisal is None:
        raise ValueError("agreement needs rollouts that carry their steps")
    written = batch.step >= 0
    distinct, which = batch.distinct()
    masks = path(
        distinct.step.cpu() >= 0,
        distinct.step.cpu(),
        distinct.surprisal.cpu(),
        1,
        generator=torch.Generator(),
    )
    own = elbo_draws(
        StepAgreement(policy, sampler),
        distinct,
        replace(masks, scored=None),
        slice_size=slice_size,
    )
    pathless, same = replace(batch, step=None, surprisal=None, valid=written).distinct()
    _, forced = forced_path(reference, pathless, pathless.valid, sampler, slice_size=slice_size)
    return own.mean(0)[which].double() - forced[same]


def path_law(
    model: Any, sampler: Sampler, batch: Batch, hidden: Bool[Tensor, "n L"]
) -> tuple[StepLaw, Bool[Tensor, "n L"], Int[Tensor, " n"]]:
    """(the law of each state's step, what the step wrote, its quota).

    hidden: states of the batch's own paths.  ValueError for a batch without steps.
    """
    if batch.step is None:
        raise ValueError("the law of a step needs rollouts that carry their steps")
    length = hidden.shape[1]
    never = int(batch.step.max()) + 1
    step = batch.step.masked_fill(~hidden, never).amin(1)
    step = step.where(hidden.any(1), 0)
    written = hidden & (batch.step == step[:, None])
    place = torch.arange(length, device=hidden.device)
    block = place.div(sampler.block, rounding_mode="floor")
    current = step.div(sampler.block_steps(length), rounding_mode="floor")
    open_here = hidden & (block == current[:, None])
    quota = sampler.quotas(batch.step >= 0).gather(0, step[None])[0]
    logp = model.conditionals(batch, hidden)
    return step_law(logp, batch.completion, open_here, sampler), written, quota


@torch.no_grad()
def forced_path(
    model: Any,
    batch: Batch,
    written: Bool[Tensor, "B L"],
    sampler: Sampler,
    *,
    choose: Callable[[StepLaw, Tensor], Tensor] = StepLaw.forced,
    slice_size: int = 2048,
) -> tuple[Int[Tensor, "B L"], Float[Tensor, " B"]]:
    """(the step that writes each token, -1 if it stood there before; the path's agreement, nats).

    The path that the sampler takes if all of its draws are tokens of the completion: teacher
    forcing.  At T = 1 and a threshold of at least 1/2 each step is the likeliest of those that
    write only tokens of y.  One forward per state; they follow each other, so equal rows should be
    given once.

    model: has `conditionals`.  written: the positions that were masked at the start.  choose(law,
    quota): another rule for what a step keeps, bool (n, L).
    """
    blocks = written.shape[1] // sampler.block
    each = sampler.block_steps(written.shape[1])
    quota = sampler.quotas(written)
    place = torch.arange(written.shape[1], device=written.device) // sampler.block
    step = torch.full_like(batch.completion, -1)
    agreement = torch.zeros(len(batch), dtype=torch.float64, device=written.device)
    hidden = written.clone()
    for n in range(blocks * each):
        here = place == n // each
        open_rows = (hidden & here).any(1).nonzero()[:, 0]
        for row in open_rows.split(slice_size) if len(open_rows) else ():
            some = batch.rows(row)
            logp = model.conditionals(some, hidden[row]).double()
            law = step_law(logp, some.completion, hidden[row] & here, sampler)
            kept = choose(law, quota[n, row])
            agreement[row] += law.agreement(quota[n, row])
            step[row] = step[row].masked_fill(kept, n)
            hidden[row] &= ~kept
    return step, agreement
