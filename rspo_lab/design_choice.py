"""Which mask design, and how many views, for completions whose noise was measured.

Shapes: B sequences; l hidden tokens of a view.  Nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rspo_lab.batch import Batch
from rspo_lab.estimators import log_ratio_draws
from rspo_lab.masks.base import count_masks, random_order, spread_levels

MOST_VIEWS = 32  # that `recommend_design` asks for


@dataclass(frozen=True)
class CountProfile:
    """How the noise of one view of a log-ratio depends on how many tokens it hides."""

    size: list[float]  # l; the geometric mean of a bin of sizes
    sd: list[float]  # nats: of u/l g(S) within a size, over all completions
    pairs: list[
        int
    ]  # pairs of views that it was measured on, in proportion to how often `count` draws such sizes
    signal: float  # nats^2: variance of the ELBO ratio between the (distinct) completions


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
    """The profile of d from `pairs` (even) pairs of views a sequence; the views of a pair hide as
    many tokens, drawn independently.

    Half the squared difference of a pair is free of what differs between sizes.  Sizes are spread
    evenly over 1..u, apart for each half of the pairs, so that the product of the halves' means is
    free of noise.  From 8 on, sizes share bins [2^i, 2^(i+1)).
    """
    if pairs < 2 or pairs % 2:
        raise ValueError(
            f"a profile compares two halves of its pairs: pairs must be even, not {pairs}"
        )
    valid, means, sizes, halves = batch.valid.cpu(), [], [], []
    used = valid.sum(1)
    for _ in range(2):
        level, values = spread_levels(valid, pairs // 2, generator), []
        for _ in range(2):
            masks = count_masks(
                valid,
                used,
                level,
                random_order(valid.expand(pairs // 2, -1, -1), generator),
                torch.arange(pairs // 2),
            )
            values.append(
                log_ratio_draws(policy, reference, batch, masks, slice_size=slice_size)
                .double()
                .cpu()
            )
        sizes.append(masks.hidden.sum(-1))
        halves.append((values[0] - values[1]).square() / 2)
        means.append((values[0] + values[1]).mean(0) / 2)
    size, half = torch.cat(sizes), torch.cat(halves)
    bins = torch.where(size < 8, size, 2 ** size.double().log2().floor().long()).where(
        size < used, 0
    )  # all hidden: nothing to draw
    found = [bins == n for n in bins[bins > 0].unique()]
    a, b = (mean - mean.mean() for mean in means)
    return CountProfile(
        size=[size[here].double().log().mean().exp().item() for here in found],
        sd=[half[here].mean().sqrt().item() for here in found],
        pairs=[int(here.sum()) for here in found],
        signal=max((a * b).sum().item() / max(len(batch) - 1, 1), 0.0),
    )


def recommend_design(profile: CountProfile | None, views: int = 0) -> tuple[str, int]:
    """(design, views) for completions of that profile; `views` as given unless 0.  None, no profile
    yet: bsc(0.5, 0.5), 4 views.

    Design: sizes cost the least noise when drawn as often as sd(l) says (Neyman), so `bsc(alpha,
    0.5)` with alpha the negative slope of log sd over log l, from 0 to 1, or 0.5 where d has no
    spread yet.
    Views: the smallest power of two up to 32 at which mask noise, (mean sd over sizes)^2 / views,
    is no more than the variance
    between completions: a reliability of one half.
    """
    if profile is None:
        return "bsc(0.5, 0.5)", views or 4
    if not views:
        noise = (
            sum(n * sd for n, sd in zip(profile.pairs, profile.sd)) / max(sum(profile.pairs), 1)
        ) ** 2
        views = 1
        while views < MOST_VIEWS and noise / views > profile.signal:
            views *= 2
    seen = [
        (math.log(size), math.log(sd), n)
        for size, sd, n in zip(profile.size, profile.sd, profile.pairs)
        if sd > 0
    ]
    if len(seen) < 2:
        return "bsc(0.5, 0.5)", views
    x, y, weight = torch.tensor(seen, dtype=torch.float64).T
    away = x - (weight * x).sum() / weight.sum()
    slope = (weight * away * y).sum() / (weight * away.square()).sum()
    return f"bsc({min(max(-slope.item(), 0.0), 1.0):.2f}, 0.5)", views
