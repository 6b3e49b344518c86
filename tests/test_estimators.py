"""Draws against the oracle, and the identities that make policy and reference comparable."""

import itertools
import math

import pytest
import torch
from conftest import completions

from rspo_lab.estimators import elbo_draws, log_ratio_draws
from rspo_lab.masks import DESIGNS, Masks, count, coupled
from rspo_lab.oracle import exact_elbo


def count_support(tokens: int) -> tuple[Masks, torch.Tensor]:
    """Every hidden set of the count design as a view of its own, with its probability."""
    subsets = [s for n in range(1, tokens + 1) for s in itertools.combinations(range(tokens), n)]
    hidden = torch.zeros(len(subsets), 1, tokens, dtype=torch.bool)
    for view, s in enumerate(subsets):
        hidden[view, 0, list(s)] = True
    size = hidden.sum(-1).double()
    law = torch.tensor([1 / (tokens * math.comb(tokens, len(s))) for s in subsets], dtype=torch.float64)
    return Masks(hidden, tokens / size, torch.arange(len(subsets))), law


def test_elbo_draws_are_unbiased(small):
    masks, law = count_support(4)
    draws = elbo_draws(small.policy, small.batch.rows([0]), masks)
    exact = exact_elbo(small.policy, small.batch.rows([0]))
    assert torch.allclose((law[:, None] * draws).sum(0), exact, atol=1e-12)


def test_log_ratio_draws_are_unbiased_and_shared(small):
    """The expectation is the difference of the ELBOs; a policy equal to its reference gives exactly 0 in every draw."""
    masks, law = count_support(4)
    batch = small.batch.rows([1])
    d = log_ratio_draws(small.policy, small.reference, batch, masks)
    assert torch.allclose((law[:, None] * d).sum(0), exact_elbo(small.policy, batch) - exact_elbo(small.reference, batch), atol=1e-12)
    assert (log_ratio_draws(small.policy, small.policy, batch, masks) == 0).all()


@pytest.mark.parametrize("name", DESIGNS)
def test_slices_and_subsets_of_rows_change_nothing(name, small):
    masks = DESIGNS[name](small.batch.valid, 4, generator=torch.Generator().manual_seed(0))
    whole = elbo_draws(small.policy, small.batch, masks)
    assert whole.shape == (masks.replicates, 3)
    assert torch.allclose(whole, elbo_draws(small.policy, small.batch, masks, slice_size=5), atol=1e-12)
    assert torch.allclose(whole[:, [2, 0]], elbo_draws(small.policy, small.batch.rows([2, 0]), masks.rows([2, 0])), atol=1e-12)


def test_empty_views_cost_no_forward(small):
    calls = []

    def counting(batch, hidden):
        calls.append(len(batch))
        assert hidden.any(-1).all()
        return small.policy(batch, hidden)

    masks = coupled(small.batch.valid, 16, generator=torch.Generator().manual_seed(0))
    elbo_draws(counting, small.batch, masks)
    assert sum(calls) == masks.hidden.any(-1).sum() < 16 * 3


def test_an_ended_completion_scores_only_to_its_end(small):
    """Tokens after the end are visible to the model and never hidden."""
    batch = completions([[1, 0, 2, 2]], [[True, True, True, False]])
    masks = count(batch.valid, 50, generator=torch.Generator().manual_seed(0))
    assert masks.hidden[:, 0, 3].sum() == 0 and masks.hidden.sum(-1).max() == 3
