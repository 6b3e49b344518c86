"""A path's score with the law of the positions: sums to 1 over paths, and its gradient is that of
the sampler's expected reward; the tokens alone are not.  Agreement along a path: an unbiased
likelihood.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import completions, table_denoiser

from rspo_lab.batch import Batch
from rspo_lab.estimators import token_logps
from rspo_lab.masks.path import path
from rspo_lab.models.loading import tiny
from rspo_lab.oracle import sampler_logp
from rspo_lab.path_score import (
    StepAgreement,
    StepLogp,
    forced_path,
    path_law,
    path_likelihood,
    pooled_log_ratio,
)
from rspo_lab.sampler import generate
from rspo_lab.sampler_law import Sampler

LENGTH, IDS = 4, 2
SAMPLERS = [
    Sampler(temperature=1.0, threshold=1.0, block=4, steps=4),
    Sampler(temperature=1.0, threshold=0.6, block=4, steps=4),
    Sampler(temperature=0.7, threshold=0.6, block=4, steps=2),
    Sampler(temperature=1.5, threshold=0.8, block=2, steps=4),
]


def ways(sampler: Sampler) -> list[tuple[int, ...]]:
    """At which step each position may be written: a block's steps follow each other from its first,
    and none is left out while tokens remain.
    """
    each = sampler.block_steps(LENGTH)
    of_a_block = [
        steps
        for steps in itertools.product(range(each), repeat=sampler.block)
        if set(steps) == set(range(max(steps) + 1))
    ]
    blocks = itertools.product(of_a_block, repeat=LENGTH // sampler.block)
    return [tuple(b * each + n for b, steps in enumerate(way) for n in steps) for way in blocks]


def all_paths(sampler: Sampler) -> Batch:
    """Every completion by every way to write it."""
    ids = itertools.product(range(IDS), repeat=LENGTH)
    rows = list(itertools.product(ids, ways(sampler)))
    batch = completions([list(completion) for completion, _ in rows])
    step = torch.tensor([way for _, way in rows])
    return replace(batch, step=step, surprisal=torch.ones(step.shape))


def score(denoiser, batch, *, tokens_alone=False):
    """The sum over the states of each path; of the tokens written there, or of all hidden ones."""
    masks = path(batch.valid, batch.step, batch.surprisal, 1, generator=torch.Generator())
    if not tokens_alone:
        masks = replace(masks, scored=None)
    return token_logps(denoiser, batch, masks).sum((0, 2))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_paths_to_a_completion_sum_to_its_likelihood(sampler):
    model = table_denoiser(LENGTH, IDS, 3)
    batch = all_paths(sampler)
    law = score(StepLogp(model, sampler).exact, batch).exp()
    code = (batch.completion * IDS ** torch.arange(LENGTH)).sum(1)
    total = torch.zeros(IDS**LENGTH, dtype=torch.float64).index_add(0, code, law)
    exact = torch.zeros_like(total)
    likelihood = sampler_logp(model.conditionals, batch, batch.valid, sampler).exp()
    exact[code] = likelihood
    torch.testing.assert_close(total, exact, rtol=0, atol=1e-12)
    assert total.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_the_law_of_the_positions_makes_the_gradient_that_of_the_reward(sampler):
    """E[R grad log Pr[path]] is the gradient of the sampler's expected reward, to rounding; with
    the tokens alone it is another vector.
    """
    model = table_denoiser(LENGTH, IDS, 3)
    batch = all_paths(sampler)
    reward = (batch.completion.sum(1) % 3 == 1).double()
    ends = len(ways(sampler))  # completions come one after the other, each in so many ways
    likelihood = sampler_logp(
        model.conditionals, batch.rows(slice(None, None, ends)), batch.valid[::ends], sampler
    )
    expected = (reward[::ends] * likelihood.exp()).sum()
    (exact,) = torch.autograd.grad(expected, model.logits)
    steps = StepLogp(model, sampler)
    chance = score(steps.exact, batch).exp().detach()
    (ours,) = torch.autograd.grad((chance * reward * score(steps, batch)).sum(), model.logits)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    (tokens,) = torch.autograd.grad(
        (chance * reward * score(model, batch, tokens_alone=True)).sum(), model.logits
    )
    assert (tokens - exact).norm() > 0.2 * exact.norm()


def test_an_impossible_step_counts_with_its_tokens():
    sampler = SAMPLERS[1]
    model = table_denoiser(LENGTH, IDS, 3)
    batch = all_paths(sampler)
    impossible = score(StepLogp(model, sampler).exact, batch).isinf()
    assert 0 < impossible.sum() < len(batch)
    assert score(StepLogp(model, sampler), batch).isfinite().all()
    once = batch.rows(((batch.step == 0).all(1)).nonzero()[:, 0])  # all at once, few are sure
    unsure = score(StepLogp(model, sampler).exact, once).isinf()
    plain = score(model, once, tokens_alone=True)
    torch.testing.assert_close(score(StepLogp(model, sampler), once)[unsure], plain[unsure])


def test_batches_without_steps_are_refused():
    batch = completions([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="carry their steps"):
        StepLogp(table_denoiser(LENGTH, IDS, 0), SAMPLERS[0])(batch, batch.valid)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_product_of_agreements_is_an_unbiased_likelihood(sampler):
    """Over all paths to each completion: E[product] = p if a path is drawn by its steps' shares of
    the agreement, E[1 / product] = 1 / p if it is the sampler's own; so the mean logarithms are a
    bound from below and one from above.
    """
    model = table_denoiser(LENGTH, IDS, 3)
    batch = all_paths(sampler)
    chance = score(StepLogp(model, sampler).exact, batch).exp()
    agreement = score(StepAgreement(model, sampler), batch)
    code = (batch.completion * IDS ** torch.arange(LENGTH)).sum(1)

    def per_completion(values):
        return torch.zeros(IDS**LENGTH, dtype=torch.float64).index_add(0, code, values)

    likelihood = torch.zeros(IDS**LENGTH, dtype=torch.float64)
    likelihood[code] = sampler_logp(model.conditionals, batch, batch.valid, sampler).exp()
    share = chance / agreement.exp()
    torch.testing.assert_close(per_completion(share), torch.ones_like(likelihood))
    torch.testing.assert_close(per_completion(share * agreement.exp()), likelihood)
    own = chance / likelihood[code]
    torch.testing.assert_close(per_completion(own / agreement.exp()), 1 / likelihood)
    below = per_completion(share * agreement)
    above = per_completion(own * agreement)
    assert (below <= likelihood.log() + 1e-12).all() and (above >= likelihood.log() - 1e-12).all()
    assert (above - below).max() > 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_forced_path_is_the_samplers_with_all_draws_y(sampler):
    """Step by step as `StepLaw.forced` has it, its agreement that of `StepAgreement` on that path;
    a token that stood there before is written at no step.
    """
    model = table_denoiser(LENGTH, IDS, 3)
    batch = completions([list(ids) for ids in itertools.product(range(IDS), repeat=LENGTH)])
    written = torch.ones_like(batch.valid)
    written[3, 1] = False
    step, agreement = forced_path(model, batch, written, sampler, slice_size=5)
    assert (step >= 0).equal(written)
    on_path = replace(batch, step=step, surprisal=torch.ones(step.shape))
    masks = path(written, step, on_path.surprisal, 1, generator=torch.Generator())
    hidden_too = replace(masks, scored=None)
    again = token_logps(StepAgreement(model, sampler), on_path, hidden_too).sum((0, 2))
    torch.testing.assert_close(agreement, again)
    for n in range(int(step.max()) + 1):
        hidden = step >= n
        row = (step == n).any(1)
        law, kept, quota = path_law(model, sampler, on_path.rows(row), hidden[row])
        assert law.forced(quota).equal(kept)


def test_a_forced_path_is_the_greedy_rollouts():
    """Of a greedy completion it is the path that decoding took, and agreement is certain."""
    model = tiny("0123=", seed=1, layers=1, width=16)
    prompt, prompt_valid = model.encode(["12=", "3="])
    canvas = model.encode_canvas(["?3??", "????"])
    rollout = generate(
        model.logits,
        prompt,
        prompt_valid,
        canvas=canvas.clone(),
        mask_id=model.mask_id,
        block=2,
        steps=4,
        temperature=0.0,
        threshold=0.15,
        generator=torch.Generator(),
    )
    assert rollout.forwards.min() < 4  # no forward is made of no rows
    batch = Batch(prompt, prompt_valid, rollout.completion, rollout.step >= 0)
    step, agreement = forced_path(model, batch, rollout.step >= 0, Sampler(0.0, 0.15, 2, 4))
    assert step.equal(rollout.step) and (agreement == 0).all()


def test_the_gradient_of_agreement_is_its_slope():
    model = table_denoiser(LENGTH, IDS, 3)
    batch = all_paths(SAMPLERS[2]).rows([40, 71, 111])

    def value():
        return score(StepAgreement(model, SAMPLERS[2]), batch).sum()

    value().backward()
    flat = model.logits.grad.flatten()
    for place in flat.abs().argsort(descending=True)[:20:4].tolist():
        with torch.no_grad():
            parameter = model.logits.view(-1)[place]
            parameter += 1e-6
            up = value()
            parameter -= 2e-6
            down = value()
            parameter += 1e-6
        assert flat[place].item() == pytest.approx((up - down).item() / 2e-6, abs=1e-7)


EVEN = [*SAMPLERS, Sampler(1.0, 0.6, 2, 2), Sampler(0.8, 1.0, 2, 4)]


@pytest.mark.parametrize("sampler", EVEN)
def test_pooled_paths(sampler):
    """Of one path its agreement where no step can leap; of all paths the exact likelihood; between
    them each visited state counts once.
    """
    model = table_denoiser(LENGTH, IDS, 3)
    batch = completions([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    every = [torch.tensor(way).expand(3, -1) for way in ways(sampler)]
    for way in every[:: 1 + len(every) // 6]:
        value, states = path_likelihood(model, batch, [way], sampler, slice_size=2)
        on_path = replace(batch, step=way, surprisal=torch.ones(way.shape))
        if sampler.threshold == 1:
            torch.testing.assert_close(value, score(StepAgreement(model, sampler), on_path))
        assert (states == len(way[0].unique())).all()
    exact = sampler_logp(model.conditionals, batch, batch.valid, sampler)
    value, states = path_likelihood(model, batch, every, sampler)
    torch.testing.assert_close(value, exact)
    twice, again = path_likelihood(model, batch, [every[0], every[-1], every[0]], sampler)
    once, fewer = path_likelihood(model, batch, [every[0], every[-1]], sampler)
    assert twice.equal(once) and again.equal(fewer) and (fewer <= states).all()


def test_pooled_paths_by_hand():
    """Two positions, one token per step, two paths: agreement of the start times the values of the
    two states, weighted by their probabilities.
    """
    sampler = Sampler(1.0, 1.0, 2, 2)
    model = table_denoiser(2, IDS, 5)
    batch = completions([[0, 1]])
    paths = [torch.tensor([[0, 1]]), torch.tensor([[1, 0]])]
    law, _, quota = path_law(model, sampler, replace(batch, step=paths[0]), batch.valid)
    first = law.kept(torch.eye(2, dtype=torch.bool)[None], quota).sum(-1).exp()[0]
    hidden = torch.tensor([[False, True], [True, False]])
    later = model(batch.rows([0, 0]), hidden).sum(1).exp()
    value, states = path_likelihood(model, batch, paths, sampler)
    assert states.item() == 3
    assert value.exp().item() == pytest.approx((first * later).sum().item(), rel=1e-12)


def test_pooled_gradient_is_its_slope():
    model = table_denoiser(LENGTH, IDS, 3)
    batch = completions([[0, 1, 1, 0], [1, 1, 0, 0]])
    paths = [torch.tensor(way).expand(2, -1) for way in ways(SAMPLERS[1])[3:60:20]]

    def value():
        return path_likelihood(model, batch, paths, SAMPLERS[1])[0].sum()

    value().backward()
    flat = model.logits.grad.flatten()
    assert flat.isfinite().all()
    for place in flat.abs().argsort(descending=True)[:20:4].tolist():
        with torch.no_grad():
            parameter = model.logits.view(-1)[place]
            parameter += 1e-6
            up = value()
            parameter -= 2e-6
            down = value()
            parameter += 1e-6
        assert flat[place].item() == pytest.approx((up - down).item() / 2e-6, abs=1e-7)


def test_a_state_of_an_uneven_schedule_is_taken_at_its_step():
    """Quotas 2, 1, 1: of one path the agreements at its own steps' quotas."""
    sampler = Sampler(1.0, 1.0, 4, 3)
    model = table_denoiser(LENGTH, IDS, 3)
    batch = completions([[0, 1, 1, 0]])
    step = torch.tensor([[0, 2, 0, 1]])
    value, _ = path_likelihood(model, batch, [step], sampler)
    on_path = replace(batch, step=step, surprisal=torch.ones(step.shape))
    torch.testing.assert_close(value, score(StepAgreement(model, sampler), on_path))


def test_pooled_log_ratio():
    """Either model on the rollout's path and its own, equal rows alike; none to itself."""
    sampler = SAMPLERS[1]
    policy, reference = table_denoiser(LENGTH, IDS, 3), table_denoiser(LENGTH, IDS, 4)
    batch = all_paths(sampler).rows([0, 5, 40, 5])
    step, _ = forced_path(reference, batch, batch.valid, sampler)
    value, cost, base_cost = pooled_log_ratio(policy, reference, batch, sampler)
    own, _ = forced_path(policy, batch, batch.valid, sampler)
    ours, states = path_likelihood(policy, batch, [batch.step, own], sampler)
    base, base_states = path_likelihood(reference, batch, [batch.step, step], sampler)
    torch.testing.assert_close(value, ours - base)
    assert cost == states.double().mean() and base_cost == base_states.double().mean()
    assert (pooled_log_ratio(policy, policy, batch, sampler)[0] == 0).all()
    with pytest.raises(ValueError, match="carry their steps"):
        pooled_log_ratio(policy, reference, replace(batch, step=None), sampler)
