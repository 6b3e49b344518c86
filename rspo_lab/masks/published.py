"""Mask designs of the field, each with its source; what is biased says so."""

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from rspo_lab.masks.base import (
    Masks,
    count_masks,
    floor_ids,
    random_order,
    spread_levels,
    uniform,
    used_tokens,
)


def count(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """l ~ U{1..u}, then a uniform l-subset; weight u/l; each view a replicate.  Unbiased.

    (LLaDA, arXiv:2502.09992)  The same law as the mean log-prob over masked tokens times u with t ~
    U(0,1) and empty masks redrawn together with t, which is how we read RSPO's estimator
    (arXiv:2605.10218).
    """
    used = used_tokens(valid, views)
    level = uniform((views, len(valid)), generator)
    order = random_order(valid.expand(views, -1, -1), generator)
    return count_masks(valid, used, level, order, torch.arange(views))


def systematic(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Counts at evenly spaced levels with one random start; weight u/(l views).  Unbiased.

    The low-discrepancy sampler of MDLM (arXiv:2406.07524) on counts.  All views are one replicate:
    those of a sequence are dependent.
    """
    used = used_tokens(valid, views)
    level = spread_levels(valid, views, generator)
    order = random_order(valid.expand(views, -1, -1), generator)
    return count_masks(valid, used, level, order, torch.zeros(views, dtype=torch.long))


def coupled(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Complementary pairs: an l-subset and the rest, l ~ U{0..u}; weight (u+1)/(2 size).  Unbiased.

    A pair is a replicate, so `views` must be even.  (ESPO, arXiv:2512.03759; each pair with its own
    l)
    """
    if views % 2:
        raise ValueError(f"coupled masks come in pairs: views must be even, not {views}")
    used = used_tokens(valid, views)
    level = uniform((views // 2, len(valid)), generator)
    order = random_order(valid.expand(views // 2, -1, -1), generator)
    hidden = order < floor_ids(level * (used + 1), used)[..., None]
    hidden = torch.stack([hidden & valid, ~hidden & valid], 1).flatten(0, 1)
    size = hidden.sum(-1)
    weight = (used + 1.0).double() / (2 * size.clamp(min=1)) * (size > 0)
    return Masks(hidden, weight, torch.arange(views // 2).repeat_interleave(2))


def t_iid(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """t ~ U(0,1), each token hidden with probability t, weight 1/t; an empty view scores 0.

    Unbiased, of infinite variance: E[1/t^2 | l=1] diverges.  The continuous-time form (MDLM,
    arXiv:2406.07524, Eq. 10), a baseline only.
    """
    used_tokens(valid, views)
    level = uniform((views, len(valid)), generator)
    coin = uniform((views, *valid.shape), generator)
    hidden = (coin < level[..., None]) & valid
    return Masks(hidden, (1 / level).where(hidden.any(-1), 0.0), torch.arange(views))


def t_redraw(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """`t_iid` with empty views redrawn together with their t.

    The continuous-time form (MDLM, arXiv:2406.07524, Eq. 10), a baseline only.  BIASED: its mean is
    ELBO (u+1)/u; and of infinite variance, because single hidden tokens come with E[1/t^2 | l=1]
    infinite.
    """
    used_tokens(valid, views)
    level = uniform((views, len(valid)), generator)
    coin = uniform((views, *valid.shape), generator)
    while (empty := ~((coin < level[..., None]) & valid).any(-1)).any():
        level[empty] = uniform((int(empty.sum()),), generator)
        coin[empty] = uniform((int(empty.sum()), valid.shape[1]), generator)
    hidden = (coin < level[..., None]) & valid
    return Masks(hidden, 1 / level, torch.arange(views))


def nested(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """`systematic` whose views hide prefixes of ONE random order; one replicate.  Unbiased.

    A baseline: the views overlap as much as they can, so more of them soon stop to help.
    """
    used = used_tokens(valid, views)
    level = spread_levels(valid, views, generator)
    order = random_order(valid[None], generator)
    return count_masks(valid, used, level, order, torch.zeros(views, dtype=torch.long))


def gauss(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Gauss-Legendre nodes t of (0, 1) with weights w/t, each token hidden with probability t.

    One replicate.  E[g(M)]/t is a polynomial of degree u-1 in t, so the rule is exact, and the
    design unbiased, if 2 views >= u; with fewer views it is BIASED.  (GDPO, arXiv:2510.08554)
    """
    used_tokens(valid, views)
    node, rule = (torch.from_numpy(x)[:, None] for x in np.polynomial.legendre.leggauss(views))
    level = (node + 1) / 2
    hidden = (uniform((views, *valid.shape), generator) < level[..., None]) & valid
    return Masks(hidden, rule / 2 / level * hidden.any(-1), torch.zeros(views, dtype=torch.long))


def one_step(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Everything hidden at once, weight 1: one forward, no noise.  BIASED: no token sees another.

    (d1, arXiv:2504.12216)
    """
    used_tokens(valid, views, most=1.0)
    weight = torch.ones(1, len(valid), dtype=torch.float64)
    return Masks(valid[None].clone(), weight, torch.zeros(1, dtype=torch.long))


def left_to_right(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """The chain rule from left to right: u views, each scores its first hidden token.

    Another target: log p in that order.  No noise, at the cost of u forwards.  (JustGRPO,
    arXiv:2601.15165)
    """
    used = used_tokens(valid, views, most=1.0)
    place = (valid.cumsum(1) - 1).masked_fill(~valid, -1)
    step = torch.arange(int(used.max()))[:, None, None]
    hidden = place >= step
    weight = hidden.any(-1).double()
    return Masks(hidden, weight, torch.zeros(len(step), dtype=torch.long), place == step)


def spg_block(
    valid: Bool[Tensor, "B L"], views: int, *, block: int = 32, generator: torch.Generator
) -> Masks:
    """`count` in a random block of the valid tokens; earlier ones visible, later ones not scored.

    Weight (blocks) (tokens of the block) / l.  Another target, unbiased for it: the ELBO of
    decoding block by block; all is `count` if one block holds everything, and `left_to_right` in
    expectation for blocks of 1.  (SPG, arXiv:2510.09541, block-wise masking)
    """
    if block < 1:
        raise ValueError(f"spg_block needs blocks of at least 1 token, not {block}")
    used = used_tokens(valid, views)
    place = (valid.cumsum(1) - 1).div(block, rounding_mode="floor").masked_fill(~valid, -1)
    blocks = (used + block - 1) // block
    chosen = floor_ids(uniform((views, len(valid)), generator) * blocks, blocks - 1)
    here = place == chosen[..., None]
    tokens = here.sum(-1)
    size = 1 + floor_ids(uniform((views, len(valid)), generator) * tokens, tokens - 1)
    scored = here & (random_order(here, generator) < size[..., None])
    hidden = scored | (place > chosen[..., None])
    return Masks(hidden, blocks * tokens / size.double(), torch.arange(views), scored)
