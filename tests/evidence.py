"""Evidence made by hand, for tests of objectives."""

import torch

from rspo_lab.masks.base import Masks
from rspo_lab.objectives import Evidence


def evidence_of_draws(draws, advantage, *, reference=None, old=None, group=None, **more):
    """Evidence whose views hide one token each, whose log-prob is the draw (R, B) of the ELBO."""
    replicates, rows = draws.shape
    hidden = torch.ones(replicates, rows, 1, dtype=torch.bool)
    weight = torch.ones(replicates, rows, dtype=torch.float64)
    masks = Masks(hidden, weight, torch.arange(replicates))
    zero = torch.zeros_like(draws.detach())
    return Evidence(
        policy=draws[..., None],
        reference=(zero if reference is None else reference)[..., None],
        old=(draws.detach() if old is None else old)[..., None],
        masks=masks,
        advantage=advantage,
        reward=torch.zeros_like(advantage),
        group=torch.zeros(rows, dtype=torch.long) if group is None else group,
        valid=torch.ones(rows, 1, dtype=torch.bool),
        **more,
    )
