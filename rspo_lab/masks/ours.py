"""Mask designs of this project."""

import torch
from jaxtyping import Bool
from torch import Tensor

from rspo_lab.masks.base import Masks, floor_ids, random_order, spread_levels, uniform, used_tokens


def bsc(
    valid: Bool[Tensor, "B L"],
    views: int,
    *,
    alpha: float = 0.5,
    gamma: float = 0.5,
    generator: torch.Generator,
) -> Masks:
    """Balanced systematic counts: counts spread evenly over the law q(l) ~ l^-alpha, tokens hidden
    in turn.  Unbiased.

    From the largest view to the smallest, each hides the tokens with the least load so far, where a
    view adds weight^gamma to the load of what it hides (gamma = 0: how often it is hidden, 1: its
    weights), blurred by up to 0.3 of that so that many views do not repeat a few sets.  Tokens are
    then relabelled at random, so no rule can bias.  weight 1/(l q(l) views); one replicate.  (ours)
    """
    if not (abs(alpha) <= 4 and abs(gamma) <= 4):
        raise ValueError(
            f"bsc takes exponents from -4 to 4, not {alpha} and {gamma}: larger ones starve whole sizes"
        )
    used = used_tokens(valid, views)
    sizes = torch.arange(1, valid.shape[1] + 1, dtype=torch.float64)
    law = torch.nn.functional.normalize(
        (sizes**-alpha).where(sizes <= used[:, None], 0.0), p=1, dim=1
    )
    level = spread_levels(valid, views, generator)
    size = 1 + torch.searchsorted(law.cumsum(1), level.T.contiguous(), right=True).T
    size = torch.minimum(size, used).sort(0, descending=True).values
    weight = 1 / (size * law.gather(1, size.T - 1).T * views)
    load, hidden = (
        torch.zeros(valid.shape, dtype=torch.float64).masked_fill(sizes > used[:, None], torch.inf),
        [],
    )
    step, blur = weight[..., None] ** gamma, 0.3 * uniform((views, *valid.shape), generator)
    for k in range(views):
        hidden.append((load + blur[k] * step[k]).argsort(dim=1).argsort(1) < size[k][:, None])
        load = load + hidden[-1] * step[k]
    label = random_order(valid[None], generator).expand(views, *valid.shape)
    return Masks(
        torch.stack(hidden).gather(2, label) & valid, weight, torch.zeros(views, dtype=torch.long)
    )


def cycle(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """The cycles of `views` random permutations: every token hidden once in each, weight 1.
    Unbiased.  (ours)

    A permutation is a replicate of as many views as it has cycles, 1 + 1/2 + ... + 1/u on average.
    The cycle of a token has a length uniform on 1..u and is a uniform set of that length around it.
    """
    hidden = _cycles(valid, views, generator)
    replicate = torch.arange(views).repeat_interleave(hidden.shape[1])
    return Masks(hidden.flatten(0, 1), hidden.any(-1).flatten(0, 1).double(), replicate)


def cyck(
    valid: Bool[Tensor, "B L"], views: int, *, k: int = 4, generator: torch.Generator
) -> Masks:
    """`cycle` at no more than k forwards: the k-1 largest cycles, and all others merged into one
    view; weight 1.  (ours)

    `views` is a multiple of k; each k views are a replicate.  BIASED unless u <= k: merged tokens
    see fewer of each other.
    """
    if k < 1 or views % k:
        raise ValueError(
            f"cyck({k}) makes {k} views at a time: views must be a multiple of k >= 1, not {views}"
        )
    hidden = _cycles(valid, views // k, generator)
    largest = hidden.sum(-1).argsort(dim=1, descending=True, stable=True)[:, : k - 1]
    kept = hidden.gather(1, largest[..., None].expand(*largest.shape, hidden.shape[-1]))
    rest = valid & ~kept.any(1)
    hidden = torch.cat([kept, rest[:, None]], 1)
    replicate = torch.arange(len(hidden)).repeat_interleave(hidden.shape[1])
    return Masks(hidden.flatten(0, 1), hidden.any(-1).flatten(0, 1).double(), replicate)


def _cycles(valid, permutations, generator) -> Bool[Tensor, "J C B L"]:
    """The cycles of random permutations of each row's valid tokens as hidden sets; those of fewer
    than C end with empty ones.

    A uniform order of the tokens is cut by stick-breaking: a cycle takes U{1..rest} of the tokens
    that are left.
    """
    left = used_tokens(valid, permutations).expand(permutations, -1)
    level, order = (
        uniform((permutations, *valid.shape), generator),
        random_order(valid.expand(permutations, -1, -1), generator),
    )
    start, cycles = torch.zeros_like(left), []
    for i in range(int(left.max())):
        size = (1 + floor_ids(level[..., i] * left, left - 1)) * (left > 0)
        cycles.append((order >= start[..., None]) & (order < (start + size)[..., None]))
        start, left = start + size, left - size
    hidden = torch.stack(cycles, 1) & valid
    return hidden[:, : int(hidden.any(-1).sum(1).max())]
