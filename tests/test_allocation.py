"""Which views: numbers per row, allocation against a search, profiles and what they
recommend.
"""

import itertools
import math

import pytest
import torch

from rspo_lab.batch import Batch
from rspo_lab.design_choice import CountProfile, count_profile, recommend_design
from rspo_lab.estimators import elbo_draws
from rspo_lab.masks.allocation import allocate, drawn
from rspo_lab.masks.designs import design
from rspo_lab.oracle import exact_elbo, subset_tables


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "name", ["count", "systematic", "bsc(0.5, 0.5)", "cycle", "t_iid", "spg_block(2)"]
)
def test_rows_with_their_own_number_of_views_are_the_design_row_by_row(name):
    """Each row's views hide and weigh as that design does with that many views: the law of (size,
    weight) agrees.
    """
    valid = torch.ones(4000, 5, dtype=torch.bool)
    views = torch.tensor([1, 3]).repeat(2000)
    masks = drawn(lambda k: name, valid, views, generator=seeded())
    assert masks.replicates == 1
    for k in (1, 3):
        rows = views == k
        other = design(name)(valid[rows], k, generator=seeded(9))
        ours = (masks.weight[:, rows] * masks.counted[:, rows].sum(-1)).sum(0)
        theirs = (other.weight * other.counted.sum(-1)).sum(0) / other.replicates
        assert (
            masks.hidden[:, rows].any(-1).sum(0).double().mean() - other.forward_passes
        ).abs() < 0.1
        error = ((ours.var() + theirs.var()) / 2000).sqrt()
        assert abs(ours.mean() - theirs.mean()) <= 5 * error + 1e-9


def test_own_numbers_of_views_are_unbiased(small):
    """Mean over many draws against the exact ELBO, for rows of 1, 2 and 5 views."""
    n = 3000
    repeated = small.batch.rows(torch.arange(3).repeat_interleave(n))
    views = torch.tensor([1, 2, 5]).repeat_interleave(n)
    for name in ("count", "bsc(1, 0.5)", "cycle"):
        masks = drawn({1: name, 2: name, 5: name}.get, repeated.valid, views, generator=seeded(1))
        with torch.no_grad():
            draws = elbo_draws(small.policy, repeated, masks).view(3, n)
        error = draws.std(1) / n**0.5
        assert (
            (draws.mean(1) - exact_elbo(small.policy, small.batch)).abs() < 4.5 * error + 1e-9
        ).all(), name


@pytest.mark.parametrize(
    "scale",
    [
        [1.0, 1.0, 1.0],
        [3.0, 1.0, 0.2],
        [10.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [5.0, 4.9, 0.1],
        [1e-12, 1.0, 7.0],
    ],
)
def test_allocation_against_every_other(scale):
    """Of all integers >= 1 with that sum, none makes sum(scale^2 / views) much smaller (rounding
    alone may lose a little).
    """
    scale = torch.tensor(scale)
    found = allocate(scale, 4)
    assert found.sum() == 12 and found.min() >= 1
    best = min(
        sum(s**2 / k for s, k in zip(scale.tolist(), views))
        for views in itertools.product(range(1, 11), repeat=3)
        if sum(views) == 12
    )
    assert (scale.square() / found).sum().item() <= 1.05 * best + 1e-9


def test_allocation_of_many_rows_meets_the_budget_exactly():
    scale = torch.rand(1000, generator=seeded()).pow(6)
    found = allocate(scale, 3)
    assert found.sum() == 3000 and found.min() == 1 and (found[scale.argsort()].diff() >= -1).all()


def test_profile_is_the_exact_spread_within_a_size(small):
    """sd(l) from pairs against the tables: the variance of u/l g(S) over the l-subsets, mean over
    sequences.
    """
    with torch.no_grad():
        tables = [
            a - b
            for a, b in zip(
                subset_tables(small.policy, small.batch),
                subset_tables(small.reference, small.batch),
            )
        ]
    profile = count_profile(
        small.policy, small.reference, small.batch, pairs=6000, generator=seeded(2)
    )
    exact = {}
    for table in tables:
        tokens = table.shape[1]
        size = (torch.arange(2**tokens)[:, None] >> torch.arange(tokens) & 1).sum(1)
        for n in range(1, tokens):
            exact.setdefault(n, []).append(
                ((table.sum(1)[size == n] * tokens / n).var(correction=0).item(), 1 / tokens)
            )
    for n, sd in zip(profile.size, profile.sd):  # a size is drawn with chance 1/u
        variance = sum(v * chance for v, chance in exact[round(n)]) / sum(
            chance for _, chance in exact[round(n)]
        )
        assert sd == pytest.approx(math.sqrt(variance), rel=0.06)
    values = torch.stack(
        [exact_elbo(small.policy, small.batch) - exact_elbo(small.reference, small.batch)]
    )
    assert profile.signal == pytest.approx(values.var().item(), rel=0.1)


def test_profile_of_long_completions_has_bins():
    denoiser = lambda batch, hidden: torch.zeros(hidden.shape, dtype=torch.float64)  # noqa: E731
    completion = torch.zeros(2, 40, dtype=torch.long)
    batch = Batch(
        completion[:, :1],
        torch.ones(2, 1, dtype=torch.bool),
        completion,
        torch.ones(2, 40, dtype=torch.bool),
    )
    profile = count_profile(denoiser, denoiser, batch, pairs=400, generator=seeded())
    means = [
        math.exp(sum(math.log(n) for n in part) / len(part))
        for part in (range(8, 16), range(16, 32), range(32, 40))
    ]
    assert (
        profile.size == pytest.approx([1, 2, 3, 4, 5, 6, 7, *means])
        and set(profile.sd) == {0.0}
        and profile.signal == 0
    )
    assert profile.pairs == [20] * 7 + [
        160,
        320,
        160,
    ]  # two completions, 400 pairs over 40 sizes; those of all 40 tokens say nothing


def law(alpha, signal=1.0, scale=1.0):
    sizes = [float(n) for n in range(1, 8)]
    return CountProfile(sizes, [scale * n**-alpha for n in sizes], [5] * 7, signal)


def test_recommendation_follows_the_profile():
    assert recommend_design(None) == ("bsc(0.5, 0.5)", 4)
    assert recommend_design(law(0.73), 4) == ("bsc(0.73, 0.5)", 4)
    assert (
        recommend_design(law(-1.0), 4)[0] == "bsc(0.00, 0.5)"
        and recommend_design(law(3.0), 4)[0] == "bsc(1.00, 0.5)"
    )
    assert (
        recommend_design(CountProfile([1.0, 2.0], [0.0, 0.0], [1, 1], 0.0), 4)[0] == "bsc(0.5, 0.5)"
    )


def test_recommended_views_reach_a_reliability_of_one_half():
    """sd 3 at every size and a signal of variance 1: noise 9 / 16 is the first power of two below
    it.
    """
    assert recommend_design(law(0.0, signal=1.0, scale=3.0))[1] == 16
    assert recommend_design(law(0.0, signal=1.0, scale=1.0))[1] == 1
    assert recommend_design(law(0.0, signal=0.0))[1] == 32


def test_bins_count_as_often_as_their_sizes_are_drawn():
    """sd 1/l up to 7, then one bin of eight sizes: the mean sd is over sizes, the slope through the
    bins' mean sizes is -1.
    """
    sizes = [*map(float, range(1, 8)), 11.0]
    binned = CountProfile(sizes, [1 / n for n in sizes], [2] * 7 + [16], 0.06)
    mean = sum(2 / n for n in range(1, 8)) / 30 + 16 / 11 / 30
    assert (
        recommend_design(binned) == ("bsc(1.00, 0.5)", 1)
        and mean**2 < 0.06 < (sum(binned.sd) / 8) ** 2
    )
    kinked = CountProfile([1.0, 2.0, 4.0], [1.0, 0.5, 0.5], [1, 1, 1000], 1.0)
    assert (
        recommend_design(kinked, 4)[0]
        != recommend_design(CountProfile([1.0, 2.0, 4.0], [1.0, 0.5, 0.5], [1, 1, 1], 1.0), 4)[0]
    )


def test_signal_is_free_of_what_differs_between_sizes():
    """d of every completion is 0 on average and depends on the size alone: there is no signal, on
    average over profiles.
    """

    def effect(batch, hidden):
        size = hidden.sum(1, keepdim=True).double()
        return torch.where(hidden, (size - 3) / 5, 0.0)

    zero = lambda batch, hidden: torch.zeros(hidden.shape, dtype=torch.float64)  # noqa: E731
    completion = torch.zeros(40, 5, dtype=torch.long)
    batch = Batch(
        completion[:, :1],
        torch.ones(40, 1, dtype=torch.bool),
        completion,
        torch.ones(40, 5, dtype=torch.bool),
    )
    found = torch.tensor(
        [
            count_profile(effect, zero, batch, pairs=2, generator=seeded(i)).signal
            for i in range(200)
        ]
    )
    assert found.mean() < 0.3  # var of d by size is 2; the clamp at 0 leaves 0.13
    with pytest.raises(ValueError, match="must be even"):
        count_profile(effect, zero, batch, pairs=3, generator=seeded())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_recommendation_is_a_design(alpha):
    name, views = recommend_design(law(alpha), 4)
    assert (
        len(design(name)(torch.ones(2, 8, dtype=torch.bool), views, generator=seeded()).hidden) == 4
    )
