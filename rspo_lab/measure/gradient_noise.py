"""Noise of the RSPO gradient at fixed rollouts: over mask redraws, scheme by scheme, and over the
rollouts themselves.

Shapes: N completions, B distinct ones, n redraws.  Variances are traces of covariances; d in nats.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from rspo_lab import objectives
from rspo_lab.config import TrainConfig
from rspo_lab.design_choice import CountProfile
from rspo_lab.estimators import elbo_draws, log_ratio_draws
from rspo_lab.masks.designs import design as design_named
from rspo_lab.random_streams import generator
from rspo_lab.rollouts import Rollouts
from rspo_lab.statistics import variance_se
from rspo_lab.update import design_chooser, scorings

FLAGS = ("two-level", "allocated", "common")
FORWARDS = 4  # of one view in one level: policy forward and backward (2), reference forward


def scheme(text: str, config: TrainConfig, views: int, inner_steps: int = 1) -> TrainConfig:
    """`config` with the masks of a scheme: a design, then any of "+ two-level", "+ allocated"
    (needs two-level), "+ common".

    Two levels take max(1, inner_steps // 2) times as many views once as in each update: then a view
    costs 1.25 of one level's (less if inner_steps is odd and above 1).
    """
    design, *flags = (part.strip() for part in text.split("+"))
    if unknown := [flag for flag in flags if flag not in FLAGS]:
        raise ValueError(
            f"scheme {text!r}: a design may be followed by + {', + '.join(FLAGS)}, not {unknown[0]!r}"
        )
    old = views * max(1, inner_steps // 2) if "two-level" in flags else 0
    return replace(
        config,
        design=design,
        views=views,
        inner_steps=inner_steps,
        old_views=old,
        allocate="allocated" in flags,
        common_masks="common" in flags,
        objective="rspo",
        use_reference=True,
        residual="shared",
        score_unit="sequence",
    )


def gradient_rows(
    config: TrainConfig,
    policy: torch.nn.Module,
    reference: Callable,
    rollouts: Rollouts,
    *,
    schemes: list[str],
    views: list[int],
    redraws: int,
    seed: int,
    inner_steps: int = 1,
    profile: CountProfile | None = None,
    on_redraw: Callable[[int, int], None] = lambda done, of: None,
) -> pd.DataFrame:
    """Noise of one update's RSPO gradient over mask redraws, all else held: a row a (scheme, views,
    quantity).

    var_gradient; var_d_rollouts: variance of d, mean over the completions; mean_gradient_sq: the
    squared norm of the mean gradient, from products of different redraws; seconds: of one redraw.
    As in training, equal completions are scored once.
    cost: forwards a completion, in views of one level (policy forward and backward, reference
    forward: 4 forwards). The design "auto" takes what `profile` recommends.  With inner_steps > 1
    it is the last of that many updates on these rollouts, reached by AdamW at config.lr with
    `count` masks.
    """
    moved = _after(config, policy, reference, rollouts, inner_steps, seed)
    parameters = [p for p in moved.parameters() if p.requires_grad]
    batch, advantage = rollouts.batch, rollouts.advantage
    distinct, which = batch.distinct()
    rows, done, total = [], 0, len(schemes) * len(views) * redraws
    for text in schemes:
        for k in views:
            chosen, gradients, ratios, costs, seconds = (
                scheme(text, config, k, inner_steps),
                [],
                [],
                [],
                [],
            )
            design_of = design_chooser(chosen, profile)
            for redraw in range(redraws):
                began, key = time.perf_counter(), (seed, text, k, redraw, "gradient")
                last = scorings(chosen, policy, reference, batch, advantage, design_of, key)[-1]
                scored = time.perf_counter()
                draws = elbo_draws(moved, distinct, last.masks)
                d = (draws - last.baseline_of(draws))[:, which]
                loss = objectives.rspo(
                    d, advantage.to(d), lam=config.lam, scope=config.scope_of(d)
                ).value
                gradients.append(_flat(torch.autograd.grad(loss, parameters)))
                ratios.append(d.detach().mean(0).double().cpu())
                seconds.append(time.perf_counter() - scored + (scored - began) / inner_steps)
                costs.append(
                    (3 * last.masks.forward_passes + last.forwards)
                    * len(distinct)
                    / len(batch)
                    / FORWARDS
                )
                done += 1
                on_redraw(done, total)
            cost, stacked, seconds = (
                sum(costs) / redraws,
                torch.stack(gradients),
                torch.tensor(seconds),
            )
            away = (stacked - stacked.mean(0)).square().sum(1) * redraws / (redraws - 1)
            pairs = (stacked * (stacked.sum(0) - stacked)).sum(1) / (redraws - 1)
            variance, error = variance_se(torch.stack(ratios))
            rows += [
                (text, k, cost, "var_gradient", away.mean(), away.std() / redraws**0.5),
                (text, k, cost, "mean_gradient_sq", pairs.mean(), 2 * pairs.std() / redraws**0.5),
                (
                    text,
                    k,
                    cost,
                    "var_d_rollouts",
                    variance.mean(),
                    _spread_error(variance, error, which),
                ),
                (text, k, cost, "seconds", seconds.median(), seconds.std() / redraws**0.5),
            ]
    frame = pd.DataFrame(rows, columns=["design", "views", "cost", "quantity", "value", "stderr"])
    return frame.astype({"value": float, "stderr": float})


def rollout_noise(
    config: TrainConfig,
    policy: torch.nn.Module,
    reference: Callable,
    rollouts: Rollouts,
    *,
    views: int,
    seed: int,
) -> pd.DataFrame:
    """The variance of the RSPO gradient over prompts and completions, free of mask noise: one row,
    quantity var_rollouts.

    The gradient is a mean over P prompts' parts.  Two independent sets of `count` masks give each
    part twice, and the covariance of the two over prompts, / P, is what masks do not explain.  d is
    centred by a mean over the batch from other masks.
    """
    whole = rollouts.batch
    with torch.no_grad():
        masks = design_named("count")(
            whole.valid.cpu(), views, generator=generator(seed, "rollout noise")
        )
        centre = log_ratio_draws(
            policy, reference, whole, masks, slice_size=config.slice_size
        ).mean()
    parameters, group, both = [p for p in policy.parameters() if p.requires_grad], config.group, []
    prompts = len(rollouts.batch) // group
    for half in range(2):
        parts = []
        for prompt in range(prompts):
            rows = torch.arange(prompt * group, (prompt + 1) * group)
            distinct, which = rollouts.batch.rows(rows).distinct()
            masks = design_named("count")(
                distinct.valid.cpu(),
                views,
                generator=generator(seed, prompt, half, "rollout noise"),
            )
            d = log_ratio_draws(policy, reference, distinct, masks)[:, which]
            loss = objectives.rspo(
                d - centre, rollouts.advantage[rows].to(d), lam=config.lam, scope="none"
            ).value
            parts.append(_flat(torch.autograd.grad(loss, parameters)))
        both.append(torch.stack(parts))
    a, b = (parts - parts.mean(0) for parts in both)
    each = (a * b).sum(1) / (prompts - 1)
    value, stderr = each.sum() / prompts, each.std() / prompts**0.5
    row = ("count", views, 2.0 * views, "var_rollouts", value.item(), stderr.item())
    return pd.DataFrame([row], columns=["design", "views", "cost", "quantity", "value", "stderr"])


def _after(config, policy, reference, rollouts, inner_steps, seed):
    """A copy of the policy after inner_steps - 1 updates on these rollouts (the policy itself if
    that is none).
    """
    if inner_steps == 1:
        return policy
    moved, (batch, which) = copy.deepcopy(policy), rollouts.batch.distinct()
    parameters = [p for p in moved.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    for inner in range(inner_steps - 1):
        masks = design_named("count")(
            batch.valid.cpu(), 4, generator=generator(seed, inner, "move")
        )
        d = log_ratio_draws(moved, reference, batch, masks)[:, which]
        optimizer.zero_grad()
        objectives.rspo(
            d, rollouts.advantage.to(d), lam=config.lam, scope=config.scope_of(d)
        ).value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
    return moved


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).double().cpu()


def _spread_error(variance, error, which) -> Tensor:
    """Standard error of the mean variance over completions, of which equal ones share their draws."""
    times = torch.bincount(which.cpu()).double()
    first = torch.zeros(len(times), dtype=torch.long).scatter(
        0, which.cpu(), torch.arange(len(which))
    )
    return (times * error[first]).norm() / len(which)
