"""What a draw of a mask design is, and what designs are made of.

Shapes: M = masked views, R = replicates, B = sequences, L = completion tokens; u = valid tokens
of a row.  Nats.

ELBO(y|x) = E_l[(u/l) E_S[g(S)]], l ~ U{1..u}, S a uniform l-subset of the valid tokens, g(S) = sum
over S of log q(y_i | x, y without S)  (LLaDA, arXiv:2502.09992, Eq. 6; any-order form,
arXiv:2110.02037).  A design is unbiased for it iff for every non-empty S:  E[sum over views of one
replicate of weight * 1(hidden = S)] = 1 / (l C(u, l)). A design of equal views relabelled by a
uniform order of the tokens needs only the right law of its sizes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """A design's draw.  Estimate of a replicate = sum over its views of weight * (sum of scored
    token log-probs).
    """

    hidden: Bool[Tensor, "M B L"]  # an empty view costs no forward
    weight: Float[Tensor, "M B"]  # float64, on the CPU like all of a draw
    replicate: Int[
        Tensor, " M"
    ]  # views of one id form a self-contained estimate; the estimate is the mean over ids
    scored: Bool[Tensor, "M B L"] | None = None  # the hidden tokens that count; None: all of them

    @property
    def replicates(self) -> int:
        """R, the number of self-contained estimates."""
        return int(self.replicate.max()) + 1

    @property
    def forward_passes(self) -> float:
        """Mean number of non-empty views a sequence, the cost of scoring it once."""
        return self.hidden.any(-1).sum().item() / self.hidden.shape[1]

    @property
    def counted(self) -> Bool[Tensor, "M B L"]:
        """The tokens whose log-probs enter the estimate."""
        return self.hidden if self.scored is None else self.scored

    def elbo(self, token_logp: Float[Tensor, "M B L"]) -> Float[Tensor, "R B"]:
        """ELBO draws of the views' token log-probs, nats; a gradient flows through them."""
        counted = self.counted.to(token_logp.device)
        term = token_logp.where(counted, 0.0).sum(-1) * self.weight.to(token_logp)
        draws = term.new_zeros(self.replicates, term.shape[1])
        return draws.index_add(0, self.replicate.to(term.device), term)

    def rows(self, index) -> "Masks":
        """The same draw for the sequences `index` only."""
        return Masks(
            self.hidden[:, index],
            self.weight[:, index],
            self.replicate,
            None if self.scored is None else self.scored[:, index],
        )


def count_masks(valid, used, level, order, replicate) -> Masks:
    """Views with count 1 + floor(level u), level in [0, 1), hiding the tokens that come first in
    `order`.
    """
    size = 1 + floor_ids(level * used, used - 1)
    views_each = len(replicate) / (int(replicate.max()) + 1)
    return Masks((order < size[..., None]) & valid, used.double() / (size * views_each), replicate)


def spread_levels(valid, views, generator) -> Float[Tensor, "M B"]:
    """Levels in [0, 1) at equal distances from one random start a row."""
    start = uniform((1, len(valid)), generator)
    return (start + torch.arange(views, dtype=torch.float64)[:, None] / views) % 1


def used_tokens(valid, views, most: float = torch.inf) -> Int[Tensor, " B"]:
    """u of every row; refuses what no design can mask, and more views than one of a design without
    randomness.
    """
    if views > most:
        raise ValueError(
            f"this design draws nothing at random, so more views are the same: views must be {most:.0f}, not {views}"
        )
    if views < 1:
        raise ValueError(f"a design needs at least 1 view, not {views}")
    used = valid.sum(-1)
    if (used == 0).any():
        raise ValueError(
            f"row {int((used == 0).nonzero()[0])} has no valid token to hide: drop it from the batch"
        )
    return used


def floor_ids(value: Tensor, most: Tensor) -> Tensor:
    """floor as ids, at most `most` (guards against a product that rounds up to the next integer)."""
    return torch.minimum(value.floor().long(), most)


def random_order(valid: Bool[Tensor, "M B L"], generator) -> Int[Tensor, "M B L"]:
    """A uniform random order of the valid tokens of each view: ranks 0..u-1; other positions come
    after.
    """
    return uniform(valid.shape, generator).masked_fill(~valid, 2.0).argsort(-1).argsort(-1)


def uniform(shape, generator) -> Float[Tensor, "..."]:
    return torch.rand(shape, generator=generator, dtype=torch.float64)
