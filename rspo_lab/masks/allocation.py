"""How many views each completion gets, and masks with a number of views per completion.

Shapes: M masked views, B sequences, L completion tokens; u = valid tokens of a row.  Nats.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rspo_lab.masks.base import Masks
from rspo_lab.masks.designs import design


def drawn(
    name_of: Callable[[int], str],
    valid: Bool[Tensor, "B L"],
    views: Int[Tensor, " B"],
    *,
    generator: torch.Generator,
) -> Masks:
    """Masks with a number of views of its own for every row, of the design that `name_of` gives for
    it; as unbiased as that.

    One replicate: rows have different numbers of them, so each row's mean over its own is folded
    into the weights.
    """
    parts = []
    for k in views.unique().tolist():
        rows = (views == k).nonzero()[:, 0]
        parts.append((rows, design(name_of(k))(valid[rows], k, generator=generator)))
    most = max(len(masks.replicate) for _, masks in parts)
    hidden = torch.zeros(most, *valid.shape, dtype=torch.bool)
    scored, weight = hidden.clone(), torch.zeros(most, len(valid), dtype=torch.float64)
    for rows, masks in parts:
        n = len(masks.replicate)
        hidden[:n, rows], scored[:n, rows], weight[:n, rows] = (
            masks.hidden,
            masks.counted,
            masks.weight / masks.replicates,
        )
    return Masks(
        hidden,
        weight,
        torch.zeros(most, dtype=torch.long),
        None if torch.equal(hidden, scored) else scored,
    )


def common(
    name: str,
    valid: Bool[Tensor, "B L"],
    views: int,
    together: Int[Tensor, " B"],
    *,
    generator: torch.Generator,
) -> Masks:
    """Masks of a design that are the same for all rows of one id in `together` whose valid tokens
    stand in the same places.
    """
    patterns, which = torch.cat([together[:, None], valid.long()], 1).unique(
        dim=0, return_inverse=True
    )
    return design(name)(patterns[:, 1:].bool(), views, generator=generator).rows(which)


def allocate(scale: Float[Tensor, " B"], views: int) -> Int[Tensor, " B"]:
    """Views for every sequence: `views` on average, at least 1 each, in proportion to `scale` where
    that is more than 1.

    Minimises sum(scale^2 / views), the noise of a sum whose terms have standard deviation `scale`
    on one view (Neyman allocation with a floor).  Unbiased if the scale does not depend on the
    masks that are then drawn.
    """
    total, left, share = (
        views * len(scale),
        scale.double().clamp(min=0),
        torch.zeros(len(scale), dtype=torch.float64),
    )
    above = left > 0
    while above.any():  # give in proportion, then take out those that would get less than their 1
        share = torch.where(above, (total - (~above).sum()) * left / left[above].sum(), 1.0)
        if not (low := above & (share < 1)).any():
            break
        above = above & ~low
    share = share if above.any() else torch.full_like(share, float(views))
    whole = share.floor().clamp(min=1)
    rest = int(total - whole.sum())
    whole[(share - whole).argsort(descending=True, stable=True)[:rest]] += 1
    return whole.long()
