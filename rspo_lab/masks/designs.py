"""Mask designs: which completion tokens are hidden in each view, and the weights that make the
views an ELBO estimate.

Shapes: M = masked views, R = replicates, B = sequences, L = completion tokens; u = valid tokens of
a row.  Nats.

ELBO(y|x) = E_l[(u/l) E_S[g(S)]], l ~ U{1..u}, S a uniform l-subset of the valid tokens, g(S) = sum
over S of log q(y_i | x, y without S)  (LLaDA, arXiv:2502.09992, Eq. 6; any-order form,
arXiv:2110.02037).  A design is unbiased for it iff for every non-empty S:  E[sum over views of one
replicate of weight * 1(hidden = S)] = 1 / (l C(u, l)). A design of equal views relabelled by a
uniform order of the tokens needs only the right law of its sizes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature

import numpy as np
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

    def rows(self, index) -> "Masks":
        """The same draw for the sequences `index` only."""
        return Masks(
            self.hidden[:, index],
            self.weight[:, index],
            self.replicate,
            None if self.scored is None else self.scored[:, index],
        )


def design(name: str) -> Callable[..., Masks]:
    """The design of that name, with its parameters if it has any: "count", "bsc", "bsc(1, 0.5)",
    "cyck(3)".
    """
    found = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", name)
    if not found or (made := DESIGNS.get(found[1])) is None:
        raise ValueError(f"design must be one of {', '.join(DESIGNS)}, not {name!r}")
    if found[2] is None:
        return made
    takes = [
        p
        for p in signature(made).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name != "generator"
    ]
    words, names = found[2].split(",") if found[2].strip() else [], [p.name for p in takes]
    try:
        values = {p.name: type(p.default)(word) for p, word in zip(takes, words, strict=True)}
    except ValueError:
        raise ValueError(
            f"design {name!r}: {found[1]} takes {len(names)} numbers ({', '.join(names) or 'none'})"
        ) from None
    return partial(made, **values)


def count(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """l ~ U{1..u}, then a uniform l-subset; weight u/l; each view a replicate.  Unbiased.  (LLaDA,
    arXiv:2502.09992)

    The same law as the mean log-prob over masked tokens times u with t ~ U(0,1) and empty masks
    redrawn together with t, which is how we read RSPO's estimator (arXiv:2605.10218).
    """
    used = _tokens(valid, views)
    level = _uniform((views, len(valid)), generator)
    return count_masks(
        valid,
        used,
        level,
        random_order(valid.expand(views, -1, -1), generator),
        torch.arange(views),
    )


def systematic(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Counts at evenly spaced levels with one random start; weight u/(l views); all views one
    replicate.  Unbiased.

    The low-discrepancy sampler of MDLM (arXiv:2406.07524) on counts; the views of a sequence are
    dependent.
    """
    used, level = _tokens(valid, views), spread_levels(valid, views, generator)
    return count_masks(
        valid,
        used,
        level,
        random_order(valid.expand(views, -1, -1), generator),
        torch.zeros(views, dtype=torch.long),
    )


def coupled(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Complementary pairs: l ~ U{0..u}, an l-subset and its complement, weights (u+1)/(2 size).
    Unbiased.

    A pair is a replicate, so `views` must be even.  (ESPO, arXiv:2512.03759; each pair with its own
    l)
    """
    if views % 2:
        raise ValueError(f"coupled masks come in pairs: views must be even, not {views}")
    used = _tokens(valid, views)
    level = _uniform((views // 2, len(valid)), generator)
    hidden = (
        random_order(valid.expand(views // 2, -1, -1), generator)
        < _floor(level * (used + 1), used)[..., None]
    )
    hidden = torch.stack([hidden & valid, ~hidden & valid], 1).flatten(0, 1)
    size = hidden.sum(-1)
    weight = (used + 1.0).double() / (2 * size.clamp(min=1)) * (size > 0)
    return Masks(hidden, weight, torch.arange(views // 2).repeat_interleave(2))


def t_iid(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """t ~ U(0,1), each token hidden with probability t, weight 1/t; an empty view scores 0.
    Unbiased, of infinite variance.

    The continuous-time form (MDLM, arXiv:2406.07524, Eq. 10), a baseline only: E[1/t^2 | l=1]
    diverges.
    """
    _tokens(valid, views)
    level, coin = (
        _uniform((views, len(valid)), generator),
        _uniform((views, *valid.shape), generator),
    )
    hidden = (coin < level[..., None]) & valid
    return Masks(hidden, (1 / level).where(hidden.any(-1), 0.0), torch.arange(views))


def t_redraw(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """t ~ U(0,1), each token hidden with probability t, weight 1/t; an empty view is redrawn
    together with its t.

    The continuous-time form (MDLM, arXiv:2406.07524, Eq. 10), a baseline only.  BIASED: its mean is
    ELBO (u+1)/u; and of infinite variance, because single hidden tokens come with E[1/t^2 | l=1]
    infinite.
    """
    _tokens(valid, views)
    shape = (views, *valid.shape)
    level, coin = _uniform(shape[:2], generator), _uniform(shape, generator)
    while (empty := ~((coin < level[..., None]) & valid).any(-1)).any():
        level[empty] = _uniform((int(empty.sum()),), generator)
        coin[empty] = _uniform((int(empty.sum()), valid.shape[1]), generator)
    hidden = (coin < level[..., None]) & valid
    return Masks(hidden, 1 / level, torch.arange(views))


def nested(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Systematic counts whose views hide prefixes of ONE random order; weight u/(l views); one
    replicate.  Unbiased.

    A baseline: the views overlap as much as they can, so more of them soon stop to help.
    """
    used, level = _tokens(valid, views), spread_levels(valid, views, generator)
    return count_masks(
        valid,
        used,
        level,
        random_order(valid[None], generator),
        torch.zeros(views, dtype=torch.long),
    )


def gauss(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Gauss-Legendre nodes t of (0, 1) with weights w/t, each token hidden with probability t; one
    replicate.

    E[g(M)]/t is a polynomial of degree u-1 in t, so the rule is exact, and the design unbiased, if
    2 views >= u; with fewer views it is BIASED.  (GDPO, arXiv:2510.08554)
    """
    _tokens(valid, views)
    node, rule = (torch.from_numpy(x)[:, None] for x in np.polynomial.legendre.leggauss(views))
    level = (node + 1) / 2
    hidden = (_uniform((views, *valid.shape), generator) < level[..., None]) & valid
    return Masks(hidden, rule / 2 / level * hidden.any(-1), torch.zeros(views, dtype=torch.long))


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
    used = _tokens(valid, views)
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
    step, blur = weight[..., None] ** gamma, 0.3 * _uniform((views, *valid.shape), generator)
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


def one_step(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """Everything hidden at once, weight 1: one forward, no noise.  BIASED: no token sees another.
    (d1, arXiv:2504.12216)
    """
    _tokens(valid, views, most=1.0)
    return Masks(
        valid[None].clone(),
        torch.ones(1, len(valid), dtype=torch.float64),
        torch.zeros(1, dtype=torch.long),
    )


def left_to_right(valid: Bool[Tensor, "B L"], views: int, *, generator: torch.Generator) -> Masks:
    """The chain rule from left to right: u views, each scores its first hidden token.  Another
    target: log p in that order.

    No noise, at the cost of u forwards.  (JustGRPO, arXiv:2601.15165)
    """
    used = _tokens(valid, views, most=1.0)
    place = (valid.cumsum(1) - 1).masked_fill(~valid, -1)
    step = torch.arange(int(used.max()))[:, None, None]
    hidden = place >= step
    weight = hidden.any(-1).double()
    return Masks(hidden, weight, torch.zeros(len(step), dtype=torch.long), place == step)


def spg_block(
    valid: Bool[Tensor, "B L"], views: int, *, block: int = 32, generator: torch.Generator
) -> Masks:
    """A random block of the valid tokens in order: earlier ones visible, later ones hidden and not
    scored, `count` inside it.

    Weight (blocks) (tokens of the block) / l.  Another target, unbiased for it: the ELBO of
    decoding block by block; all is `count` if one block holds everything, and `left_to_right` in
    expectation for blocks of 1.  (SPG, arXiv:2510.09541, block-wise masking)
    """
    if block < 1:
        raise ValueError(f"spg_block needs blocks of at least 1 token, not {block}")
    used = _tokens(valid, views)
    place = (valid.cumsum(1) - 1).div(block, rounding_mode="floor").masked_fill(~valid, -1)
    blocks = (used + block - 1) // block
    chosen = _floor(_uniform((views, len(valid)), generator) * blocks, blocks - 1)
    tokens = (here := place == chosen[..., None]).sum(-1)
    size = 1 + _floor(_uniform((views, len(valid)), generator) * tokens, tokens - 1)
    scored = here & (random_order(here, generator) < size[..., None])
    return Masks(
        scored | (place > chosen[..., None]),
        blocks * tokens / size.double(),
        torch.arange(views),
        scored,
    )


DESIGNS: dict[str, Callable[..., Masks]] = {
    "count": count,
    "systematic": systematic,
    "coupled": coupled,
    "nested": nested,
    "bsc": bsc,
    "cycle": cycle,
    "cyck": cyck,
    "gauss": gauss,
    "t_iid": t_iid,
    "t_redraw": t_redraw,
    "one_step": one_step,
    "left_to_right": left_to_right,
    "spg_block": spg_block,
}


def count_masks(valid, used, level, order, replicate) -> Masks:
    """Views with count 1 + floor(level u), level in [0, 1), hiding the tokens that come first in
    `order`.
    """
    size = 1 + _floor(level * used, used - 1)
    views_each = len(replicate) / (int(replicate.max()) + 1)
    return Masks((order < size[..., None]) & valid, used.double() / (size * views_each), replicate)


def spread_levels(valid, views, generator) -> Float[Tensor, "M B"]:
    """Levels in [0, 1) at equal distances from one random start a row."""
    start = _uniform((1, len(valid)), generator)
    return (start + torch.arange(views, dtype=torch.float64)[:, None] / views) % 1


def _cycles(valid, permutations, generator) -> Bool[Tensor, "J C B L"]:
    """The cycles of random permutations of each row's valid tokens as hidden sets; those of fewer
    than C end with empty ones.

    A uniform order of the tokens is cut by stick-breaking: a cycle takes U{1..rest} of the tokens
    that are left.
    """
    left = _tokens(valid, permutations).expand(permutations, -1)
    level, order = (
        _uniform((permutations, *valid.shape), generator),
        random_order(valid.expand(permutations, -1, -1), generator),
    )
    start, cycles = torch.zeros_like(left), []
    for i in range(int(left.max())):
        size = (1 + _floor(level[..., i] * left, left - 1)) * (left > 0)
        cycles.append((order >= start[..., None]) & (order < (start + size)[..., None]))
        start, left = start + size, left - size
    hidden = torch.stack(cycles, 1) & valid
    return hidden[:, : int(hidden.any(-1).sum(1).max())]


def _tokens(valid, views, most: float = torch.inf) -> Int[Tensor, " B"]:
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


def _floor(value: Tensor, most: Tensor) -> Tensor:
    """floor as ids, at most `most` (guards against a product that rounds up to the next integer)."""
    return torch.minimum(value.floor().long(), most)


def random_order(valid: Bool[Tensor, "M B L"], generator) -> Int[Tensor, "M B L"]:
    """A uniform random order of the valid tokens of each view: ranks 0..u-1; other positions come
    after.
    """
    return _uniform(valid.shape, generator).masked_fill(~valid, 2.0).argsort(-1).argsort(-1)


def _uniform(shape, generator) -> Float[Tensor, "..."]:
    return torch.rand(shape, generator=generator, dtype=torch.float64)
