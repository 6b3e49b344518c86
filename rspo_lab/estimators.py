"""Monte-Carlo draws of the ELBO and of the log-ratio of a masked diffusion model; the replicate axis is kept.

Shapes: M masked views, R replicates, B sequences, L completion tokens.  Nats, summed over tokens.

A denoiser is any callable `denoiser(batch, hidden) -> token_logp` (B, L): log q(y_i | x, y without the hidden tokens) at
the hidden positions, anything finite elsewhere.  It sees a `Batch` and a bool (B, L) and nothing of the estimator.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rspo_lab.batch import Batch
from rspo_lab.masks import Masks

Denoiser = Callable[[Batch, Bool[Tensor, "B L"]], Float[Tensor, "B L"]]


def elbo_draws(denoiser: Denoiser, batch: Batch, masks: Masks, *, slice_size: int | None = None) -> Float[Tensor, "R B"]:
    """One ELBO estimate a replicate and sequence; their mean over R is the estimate, their spread its noise.

    Empty views are skipped.  At most `slice_size` masked sequences go through the denoiser at once (all, if None).
    """
    return sum(elbo_slices(denoiser, batch, masks, slice_size=slice_size))


def elbo_slices(denoiser: Denoiser, batch: Batch, masks: Masks, *, slice_size: int | None = None) -> Iterator[Tensor]:
    """The terms whose sum is `elbo_draws`, one a forward, so that a caller can back-propagate each and drop its graph."""
    view, row = masks.hidden.any(-1).nonzero(as_tuple=True)
    device = batch.completion.device
    for part in torch.arange(len(view)).split(slice_size or max(len(view), 1)):
        v, b = view[part], row[part]
        hidden = masks.hidden[v, b].to(device)
        token_logp = denoiser(batch.rows(b.to(device)), hidden)
        term = token_logp.where(hidden, 0.0).sum(-1) * masks.weight[v, b].to(token_logp)
        cell = (masks.replicate[v] * len(batch) + b).to(device)
        draws = term.new_zeros(masks.replicates * len(batch)).index_add(0, cell, term)
        yield draws.view(masks.replicates, len(batch))


def log_ratio_draws(
    policy: Denoiser, reference: Denoiser, batch: Batch, masks: Masks, *, slice_size: int | None = None
) -> Float[Tensor, "R B"]:
    """Draws of ELBO_policy - ELBO_reference on the SAME masks (common random numbers); gradient through the policy only.

    The relative score of RSPO (arXiv:2605.10218); shared masks as in VRPO (arXiv:2505.19223).
    """
    with torch.no_grad():
        baseline = elbo_draws(reference, batch, masks, slice_size=slice_size)
    return elbo_draws(policy, batch, masks, slice_size=slice_size) - baseline
