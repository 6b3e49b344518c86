"""Rollouts: completions of problems, their verified rewards and advantages, which are equal.

Shapes: B = prompts x group completions (group-major), U distinct ones of them, L completion tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rspo_lab.advantages import ADVANTAGES, uninformative
from rspo_lab.batch import Batch
from rspo_lab.config import TrainConfig
from rspo_lab.decoding import complete, rewards
from rspo_lab.models.diffusion_lm import DiffusionLM
from rspo_lab.random_streams import generator
from rspo_lab.sampler import Rollout
from rspo_lab.tasks import task as task_named


@dataclass(frozen=True)
class Rollouts:
    """Completions and what was made of them; equal ones are scored once, as one of `distinct`."""

    examples: list  # the problem of every completion
    batch: Batch
    distinct: Batch  # U rows
    which: Int[Tensor, " B"]  # the distinct completion that each one is
    group: Int[Tensor, " B"]  # the prompt that each one answers
    reward: Float[Tensor, " B"]  # float64 in [0, 1]
    advantage: Float[Tensor, " B"]
    record: dict[str, float]  # what training logs of it

    def __len__(self) -> int:
        return len(self.batch)


def roll_out(
    config: TrainConfig, policy: DiffusionLM, problems: list, generator: torch.Generator
) -> Rollouts:
    """`config.group` sampled completions per problem, their verified rewards and their advantages.

    With zero_variance = "skip" the groups whose rewards agree are left out; the record counts them.
    Losses and centres are then means over the rows that are left, so the gradient is larger by the
    inverse of their share.
    """
    task = task_named(config.task)
    examples = [problem for problem in problems for _ in range(config.group)]
    batch, rollout = complete(
        policy,
        task,
        examples,
        temperature=config.temperature,
        threshold=config.threshold,
        steps=config.decode_steps,
        generator=generator,
        cache=config.cache,
        **text_format(config),
    )
    verified = rewards(policy, task, examples, batch.completion, style=config.style)
    reward = torch.tensor(verified, dtype=torch.float64)
    advantage = ADVANTAGES[config.advantage](reward, config.group)
    silent = uninformative(reward, config.group)
    record = _record(batch, rollout, reward, advantage, silent, policy.tokenizer.eos_token_id)
    group = torch.arange(len(batch)) // config.group
    kept = torch.arange(len(batch))
    if config.zero_variance == "skip":
        kept = (silent[group] == 0).nonzero()[:, 0]
    batch = batch.rows(kept.to(batch.completion.device))
    distinct, which = batch.distinct() if len(batch) else (batch, kept)
    return Rollouts(
        examples=[examples[i] for i in kept.tolist()],
        batch=batch,
        distinct=distinct,
        which=which,
        group=group[kept],
        reward=reward[kept],
        advantage=advantage[kept],
        record=record,
    )


def fixed_rollouts(
    config: TrainConfig, policy: DiffusionLM, *, prompts: int, group: int, seed: int
) -> Rollouts:
    """Rollouts of training problems for measurements: the same problems for every policy."""
    config = replace(config, group=group, zero_variance="keep")
    task = task_named(config.task)
    if config.data:
        problems = task.read(config.data, prompts)
    else:
        problems = task.examples("train", prompts, seed=seed)
    return roll_out(config, policy, problems, generator(seed, "held still"))


def text_format(config: TrainConfig) -> dict[str, Any]:
    """How completions are laid out, for `complete` and `solve_rate`."""
    return {"style": config.style, "length": config.length, "block": config.block}


def _record(
    batch: Batch, rollout: Rollout, reward: Tensor, advantage: Tensor, silent: Tensor, end: int
) -> dict[str, float]:
    """What training logs of all completions, kept or not."""
    written = rollout.step >= 0
    return {
        "reward": reward.mean().item(),
        "solve_rate": (reward == 1).double().mean().item(),
        "advantage_sd": advantage.std().item(),
        "zero_variance_groups": silent.mean().item(),
        "tokens": batch.valid.sum(1).double().mean().item(),
        "ended": (batch.completion == end).any(1).double().mean().item(),
        "confidence": rollout.confidence[written].mean().item(),
        "decoding_forwards": rollout.forwards.double().mean().item(),
    }
