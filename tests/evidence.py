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


def toy(seed=0, *, spread=0.3) -> Evidence:
    """Four completions of two prompts, of 3, 2, 3 and 1 valid tokens, on four views in two
    replicates; the third view scores fewer tokens than it hides, the fourth is empty in the last
    row.

    spread: how far the policy is from `old` and from the reference per token, nats.
    """
    draw = torch.Generator().manual_seed(seed)
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 1, 0]]).bool()
    hidden = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 0, 1]]).bool()[:, None] & valid
    scored = hidden.clone()
    scored[2, 0, 0] = False
    weight = 0.5 + torch.rand((4, 4), generator=draw, dtype=torch.float64)
    policy, reference, old = torch.randn((3, 4, 4, 3), generator=draw, dtype=torch.float64)
    policy = (-policy.abs()).where(scored, 0.0)
    return Evidence(
        policy=policy.requires_grad_(),
        reference=(policy.detach() + spread * reference).where(scored, 0.0),
        old=(policy.detach() + spread * old).where(scored, 0.0),
        masks=Masks(hidden, weight * hidden.any(-1), torch.tensor([0, 0, 1, 1]), scored),
        advantage=torch.tensor([1.2, -0.7, 0.4, -1.1], dtype=torch.float64),
        reward=torch.tensor([1.0, 0.0, 1.0, 0.25], dtype=torch.float64),
        group=torch.tensor([0, 0, 3, 3]),
        valid=valid,
    )


def slope(loss, e: Evidence) -> torch.Tensor:
    """The derivative of a loss by every token log-prob of the policy."""
    return torch.autograd.grad(loss.value, e.policy)[0]


def slope_of_draws(e: Evidence, by_row) -> torch.Tensor:
    """The derivative of a loss that is `by_row` (B,) by the mean over replicates of the ELBO."""
    return by_row[:, None] * e.masks.weight[..., None] / 2 * e.masks.scored


def sums(e: Evidence, token_logp) -> list[float]:
    """The mean over the two replicates of a row's weighted sum of scored log-probs, by loops."""
    total = [0.0] * 4
    for view, row, token in e.masks.scored.nonzero().tolist():
        weight = e.masks.weight[view, row].item()
        total[row] += weight * token_logp[view, row, token].item() / 2
    return total
