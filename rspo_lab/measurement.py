"""Measurements at fixed rollouts: bias and variance of estimates by mask design, estimated against exact log-ratios.

Shapes: B sequences, u scored tokens of one, R replicates, n redraws.  Nats, nats^2.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rspo_lab import objectives
from rspo_lab.batch import Batch
from rspo_lab.config import TrainConfig
from rspo_lab.diagnostics import variance_se
from rspo_lab.estimators import log_ratio_draws
from rspo_lab.keys import generator
from rspo_lab.masks import Masks
from rspo_lab.masks import design as design_named
from rspo_lab.model import load, reference_of
from rspo_lab.oracle import count_moments, exact_scores, subset_tables, table_elbo
from rspo_lab.training import held_still


def score_rows(
    policy: Callable, reference: Callable, batch: Batch, *, designs: list[str], views: list[int], redraws: int, seed: int
) -> pd.DataFrame:
    """Bias and variance of the estimates of the score and of d, one row a (design, views, quantity).

    quantity: bias_score, bias_d (against the oracle), var_score, var_d_shared (policy and reference on the same masks),
    var_d_independent; each the mean over the batch's sequences.  stderr is the Monte-Carlo error of the redraws at these
    sequences; it means nothing for t_iid and t_redraw, of infinite variance.  cost: non-empty views a sequence.
    share_count, share_token, share_interaction of score and d: where the variance of one `count` view comes from, exact (see
    `table_anova`); the stderr is over sequences.  Balancing counts and tokens does not remove the last.
    """
    with torch.no_grad():
        ours, theirs = subset_tables(policy, batch), subset_tables(reference, batch)
    score, base = (torch.stack([table_elbo(t) for t in tables]) for tables in (ours, theirs))
    repeated = batch.valid.cpu().repeat_interleave(redraws, 0)
    rows = []
    for design in designs:
        for k in views:
            masks = design_named(design)(repeated, k, generator=generator(seed, design, k))
            other = design_named(design)(repeated, k, generator=generator(seed, design, k, "independent"))
            s, r = table_estimates(ours, batch.valid, masks), table_estimates(theirs, batch.valid, masks)
            samples = {"score": (s, score), "d_shared": (s - r, score - base)}
            samples["d_independent"] = (s - table_estimates(theirs, batch.valid, other), score - base)
            for name, (draws, exact) in samples.items():
                variance, error = variance_se(draws)
                rows.append((design, k, masks.forward_passes, f"var_{name}", variance.mean(), error.norm() / len(batch)))
                error = (variance / redraws).sum().sqrt() / len(batch)
                rows.append((design, k, masks.forward_passes, f"bias_{name}", (draws.mean(0) - exact.cpu()).mean(), error))
    for name, tables in (("score", ours), ("d", [a - b for a, b in zip(ours, theirs)])):
        shares = torch.stack([table_anova(table) for table in tables])
        shares = (shares / shares.sum(1, keepdim=True))[shares.sum(1) > 0]
        if len(shares) < 2:
            continue  # d of a policy that is still its reference
        error = shares.std(0) / len(shares) ** 0.5
        for part, value, stderr in zip(("count", "token", "interaction"), shares.mean(0), error):
            rows.append(("count", 1, 1.0, f"share_{part}_{name}", value, stderr))
    frame = _tidy(rows)
    return frame[frame["quantity"] != "bias_d_independent"].replace({"quantity": {"bias_d_shared": "bias_d"}})


def table_estimates(tables: list[Tensor], valid: Bool[Tensor, "B L"], masks: Masks) -> Float[Tensor, "n B"]:
    """`elbo_draws(...).mean(0)` of n redraws by look-up in the oracle's subset tables, so that a redraw costs no forward.

    Row b * n + i of `masks` is the i-th redraw for sequence b.
    """
    redraws = masks.hidden.shape[1] // len(tables)
    columns = []
    for row, table in enumerate(tables):
        here = slice(row * redraws, (row + 1) * redraws)
        bits = masks.hidden[:, here, valid[row].cpu()].long()
        code = (bits << torch.arange(bits.shape[-1])).sum(-1)
        if masks.scored is None:
            value = table.sum(1).cpu()[code]
        else:
            value = (table.cpu()[code] * masks.scored[:, here, valid[row].cpu()]).sum(-1)
        columns.append((masks.weight[:, here] * value).sum(0) / masks.replicates)
    return torch.stack(columns, 1)


def gradient_rows(
    policy: torch.nn.Module, reference: Callable, batch: Batch, advantage: Float[Tensor, " B"], *,
    designs: list[str], views: list[int], redraws: int, lam: float, seed: int,
    on_redraw: Callable[[int, int], None] = lambda done, of: None,
) -> pd.DataFrame:  # fmt: skip
    """Trace of the covariance of the RSPO gradient over mask redraws at these rollouts: rows of quantity var_gradient.

    The squared norm of the mean gradient, mean_gradient_sq, stands beside it, from products of different redraws.  As in
    training, equal completions share their masks and are scored once; cost counts that.
    """
    distinct, which = batch.distinct()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    rows, done, total = [], 0, len(designs) * len(views) * redraws
    for design in designs:
        for k in views:
            gradients, cost = [], 0.0
            for redraw in range(redraws):
                masks = design_named(design)(distinct.valid.cpu(), k, generator=generator(seed, design, k, redraw, "gradient"))
                d = log_ratio_draws(policy, reference, distinct, masks)[:, which]
                loss = objectives.rspo(d, advantage.to(d), lam=lam).value
                gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double())
                cost += masks.forward_passes * len(distinct) / len(batch) / redraws
                done += 1
                on_redraw(done, total)
            stacked = torch.stack(gradients)
            away = (stacked - stacked.mean(0)).square().sum(1) * redraws / (redraws - 1)
            rows.append((design, k, cost, "var_gradient", away.mean(), away.std() / redraws**0.5))
            pairs = (stacked * (stacked.sum(0) - stacked)).sum(1) / (redraws - 1)
            rows.append((design, k, cost, "mean_gradient_sq", pairs.mean(), 2 * pairs.std() / redraws**0.5))
    return _tidy(rows)


def table_anova(table: Float[Tensor, "S u"]) -> Float[Tensor, "3"]:
    """(between counts, linear in the tokens, interactions): the variance of one `count` view of a `subset_table`, nats^2.

    At l of u hidden tokens the indicators have covariance l/u (1 - l/u) u/(u-1) (I - 11'/u), so the linear part of a variable
    whose covariances with them are v explains |v|^2 (u-1) / (u l/u (1 - l/u)).
    """
    subsets, tokens = table.shape
    inside = (torch.arange(subsets)[:, None] >> torch.arange(tokens) & 1).double().to(table.device)
    size = inside.sum(1)
    view, means, linear, within = table.sum(1) * tokens / size.clamp(min=1), [], [], []
    for n in range(1, tokens + 1):
        x, hidden, p = view[size == n], inside[size == n], n / tokens
        centred = x - x.mean()
        covariance = (centred[:, None] * (hidden - p)).mean(0)
        means.append(x.mean())
        within.append(centred.square().mean())
        linear.append(covariance.square().sum() * (tokens - 1) / (tokens * p * (1 - p)) if n < tokens else x.new_zeros(()))
    linear, within = torch.stack(linear).mean(), torch.stack(within).mean()
    return torch.stack([torch.stack(means).var(correction=0), linear, within - linear])


def count_check(policy: Callable, batch: Batch, *, redraws: int, seed: int) -> dict[str, float]:
    """Variance of one `count` view, mean over sequences, nats^2: summed over all masks, and measured from redraws."""
    with torch.no_grad():
        exact = count_moments(policy, batch)[1].mean().item()
    rows = score_rows(policy, policy, batch, designs=["count"], views=[1], redraws=redraws, seed=seed).set_index("quantity")
    return {"exact": exact, "measured": rows.loc["var_score", "value"], "stderr": rows.loc["var_score", "stderr"]}


def tidy(*frames: pd.DataFrame, task: str, policy: str) -> pd.DataFrame:
    """All rows of a study, with what they were measured on in front."""
    frame = pd.concat(frames, ignore_index=True)
    frame.insert(0, "task", task)
    frame.insert(1, "policy", policy)
    return frame


def factors(results: pd.DataFrame) -> pd.DataFrame:
    """How many times lower than `count`'s each variance is at equal cost, "ratio ± half a 95 % Monte-Carlo interval".

    The ratio is (variance x cost) of count over that of the design, its error to first order in those of both variances.  Not
    for the 1/t forms: their variance is infinite, so what is measured of it is no estimate of anything.
    """
    part = results[results["quantity"].str.startswith("var_") & ~results["design"].isin(["t_iid", "t_redraw"])]
    part = part.assign(work=part["value"] * part["cost"], relative=part["stderr"] / part["value"])
    work, relative = (part.pivot_table(index=["quantity", "views"], columns="design", values=c, sort=False) for c in ("work", "relative"))
    ratio = work.rdiv(work["count"], axis=0)
    half = 1.96 * ratio * (relative**2).add(relative["count"] ** 2, axis=0) ** 0.5
    return (ratio.map("{:.2f}".format) + " ± " + half.map("{:.2f}".format)).drop(columns="count")


@torch.no_grad()
def gap_samples(policy: Callable, reference: Callable, batch: Batch, *, design: str, views: int, seed: int) -> pd.DataFrame:
    """One row a sequence: the log-ratio as it is estimated, its exact expectation, and what it stands for.

    d: the estimate on `views` masks; d_exact: ELBO_policy - ELBO_reference; log_ratio: log pi/pi_ref; elbo_gap,
    elbo_gap_reference: log p - ELBO of either model.
    """
    distinct, which = batch.distinct()  # scored once, as in training
    masks = design_named(design)(distinct.valid.cpu(), views, generator=generator(seed, "gap"))
    d = log_ratio_draws(policy, reference, distinct, masks).mean(0)[which]
    (elbo, logp), (base_elbo, base_logp) = exact_scores(policy, batch), exact_scores(reference, batch)
    columns = {
        "d": d, "d_exact": elbo - base_elbo, "log_ratio": logp - base_logp, "elbo_gap": logp - elbo,
        "elbo_gap_reference": base_logp - base_elbo,
    }  # fmt: skip
    return pd.DataFrame({name: values.double().cpu().numpy() for name, values in columns.items()})


def through_training(
    config: TrainConfig, policies: dict[int, Path], *, prompts: int, group: int, design: str, views: int, lam: float, seed: int,
    on_policy: Callable[[int, int], None] = lambda done, of: None,
) -> pd.DataFrame:  # fmt: skip
    """`gap_samples` of fresh on-policy rollouts of every saved policy on the same problems, with target, gap and weight.

    d_hat is d centred over its policy's rollouts; target = A/lam, gap = A/lam - d_hat, weight = A - lam d_hat.
    """
    if lam <= 0:
        raise ValueError(f"the target A/lam needs lam > 0, not {lam}")
    reference, frames = reference_of(load(config.model)), []
    for done, (step, path) in enumerate(sorted(policies.items())):
        policy = load(path)
        rollouts = held_still(config, policy, prompts=prompts, group=group, seed=seed)
        frame = gap_samples(policy, reference, rollouts.batch, design=design, views=views, seed=seed)
        frame["d_hat"] = frame["d"] - frame["d"].mean()
        advantage = rollouts.advantage.numpy()
        frame = frame.assign(
            step=step, problem=[e.id for e in rollouts.examples], reward=rollouts.reward.numpy(), advantage=advantage,
            target=advantage / lam,
            gap=advantage / lam - frame["d_hat"], weight=advantage - lam * frame["d_hat"],
        )  # fmt: skip
        frames.append(frame)
        on_policy(done + 1, len(policies))
    return pd.concat(frames, ignore_index=True)


def gap_table(samples: pd.DataFrame, lam: float, *, seed: int, resamples: int = 400) -> pd.DataFrame:
    """A row a saved policy: solve rate, rms of target and gap, sign flips, reliability and bias of d, and the ELBO gaps.

    slope, r_estimate: exact ELBO ratio regressed on, and correlated with, the estimate (mask noise lowers both).
    r_log_ratio: correlation of the exact ELBO ratio with the exact log-ratio (what no mask design can mend).
    flips, flips_exact: share of sequences with A != 0 for which A - lam d_hat has the other sign, by estimated and exact d.
    Columns *_low, *_high: 95 % percentile bootstrap over problems.
    """
    rows = []
    for step, part in samples.groupby("step"):
        rng, problems = np.random.default_rng([seed, int(step)]), [rows for _, rows in part.groupby("problem")]
        draws = [_gap_row(pd.concat([problems[i] for i in rng.integers(len(problems), size=len(problems))]), lam) for _ in range(resamples)]
        row = {"step": step, "n": len(part), "distinct": part[["d_exact", "log_ratio"]].drop_duplicates().shape[0]} | _gap_row(part, lam)
        for name in ("r_estimate", "r_log_ratio", "mean_d_exact", "mean_log_ratio", "elbo_gap"):
            values = [draw[name] for draw in draws if not np.isnan(draw[name])] or [np.nan]
            row[f"{name}_low"], row[f"{name}_high"] = np.percentile(values, [2.5, 97.5])
        rows.append(row)
    return pd.DataFrame(rows)


def _gap_row(part: pd.DataFrame, lam: float) -> dict[str, float]:
    """The point estimates of `gap_table` for one policy's sequences."""
    told = part["advantage"].to_numpy() != 0
    advantage = part["advantage"].to_numpy()[told]
    exact = (part["d_exact"] - part["d_exact"].mean()).to_numpy()[told]
    moved = part["d"].std() > 0 and part["d_exact"].std() > 0
    return {
        "solved": (part["reward"] == 1).mean(),
        "target_rms": (part["target"] ** 2).mean() ** 0.5,
        "gap_rms": (part["gap"] ** 2).mean() ** 0.5,
        "flips": (part["weight"].to_numpy()[told] * advantage < 0).mean() if told.any() else np.nan,
        "flips_exact": ((advantage - lam * exact) * advantage < 0).mean() if told.any() else np.nan,
        "slope": np.polyfit(part["d"], part["d_exact"], 1)[0] if moved else np.nan,
        "r_estimate": part["d"].corr(part["d_exact"]) if moved else np.nan,
        "r_log_ratio": part["d_exact"].corr(part["log_ratio"]) if moved else np.nan,
        "mean_d_exact": part["d_exact"].mean(),
        "mean_log_ratio": part["log_ratio"].mean(),
        "elbo_gap": part["elbo_gap"].mean(),
        "elbo_gap_solved": part.loc[part["reward"] == 1, "elbo_gap"].mean(),
        "elbo_gap_not_solved": part.loc[part["reward"] != 1, "elbo_gap"].mean(),
    }


def _tidy(rows: list[tuple]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["design", "views", "cost", "quantity", "value", "stderr"])
    return frame.astype({"value": float, "stderr": float})
