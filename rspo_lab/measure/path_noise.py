"""Noise of sampled steps of a rollout's path, against all of its steps, by design and views.

Shapes: B paths, n redraws of their masks, T steps of the longest path.  Nats, nats^2.
"""

from dataclasses import replace
from itertools import product

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rspo_lab.batch import Batch
from rspo_lab.estimators import Denoiser, elbo_draws, token_logps
from rspo_lab.masks.base import Masks
from rspo_lab.masks.designs import path_design
from rspo_lab.measure.score_noise import Expectation, frame_of, noise_quantities
from rspo_lab.policies import TrainedPolicy
from rspo_lab.random_streams import generator
from rspo_lab.rollouts import fixed_rollouts

# of `score_noise` and what it is called here: another score with another expectation
QUANTITIES = {
    "var_score": "var_path_score",
    "var_d_shared": "var_path_d",
    "bias_score": "bias_path_score",
    "bias_d": "bias_path_d",
}


def of_trained(
    measured: TrainedPolicy,
    *,
    prompts: int,
    group: int,
    threshold: float,
    designs: list[str],
    views: list[int],
    merges: list[int],
    redraws: int,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(`path_rows`, `merged_rows`) of a saved policy's own rollouts, decoded with a threshold."""
    config = replace(
        measured.config,
        objective="reinforce_path",
        hyper=None,
        design="path",
        views=1,
        path_score="tokens",
        residual="shared",
        old_views=0,
        allocate=False,
        threshold=threshold,
    )
    policy, reference = measured.policy, measured.reference
    paths = fixed_rollouts(config, policy, prompts=prompts, group=group, seed=seed).distinct
    sampled = path_rows(
        policy, reference, paths, designs=designs, views=views, redraws=redraws, seed=seed
    )
    return sampled, merged_rows(policy, reference, paths, merges=merges)


@torch.no_grad()
def path_rows(
    policy: Denoiser,
    reference: Denoiser,
    batch: Batch,
    *,
    designs: list[str],
    views: list[int],
    redraws: int,
    seed: int,
    slice_size: int = 2048,
) -> pd.DataFrame:
    """Bias and variance of the path's score and of its d when only some of its steps are scored.

    batch: rollouts that carry their steps (`Rollouts.distinct` of a run on the path).  One row per
    design, number of views and quantity, as `score_noise.score_rows`: bias_path_score, bias_path_d,
    var_path_score, var_path_d (policy and reference at the same steps).  The expectation is the
    whole path, which is scored once, so a redraw of steps costs no forward.  Designs without
    randomness make one number of views.  ValueError for a batch without steps.
    """
    if batch.step is None or batch.surprisal is None:
        raise ValueError("path_rows needs rollouts that carry their steps: roll out for a path")
    whole = _drawn("path", batch, 1, 1, seed)
    ours, theirs = (
        token_logps(model, batch, whole, slice_size=slice_size).double().sum(-1).cpu()
        for model in (policy, reference)
    )
    expectation = _expectation(ours.sum(0), theirs.sum(0))
    rows = []
    for name, k in product(designs, views):
        try:
            masks = _drawn(name, batch, k, redraws, seed)
        except ValueError:
            continue
        score, base = (_estimates(steps, whole, masks) for steps in (ours, theirs))
        draw = generator(seed, name, k, "bootstrap")
        for quantity, *value in noise_quantities(score, base, expectation, draw):
            if quantity in QUANTITIES:
                rows.append((name, k, masks.forward_passes, QUANTITIES[quantity], *value))
    return frame_of(rows)


@torch.no_grad()
def merged_rows(
    policy: Denoiser,
    reference: Denoiser,
    batch: Batch,
    *,
    merges: list[int],
    slice_size: int = 2048,
) -> pd.DataFrame:
    """Bias of `path_merged` by how many steps it merges; no redraw changes it.

    Columns as in `path_rows`; a bias is the mean over the paths, with its stderr over them.
    """
    rows = []
    whole = _drawn("path", batch, 1, 1, 0)
    for merge in merges:
        masks = _drawn(f"path_merged({merge})", batch, 1, 1, 0)
        ours, theirs = (
            elbo_draws(model, batch, masks, slice_size=slice_size)[0].double()
            - elbo_draws(model, batch, whole, slice_size=slice_size)[0].double()
            for model in (policy, reference)
        )
        for quantity, bias in (("bias_path_score", ours), ("bias_path_d", ours - theirs)):
            error = bias.std() / len(bias) ** 0.5
            name = f"path_merged({merge})"
            rows.append((name, 1, masks.forward_passes, quantity, bias.mean(), error))
    return frame_of(rows)


def _drawn(name: str, batch: Batch, views: int, redraws: int, seed: int) -> Masks:
    """Masks of n redraws per path: row b * n + i is the i-th of path b."""
    valid, step, surprisal = (
        field.cpu().repeat_interleave(redraws, 0)  # pyright: ignore[reportOptionalMemberAccess]
        for field in (batch.valid, batch.step, batch.surprisal)
    )
    draw = generator(seed, name, views)
    return path_design(name)(valid, step, surprisal, views, generator=draw)


def _expectation(ours: Float[Tensor, " B"], theirs: Float[Tensor, " B"]) -> Expectation:
    none = torch.zeros_like(ours)
    return Expectation(ours, ours - theirs, none, none)


def _estimates(steps: Float[Tensor, "T B"], whole: Masks, masks: Masks) -> Float[Tensor, "n B"]:
    """The estimates of n redraws per path from what every step of it is worth."""
    paths = steps.shape[1]
    redraws = masks.hidden.shape[1] // paths
    left = whole.hidden.sum(-1)  # tokens hidden before a step, which tells a path's steps apart
    shown = masks.hidden.sum(-1).view(-1, paths, redraws)
    worth = torch.zeros(shown.shape, dtype=torch.float64)
    for t in range(len(steps)):
        met = (shown == left[t][None, :, None]) & (shown > 0)
        worth = torch.where(met, steps[t][None, :, None], worth)
    return (masks.weight.view(-1, paths, redraws) * worth).sum(0).T
