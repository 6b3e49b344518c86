"""Mask designs: which completion tokens are hidden in each view, and the weights that make the views an ELBO estimate.

Shapes: M = masked views, R = replicates, B = sequences, L = completion tokens; u = valid tokens of a row.  Nats.

ELBO(y|x) = E_l[(u/l) E_S[g(S)]], l ~ U{1..u}, S a uniform l-subset of the valid tokens, g(S) = sum over S of
log q(y_i | x, y without S)  (LLaDA, arXiv:2502.09992, Eq. 6; any-order form, arXiv:2110.02037).  A design is unbiased
for it iff for every non-empty S:  E[sum over views of one replicate of weight * 1(hidden = S)] = 1 / (l C(u, l)).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """A design's draw.  ELBO estimate of a replicate = sum over its views of weight * (sum of hidden token log-probs)."""

    hidden: Bool[Tensor, "M B L"]  # an empty view costs no forward
    weight: Float[Tensor, "M B"]  # float64, on the CPU like all of a draw
    replicate: Int[Tensor, " M"]  # views of one id form a self-contained estimate; the estimate is the mean over ids

    @property
    def replicates(self) -> int:
        """R, the number of self-contained estimates."""
        return int(self.replicate.max()) + 1

    @property
    def forward_passes(self) -> float:
        """Mean number of non-empty views a sequence, the cost of scoring it once."""
        return self.hidden.any(-1).sum().item() / self.hidden.shape[1]

    def rows(self, index) -> "Masks":
        """The same draw for the sequences `index` only."""
        return Masks(self.hidden[:, index], self.weight[:, index], self.replicate)


def count(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """l ~ U{1..u}, then a uniform l-subset; weight u/l; each view a replicate.  Unbiased.  (LLaDA, arXiv:2502.09992)

    The same law as the mean log-prob over masked tokens times u with t ~ U(0,1) and empty masks redrawn together with t,
    which is how we read RSPO's estimator (arXiv:2605.10218).
    """
    used = _tokens(valid, views)
    level = _uniform((views, len(valid)), generator)
    return _count(valid, used, level, _order(valid, views, generator), torch.arange(views))


def systematic(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Counts at evenly spaced levels with one random start; weight u/(l views); all views one replicate.  Unbiased.

    The low-discrepancy sampler of MDLM (arXiv:2406.07524) on counts; the views of a sequence are dependent.
    """
    used = _tokens(valid, views)
    start = _uniform((1, len(valid)), generator)
    level = (start + torch.arange(views, dtype=torch.float64)[:, None] / views) % 1
    order = _order(valid, views, generator)
    return _count(valid, used, level, order, torch.zeros(views, dtype=torch.long))


def coupled(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Complementary pairs: l ~ U{0..u}, an l-subset and its complement, weights (u+1)/(2 size).  Unbiased.

    A pair is a replicate, so `views` must be even.  (ESPO, arXiv:2512.03759; each pair with its own l)
    """
    if views % 2:
        raise ValueError(f"coupled masks come in pairs: views must be even, not {views}")
    used = _tokens(valid, views)
    level = _uniform((views // 2, len(valid)), generator)
    hidden = _order(valid, views // 2, generator) < _floor(level * (used + 1), used)[..., None]
    hidden = torch.stack([hidden & valid, ~hidden & valid], 1).flatten(0, 1)
    size = hidden.sum(-1)
    weight = (used + 1.0).double() / (2 * size.clamp(min=1)) * (size > 0)
    return Masks(hidden, weight, torch.arange(views // 2).repeat_interleave(2))


def t_redraw(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """t ~ U(0,1), each token hidden with probability t, weight 1/t; an empty view is redrawn together with its t.

    The continuous-time form (MDLM, arXiv:2406.07524, Eq. 10), a baseline only.  BIASED: its mean is ELBO (u+1)/u; and of
    infinite variance, because single hidden tokens come with E[1/t^2 | l=1] infinite.
    """
    _tokens(valid, views)
    shape = (views, *valid.shape)
    level, coin = _uniform(shape[:2], generator), _uniform(shape, generator)
    while (empty := ~((coin < level[..., None]) & valid).any(-1)).any():
        level[empty] = _uniform((int(empty.sum()),), generator)
        coin[empty] = _uniform((int(empty.sum()), valid.shape[1]), generator)
    hidden = (coin < level[..., None]) & valid
    return Masks(hidden, 1 / level, torch.arange(views))


DESIGNS = {"count": count, "systematic": systematic, "coupled": coupled, "t_redraw": t_redraw}


def _count(valid, used, level, order, replicate) -> Masks:
    """Views with count 1 + floor(level u), level in [0, 1), hiding the tokens that come first in `order`."""
    size = 1 + _floor(level * used, used - 1)
    views_each = len(replicate) / (int(replicate.max()) + 1)
    return Masks((order < size[..., None]) & valid, used.double() / (size * views_each), replicate)


def _tokens(valid, views) -> Int[Tensor, " B"]:
    """u of every row; refuses what no design can mask."""
    if views < 1:
        raise ValueError(f"a design needs at least 1 view, not {views}")
    used = valid.sum(-1)
    if (used == 0).any():
        raise ValueError(f"row {int((used == 0).nonzero()[0])} has no valid token to hide: drop it from the batch")
    return used


def _floor(value: Tensor, most: Tensor) -> Tensor:
    """floor as ids, at most `most` (guards against a product that rounds up to the next integer)."""
    return torch.minimum(value.floor().long(), most)


def _order(valid, views, generator) -> Int[Tensor, "M B L"]:
    """A uniform random order of each row's valid tokens, one a view: ranks 0..u-1; other positions come after."""
    key = _uniform((views, *valid.shape), generator).masked_fill(~valid, 2.0)
    return key.argsort(-1).argsort(-1)


def _uniform(shape, generator) -> Float[Tensor, "..."]:
    return torch.rand(shape, generator=generator, dtype=torch.float64)
