"""What the updates on one rollout measure d with: masks, the scores that the policy's are compared
with, and the gradient.

Shapes: M masked views, R replicates, N completions, B distinct ones.  Nats.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rspo_lab import objectives
from rspo_lab.batch import Batch
from rspo_lab.config import TrainConfig
from rspo_lab.design_choice import CountProfile, recommend_design
from rspo_lab.distributed import ALONE
from rspo_lab.estimators import elbo_draws, elbo_slices, two_level_baseline
from rspo_lab.masks.allocation import allocate, common, drawn
from rspo_lab.masks.base import Masks
from rspo_lab.masks.designs import design as design_named
from rspo_lab.random_streams import generator


@dataclass(frozen=True)
class Scoring:
    """Of one update: d = the policy's draws on `masks` - `baseline`."""

    masks: Masks
    baseline: (
        Float[Tensor, "R B"] | None
    )  # None: the policy's own draws at this update less `ratio`
    ratio: Float[Tensor, " B"] | None
    forwards: float  # forward passes a distinct completion that it took so far, of any model

    def baseline_of(self, draws: Float[Tensor, "R B"]) -> Float[Tensor, "R B"]:
        """What to take from `draws`, the policy's on `masks` at this update."""
        return draws.detach() - self.ratio if self.baseline is None else self.baseline


def design_chooser(config: TrainConfig, profile: CountProfile | None) -> Callable[[int], str]:
    """The design for a number of views: the one that the config asks for, or for "auto" what the
    profile recommends.
    """
    if config.design == "auto":
        return lambda views: recommend_design(profile, views)[0]
    return lambda views: config.design


def scorings(
    config: TrainConfig,
    policy,
    reference,
    batch: Batch,
    advantage: Float[Tensor, " N"],
    design_of: Callable[[int], str],
    key: tuple,
) -> list[Scoring]:
    """The scoring of the distinct completions of a rollout (N rows, group-major) for each of
    `config.inner_steps` updates.

    design_of: the design for a number of views; key: what the masks are drawn by.  With
    `old_views`, d = (policy - rollout's policy) on the update's masks + (that - reference) on
    `old_views` others; with `allocate` the former are shared out by |weight x score|, weight the
    sum of A - lam d over the equal completions, both as measured on the latter.
    """
    distinct, which = (
        batch.distinct()
    )  # equal completions are scored once, on masks that they share
    valid, size = distinct.valid.cpu(), config.slice_size
    group = torch.zeros(len(distinct), dtype=torch.long).scatter(
        0, which.cpu(), torch.arange(len(batch)) // config.group
    )

    def masks_of(views, *more):
        draw = generator(*key, *more, "masks")
        if config.common_masks:
            return common(design_of(views), valid, views, group, generator=draw)
        return design_named(design_of(views))(valid, views, generator=draw)

    if not config.old_views:
        found = []
        for masks in (masks_of(config.views, inner) for inner in range(config.inner_steps)):
            with torch.no_grad():
                found.append(
                    Scoring(
                        masks,
                        elbo_draws(reference, distinct, masks, slice_size=size),
                        None,
                        masks.forward_passes,
                    )
                )
        return found
    many = masks_of(config.old_views, "old")
    with torch.no_grad():
        score = elbo_draws(policy, distinct, many, slice_size=size).mean(0)
        ratio = score - elbo_draws(reference, distinct, many, slice_size=size).mean(0)
    if config.allocate:
        unit = (
            1 / distinct.valid.sum(1).to(ratio)
            if config.score_unit == "token"
            else torch.ones_like(ratio)
        )
        d = (ratio * unit)[which][None]
        weight = (
            advantage.to(ratio) - config.lam * (d - objectives.centre(d, config.scope_of(d)))[0]
        )
        total = torch.zeros_like(ratio).index_add(0, which, weight)
        size_of_update = (total * score * unit).abs().cpu()
        world = getattr(policy, "world", ALONE)  # a denoiser of another kind is alone
        each = world.first(
            lambda: allocate(size_of_update, config.views)
        )  # sums on GPUs may differ in their last bit
        updates = [
            drawn(design_of, valid, each, generator=generator(*key, i, "masks"))
            for i in range(config.inner_steps)
        ]
    else:
        updates = [masks_of(config.views, inner) for inner in range(config.inner_steps)]
    shared = 2 * many.forward_passes / config.inner_steps
    found = [Scoring(updates[0], None, ratio, shared)]
    for masks in updates[1:]:
        baseline = two_level_baseline(policy, distinct, masks, ratio, slice_size=size)
        found.append(Scoring(masks, baseline, None, shared + masks.forward_passes))
    return found


def accumulate_gradient(policy, batch: Batch, masks: Masks, loss_of, slice_size: int):
    """Adds the gradient of `loss_of(draws)` to the parameters; returns (loss, draws (R, B)), both
    detached.

    If all views fit one slice they share a graph.  If not, a first pass without gradient gives the
    loss and its derivative by every draw, and a second one back-propagates slice by slice: the same
    gradient, in the memory of one slice.  (the idea of BGPO, arXiv:2510.11683)  Exact as two passes
    agree: ValueError if the policy drops units at random.
    """
    if isinstance(policy, torch.nn.Module) and any(map(_drops, policy.modules())):
        raise ValueError(
            "dropout is active, so two passes would see two policies: call policy.eval()"
        )
    if masks.hidden.any(-1).sum() <= slice_size:
        draws = elbo_draws(policy, batch, masks)
        loss = loss_of(draws)
        loss.value.backward()
        return objectives.Loss(loss.value.detach(), loss.log), draws.detach()
    with torch.no_grad():
        draws = elbo_draws(policy, batch, masks, slice_size=slice_size)
    leaf = draws.clone().requires_grad_()
    loss = loss_of(leaf)
    (by_draw,) = torch.autograd.grad(loss.value, leaf)
    for part in elbo_slices(policy, batch, masks, slice_size=slice_size):
        (part * by_draw).sum().backward()
    return objectives.Loss(loss.value.detach(), loss.log), draws


def _drops(module: torch.nn.Module) -> bool:
    """Whether a layer drops units at random as it stands."""
    return (
        module.training
        and (
            getattr(module, "attention_dropout", 0)
            or (isinstance(module, torch.nn.Dropout) and module.p)
        )
        > 0
    )
