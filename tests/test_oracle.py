"""The oracle against brute force over strings and over orders."""

import itertools
import math

import pytest
import torch
from conftest import completions, table_denoiser

from rspo_lab.estimators import elbo_draws
from rspo_lab.masks.published import count
from rspo_lab.oracle import count_moments, exact_elbo, exact_logp, exact_scores


def by_orders(denoiser, batch):
    """(ELBO, log p) of a full row as plain averages over all u! orders of revealing its tokens."""
    tokens = batch.completion.shape[1]
    chains = []
    for order in itertools.permutations(range(tokens)):
        hidden, chain = torch.ones(1, tokens, dtype=torch.bool), 0.0
        for i in order:
            chain += denoiser(batch, hidden)[0, i].item()
            hidden[0, i] = False
        chains.append(chain)
    return sum(chains) / len(chains), math.log(sum(map(math.exp, chains)) / len(chains))


def test_equal_to_the_average_over_all_orders():
    denoiser = table_denoiser(4, 3, 0)
    for row in ([0, 1, 2, 0], [2, 2, 2, 1]):
        batch = completions([row])
        elbo, logp = by_orders(denoiser, batch)
        assert exact_elbo(denoiser, batch).item() == pytest.approx(elbo, abs=1e-12)
        assert exact_logp(denoiser, batch).item() == pytest.approx(logp, abs=1e-12)


def test_likelihood_sums_to_one_and_bounds_the_elbo():
    denoiser = table_denoiser(4, 3, 5)
    batch = completions([list(y) for y in itertools.product(range(3), repeat=4)])
    elbo, logp = exact_scores(denoiser, batch)
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert (logp - elbo >= -1e-12).all() and (logp - elbo).max() > 0.1


def test_no_gap_for_an_order_consistent_model():
    """Independent tokens: every order gives the same product."""
    table = torch.randn(
        4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).log_softmax(-1)
    batch = completions([[0, 1, 2, 0], [2, 1, 1, 1]])
    elbo, logp = exact_scores(
        lambda b, hidden: table[torch.arange(4), b.completion].where(hidden, 0.0), batch
    )
    assert torch.allclose(elbo, logp, atol=1e-12) and torch.allclose(
        logp, table[torch.arange(4), batch.completion].sum(1), atol=1e-12
    )


def test_short_rows_ignore_their_tail(small):
    tail = completions([[1, 0, 2, 2]], [[True, True, True, False]])
    assert exact_elbo(small.policy, small.batch)[2] == exact_elbo(small.policy, tail)[0]


def test_moments_of_one_count_view(small):
    """Against draws of the estimator itself: mean is the ELBO exactly, variance within 5 standard
    errors.
    """
    mean, variance = count_moments(small.policy, small.batch)
    assert torch.allclose(mean, exact_elbo(small.policy, small.batch), atol=1e-12)
    masks = count(small.batch.valid, 20_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        draws = elbo_draws(small.policy, small.batch, masks, slice_size=30_000)
    deviation = (draws - mean) ** 2
    assert ((deviation.mean(0) - variance).abs() < 5 * deviation.std(0) / 20_000**0.5).all()


def test_equal_rows_are_computed_once_and_others_not_mixed_up(small):
    calls = []

    def counting(batch, hidden):
        calls.append(len(batch))
        return small.policy(batch, hidden)

    elbo = exact_elbo(counting, small.batch.rows([0, 1, 0, 0]))
    assert sum(calls) == 2 * 2**4
    assert elbo.tolist() == exact_elbo(small.policy, small.batch)[[0, 1, 0, 0]].tolist()


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match="1..16 valid tokens, not 17"):
        exact_elbo(lambda b, h: h.double(), completions([[0] * 17]))
