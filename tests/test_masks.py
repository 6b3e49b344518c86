"""Every design against the inclusion identity: the total weight that each hidden set S gets is 1 / (l C(u, l)).

Exact: a design reads its generator only through torch.rand, so replacing that by a grid of levels and by every order of the
tokens runs the design's own code over its whole support.
"""

import itertools
import math
from collections import defaultdict

import pytest
import torch

from rspo_lab import masks as masks_module
from rspo_lab.masks import DESIGNS, count, coupled, systematic, t_redraw

U = 4
SUBSETS = [s for n in range(1, U + 1) for s in itertools.combinations(range(U), n)]
ORDERS = torch.tensor(list(itertools.permutations(range(U))))


def support(design, views, monkeypatch, cells):
    """{S: expected weight of S} summed over level cells (midpoints) and all token orders of one view at a time.

    Views differ only in level, and each view's order is uniform by itself, so by linearity one order serves all views.
    """
    draws = []
    for cell in range(cells):
        draws += [((cell + 0.5) / cells, order) for order in ORDERS]
    level = torch.tensor([d[0] for d in draws], dtype=torch.float64)
    order = torch.stack([d[1] for d in draws]).double() / U

    def uniform(shape, generator):
        return level.expand(shape) if len(shape) == 2 else order.expand(shape)

    monkeypatch.setattr(masks_module, "_uniform", uniform)
    masks = design(torch.ones(len(draws), U, dtype=torch.bool), views, generator=torch.Generator())
    total = defaultdict(float)
    for view in range(len(masks.hidden)):
        for row in range(len(draws)):
            chosen = tuple(masks.hidden[view, row].nonzero()[:, 0].tolist())
            total[chosen] += masks.weight[view, row].item() / len(draws) / masks.replicates
    return total


@pytest.mark.parametrize(
    "design, views, cells", [(count, 1, U), (count, 3, U), (systematic, 3, 3 * U), (systematic, 4, U), (coupled, 2, U + 1)]
)
def test_unbiased_over_the_exact_support(design, views, cells, monkeypatch):
    """With levels on a grid that every count boundary falls on, the sum over cells is the exact expectation."""
    total = support(design, views, monkeypatch, cells)
    for s in SUBSETS:
        assert total[s] == pytest.approx(1 / (len(s) * math.comb(U, len(s))), abs=1e-12)


def test_t_redraw_is_biased_by_exactly_one_over_u():
    """Given its size l a non-empty view has E[1/t | l] = (u+1)/l, and l is uniform on 1..u: the mean is ELBO (u+1)/u."""
    level = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    for size in range(1, U + 1):
        law = level**size * (1 - level) ** (U - size)
        assert ((law / level).sum() / law.sum()).item() == pytest.approx((U + 1) / size, rel=1e-4)
        assert (law.mean() * math.comb(U, size)).item() == pytest.approx(1 / (U + 1), rel=1e-4)
    masks = t_redraw(torch.ones(200_000, U, dtype=torch.bool), 1, generator=torch.Generator().manual_seed(0))
    size = masks.hidden[0].sum(-1)
    for n in range(2, U + 1):  # at size 1 the weight has no variance to speak of a standard error
        drawn = masks.weight[0][size == n]
        assert abs(drawn.mean().item() - (U + 1) / n) < 5 * drawn.std().item() / len(drawn) ** 0.5


@pytest.mark.parametrize("name", DESIGNS)
def test_draws_follow_the_law_of_each_set(name):
    """Row by row: sizes are uniform and, given the size, every subset is equally likely (chi-square, 99.99 %)."""
    rows = 40_000
    masks = DESIGNS[name](torch.ones(rows, U, dtype=torch.bool), 2, generator=torch.Generator().manual_seed(1))
    for view in masks.hidden:
        code = (view * 2 ** torch.arange(U)).sum(-1)
        seen = torch.bincount(code, minlength=2**U).double()
        law = torch.zeros(2**U, dtype=torch.float64)
        sizes = U + 1 if name == "coupled" else U
        law[0] = 1 / sizes if name == "coupled" else 0
        for s in SUBSETS:
            law[sum(2**i for i in s)] = 1 / (sizes * math.comb(U, len(s)))
        used = law > 0
        assert seen[~used].sum() == 0
        chi2 = ((seen - rows * law)[used] ** 2 / (rows * law)[used]).sum().item()
        assert chi2 < 47  # 15 degrees of freedom at most


@pytest.mark.parametrize("name", DESIGNS)
def test_only_valid_tokens_are_hidden_and_the_global_generator_is_untouched(name):
    valid = torch.tensor([[True, True, False, True, False, False], [True] * 6, [False, True, False, False, False, False]])
    before = torch.random.get_rng_state()
    masks = DESIGNS[name](valid, 4, generator=torch.Generator().manual_seed(0))
    again = DESIGNS[name](valid, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not (masks.hidden & ~valid).any()
    assert torch.equal(masks.hidden, again.hidden) and torch.equal(masks.weight, again.weight)
    assert masks.weight.dtype == torch.float64 and (masks.weight[~masks.hidden.any(-1)] == 0).all()
    assert masks.forward_passes == pytest.approx(masks.hidden.any(-1).double().sum().item() / 3)


def test_systematic_counts_are_spread():
    masks = systematic(torch.ones(50, 8, dtype=torch.bool), 4, generator=torch.Generator().manual_seed(0))
    sizes = masks.hidden.sum(-1).sort(0).values
    assert ((sizes[1:] - sizes[:-1]) == 2).all() and masks.replicates == 1


def test_coupled_views_are_complements():
    valid = torch.tensor([[True] * 5 + [False]])
    masks = coupled(valid, 4, generator=torch.Generator().manual_seed(0))
    assert ((masks.hidden[0::2] ^ masks.hidden[1::2]) == valid).all() and masks.replicate.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["count", "coupled", "t_redraw"])
def test_replicates_are_drawn_independently(name):
    """The sizes of two replicates' first views are uncorrelated over rows (4 standard errors)."""
    masks = DESIGNS[name](torch.ones(20_000, 6, dtype=torch.bool), 4, generator=torch.Generator().manual_seed(0))
    first, second = (masks.hidden[(masks.replicate == r).nonzero()[0, 0]].sum(-1).double() for r in (0, 1))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 4 / 20_000**0.5


def test_weights_of_t_redraw_are_one_over_its_level():
    """A level in (0, 1) gives weights above 1; given one hidden token of 4, P(t < 1/2 | l = 1) = 13/16 (Beta(2, 4))."""
    masks = t_redraw(torch.ones(100_000, U, dtype=torch.bool), 1, generator=torch.Generator().manual_seed(0))
    weight = masks.weight[0][masks.hidden[0].sum(-1) == 1]
    share = (weight > 2).double().mean().item()
    assert (masks.weight > 1).all() and abs(share - 13 / 16) < 4 * (13 / 16 * 3 / 16 / len(weight)) ** 0.5


def test_bad_input_is_refused():
    valid = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="even"):
        coupled(valid, 3, generator=torch.Generator())
    with pytest.raises(ValueError, match="at least 1 view"):
        count(valid, 0, generator=torch.Generator())
    with pytest.raises(ValueError, match="row 1 has no valid token"):
        count(torch.tensor([[True], [False]]), 1, generator=torch.Generator())
