"""The estimated log-ratio against its target and against the exact one, through training.

Shapes: B sequences.  Nats.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rspo_lab.batch import Batch
from rspo_lab.config import TrainConfig
from rspo_lab.estimators import log_ratio_draws
from rspo_lab.masks.designs import design as design_named
from rspo_lab.models.loading import load
from rspo_lab.oracle import exact_scores
from rspo_lab.policies import reference_of
from rspo_lab.random_streams import generator
from rspo_lab.rollouts import held_still


@torch.no_grad()
def gap_samples(
    policy: Callable, reference: Callable, batch: Batch, *, design: str, views: int, seed: int
) -> pd.DataFrame:
    """One row a sequence: the log-ratio as it is estimated, its exact expectation, and what it
    stands for.

    d: the estimate on `views` masks; d_exact: ELBO_policy - ELBO_reference; log_ratio: log
    pi/pi_ref; elbo_gap,
    elbo_gap_reference: log p - ELBO of either model.
    """
    distinct, which = batch.distinct()  # scored once, as in training
    masks = design_named(design)(distinct.valid.cpu(), views, generator=generator(seed, "gap"))
    d = log_ratio_draws(policy, reference, distinct, masks).mean(0)[which]
    (elbo, logp), (base_elbo, base_logp) = (
        exact_scores(policy, batch),
        exact_scores(reference, batch),
    )
    columns = {
        "d": d,
        "d_exact": elbo - base_elbo,
        "log_ratio": logp - base_logp,
        "elbo_gap": logp - elbo,
        "elbo_gap_reference": base_logp - base_elbo,
    }
    return pd.DataFrame({name: values.double().cpu().numpy() for name, values in columns.items()})


def through_training(
    config: TrainConfig,
    policies: dict[int, Path],
    *,
    prompts: int,
    group: int,
    design: str,
    views: int,
    lam: float,
    seed: int,
    on_policy: Callable[[int, int], None] = lambda done, of: None,
) -> pd.DataFrame:
    """`gap_samples` of fresh on-policy rollouts of every saved policy on the same problems, with
    target, gap and weight.

    d_hat is d centred over its policy's rollouts; target = A/lam, gap = A/lam - d_hat, weight = A -
    lam d_hat.
    """
    if lam <= 0:
        raise ValueError(f"the target A/lam needs lam > 0, not {lam}")
    reference, frames = reference_of(load(config.model)), []
    for done, (step, path) in enumerate(sorted(policies.items())):
        policy = load(path)
        rollouts = held_still(config, policy, prompts=prompts, group=group, seed=seed)
        frame = gap_samples(
            policy, reference, rollouts.batch, design=design, views=views, seed=seed
        )
        frame["d_hat"] = frame["d"] - frame["d"].mean()
        advantage = rollouts.advantage.numpy()
        frame = frame.assign(
            step=step,
            problem=[e.id for e in rollouts.examples],
            reward=rollouts.reward.numpy(),
            advantage=advantage,
            target=advantage / lam,
            gap=advantage / lam - frame["d_hat"],
            weight=advantage - lam * frame["d_hat"],
        )
        frames.append(frame)
        on_policy(done + 1, len(policies))
    return pd.concat(frames, ignore_index=True)


def gap_table(
    samples: pd.DataFrame, lam: float, *, seed: int, resamples: int = 400
) -> pd.DataFrame:
    """A row a saved policy: solve rate, rms of target and gap, sign flips, reliability and bias of
    d, and the ELBO gaps.

    slope, r_estimate: exact ELBO ratio regressed on, and correlated with, the estimate (mask noise
    lowers both).
    r_log_ratio: correlation of the exact ELBO ratio with the exact log-ratio (what no mask design
    can mend).
    flips, flips_exact: share of sequences with A != 0 for which A - lam d_hat has the other sign,
    by estimated and exact d.
    Columns *_low, *_high: 95 % percentile bootstrap over problems.
    """
    rows = []
    for step, part in samples.groupby("step"):
        rng, problems = (
            np.random.default_rng([seed, int(step)]),
            [rows for _, rows in part.groupby("problem")],
        )
        draws = [
            _gap_row(
                pd.concat([problems[i] for i in rng.integers(len(problems), size=len(problems))]),
                lam,
            )
            for _ in range(resamples)
        ]
        row = {
            "step": step,
            "n": len(part),
            "distinct": part[["d_exact", "log_ratio"]].drop_duplicates().shape[0],
        } | _gap_row(part, lam)
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
