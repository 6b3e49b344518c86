"""Measured variances against exact ones, and table look-up against the estimator it stands in for."""

import itertools
import statistics

import pytest
import torch
from conftest import completions, table_denoiser

from rspo_lab import objectives
from rspo_lab.config import TrainConfig
from rspo_lab.estimators import elbo_draws, log_ratio_draws
from rspo_lab.figures.style import design_look
from rspo_lab.masks.designs import DESIGNS
from rspo_lab.measure import gradient_noise, score_noise
from rspo_lab.measure.gap import gap_samples
from rspo_lab.measure.gradient_noise import gradient_rows, rollout_noise, scheme
from rspo_lab.measure.score_noise import score_rows, table_anova, table_estimates
from rspo_lab.oracle import count_moments, exact_elbo, exact_scores, subset_tables
from rspo_lab.rollouts import Rollouts
from rspo_lab.update import scorings


@pytest.mark.parametrize("name", DESIGNS)
def test_table_estimates_are_the_estimator(name, small):
    views = 1 if name in ("one_step", "left_to_right") else 4
    masks = DESIGNS[name](
        small.batch.valid.repeat_interleave(5, 0), views, generator=torch.Generator().manual_seed(0)
    )
    tables = subset_tables(small.policy, small.batch)
    repeated = small.batch.rows(torch.arange(3).repeat_interleave(5))
    direct = elbo_draws(small.policy, repeated, masks).mean(0).view(3, 5).T
    assert torch.allclose(
        table_estimates(tables, small.batch.valid, masks), direct.detach(), atol=1e-12
    )


def test_score_rows_against_the_oracle(small):
    frame = score_rows(
        small.policy,
        small.reference,
        small.batch,
        designs=["count"],
        views=[1, 4],
        redraws=4000,
        seed=0,
    )
    value = frame.set_index(["views", "quantity"])
    exact = count_moments(small.policy, small.batch)[1].mean().item()
    for views in (1, 4):
        row = value.loc[(views, "var_score")]
        assert abs(row["value"] - exact / views) < 4 * row["stderr"] and row["stderr"] < 0.1 * exact
        for quantity in ("bias_score", "bias_d"):
            assert (
                abs(value.loc[(views, quantity), "value"])
                < 4 * value.loc[(views, quantity), "stderr"]
            )
        row, apart = (
            value.loc[(views, "var_d_independent")],
            exact + count_moments(small.reference, small.batch)[1].mean().item(),
        )
        assert abs(row["value"] - apart / views) < 4 * row["stderr"] and row["stderr"] < 0.1 * apart
    measured = frame[~frame["quantity"].str.startswith("share")]
    assert set(measured["quantity"]) == {
        "bias_score",
        "bias_d",
        "var_score",
        "var_d_shared",
        "var_d_independent",
        "reliability",
    }


def held(rows, advantage, **changes):
    """(config, rollouts) of given completions, two a prompt."""
    config = TrainConfig(model="base-sudoku", task="sudoku", group=2, **{"lam": 0.4} | changes)
    advantage = torch.tensor(advantage, dtype=torch.float64)
    return config, Rollouts([None] * len(rows), completions(rows), advantage, advantage, {})


@pytest.mark.slow
def test_gradient_variance_against_all_masks():
    """One sequence of three tokens: the trace of the gradient's covariance, summed over the 7 masks
    of the count design.
    """
    from test_estimators import count_support

    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    config, rollouts = held([[0, 1, 1]], [0.7])
    masks, law = count_support(3)
    d = log_ratio_draws(policy, reference, rollouts.batch, masks)[:, 0]
    gradients = [
        torch.autograd.grad(-0.7 * x, policy.logits, retain_graph=True)[0].flatten() for x in d
    ]  # centred: d_hat is 0
    stacked = torch.stack(gradients)
    exact = (law[:, None] * (stacked - (law[:, None] * stacked).sum(0)) ** 2).sum().item()
    frame = gradient_rows(
        config, policy, reference, rollouts, schemes=["count"], views=[1], redraws=1500, seed=0
    )
    value = frame.set_index("quantity")
    row = value.loc["var_gradient"]
    assert abs(row["value"] - exact) < 4 * row["stderr"] < 0.3 * exact
    noise = (law * (d - (law * d).sum()) ** 2).sum().item()
    row = value.loc["var_d_rollouts"]
    assert abs(row["value"] - noise) < 4 * row["stderr"] < 0.3 * noise and row["cost"] == 1


ROWS, ADVANTAGE = (
    [[0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]],
    [0.7, -0.7, 0.0, 0.0, 1.0, -1.0],
)


def exact_gradient(config, policy, reference, rollouts):
    """Of -mean (A - lam d_hat) d with exact scores."""
    batch, advantage = rollouts.batch, rollouts.advantage
    d = exact_elbo(policy, batch) - exact_elbo(reference, batch)
    weight = advantage - config.lam * (d - d.mean())
    return torch.autograd.grad(-(weight.detach() * d).mean(), policy.logits)[0].flatten()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "count + two-level + allocated",
        "bsc + two-level + allocated",
        "bsc + two-level",
        "cycle + two-level",
    ],
)
def test_two_levels_leave_no_bias_in_the_gradient(text):
    """Mean of the update's gradient over many masks, with the views shared out by noisy weights,
    against the exact one.
    """
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    config, rollouts = held(ROWS, ADVANTAGE)
    chosen = scheme(text, config, 2)
    distinct, which = rollouts.batch.distinct()
    gradients = []
    for i in range(600):
        (one,) = scorings(
            chosen,
            policy,
            reference,
            rollouts.batch,
            rollouts.advantage,
            lambda k: chosen.design,
            (7, text, i),
        )
        draws = elbo_draws(policy, distinct, one.masks)
        d = (draws - one.baseline_of(draws))[:, which]
        loss = objectives.rspo(d, rollouts.advantage, lam=config.lam).value
        gradients.append(torch.autograd.grad(loss, policy.logits)[0].flatten())
    stacked = torch.stack(gradients)
    pairs = (
        stacked[:300].mean(0) - exact_gradient(config, policy, reference, rollouts),
        stacked[300:].mean(0),
    )
    bias = (
        pairs[0] * (pairs[1] - exact_gradient(config, policy, reference, rollouts))
    ).sum()  # unbiased for |bias|^2
    noise = stacked.var(0).sum() / 300
    assert (
        bias.abs() < 1.5 * noise
        and noise < 0.4 * exact_gradient(config, policy, reference, rollouts).square().sum()
    )


def test_allocation_gives_more_views_to_larger_updates_at_the_same_cost():
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    config, rollouts = held(ROWS, ADVANTAGE, lam=0.0)
    chosen = scheme("count + two-level + allocated", config, 4)
    (one,) = scorings(
        chosen, policy, reference, rollouts.batch, rollouts.advantage, lambda k: "count", (0,)
    )
    used = one.masks.hidden.any(-1).sum(0)
    silent = rollouts.batch.distinct()[0].completion.sum(1) == 0
    assert used.sum() == 4 * 5 and (used[silent] == 1).all() and (used[~silent] > 1).all()


def test_allocation_counts_the_pull_to_the_reference():
    """Without any advantage the views still go where lam d is large."""
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    config, rollouts = held(ROWS, [0.0] * 6, lam=1.0)
    chosen = scheme("count + two-level + allocated", config, 40)
    (one,) = scorings(
        chosen, policy, reference, rollouts.batch, rollouts.advantage, lambda k: "count", (0,)
    )
    used, (distinct, which) = one.masks.hidden.any(-1).sum(0), rollouts.batch.distinct()
    d, score = (
        exact_elbo(policy, distinct) - exact_elbo(reference, distinct),
        exact_elbo(policy, distinct),
    )
    scale = ((d - d[which].mean()) * torch.bincount(which) * score).abs()
    assert (
        set(used.argsort()[-2:].tolist()) == set(scale.argsort()[-2:].tolist())
        and used.max() > 3 * used.min()
    )


def test_later_updates_are_measured_from_the_rollout_policy():
    """From the second update on: d = (policy - rollout's policy) on the update's masks + the ratio
    of the first.
    """
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    config, rollouts = held(ROWS, ADVANTAGE)
    chosen = scheme("count + two-level", config, 2, inner_steps=3)
    first, *later = scorings(
        chosen, policy, reference, rollouts.batch, rollouts.advantage, lambda k: "count", (0,)
    )
    distinct, _ = rollouts.batch.distinct()
    for one in later:
        draws = elbo_draws(policy, distinct, one.masks)  # the policy has not moved
        assert torch.allclose(
            (draws - one.baseline_of(draws)).mean(0), first.ratio
        ) and not torch.equal(one.masks.hidden, first.masks.hidden)


def test_the_last_of_many_updates_is_measured_after_the_others():
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    config, rollouts = held(ROWS, ADVANTAGE, lr=0.05)
    moved = gradient_noise._after(config, policy, reference, rollouts, 3, 0)
    assert 0.05 < (moved.logits - policy.logits).abs().max() <= 0.11  # two steps of Adam
    assert gradient_noise._after(config, policy, reference, rollouts, 1, 0) is policy
    args = dict(schemes=["count + two-level"], views=[2], redraws=4, seed=0)
    one, three = (
        gradient_rows(config, policy, reference, rollouts, inner_steps=n, **args).set_index(
            "quantity"
        )["value"]
        for n in (1, 3)
    )
    assert one["mean_gradient_sq"] != three["mean_gradient_sq"]


@pytest.mark.slow
def test_squared_mean_gradient_and_rollout_noise_are_unbiased_with_few_redraws():
    """Means over many seeds at 1 and 2 views, where a product of a gradient with itself would add
    its noise.
    """
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    config, rollouts = held(
        ROWS, ADVANTAGE, lam=0.0
    )  # linear in the draws, so the mean gradient is the exact one
    args = dict(schemes=["count"], views=[1], redraws=3)
    found = [
        gradient_rows(config, policy, reference, rollouts, seed=i, **args).set_index("quantity")[
            "value"
        ]
        for i in range(60)
    ]
    squares, noise = (
        torch.tensor([f[name] for f in found]) for name in ("mean_gradient_sq", "var_gradient")
    )
    exact, error = (
        exact_gradient(config, policy, reference, rollouts).square().sum(),
        squares.std() / 60**0.5,
    )
    assert (squares.mean() - exact).abs() < 4 * error < noise.mean() / 3
    rolls = torch.tensor(
        [
            rollout_noise(config, policy, reference, rollouts, views=1, seed=i)["value"].item()
            for i in range(60)
        ]
    )
    exact, error = (
        rollout_noise(config, policy, reference, rollouts, views=3000, seed=0)["value"].item(),
        rolls.std() / 60**0.5,
    )
    assert (rolls.mean() - exact).abs() < 4 * error


def test_a_scheme_costs_its_forwards():
    """Two levels of 4 and 4 views: policy and reference on 4, forward and backward on 4, that is 20
    forwards, 5 views of one level.
    """
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    config, rollouts = held(ROWS, ADVANTAGE)
    frame = gradient_rows(
        config,
        policy,
        reference,
        rollouts,
        schemes=["count", "count + two-level"],
        views=[4],
        redraws=2,
        seed=0,
    )
    cost = (
        frame.drop_duplicates("design").set_index("design")["cost"] * 6 / 5
    )  # five distinct of six
    assert cost["count"] == pytest.approx(4) and cost["count + two-level"] == pytest.approx(5)
    later = gradient_rows(
        config,
        policy,
        reference,
        rollouts,
        schemes=["count + two-level"],
        views=[4],
        redraws=2,
        seed=0,
        inner_steps=8,
    )
    assert later["cost"].iloc[0] * 6 / 5 == pytest.approx((2 * 16 / 8 + 4 * 4) / 4)


def test_schemes_are_read_or_refused():
    config, _ = held(ROWS, ADVANTAGE)
    found = scheme("bsc(1, 0.5) + two-level + allocated", config, 3, inner_steps=8)
    assert (found.design, found.views, found.old_views, found.allocate, found.common_masks) == (
        "bsc(1, 0.5)",
        3,
        12,
        True,
        False,
    )
    assert (
        scheme("count + common", config, 2).common_masks
        and not scheme("count", config, 2).old_views
    )
    with pytest.raises(ValueError, match="may be followed by"):
        scheme("count + fast", config, 2)
    with pytest.raises(ValueError, match="old_views"):
        scheme("count + allocated", config, 2)


def test_rollout_noise_against_exact_gradients():
    """Prompts' parts of the gradient with exact scores: their variance over prompts, / P."""
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    config, rollouts = held(ROWS, ADVANTAGE)
    d = exact_elbo(policy, rollouts.batch) - exact_elbo(reference, rollouts.batch)
    weight = (rollouts.advantage - config.lam * (d - d.mean())).detach()
    parts = []
    for prompt in range(3):
        rows = slice(2 * prompt, 2 * prompt + 2)
        (part,) = torch.autograd.grad(
            -(weight[rows] * d[rows]).mean(), policy.logits, retain_graph=True
        )
        parts.append(part.flatten())
    exact = torch.stack(parts).var(0).sum().item() / 3
    row = rollout_noise(config, policy, reference, rollouts, views=3000, seed=0).iloc[0]
    assert row["value"] == pytest.approx(exact, rel=0.1) and row["quantity"] == "var_rollouts"


def test_long_completions_are_measured_without_tables(small, monkeypatch):
    """The same batch through the network instead of tables: the same variances and no bias beyond
    its error.
    """
    args = dict(designs=["count", "coupled"], views=[2, 3], redraws=3000, seed=0)
    tabled = score_rows(small.policy, small.reference, small.batch, **args)
    monkeypatch.setattr(score_noise, "TABLED", 3)
    frame = score_rows(small.policy, small.reference, small.batch, **args)
    both = frame.merge(tabled, on=["design", "views", "quantity"])
    noise = both[both["quantity"].str.startswith("var")]
    assert (
        len(noise) == 9 and (noise["value_x"] - noise["value_y"]).abs().max() < 1e-9
    )  # the same masks, so the same numbers
    bias = frame[frame["quantity"].str.startswith("bias")]
    assert (bias["value"].abs() < 4.5 * bias["stderr"]).all() and not frame[
        "quantity"
    ].str.startswith("share").any()


def test_a_design_that_is_not_there_is_no_missing_row(small):
    with pytest.raises(ValueError, match="design must be one of"):
        score_rows(
            small.policy,
            small.reference,
            small.batch,
            designs=["cuont"],
            views=[1],
            redraws=4,
            seed=0,
        )


def test_reliability_and_exact_correlation_of_score_rows(small):
    frame = score_rows(
        small.policy,
        small.reference,
        small.batch,
        designs=["count"],
        views=[4],
        redraws=2000,
        seed=0,
    )
    value = frame.set_index("quantity")["value"]
    signal = (
        (exact_elbo(small.policy, small.batch) - exact_elbo(small.reference, small.batch))
        .var()
        .item()
    )
    assert value["reliability"] == pytest.approx(signal / (signal + value["var_d_shared"]))
    four = small.batch.rows(torch.tensor([0, 1, 1, 2]))
    again = score_rows(
        small.policy, small.reference, four, designs=["count"], views=[1], redraws=4, seed=0
    )
    assert "correlation_exact" not in set(again["quantity"])  # three distinct points say nothing


def test_gap_samples_are_exact_where_they_say_so(small):
    frame = gap_samples(
        small.policy, small.reference, small.batch, design="count", views=2000, seed=0
    )
    (elbo, logp), (base, base_logp) = (
        exact_scores(small.policy, small.batch),
        exact_scores(small.reference, small.batch),
    )
    assert frame["d_exact"].tolist() == pytest.approx((elbo - base).tolist())
    assert frame["log_ratio"].tolist() == pytest.approx((logp - base_logp).tolist())
    assert (frame["elbo_gap"] >= -1e-12).all() and (frame["elbo_gap_reference"] >= -1e-12).all()
    assert (frame["d"] - frame["d_exact"]).abs().max() < 0.3


def test_conditional_likelihood_of_open_tokens_sums_to_one(small):
    """Where some tokens stand from the start, p(open tokens | the rest) sums to one over the
    strings of the open ones.
    """
    rows = [[a, b, 2, c] for a, b, c in itertools.product(range(3), repeat=3)]
    batch = completions(rows, [[True, True, False, True]] * 27)
    assert exact_scores(small.policy, batch)[1].exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_anova_of_tables_whose_parts_are_known():
    """Own effects are all tokens, effects of the number hidden are all counts, and what is neither
    is interaction.
    """
    tokens = 5
    inside = (torch.arange(2**tokens)[:, None] >> torch.arange(tokens) & 1).double()
    own, by_count = (
        torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7]),
        torch.tensor([0.0, 3.0, -1.0, 0.5, 2.0, 1.0]),
    )
    size = inside.sum(1).long()
    token = table_anova(inside * (own - own.mean()).double())
    assert token[[0, 2]].abs().max() < 1e-12 and token[1] > 0.1
    count = table_anova(inside * by_count[size][:, None].double())
    assert count[[1, 2]].abs().max() < 1e-12 and count[0] > 0.1
    pair = inside[:, [0]] * inside[:, [1]] - (size * (size - 1))[:, None] / (
        tokens * (tokens - 1)
    )  # mean 0 at every count
    assert table_anova(inside * pair)[0] < 1e-12 < 0.01 < table_anova(inside * pair)[2]


def test_anova_against_a_regression_on_the_tokens(small):
    """Of a random table: the parts add up to the exact variance, and the linear one is that of
    least squares at each count.
    """
    table = subset_tables(small.policy, small.batch)[0].detach()
    inside = (torch.arange(16)[:, None] >> torch.arange(4) & 1).double()
    size = inside.sum(1)
    view, linear = table.sum(1) * 4 / size.clamp(min=1), 0.0
    for n in range(1, 5):
        x, hidden = view[size == n], inside[size == n]
        fit = hidden @ torch.linalg.lstsq(hidden, x[:, None], driver="gelsd").solution[:, 0]
        linear += (fit - fit.mean()).square().mean().item() / 4
    parts = table_anova(table)
    assert parts[1].item() == pytest.approx(linear, abs=1e-10)
    assert parts.sum().item() == pytest.approx(
        count_moments(small.policy, small.batch)[1][0].item(), abs=1e-10
    )


def test_shares_of_the_variance_are_those_of_the_tables(small):
    """By name, mean and standard error over the three sequences; none of d for a policy that is its
    reference.
    """

    def shares(reference):
        rows = score_rows(
            small.policy, reference, small.batch, designs=["count"], views=[1], redraws=4, seed=0
        )
        return rows[rows["quantity"].str.startswith("share")].set_index("quantity")

    found, ours, theirs = (
        shares(small.reference),
        subset_tables(small.policy, small.batch),
        subset_tables(small.reference, small.batch),
    )
    for name, tables in (("score", ours), ("d", [a - b for a, b in zip(ours, theirs)])):
        parts = [[x.item() for x in table_anova(t.detach())] for t in tables]
        for i, part in enumerate(("count", "token", "interaction")):
            values = [p[i] / sum(p) for p in parts]
            row = found.loc[f"share_{part}_{name}"]
            assert row["value"] == pytest.approx(statistics.mean(values))
            assert row["stderr"] == pytest.approx(statistics.stdev(values) / 3**0.5)
    assert set(shares(small.policy).index) == {
        "share_count_score",
        "share_token_score",
        "share_interaction_score",
    }


def test_no_two_designs_of_a_figure_look_alike():
    more = [
        "bsc(0, 0)",
        "bsc(1, 1)",
        "cyck(2)",
        "auto",
        "auto + two-level + allocated",
        "count + common",
    ]
    looks = design_look([*DESIGNS, *more])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(DESIGNS) + len(
        more
    )  # some figures have no lines
