"""The estimated log-ratio against its target and against exact ones, through training.

Shapes: B sequences.  Nats.

Three log-ratios of policy to reference meet here: the estimated ELBO ratio d (on a few masks), the
exact ELBO ratio, which is what d is on average, and the exact random-order log-ratio, that of the
decoder that unmasks in uniformly random order.  None is that of the sampler that made the
completions.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch

from rspo_lab.batch import Batch
from rspo_lab.config import Reading
from rspo_lab.estimators import Denoiser, log_ratio_draws
from rspo_lab.masks.designs import design as design_named
from rspo_lab.objectives import RelativeScore, in_unit, relative_score
from rspo_lab.oracle import exact_scores
from rspo_lab.policies import TrainedRun
from rspo_lab.random_streams import generator
from rspo_lab.rollouts import Rollouts, fixed_rollouts

# columns of `gap_table` that get an interval
WITH_INTERVAL = ("r_estimate", "r_random_order", "mean_d_exact", "mean_random_order", "elbo_gap")


@torch.no_grad()
def gap_samples(
    policy: Denoiser, reference: Denoiser, batch: Batch, *, design: str, views: int, seed: int
) -> pd.DataFrame:
    """One row per sequence: the estimated and the exact ELBO ratio, and what it stands for.

    d: estimated ELBO ratio, on `views` masks; d_exact: exact ELBO_policy - ELBO_reference;
    random_order_log_ratio: exact log p_policy - log p_reference of random-order decoding; elbo_gap,
    elbo_gap_reference: log p - ELBO of either model.
    """
    distinct, which = batch.distinct()  # scored once, as in training
    masks = design_named(design)(distinct.valid.cpu(), views, generator=generator(seed, "gap"))
    d = log_ratio_draws(policy, reference, distinct, masks).mean(0)[which]
    elbo, logp = exact_scores(policy, batch)
    base_elbo, base_logp = exact_scores(reference, batch)
    columns = {
        "d": d,
        "d_exact": elbo - base_elbo,
        "random_order_log_ratio": logp - base_logp,
        "elbo_gap": logp - elbo,
        "elbo_gap_reference": base_logp - base_elbo,
    }
    return pd.DataFrame({name: values.double().cpu().numpy() for name, values in columns.items()})


def through_training(
    run: TrainedRun,
    *,
    prompts: int,
    group: int,
    design: str,
    views: int,
    lam: float,
    seed: int,
    steps: Iterable[int] | None = None,
    on_policy: Callable[[int, int], None] = lambda done, of: None,
) -> pd.DataFrame:
    """`gap_samples` of fresh rollouts of a run's saved policies, against their targets.

    All policies (or those of `steps`) complete the same problems.  Further columns: step, problem,
    reward, advantage; d_hat, target A/lam, gap, weight and flipped of the estimate, and
    flipped_exact, with the exact ELBO ratio in its place.  These are as `objectives.relative_score`
    has them, centred over these rollouts of one policy with the run's own scope.

    ValueError for lam <= 0, which has no target.
    """
    if lam <= 0:
        raise ValueError(f"the target A/lam needs lam > 0, not {lam}")
    steps = sorted(run.folders if steps is None else steps)
    reference = run.reference()
    frames = []
    for done, step in enumerate(steps, 1):
        policy = run.policy(step)
        rollouts = fixed_rollouts(run.config, policy, prompts=prompts, group=group, seed=seed)
        samples = gap_samples(
            policy, reference, rollouts.batch, design=design, views=views, seed=seed
        )
        frames.append(_against_target(samples, rollouts, lam, run.config.reading).assign(step=step))
        on_policy(done, len(steps))
    return pd.concat(frames, ignore_index=True)


def _against_target(
    samples: pd.DataFrame, rollouts: Rollouts, lam: float, reading: Reading
) -> pd.DataFrame:
    """The samples with their problem, reward and advantage, and the estimate against its target.

    d_hat, target, gap and weight are in the run's own unit, that of lam.
    """

    def terms_of(column: str) -> RelativeScore:
        d = torch.tensor(samples[column].to_numpy())[None]
        d = in_unit(d, rollouts.batch.valid.cpu(), reading.score_unit)
        how = {"lam": lam, "scope": reading.scope, "group": rollouts.group}
        return relative_score(d, rollouts.advantage, **how)

    estimated = terms_of("d")
    return samples.assign(
        problem=[example.id for example in rollouts.examples],
        reward=rollouts.reward.numpy(),
        advantage=rollouts.advantage.numpy(),
        d_hat=estimated.estimate.numpy(),
        target=estimated.target.numpy(),
        gap=estimated.gap.numpy(),
        weight=estimated.weight[0].numpy(),
        flipped=estimated.flipped.numpy(),
        flipped_exact=terms_of("d_exact").flipped.numpy(),
    )


def gap_table(samples: pd.DataFrame, *, seed: int, resamples: int = 400) -> pd.DataFrame:
    """The samples of `through_training` as one row per saved policy.

    solved: solve rate; distinct: number of distinct pairs of the two exact values (1 at step 0);
    target_rms, gap_rms: of target and gap.
    flips, flips_exact: share of the sequences with A != 0 whose weight A - lam d_hat has the other
    sign, by the estimated and by the exact ELBO ratio.
    slope, r_estimate: exact ELBO ratio regressed on, and correlated with, the estimated one (mask
    noise lowers both).
    r_random_order: correlation of the exact ELBO ratio with the exact random-order log-ratio (what
    no mask design can mend).
    mean_d_exact, mean_random_order: means of these two.
    elbo_gap, elbo_gap_solved, elbo_gap_not_solved: mean log p - ELBO of the policy.
    Columns *_low, *_high: 95 % percentile bootstrap over problems.
    """
    rows = []
    for step, part in samples.groupby("step"):
        points = part[["d_exact", "random_order_log_ratio"]].drop_duplicates()
        row = {"step": step, "n": len(part), "distinct": len(points)} | _gap_row(part)
        rng = np.random.default_rng([seed, int(step)])
        rows.append(row | _bootstrap(part, rng, resamples))
    return pd.DataFrame(rows)


def _bootstrap(part: pd.DataFrame, rng: np.random.Generator, resamples: int) -> dict[str, float]:
    """The ends of the intervals of one policy's row, when its problems are drawn again."""
    problems = [samples for _, samples in part.groupby("problem")]
    draws = []
    for _ in range(resamples):
        chosen = rng.integers(len(problems), size=len(problems))
        draws.append(_gap_row(pd.concat([problems[i] for i in chosen])))
    ends = {}
    for name in WITH_INTERVAL:
        values = [draw[name] for draw in draws if not np.isnan(draw[name])] or [np.nan]
        ends[f"{name}_low"], ends[f"{name}_high"] = np.percentile(values, [2.5, 97.5])
    return ends


def _gap_row(part: pd.DataFrame) -> dict[str, float]:
    """The point estimates of `gap_table` for one policy's sequences."""
    informed = part[part["advantage"] != 0]
    solved = part["reward"] == 1
    row = {
        "solved": solved.mean(),
        "target_rms": (part["target"] ** 2).mean() ** 0.5,
        "gap_rms": (part["gap"] ** 2).mean() ** 0.5,
        "flips": informed["flipped"].mean(),
        "flips_exact": informed["flipped_exact"].mean(),
        "slope": np.nan,
        "r_estimate": np.nan,
        "r_random_order": np.nan,
        "mean_d_exact": part["d_exact"].mean(),
        "mean_random_order": part["random_order_log_ratio"].mean(),
        "elbo_gap": part["elbo_gap"].mean(),
        "elbo_gap_solved": part.loc[solved, "elbo_gap"].mean(),
        "elbo_gap_not_solved": part.loc[~solved, "elbo_gap"].mean(),
    }
    if part["d"].std() > 0 and part["d_exact"].std() > 0:
        row["slope"] = np.polyfit(part["d"], part["d_exact"], 1)[0]
        row["r_estimate"] = part["d"].corr(part["d_exact"])
        row["r_random_order"] = part["d_exact"].corr(part["random_order_log_ratio"])
    return row
