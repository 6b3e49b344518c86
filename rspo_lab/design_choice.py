"""The choice of a mask design and of a number of views, from the noise of measured completions.

Shapes: n pairs of views, B sequences; l hidden tokens of a view, u valid tokens of a row.  Nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rspo_lab.batch import Batch
from rspo_lab.estimators import log_ratio_draws
from rspo_lab.masks.base import Masks, count_masks, random_order, spread_levels

DEFAULT = "bsc(0.5, 0.5)"  # the design where nothing is measured yet
DEFAULT_VIEWS = 4
MOST_VIEWS = 32  # that `recommend_design` asks for


@dataclass(frozen=True)
class CountProfile:
    """How the noise of one view of a log-ratio depends on how many tokens it hides.

    size: l; the geometric mean of a bin of sizes.  sd: nats, of u/l g(S) within a size, over all
    completions.  pairs: pairs of views that it was measured on, in proportion to how often `count`
    draws such sizes.  signal: nats^2, the variance of the ELBO ratio between the (distinct)
    completions.
    """

    size: list[float]
    sd: list[float]
    pairs: list[int]
    signal: float


@torch.no_grad()
def count_profile(
    policy: Callable,
    reference: Callable,
    batch: Batch,
    *,
    pairs: int,
    generator: torch.Generator,
    slice_size: int | None = None,
) -> CountProfile:
    """The profile of d from `pairs` (even) pairs of views per sequence.

    The views of a pair hide as many tokens, drawn independently: half the squared difference of a
    pair is free of what differs between sizes.  Sizes are spread evenly over 1..u, apart for each
    half of the pairs, so that the product of the halves' means is free of noise.  From 8 on, sizes
    share bins [2^i, 2^(i+1)).
    """
    if pairs < 2 or pairs % 2:
        raise ValueError(
            f"a profile compares two halves of its pairs: pairs must be even, not {pairs}"
        )
    draws_of = partial(log_ratio_draws, policy, reference, batch, slice_size=slice_size)
    valid = batch.valid.cpu()
    halves = [_pairs_of_views(draws_of, valid, pairs // 2, generator) for _ in range(2)]
    size = torch.cat([size for size, _, _ in halves])
    variance = torch.cat([(first - second).square() / 2 for _, first, second in halves])
    one, other = ((first + second).mean(0) / 2 for _, first, second in halves)
    signal = ((one - one.mean()) * (other - other.mean())).sum().item() / max(len(batch) - 1, 1)
    bins = _bins(size, valid.sum(1))
    members = [bins == n for n in bins[bins > 0].unique()]
    return CountProfile(
        size=[size[here].double().log().mean().exp().item() for here in members],
        sd=[variance[here].mean().sqrt().item() for here in members],
        pairs=[int(here.sum()) for here in members],
        signal=max(signal, 0.0),
    )


def _pairs_of_views(
    draws_of: Callable[[Masks], Tensor],
    valid: Bool[Tensor, "B L"],
    pairs: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "n B"], Float[Tensor, "n B"], Float[Tensor, "n B"]]:
    """(sizes, the first views' draws, the second views' draws) of pairs at evenly spread sizes."""
    level = spread_levels(valid, pairs, generator)
    draws = []
    for _ in range(2):
        order = random_order(valid.expand(pairs, -1, -1), generator)
        masks = count_masks(valid, valid.sum(1), level, order, torch.arange(pairs))
        draws.append(draws_of(masks).double().cpu())
    return masks.hidden.sum(-1), *draws


def _bins(size: Int[Tensor, "n B"], used: Int[Tensor, " B"]) -> Int[Tensor, "n B"]:
    """The least size of each size's bin; 0 where all tokens are hidden: nothing is drawn."""
    least = torch.where(size < 8, size, 2 ** size.double().log2().floor().long())
    return least.where(size < used, 0)


def recommend_design(profile: CountProfile | None, views: int = 0) -> tuple[str, int]:
    """(design, views) for completions of that profile; `views` as given unless 0.

    Design: sizes cost the least noise when drawn as often as sd(l) says (Neyman), so `bsc(alpha,
    0.5)` with alpha the negative slope of log sd over log l, from 0 to 1.  Without a profile, or
    where d has no spread yet, it is 0.5.
    Views: the smallest power of two up to 32 at which mask noise, (mean sd over sizes)^2 / views,
    is no more than the variance between completions: a reliability of one half.
    """
    if profile is None:
        return DEFAULT, views or DEFAULT_VIEWS
    return _design_for(profile), views or _views_for(profile)


def _views_for(profile: CountProfile) -> int:
    weighted = sum(n * sd for n, sd in zip(profile.pairs, profile.sd))
    noise = (weighted / max(sum(profile.pairs), 1)) ** 2
    views = 1
    while views < MOST_VIEWS and noise / views > profile.signal:
        views *= 2
    return views


def _design_for(profile: CountProfile) -> str:
    points = [
        (math.log(size), math.log(sd), n)
        for size, sd, n in zip(profile.size, profile.sd, profile.pairs)
        if sd > 0
    ]
    if len(points) < 2:
        return DEFAULT
    x, y, weight = torch.tensor(points, dtype=torch.float64).T
    away = x - (weight * x).sum() / weight.sum()
    slope = (weight * away * y).sum() / (weight * away.square()).sum()
    alpha = min(max(-slope.item(), 0.0), 1.0)
    return f"bsc({alpha:.2f}, 0.5)"
