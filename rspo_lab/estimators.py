"""Monte-Carlo draws of the ELBO and of the log-ratio of a masked diffusion model; the replicate
axis is kept.

Shapes: M masked views, R replicates, B sequences, L completion tokens.  Nats, summed over tokens.

A denoiser is any callable `denoiser(batch, hidden) -> token_logp` (B, L): log q(y_i | x, y without
the hidden tokens) at the hidden positions, anything finite elsewhere.  It sees a `Batch` and a bool
(B, L) and nothing of the estimator.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rspo_lab.batch import Batch
from rspo_lab.masks.base import Masks

Denoiser = Callable[[Batch, Bool[Tensor, "B L"]], Float[Tensor, "B L"]]


def elbo_draws(
    denoiser: Denoiser, batch: Batch, masks: Masks, *, slice_size: int | None = None
) -> Float[Tensor, "R B"]:
    """One ELBO estimate a replicate and sequence; their mean over R is the estimate, their spread
    its noise.

    Empty views are skipped.  At most `slice_size` masked sequences go through the denoiser at once
    (all, if None).
    """
    return sum(elbo_slices(denoiser, batch, masks, slice_size=slice_size))


def elbo_slices(
    denoiser: Denoiser, batch: Batch, masks: Masks, *, slice_size: int | None = None
) -> Iterator[Tensor]:
    """The terms whose sum is `elbo_draws`, one a forward, so that a caller can back-propagate each
    and drop its graph.
    """
    view, row = masks.hidden.any(-1).nonzero(as_tuple=True)
    device = batch.completion.device
    for part in torch.arange(len(view)).split(slice_size or max(len(view), 1)):
        v, b = view[part], row[part]
        hidden = masks.hidden[v, b].to(device)
        token_logp = denoiser(batch.rows(b.to(device)), hidden)
        counted = masks.counted[v, b].to(device)
        term = token_logp.where(counted, 0.0).sum(-1) * masks.weight[v, b].to(token_logp)
        cell = (masks.replicate[v] * len(batch) + b).to(device)
        draws = term.new_zeros(masks.replicates * len(batch)).index_add(0, cell, term)
        yield draws.view(masks.replicates, len(batch))


def log_ratio_draws(
    policy: Denoiser,
    reference: Denoiser,
    batch: Batch,
    masks: Masks,
    *,
    slice_size: int | None = None,
) -> Float[Tensor, "R B"]:
    """Draws of ELBO_policy - ELBO_reference on the SAME masks (common random numbers); gradient
    through the policy only.

    The relative score of RSPO (arXiv:2605.10218); shared masks as in VRPO (arXiv:2505.19223).
    """
    with torch.no_grad():
        baseline = elbo_draws(reference, batch, masks, slice_size=slice_size)
    return elbo_draws(policy, batch, masks, slice_size=slice_size) - baseline


def two_level_baseline(
    old: Denoiser,
    batch: Batch,
    masks: Masks,
    ratio: Float[Tensor, " B"],
    *,
    slice_size: int | None = None,
) -> Float[Tensor, "R B"]:
    """What to take from a policy's draws on `masks` to have d = (policy - old) on `masks` + (old -
    reference) on many others.

    ratio: the mean of log_ratio_draws(old, reference, ...) on those others, computed once for all
    updates on the completions that `old` made.  Unbiased for d if the designs are for their scores.
    At the old policy itself d is `ratio` alone; with `masks` drawn independently of it the shared
    residual of RSPO is then unbiased too.
    """
    with torch.no_grad():
        return elbo_draws(old, batch, masks, slice_size=slice_size) - ratio


def level_control(
    draws: Float[Tensor, "R B"], masks: Masks, valid: Bool[Tensor, "B L"], level: float
) -> Float[Tensor, "R B"]:
    """Draws of a score less level * (weight given to tokens - its expectation u): the same mean for
    unbiased designs, less noise.

    level: nats a token, typically the mean so far; it must not depend on these masks.  Designs
    whose weights always sum to u (count, systematic, nested, cycle) are left as they are; bsc with
    alpha > 0, coupled and the 1/t forms gain.
    """
    covered = masks.counted.sum(-1) * masks.weight
    total = covered.new_zeros(masks.replicates, covered.shape[1]).index_add(
        0, masks.replicate, covered
    )
    return draws - level * (total - valid.sum(-1).cpu()).to(draws)


def eubo(
    denoiser: Denoiser, batch: Batch, masks: Masks, *, beta: float, slice_size: int | None = None
) -> Float[Tensor, " B"]:
    """(1/beta) sum_i log E_S[q(y_i | x, y without S)^beta | i in S], from all views: an evidence
    upper bound, nats.

    Plug-in: the mean over S is that of the weights of the views that score i, and the logarithm of
    a mean is biased down; a token that no view scores adds 0, which is a large upward bias with few
    views.  Both vanish with more.  By Hölder's inequality the exact value is at least the
    random-order log p if beta >= u, and it is never below the ELBO; for smaller beta it can be
    below log p.  All views share a graph.  (SPG, arXiv:2510.09541)
    """
    view, row = masks.hidden.any(-1).nonzero(as_tuple=True)
    device, (rows, length) = batch.completion.device, batch.completion.shape
    cells, terms, weights = [], [], []
    for part in torch.arange(len(view)).split(slice_size or max(len(view), 1)):
        v, b = view[part], row[part]
        token_logp = denoiser(batch.rows(b.to(device)), masks.hidden[v, b].to(device)).double()
        n, token = masks.counted[v, b].nonzero(as_tuple=True)
        cells.append((b[n] * length + token).to(device))
        weights.append(masks.weight[v, b][n].to(device))
        terms.append(weights[-1].log() + beta * token_logp[n.to(device), token.to(device)])
    cell, term, weight = torch.cat(cells), torch.cat(terms), torch.cat(weights)
    none = term.new_zeros(rows * length)
    top = none.scatter_reduce(0, cell, term.detach(), "amax", include_self=False)
    power, total = (
        none.index_add(0, cell, (term - top[cell]).exp()),
        none.index_add(0, cell, weight),
    )
    mean = power.where(total > 0, 1.0).log() + top - total.where(total > 0, 1.0).log()
    return mean.view(rows, length).sum(-1) / beta
