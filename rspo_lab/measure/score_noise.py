"""Noise of the estimates of score and d at fixed rollouts, by mask design and views, against exact
values where they can be had.

Shapes: B sequences, u scored tokens of one, R replicates, n redraws.  Nats, nats^2.
"""

from collections.abc import Callable

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rspo_lab.batch import Batch
from rspo_lab.estimators import elbo_draws
from rspo_lab.masks.base import Masks
from rspo_lab.masks.designs import design as design_named
from rspo_lab.oracle import count_moments, subset_tables, table_elbo, table_logp
from rspo_lab.random_streams import generator
from rspo_lab.statistics import correlation, variance_se

COLUMNS = ["design", "views", "cost", "quantity", "value", "stderr"]
TABLED = 12  # most tokens of a completion whose 2^u masks are tabulated
PERMUTATIONS = 256  # of `cycle`, for the expectation of longer ones


@torch.no_grad()
def score_rows(
    policy: Callable,
    reference: Callable,
    batch: Batch,
    *,
    designs: list[str],
    views: list[int],
    redraws: int,
    seed: int,
    slice_size: int = 2048,
    on_design: Callable[[int, int], None] = lambda done, of: None,
) -> pd.DataFrame:
    """Bias and variance of the estimates of the score and of d, one row a (design, views,
    quantity).

    quantity: bias_score, bias_d, var_score, var_d_shared (policy and reference on the same masks),
    var_d_independent (the sum of the variances of the two scores); each the mean over the batch's
    sequences.  stderr is the Monte-Carlo error of the redraws at these sequences; it means nothing
    for t_iid and t_redraw, of infinite variance.  cost: non-empty views a sequence.  A number of
    views that a design cannot make is left out.
    reliability: share of the variance of d between sequences and over masks together that is not
    noise; it is also the slope of exact on estimated d.  Its stderr is that of the noise.

    Completions of up to 12 tokens are tabulated: a redraw costs no forward, the bias is against the
    exact sum, and there are rows of
    what it rests on: share_count, share_token, share_interaction of score and d (where the variance
    of one `count` view comes from, see `table_anova`) and correlation_exact, of the exact ELBO
    ratio with the exact log-ratio; their stderr is over sequences. For longer ones the expectation
    is that of 256 permutations of `cycle`, whose own error is part of the bias's stderr.
    """
    tabled = int(batch.valid.sum(1).max()) <= TABLED
    if tabled:
        ours, theirs = (
            subset_tables(policy, batch, slice_size=slice_size),
            subset_tables(reference, batch, slice_size=slice_size),
        )
        score, base = (
            torch.stack([table_elbo(t) for t in tables]).cpu() for tables in (ours, theirs)
        )
        uncertain = {"score": torch.zeros(()), "d": torch.zeros(())}
    else:
        masks = design_named("cycle")(
            batch.valid.cpu(), PERMUTATIONS, generator=generator(seed, "expectation")
        )
        ours, theirs = policy, reference
        many, fewer = (
            elbo_draws(model, batch, masks, slice_size=slice_size).double().cpu()
            for model in (policy, reference)
        )
        score, base = many.mean(0), fewer.mean(0)
        uncertain = {"score": many.var(0) / PERMUTATIONS, "d": (many - fewer).var(0) / PERMUTATIONS}
    valid, rows, done = batch.valid.cpu().repeat_interleave(redraws, 0), [], 0
    signal = max((score - base).var().item() - uncertain["d"].mean().item(), 0.0)
    for design in designs:
        made = design_named(
            design
        )  # an unknown name is an error, only a number of views may not suit
        for k in views:
            done += 1
            try:
                masks = made(valid, k, generator=generator(seed, design, k))
            except ValueError:  # an odd number of paired views
                continue
            s, r = (
                _estimates(model, batch, masks, redraws, slice_size) for model in (ours, theirs)
            )
            for of, draws, exact in (("score", s, score), ("d", s - r, score - base)):
                variance, error = variance_se(draws)
                name = "var_score" if of == "score" else "var_d_shared"
                rows.append(
                    (
                        design,
                        k,
                        masks.forward_passes,
                        name,
                        variance.mean(),
                        error.norm() / len(batch),
                    )
                )
                error = (variance / redraws + uncertain[of]).sum().sqrt() / len(batch)
                rows.append(
                    (
                        design,
                        k,
                        masks.forward_passes,
                        f"bias_{of}",
                        (draws.mean(0) - exact).mean(),
                        error,
                    )
                )
            variance, error = variance_se(s, r)
            rows.append(
                (
                    design,
                    k,
                    masks.forward_passes,
                    "var_d_independent",
                    variance.mean(),
                    error.norm() / len(batch),
                )
            )
            noise, error = next(row[4:] for row in reversed(rows) if row[3] == "var_d_shared")
            if signal + noise > 0:
                slope = signal / (signal + noise)
                rows.append(
                    (
                        design,
                        k,
                        masks.forward_passes,
                        "reliability",
                        slope,
                        slope**2 / signal * error if signal else 0.0,
                    )
                )
            on_design(done, len(designs) * len(views))
    if tabled:
        rows += _exact_rows(ours, theirs)  # pyright: ignore[reportArgumentType]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.astype({"value": float, "stderr": float})


def _exact_rows(ours: list[Tensor], theirs: list[Tensor]) -> list[tuple]:
    """Rows that need no redraws: shares of the variance, and the correlation of ELBO ratio and
    log-ratio.
    """
    rows, differences = [], [a - b for a, b in zip(ours, theirs)]
    for name, tables in (("score", ours), ("d", differences)):
        shares = torch.stack([table_anova(table) for table in tables])
        shares = (shares / shares.sum(1, keepdim=True))[shares.sum(1) > 0]
        if len(shares) < 2:
            continue  # d of a policy that is still its reference
        error = shares.std(0) / len(shares) ** 0.5
        for part, value, stderr in zip(("count", "token", "interaction"), shares.mean(0), error):
            rows.append(("count", 1, 1.0, f"share_{part}_{name}", value, stderr))
    ratio = torch.stack([table_elbo(d) for d in differences])
    exact = torch.stack([table_logp(a) - table_logp(b) for a, b in zip(ours, theirs)])
    distinct = torch.stack([ratio, exact], 1).unique(dim=0).T
    r = correlation(*distinct)
    if r is not None and distinct.shape[1] > 3:
        rows.append(
            ("count", 1, 1.0, "correlation_exact", r, (1 - r * r) / (distinct.shape[1] - 3) ** 0.5)
        )
    return rows


def _estimates(model, batch, masks, redraws, slice_size) -> Float[Tensor, "n B"]:
    """Of n redraws, by look-up in a model's tables or by the model itself."""
    if isinstance(model, list):
        return table_estimates(model, batch.valid, masks)
    copies = batch.rows(
        torch.arange(len(batch), device=batch.valid.device).repeat_interleave(redraws)
    )
    return (
        elbo_draws(model, copies, masks, slice_size=slice_size)
        .mean(0)
        .double()
        .cpu()
        .view(len(batch), redraws)
        .T
    )


def table_estimates(
    tables: list[Tensor], valid: Bool[Tensor, "B L"], masks: Masks
) -> Float[Tensor, "n B"]:
    """`elbo_draws(...).mean(0)` of n redraws by look-up in the oracle's subset tables, so that a
    redraw costs no forward.

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


def table_anova(table: Float[Tensor, "S u"]) -> Float[Tensor, "3"]:
    """(between counts, linear in the tokens, interactions): the variance of one `count` view of a
    `subset_table`, nats^2.

    At l of u hidden tokens the indicators have covariance l/u (1 - l/u) u/(u-1) (I - 11'/u), so the
    linear part of a variable whose covariances with them are v explains |v|^2 (u-1) / (u l/u (1 -
    l/u)).
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
        linear.append(
            covariance.square().sum() * (tokens - 1) / (tokens * p * (1 - p))
            if n < tokens
            else x.new_zeros(())
        )
    linear, within = torch.stack(linear).mean(), torch.stack(within).mean()
    return torch.stack([torch.stack(means).var(correction=0), linear, within - linear])


def count_check(policy: Callable, batch: Batch, *, redraws: int, seed: int) -> dict[str, float]:
    """Variance of one `count` view, mean over sequences, nats^2: summed over all masks, and
    measured from redraws.
    """
    with torch.no_grad():
        exact = count_moments(policy, batch)[1].mean().item()
    rows = score_rows(
        policy, policy, batch, designs=["count"], views=[1], redraws=redraws, seed=seed
    ).set_index("quantity")
    return {
        "exact": exact,
        "measured": rows.loc["var_score", "value"],
        "stderr": rows.loc["var_score", "stderr"],
    }


def tidy(*frames: pd.DataFrame, task: str, policy: str) -> pd.DataFrame:
    """All rows of a study, with what they were measured on in front."""
    frame = pd.concat(frames, ignore_index=True)
    frame.insert(0, "task", task)
    frame.insert(1, "policy", policy)
    return frame


def efficiency(results: pd.DataFrame, baseline: str = "count") -> pd.DataFrame:
    """How many times lower than the baseline's each variance is at equal cost: rows with ratio and
    half, of a 95 % interval.

    The ratio is (variance x cost) of the baseline over that of the design at as many views, its
    error to first order in those of both variances.  The 1/t forms are left out unless they are the
    baseline: their variance is infinite, so a ratio grows with the redraws.
    """
    hidden = {"t_iid", "t_redraw"} - {baseline}
    part = results[
        results["quantity"].str.startswith("var_")
        & (results["quantity"] != "var_rollouts")
        & ~results["design"].isin(hidden)
    ]
    part = part[part["value"] > 0]  # a design without noise has no ratio
    part = part.assign(work=part["value"] * part["cost"], relative=part["stderr"] / part["value"])
    keys = [name for name in ("task", "policy", "quantity", "views") if name in part]
    base = part.loc[part["design"] == baseline, [*keys, "work", "relative"]]
    part = part.merge(base, on=keys, suffixes=("", "_baseline"))
    ratio = part["work_baseline"] / part["work"]
    half = 1.96 * ratio * (part["relative"] ** 2 + part["relative_baseline"] ** 2) ** 0.5
    return part[[*keys, "design", "cost"]].assign(ratio=ratio, half=half)


def factors(results: pd.DataFrame, baseline: str = "count") -> pd.DataFrame:
    """`efficiency` as a table: a row a (quantity, views), a column a design, "ratio ± half"."""
    found = efficiency(results, baseline)
    found = found[found["design"] != baseline]
    found = found.assign(
        text=[f"{ratio:.2f} ± {half:.2f}" for ratio, half in zip(found["ratio"], found["half"])]
    )
    keys = [name for name in ("task", "policy", "quantity", "views") if name in found]
    table = found.pivot(index=keys, columns="design", values="text")
    return (
        table[list(found["design"].unique())]
        .reindex(found[keys].drop_duplicates().apply(tuple, axis=1))
        .fillna("")
    )
