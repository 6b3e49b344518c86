"""The oracle against brute force over strings and over orders."""

import itertools
import math

import pytest
import torch
from conftest import completions, table_denoiser

from rspo_lab.batch import Batch
from rspo_lab.estimators import elbo_draws
from rspo_lab.masks.published import count
from rspo_lab.models.loading import tiny
from rspo_lab.oracle import (
    count_moments,
    exact_elbo,
    exact_likelihoods,
    exact_logp,
    exact_scores,
    exact_tables,
    sampler_logp,
    subset_tables,
)
from rspo_lab.sampler import generate
from rspo_lab.sampler_law import Sampler


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


# --- the sampler's own likelihood


def by_every_draw(logits, canvas, mask_id, block, steps, temperature, threshold):
    """{completion: probability} of the sampler on one row, by all draws of every step.

    A plain re-reading of the published procedure: it goes forward from the canvas, and knows
    nothing of hidden sets.  logits(ids (1, L)) -> (L, V).
    """
    length = len(canvas)
    per_block = steps // (length // block)
    states = {tuple(canvas): 1.0}
    for b in range(length // block):
        here = range(b * block, (b + 1) * block)
        masked = sum(canvas[i] == mask_id for i in here)
        for n in range(per_block):
            quota = masked // per_block + (n < masked % per_block)
            after = {}
            for ids, p in states.items():
                for new, chance in one_step(
                    logits, ids, here, mask_id, quota, temperature, threshold
                ):
                    after[new] = after.get(new, 0.0) + p * chance
            states = after
    return states


def one_step(logits, ids, here, mask_id, quota, temperature, threshold):
    """[(ids after a step, probability)] for every combination of draws."""
    places = [i for i in here if ids[i] == mask_id]
    if not places:
        return [(ids, 1.0)]
    table = logits(torch.tensor([ids]))
    confidence = table.float().softmax(-1)
    outcomes = []
    for draws in itertools.product(range(table.shape[-1]), repeat=len(places)):
        sure = {i: confidence[i, v].item() for i, v in zip(places, draws)}
        ranked = sorted(places, key=lambda i: (-sure[i], i))
        new, chance = list(ids), 1.0
        for i, v in zip(places, draws):
            if temperature == 0:
                chance *= float(table[i].argmax() == v)
            else:
                chance *= (table[i] / temperature).softmax(-1)[v].item()
            if i in ranked[:quota] or sure[i] > threshold:
                new[i] = v
        outcomes.append((tuple(new), chance))
    return outcomes


SAMPLERS = [  # temperature, threshold, block, steps
    (1.0, 1.0, 4, 4),  # the published sampler, one token per step
    (1.0, 0.45, 4, 4),
    (0.6, 0.5, 4, 4),
    (1.7, 0.4, 4, 3),  # quotas 2, 1, 1
    (1.0, 1.0, 4, 2),
    (1.0, 0.5, 2, 4),
    (1.3, 0.4, 2, 2),
    (0.0, 1.0, 4, 4),
    (0.0, 0.5, 2, 2),
]


@pytest.mark.parametrize("settings", SAMPLERS)
@pytest.mark.parametrize("canvas", [[3, 3, 3, 3], [3, 1, 3, 3]])
def test_the_samplers_likelihood_is_that_of_all_draws(settings, canvas):
    """Of every completion, so the sum over them is 1 too; tokens that stood there before count
    nothing.
    """
    temperature, threshold, block, steps = settings
    table = table_denoiser(4, 3, 7)
    expected = by_every_draw(
        lambda ids: table.of_context(ids)[0].detach(),
        canvas,
        3,
        block,
        steps,
        temperature,
        threshold,
    )
    written = torch.tensor(canvas) == 3
    free = itertools.product(*[range(3) if c == 3 else [c] for c in canvas])
    batch = completions([list(y) for y in free])
    logp = sampler_logp(
        table.conditionals,
        batch,
        written.expand(len(batch), -1),
        Sampler(temperature, threshold, block, steps),
    )
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for y, p in zip(batch.completion.tolist(), logp.exp().tolist()):
        assert p == pytest.approx(expected.get(tuple(y), 0.0), abs=1e-12)


def test_the_samplers_likelihood_is_not_that_of_random_order(small):
    """They differ by much where conditionals are inconsistent, and agree where the tokens are
    independent and nothing is surer than the threshold.
    """
    every = torch.ones_like(small.batch.valid)
    logp = sampler_logp(small.policy.conditionals, small.batch, every, Sampler(1.0, 1.0, 4, 4))
    assert (logp - exact_logp(small.policy, small.batch))[:2].abs().max() > 0.2


def test_sampled_frequencies_follow_the_likelihood():
    """Of a real (tiny) model with the real sampler: z of each completion's count, T and threshold
    other than 1, a canvas with a given token.
    """
    model = tiny("01=", seed=2, layers=1, width=16)
    n = 4000
    prompt, prompt_valid = model.encode(["1="])
    canvas = model.encode_canvas(["??0?"])
    rollout = generate(
        model.logits,
        prompt.expand(n, -1),
        prompt_valid.expand(n, -1),
        canvas=canvas.repeat(n, 1),
        mask_id=model.mask_id,
        block=4,
        steps=2,
        temperature=0.8,
        threshold=0.3,
        generator=torch.Generator().manual_seed(0),
    )
    completion, count = rollout.completion.unique(dim=0, return_counts=True)
    rows = len(completion)
    batch = Batch(
        prompt.expand(rows, -1),
        prompt_valid.expand(rows, -1),
        completion,
        torch.ones_like(completion, dtype=torch.bool),
    )
    written = (canvas == model.mask_id).expand(rows, -1)
    with torch.no_grad():
        p = sampler_logp(model.conditionals, batch, written, Sampler(0.8, 0.3, 4, 2)).exp()
    assert 1 - p.sum().item() < 0.01  # what was never drawn
    often = p * n > 5
    z = (count - n * p)[often] / (n * p * (1 - p))[often].sqrt()
    assert often.sum() > 20 and z.abs().max() < 4 and 0.6 < z.square().mean() < 1.6


def test_greedy_decoding_has_one_completion():
    model = tiny("0123=", seed=1, layers=1, width=16)
    prompt, prompt_valid = model.encode(["12="])
    canvas = torch.full((1, 4), model.mask_id)
    rollout = generate(
        model.logits,
        prompt,
        prompt_valid,
        canvas=canvas.clone(),
        mask_id=model.mask_id,
        block=2,
        steps=4,
        temperature=0.0,
        generator=torch.Generator(),
    )
    y = rollout.completion
    other = y.clone()
    other[0, 2] = (other[0, 2] + 1) % 4
    batch = Batch(prompt, prompt_valid, y, y >= 0)
    sampler = Sampler(0.0, 1.0, 2, 4)
    assert sampler_logp(model.conditionals, batch, y >= 0, sampler).item() == 0
    changed = Batch(prompt, prompt_valid, other, y >= 0)
    assert sampler_logp(model.conditionals, changed, y >= 0, sampler).item() == -torch.inf


def test_the_likelihoods_gradient_is_its_slope_and_has_no_nan(small):
    every = torch.ones_like(small.batch.valid)
    sampler = Sampler(1.0, 0.5, 4, 3)

    def value():
        return sampler_logp(small.policy.conditionals, small.batch, every, sampler)[0]

    value().backward()
    gradient = small.policy.logits.grad
    assert gradient.isfinite().all()
    flat = gradient.flatten()
    for place in flat.abs().argsort(descending=True)[:20:4].tolist():
        with torch.no_grad():
            parameter = small.policy.logits.view(-1)[place]
            parameter += 1e-6
            up = value()
            parameter -= 2e-6
            down = value()
            parameter += 1e-6
        assert flat[place].item() == pytest.approx((up - down).item() / 2e-6, abs=1e-7)


def test_equal_rows_share_and_too_many_written_tokens_are_refused(small):
    every = torch.ones_like(small.batch.valid)
    twice = small.batch.rows([0, 1, 0])
    logp = sampler_logp(small.policy.conditionals, twice, every, Sampler(1.0, 1.0, 4, 4))
    assert logp[0] == logp[2] != logp[1]
    with pytest.raises(ValueError, match="at most 11 written tokens per block, not 12"):
        sampler_logp(
            small.policy.conditionals,
            completions([[0] * 12]),
            torch.ones(1, 12, dtype=torch.bool),
            Sampler(1.0, 1.0, 12, 12),
        )


@pytest.mark.parametrize("sampler", [Sampler(0.8, 0.5, 4, 3), Sampler(1.0, 0.5, 2, 4)])
@pytest.mark.parametrize("rows", [[0, 1, 0], [0, 1, 2]])
def test_all_likelihoods_from_one_pass(small, sampler, rows):
    """Or from two, where a row ends early or decodes in blocks."""
    batch = small.batch.rows(rows)
    written = torch.ones_like(batch.valid)
    elbo, logp, ours = exact_likelihoods(small.policy, batch, written, sampler)
    assert torch.allclose(torch.stack([elbo, logp]), torch.stack(exact_scores(small.policy, batch)))
    tables, _ = exact_tables(small.policy, batch, written, sampler)
    for table, plain in zip(tables, subset_tables(small.policy, batch), strict=True):
        assert torch.allclose(table, plain)
    expected = sampler_logp(small.policy.conditionals, batch, written, sampler)
    assert torch.allclose(ours, expected)


def test_the_policy_gradient_of_the_sampler_is_the_slope_of_its_expected_reward(small):
    """E[R grad log p] over all completions against finite differences of E[R]."""
    sampler = Sampler(1.0, 0.5, 4, 4)
    batch = completions([list(y) for y in itertools.product(range(3), repeat=4)])
    reward = (batch.completion.sum(1) % 3 == 1).double()

    def logp():
        return sampler_logp(small.policy.conditionals, batch, batch.valid, sampler)

    value = logp()
    (value.detach().exp() * reward * value).sum().backward()
    flat = small.policy.logits.grad.flatten()
    for place in flat.abs().argsort(descending=True)[:12:4].tolist():
        with torch.no_grad():
            parameter = small.policy.logits.view(-1)[place]
            parameter += 1e-6
            up = (logp().exp() * reward).sum()
            parameter -= 2e-6
            down = (logp().exp() * reward).sum()
            parameter += 1e-6
        assert flat[place].item() == pytest.approx((up - down).item() / 2e-6, abs=1e-7)


def test_the_likelihood_jumps_where_two_confidences_cross():
    """Two positions that tie but for 1e-4: which of them is kept first changes the other's law."""
    model = table_denoiser(2, 2, 0)
    batch = completions([[0, 0]])
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            start = (2 * torch.tensor([1, 3])).sum()  # the context with both hidden
            model.logits[start] = torch.tensor([[1.0 + 1e-4 * sign, 0.0], [1.0, 0.0]])
            values.append(
                sampler_logp(model.conditionals, batch, batch.valid, Sampler(1.0, 1.0, 2, 2))
            )
    assert (values[0] - values[1]).abs().item() > 0.05
