"""Draws against the oracle, and the identities that make policy and reference comparable."""

import itertools
import math

import pytest
import torch
from conftest import completions, table_denoiser

from rspo_lab.estimators import elbo_draws, eubo, level_control, log_ratio_draws, two_level_baseline
from rspo_lab.masks.base import Masks
from rspo_lab.masks.designs import DESIGNS, design
from rspo_lab.masks.published import count, coupled
from rspo_lab.objectives import rspo
from rspo_lab.oracle import exact_elbo, exact_logp, subset_tables


def count_support(tokens: int) -> tuple[Masks, torch.Tensor]:
    """Every hidden set of the count design as a view of its own, with its probability."""
    subsets = [s for n in range(1, tokens + 1) for s in itertools.combinations(range(tokens), n)]
    hidden = torch.zeros(len(subsets), 1, tokens, dtype=torch.bool)
    for view, s in enumerate(subsets):
        hidden[view, 0, list(s)] = True
    size = hidden.sum(-1).double()
    law = torch.tensor(
        [1 / (tokens * math.comb(tokens, len(s))) for s in subsets], dtype=torch.float64
    )
    return Masks(hidden, tokens / size, torch.arange(len(subsets))), law


def test_elbo_draws_are_unbiased(small):
    masks, law = count_support(4)
    draws = elbo_draws(small.policy, small.batch.rows([0]), masks)
    exact = exact_elbo(small.policy, small.batch.rows([0]))
    assert torch.allclose((law[:, None] * draws).sum(0), exact, atol=1e-12)


def test_log_ratio_draws_are_unbiased_and_shared(small):
    """The expectation is the difference of the ELBOs; a policy equal to its reference gives exactly
    0 in every draw.
    """
    masks, law = count_support(4)
    batch = small.batch.rows([1])
    d = log_ratio_draws(small.policy, small.reference, batch, masks)
    assert torch.allclose(
        (law[:, None] * d).sum(0),
        exact_elbo(small.policy, batch) - exact_elbo(small.reference, batch),
        atol=1e-12,
    )
    assert (log_ratio_draws(small.policy, small.policy, batch, masks) == 0).all()


@pytest.mark.parametrize("name", DESIGNS)
def test_slices_and_subsets_of_rows_change_nothing(name, small):
    views = 1 if name in ("one_step", "left_to_right") else 4
    masks = DESIGNS[name](small.batch.valid, views, generator=torch.Generator().manual_seed(0))
    whole = elbo_draws(small.policy, small.batch, masks)
    assert whole.shape == (masks.replicates, 3)
    assert torch.allclose(
        whole, elbo_draws(small.policy, small.batch, masks, slice_size=2), atol=1e-12
    )
    assert torch.allclose(
        whole[:, [2, 0]],
        elbo_draws(small.policy, small.batch.rows([2, 0]), masks.rows([2, 0])),
        atol=1e-12,
    )


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


def test_left_to_right_is_the_chain_rule_and_one_step_the_product_of_marginals(small):
    batch, generator = small.batch, torch.Generator()
    chain = elbo_draws(
        small.policy, batch, DESIGNS["left_to_right"](batch.valid, 1, generator=generator)
    )[0]
    at_once = elbo_draws(
        small.policy, batch, DESIGNS["one_step"](batch.valid, 1, generator=generator)
    )[0]
    for row in range(3):
        one, hidden = batch.rows([row]), batch.valid[[row]].clone()
        assert small.policy(one, hidden).sum().item() == pytest.approx(
            at_once[row].item(), abs=1e-12
        )
        total = 0.0
        for i in range(int(batch.valid[row].sum())):
            total += small.policy(one, hidden)[0, i].item()
            hidden[0, i] = False
        assert total == pytest.approx(chain[row].item(), abs=1e-12)


def test_level_control_keeps_the_mean_and_takes_the_noise_of_the_weights(small):
    """With equal log-probs everywhere the score's only noise is the sum of the weights, which the
    right level removes.
    """
    valid = small.batch.valid.repeat_interleave(4_000, 0)
    batch = completions([[0] * 4] * len(valid), valid.tolist())
    masks = design("bsc(1, 1)")(valid, 2, generator=torch.Generator().manual_seed(0))
    draws = elbo_draws(
        lambda b, hidden: torch.full(hidden.shape, -0.7, dtype=torch.float64), batch, masks
    )
    exact = -0.7 * valid.sum(1).double()
    assert draws.std() > 0.3 and torch.allclose(
        level_control(draws, masks, valid, -0.7), exact[None], atol=1e-12
    )
    half = level_control(
        draws, masks, valid, -0.35
    )  # any level that the masks did not choose leaves the mean alone
    assert (
        abs((half - exact).mean()) < 4 * half.std() / len(valid) ** 0.5 and half.std() < draws.std()
    )
    even = DESIGNS["systematic"](valid, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(level_control(draws, even, valid, 3.0), draws, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 2.0, 4.0])
def test_eubo_is_the_upper_bound_that_the_oracle_gives(beta, small):
    """On the whole support it is the exact sum over subsets; never below the ELBO, nor below log p
    if beta >= u.
    """
    masks, law = count_support(4)
    weighted = Masks(masks.hidden, masks.weight * law[:, None], masks.replicate)
    for row in (0, 1):
        batch = small.batch.rows([row])
        table = subset_tables(small.policy, batch)[0]
        exact = 0.0
        for i in range(4):
            inside = [s for s in range(16) if s >> i & 1]
            weight = torch.tensor(
                [1 / (s.bit_count() * math.comb(4, s.bit_count())) for s in inside],
                dtype=torch.float64,
            )
            assert weight.sum().item() == pytest.approx(1)
            exact += (weight * (beta * table[inside, i]).exp()).sum().log().item() / beta
        value = eubo(small.policy, batch, weighted, beta=beta).item()
        assert (
            value == pytest.approx(exact, abs=1e-12)
            and value >= exact_elbo(small.policy, batch).item()
        )
        assert value >= exact_logp(small.policy, batch).item() or beta < 4
        sliced = eubo(small.policy, batch, weighted, beta=beta, slice_size=3).item()
        assert sliced == pytest.approx(value, abs=1e-12)


def test_eubo_with_beta_1_can_lie_below_the_log_likelihood():
    """Three tokens, sharp and inconsistent conditionals: more than a nat below, so it is no upper
    bound of log p.
    """
    gaps = []
    for seed in range(40):
        policy = table_denoiser(3, 3, seed)
        policy.logits.data *= 3
        batch = completions([[2, 2, 2]])
        masks, law = count_support(3)
        weighted = Masks(masks.hidden, masks.weight * law[:, None], masks.replicate)
        gaps.append(
            [
                eubo(policy, batch, weighted, beta=beta).item() - exact_logp(policy, batch).item()
                for beta in (1.0, 3.0)
            ]
        )
    gaps = torch.tensor(gaps)
    assert gaps[:, 0].min() < -1 and gaps[:, 1].min() >= 0


def test_eubo_of_few_views_is_finite_and_converges(small):
    def value(views, seed):
        masks = count(small.batch.valid, views, generator=torch.Generator().manual_seed(seed))
        return eubo(small.policy, small.batch, masks, beta=1.5)

    assert value(1, 0).isfinite().all() and torch.allclose(
        value(4000, 1), value(4000, 2), atol=0.15
    )


def test_eubo_of_few_views_by_hand_and_far_below_what_exp_can_hold():
    """Two views whose scored tokens are known, with weights that do not sum to 1; then log-probs of
    -3 nats at beta = u = 256.
    """
    batch = completions([[0, 0]])
    hidden = torch.tensor([[[True, True]], [[True, True]], [[False, True]]])
    scored = torch.tensor([[[True, False]], [[True, True]], [[False, True]]])
    masks = Masks(
        hidden, torch.tensor([[2.0], [1.0], [4.0]], dtype=torch.float64), torch.arange(3), scored
    )
    logp = torch.tensor([[-1.0, -9.0], [-2.0, -0.5], [-7.0, -3.0]], dtype=torch.float64)
    value = eubo(lambda b, h: logp, batch, masks, beta=2.0).item()
    first = math.log((2 * math.exp(-2) + math.exp(-4)) / 3) / 2
    second = math.log((math.exp(-1) + 4 * math.exp(-6)) / 5) / 2
    assert value == pytest.approx(first + second, abs=1e-12)
    long = completions([[0] * 256])
    level = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    masks = Masks(
        torch.ones(2, 1, 256, dtype=torch.bool),
        torch.ones(2, 1, dtype=torch.float64),
        torch.arange(2),
    )
    bound = eubo(lambda b, h: level.expand(h.shape), long, masks, beta=256.0)
    assert bound.item() == pytest.approx(-768) and torch.autograd.grad(bound.sum(), level)[
        0
    ].item() == pytest.approx(256)


def test_level_control_works_replicate_by_replicate_on_scored_tokens(small):
    valid = small.batch.valid
    for name in ("coupled", "spg_block(2)"):
        masks = design(name)(valid, 6, generator=torch.Generator().manual_seed(0))
        draws = elbo_draws(
            lambda b, h: torch.full(h.shape, -0.7, dtype=torch.float64), small.batch, masks
        )
        controlled = level_control(draws, masks, valid, -0.7)
        assert masks.replicates > 1 and draws.std(0).max() > 0.1
        assert torch.allclose(
            controlled, (-0.7 * valid.sum(1).double()).expand_as(draws), atol=1e-12
        )


@pytest.mark.parametrize("at_old", [True, False])
def test_two_level_gradient_is_unbiased_where_the_shared_one_is_not(at_old, small):
    """Gradients of RSPO in expectation over all masks, float64, lam = 1.

    At the policy that made the rollouts two levels give the gradient of the exact square, where one
    level adds 1/2 grad Var d. Away from it what is left is 1/2 grad Var(policy - old), the bias of
    the small part.
    """
    batch, advantage = small.batch.rows([0]), torch.tensor([1.0], dtype=torch.float64)
    masks, law = count_support(4)
    old = table_denoiser(4, 3, 0 if at_old else 2)
    (table,) = small.policy.parameters()
    d_exact = (exact_elbo(small.policy, batch) - exact_elbo(small.reference, batch)).detach()

    def gradient(value):
        return torch.autograd.grad(value, table, retain_graph=True)[0]

    exact = gradient(-((advantage - d_exact) * exact_elbo(small.policy, batch)).sum())
    scores = elbo_draws(small.policy, batch, masks)
    one_level, two_level = (torch.zeros_like(table) for _ in range(2))
    many_ratio = exact_elbo(old, batch) - exact_elbo(
        small.reference, batch
    )  # the mean over many masks
    for i in range(len(law)):
        mask = Masks(masks.hidden[[i]], masks.weight[[i]], torch.zeros(1, dtype=torch.long))
        whole = Masks(masks.hidden, masks.weight * law[:, None] * len(law), masks.replicate)
        ratio = log_ratio_draws(old, small.reference, batch, whole).mean(0).detach()
        baseline = two_level_baseline(old, batch, mask, ratio)
        d = scores[[i]] - baseline
        expected = scores[[i]] - elbo_draws(old, batch, mask) + many_ratio
        assert torch.allclose(d, expected, atol=1e-12)
        two_level += law[i] * gradient(rspo(d, advantage, lam=1.0, scope="none").value)
        shared = scores[[i]] - elbo_draws(small.reference, batch, mask)
        one_level += law[i] * gradient(rspo(shared, advantage, lam=1.0, scope="none").value)

    def half_variance(other):
        gap = (scores - elbo_draws(other, batch, masks).detach())[:, 0]
        return gradient(0.5 * ((law * gap**2).sum() - (law * gap).sum() ** 2))

    assert torch.allclose(one_level, exact + half_variance(small.reference), atol=1e-12)
    assert torch.allclose(two_level, exact + half_variance(old), atol=1e-12)
    assert half_variance(small.reference).norm() > 0.05
    assert torch.allclose(two_level, exact, atol=1e-12) is at_old
