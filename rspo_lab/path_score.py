"""Scores of a rollout's own steps that need the model's full conditionals at each state.

Shapes: n states of as many completions, L completion tokens, V vocabulary.  Nats.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rspo_lab.batch import Batch
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
        law, written, quota = self._law(batch, hidden)
        terms = law.kept(written[:, None], quota)[:, 0]
        possible = terms.isfinite().all(1, keepdim=True)
        return torch.where(possible, terms, law.token.where(written, 0.0))

    def exact(self, batch: Batch, hidden: Bool[Tensor, "n L"]) -> Float[Tensor, "n L"]:
        """As `forward`, but -inf in its block for a step that the model could not make."""
        law, written, quota = self._law(batch, hidden)
        return law.kept(written[:, None], quota)[:, 0]

    def _law(
        self, batch: Batch, hidden: Bool[Tensor, "n L"]
    ) -> tuple[StepLaw, Bool[Tensor, "n L"], Int[Tensor, " n"]]:
        """(the law of each state's step, what it wrote, its quota)."""
        if batch.step is None:
            raise ValueError("the law of a step needs rollouts that carry their steps")
        length = hidden.shape[1]
        never = int(batch.step.max()) + 1
        step = batch.step.masked_fill(~hidden, never).amin(1)
        step = step.where(hidden.any(1), 0)
        written = hidden & (batch.step == step[:, None])
        place = torch.arange(length, device=hidden.device)
        block = place.div(self.sampler.block, rounding_mode="floor")
        current = step.div(self.sampler.block_steps(length), rounding_mode="floor")
        open_here = hidden & (block == current[:, None])
        quota = self.sampler.quotas(batch.step >= 0).gather(0, step[None])[0]
        logp = self.model.conditionals(batch, hidden)
        return step_law(logp, batch.completion, open_here, self.sampler), written, quota
