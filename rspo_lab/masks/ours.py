"""Mask designs of this project."""

import torch
from jaxtyping import Bool, Float, Int
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
    """Balanced systematic counts: sizes spread evenly over the law q(l) ~ l^-alpha, tokens hidden
    in turn.  Unbiased.  (ours)

    From the largest view to the smallest, each hides the tokens with the least load so far, where a
    view adds weight^gamma to the load of what it hides (gamma = 0: how often it is hidden, 1: its
    weights), blurred by up to 0.3 of that so that many views do not repeat a few sets.  Tokens are
    then relabelled at random, so no rule can bias.  weight 1/(l q(l) views); one replicate.
    """
    if not (abs(alpha) <= 4 and abs(gamma) <= 4):
        raise ValueError(
            f"bsc takes exponents from -4 to 4, not {alpha} and {gamma}: "
            "larger ones starve whole sizes"
        )
    used = used_tokens(valid, views)
    law = _power_law(used, valid.shape[1], alpha)
    size = _spread_sizes(law, used, spread_levels(valid, views, generator))
    weight = 1 / (size * law.gather(1, size.T - 1).T * views)
    blur = 0.3 * uniform((views, *valid.shape), generator)
    hidden = _hide_in_turn(size, weight**gamma, used, blur)
    label = random_order(valid[None], generator).expand(views, *valid.shape)
    return Masks(hidden.gather(2, label) & valid, weight, torch.zeros(views, dtype=torch.long))


def _power_law(used: Int[Tensor, " B"], length: int, alpha: float) -> Float[Tensor, "B L"]:
    """q(l) ~ l^-alpha over the sizes l = 1..u of each row, 0 beyond."""
    sizes = torch.arange(1, length + 1, dtype=torch.float64)
    unnormalized = (sizes**-alpha).where(sizes <= used[:, None], 0.0)
    return torch.nn.functional.normalize(unnormalized, p=1, dim=1)


def _spread_sizes(
    law: Float[Tensor, "B L"], used: Int[Tensor, " B"], level: Float[Tensor, "M B"]
) -> Int[Tensor, "M B"]:
    """The sizes of each row's views, quantiles of its law at the levels, the largest first."""
    size = 1 + torch.searchsorted(law.cumsum(1), level.T.contiguous(), right=True).T
    return torch.minimum(size, used).sort(0, descending=True).values


def _hide_in_turn(
    size: Int[Tensor, "M B"],
    step: Float[Tensor, "M B"],
    used: Int[Tensor, " B"],
    blur: Float[Tensor, "M B L"],
) -> Bool[Tensor, "M B L"]:
    """Each view hides the `size` least loaded of the first u places, and adds `step` to their load.

    blur: in steps, added to the loads as they are compared.
    """
    place = torch.arange(blur.shape[-1])
    load = torch.zeros(blur.shape[1:], dtype=torch.float64)
    load = load.masked_fill(place >= used[:, None], torch.inf)
    hidden = []
    for tokens, added, noise in zip(size[..., None], step[..., None], blur):
        rank = (load + noise * added).argsort(dim=1).argsort(1)
        hidden.append(rank < tokens)
        load = load + hidden[-1] * added
    return torch.stack(hidden)


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
    """`cycle` at k forwards at most: the k-1 largest cycles, and all others merged.  (ours)

    `views` is a multiple of k; each k views are a replicate, of weight 1.  BIASED unless u <= k:
    merged tokens see fewer of each other.
    """
    if k < 1 or views % k:
        raise ValueError(
            f"cyck({k}) draws {k} views together: views must be a multiple of k >= 1, not {views}"
        )
    hidden = _cycles(valid, views // k, generator)
    largest = hidden.sum(-1).argsort(dim=1, descending=True, stable=True)[:, : k - 1]
    kept = hidden.gather(1, largest[..., None].expand(*largest.shape, hidden.shape[-1]))
    rest = valid & ~kept.any(1)
    hidden = torch.cat([kept, rest[:, None]], 1)
    replicate = torch.arange(len(hidden)).repeat_interleave(hidden.shape[1])
    return Masks(hidden.flatten(0, 1), hidden.any(-1).flatten(0, 1).double(), replicate)


def _cycles(
    valid: Bool[Tensor, "B L"], permutations: int, generator: torch.Generator
) -> Bool[Tensor, "J C B L"]:
    """The cycles of J random permutations of each row's valid tokens, as hidden sets.

    Permutations of fewer than C cycles end with empty sets.  A uniform order of the tokens is cut
    by stick-breaking: a cycle takes U{1..rest} of the tokens that are left.
    """
    left = used_tokens(valid, permutations).expand(permutations, -1)
    level = uniform((permutations, *valid.shape), generator)
    order = random_order(valid.expand(permutations, -1, -1), generator)
    start = torch.zeros_like(left)
    cycles = []
    for i in range(int(left.max())):
        size = (1 + floor_ids(level[..., i] * left, left - 1)) * (left > 0)
        cycles.append((order >= start[..., None]) & (order < (start + size)[..., None]))
        start = start + size
        left = left - size
    hidden = torch.stack(cycles, 1) & valid
    return hidden[:, : int(hidden.any(-1).sum(1).max())]
