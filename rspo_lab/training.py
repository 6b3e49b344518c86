"""RL with verifiable rewards for a diffusion language model: rollout, masks, recipe, update, log,
save.

Shapes: B = prompts x group completions a step (group-major), R replicates of the score.  Nats.
"""

import math
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from rspo_lab import objectives
from rspo_lab.advantages import ADVANTAGES, uninformative
from rspo_lab.batch import Batch
from rspo_lab.checkpoints import (
    RECORDS,
    append,
    kept,
    resume,
    save,
    save_snapshot,
    saved_policy,
    trained_run,
)
from rspo_lab.config import TrainConfig
from rspo_lab.decoding import complete, rewards, solve_rate
from rspo_lab.design_choice import CountProfile, count_profile
from rspo_lab.diagnostics import gap_summary
from rspo_lab.distributed import ALONE, World, whole
from rspo_lab.estimators import elbo_draws
from rspo_lab.masks.designs import design as design_named
from rspo_lab.models.adapters import add_lora
from rspo_lab.models.diffusion_lm import DiffusionLM, shard
from rspo_lab.models.loading import load
from rspo_lab.policies import reference_of
from rspo_lab.random_streams import generator
from rspo_lab.runs.files import write_json
from rspo_lab.runs.interrupts import noted
from rspo_lab.runs.tracking import tracking
from rspo_lab.tasks import task as task_named
from rspo_lab.update import accumulate_gradient, design_chooser, scorings


class Diverged(RuntimeError):
    """A loss or gradient stopped being finite."""


class Preempted(RuntimeError):
    """A signal asked the run to end; its checkpoint is saved."""


def train(
    config: TrainConfig,
    run,
    *,
    on_step: Callable[[dict], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> list[dict]:
    """Trains to `config.steps`, going on from the run's checkpoint if there is one; returns the
    records of metrics.jsonl.

    `run` has a `path` (a folder, which gets metrics, sequences, timing and profile.jsonl,
    checkpoint.pt and snapshots/), `progress(done, total, note)` and a `stopped` flag, set when
    `should_stop` ended the run early.  Equal config and threads give equal bits on a CPU, through
    any number of kills and resumes; timing.jsonl alone differs.  All processes of `world` call this
    with the same config; their number changes the result by rounding only, also from one resume to
    the next, and the first writes the files.

    Raises ValueError for a checkpoint of another config, Diverged for a loss that is not finite,
    Preempted on SIGTERM or SIGUSR2 (once the step in hand is saved).
    """
    run.stopped = False
    policy, reference = _policies(config, world)
    device = policy.device
    task = task_named(config.task)
    problems, held_out = _problems(config, task)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    files = {name: run.path / f"{name}.jsonl" for name in RECORDS}
    done = resume(config, run.path, parameters, optimizer)
    log = append if world.rank == 0 else lambda path, record: None
    if world.rank == 0:
        write_json(run.path / "config.json", asdict(config))
    history, profiles = world.first(lambda: kept(files, done))
    spread = replace(
        config, slice_size=config.slice_size * world.size
    )  # a forward of all processes together
    if done == 0:
        history.append({"step": 0, "eval_solve_rate": _evaluate(config, policy, task, held_out)})
        log(files["metrics"], history[-1])
    on_step(history[-1])
    with tracking(config, run.path) as track, noted(signal.SIGTERM, signal.SIGUSR2) as signals:
        track(history[-1])
        for step in range(done + 1, config.steps + 1):
            began = time.perf_counter()
            chosen = torch.randperm(
                len(problems), generator=generator(config.seed, step, "problems")
            )[: config.prompts]
            rollouts = roll_out(
                config,
                policy,
                [problems[i] for i in chosen],
                generator(config.seed, step, "rollout"),
            )
            rolled = time.perf_counter()
            updates = _updates(
                spread, policy, reference, optimizer, parameters, rollouts, step, profiles
            )
            on_policy, d = updates[0]
            spent = {
                name: sum(update[name] for update, _ in updates)
                for name in ("forward_passes", "forwards")
            }
            record = {"step": step} | rollouts.record | on_policy | spent
            timing = {
                "step": step,
                "rollout_s": rolled - began,
                "update_s": time.perf_counter() - rolled,
                "peak_gib": _peak_gib(device),
            }
            if step % config.eval_every == 0 or step == config.steps:
                if config.design == "auto" and len(rollouts.batch):
                    profiles.append(
                        {"step": step} | asdict(_profile(spread, policy, reference, rollouts, step))
                    )
                    log(files["profile"], profiles[-1])
                record["eval_solve_rate"] = _evaluate(config, policy, task, held_out)
                pairs = {
                    "d": d.tolist(),
                    "advantage": rollouts.advantage.tolist(),
                    "reward": rollouts.reward.tolist(),
                }
                log(files["sequences"], {"step": step} | pairs)
            log(files["metrics"], record)
            log(files["timing"], timing)
            history.append(record)
            if step in config.snapshot_steps:
                save_snapshot(policy, run.path / "snapshots" / f"{step:06d}")
            on_step(record)
            track(record)
            stopping, received = world.any(should_stop()), world.any(bool(signals))
            if step % config.checkpoint_every == 0 or step == config.steps or stopping or received:
                save(config, run.path, step, parameters, optimizer, world)
            run.progress(step, config.steps, f"reward {record['reward']:.2f}")
            if received:
                name = signal.Signals(signals[0]).name if signals else "a signal to another process"
                raise Preempted(
                    f"{name} after step {step}, which is saved: run again to go on from there"
                )
            if stopping and step < config.steps:
                run.stopped = True
                break
    return history


@dataclass(frozen=True)
class Rollouts:
    """Completions of some problems with what was made of them; rows are group-major."""

    examples: list
    batch: Batch
    reward: torch.Tensor  # (B,) float64 in [0, 1]
    advantage: torch.Tensor  # (B,)
    record: dict[str, float]  # what training logs of it


def roll_out(
    config: TrainConfig, policy: DiffusionLM, problems: list, generator: torch.Generator
) -> Rollouts:
    """`config.group` sampled completions of every problem, their verified rewards and their
    advantages.
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
        **_format(config),
    )
    reward = torch.tensor(
        rewards(policy, task, examples, batch.completion, style=config.style), dtype=torch.float64
    )
    advantage = ADVANTAGES[config.advantage](reward, config.group)
    silent = uninformative(reward, config.group)
    record = {
        "reward": reward.mean().item(),
        "solve_rate": (reward == 1).double().mean().item(),
        "advantage_sd": advantage.std().item(),
        "zero_variance_groups": silent.mean().item(),
        "tokens": batch.valid.sum(1).double().mean().item(),
        "ended": (batch.completion == policy.tokenizer.eos_token_id).any(1).double().mean().item(),
        "confidence": rollout.confidence[rollout.step >= 0].mean().item(),
        "decoding_forwards": rollout.forwards.double().mean().item(),
    }
    if config.zero_variance == "skip":
        keep = (silent == 0).repeat_interleave(config.group).nonzero()[:, 0]
        batch, advantage, reward = (
            batch.rows(keep.to(batch.completion.device)),
            advantage[keep],
            reward[keep],
        )
        examples = [examples[i] for i in keep.tolist()]
    return Rollouts(examples, batch, reward, advantage, record)


def starting_point(config: TrainConfig) -> dict[str, float]:
    """The largest |d| over a few sequences before training: exactly 0 on shared masks, mask noise
    on independent ones.
    """
    policy, reference = _policies(config)
    batch = held_still(config, policy, prompts=2, group=4, seed=config.seed).batch
    design, valid = design_named(design_chooser(config, None)(config.views)), batch.valid.cpu()
    mine, theirs = (
        design(valid, config.views, generator=generator(config.seed, "start", i)) for i in (0, 1)
    )
    with torch.no_grad():
        score, same, other = (
            elbo_draws(m, batch, k)
            for m, k in ((policy, mine), (reference, mine), (reference, theirs))
        )
    return {
        "largest |d|, shared masks": (score - same).abs().max().item(),
        "independent masks": (score - other).abs().max().item(),
    }


def saved(trained: Path, step: int, **changes) -> tuple[TrainConfig, int, DiffusionLM, Callable]:
    """(config with changes, step, policy, reference) of a training run's policy of that step; step
    0 is the last one.
    """
    config, policies = trained_run(trained)
    step, folder = saved_policy(policies, step)
    return (
        replace(config, **changes),
        step,
        _load(config, folder),
        reference_of(_load(config, config.model)),
    )


def held_still(
    config: TrainConfig, policy: DiffusionLM, *, prompts: int, group: int, seed: int
) -> Rollouts:
    """Rollouts of `prompts` training problems, the same problems for every policy, for
    measurements.
    """
    config = replace(config, group=group, zero_variance="keep")
    task = task_named(config.task)
    problems = (
        task.read(config.data, prompts)
        if config.data
        else task.examples("train", prompts, seed=seed)
    )
    return roll_out(config, policy, problems, generator(seed, "held still"))


def _updates(config, policy, reference, optimizer, parameters, rollouts, step, profiles):
    """All updates on one rollout, each (what to log, d per sequence).  A batch with no row left
    (all skipped) changes nothing.
    """
    if len(rollouts.batch) == 0:
        return [
            (
                {
                    "loss": 0.0,
                    "gradient_norm": 0.0,
                    "lr": 0.0,
                    "forward_passes": 0.0,
                    "forwards": 0.0,
                },
                torch.zeros(0),
            )
        ]
    last = (
        CountProfile(**{k: v for k, v in profiles[-1].items() if k != "step"}) if profiles else None
    )
    design_of = design_chooser(config, last)
    scored = scorings(
        config,
        policy,
        reference,
        rollouts.batch,
        rollouts.advantage,
        design_of,
        (config.seed, step),
    )
    return [
        _update(config, policy, optimizer, parameters, rollouts, step, scoring)
        for scoring in scored
    ]


def _profile(config, policy, reference, rollouts, step):
    """The count profile of up to 64 of a rollout's distinct completions."""
    draw, (distinct, _) = generator(config.seed, step, "profile"), rollouts.batch.distinct()
    some = distinct.rows(
        torch.randperm(len(distinct), generator=draw)[:64].to(distinct.valid.device)
    )
    found = count_profile(
        policy, reference, some, pairs=8, generator=draw, slice_size=config.slice_size
    )
    return policy.world.first(lambda: found)  # sums on GPUs may differ in their last bit


def _update(config, policy, optimizer, parameters, rollouts, step, scoring):
    """One optimizer step; (what to log, d per sequence)."""
    batch, masks = rollouts.batch, scoring.masks
    unit = (
        1 / batch.valid.sum(1)
        if config.score_unit == "token"
        else torch.ones(len(batch), device=batch.completion.device)
    )
    distinct, which = batch.distinct()
    weight = rollouts.advantage.to(unit)
    for group in optimizer.param_groups:
        group["lr"] = (
            config.lr
            * min(1.0, step / config.warmup if config.warmup else 1.0)
            * _cosine(step / config.steps)
        )
    optimizer.zero_grad()
    recipe = objectives.RECIPES[config.objective]

    def loss_of(draws):
        return recipe(
            config, draws[:, which] * unit, scoring.baseline_of(draws)[:, which] * unit, weight
        )

    loss, score = accumulate_gradient(policy, distinct, masks, loss_of, config.slice_size)
    policy.world.sum_gradients(parameters)
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)).item()
    if not (math.isfinite(loss.value.item()) and math.isfinite(norm)):
        raise Diverged(
            f"step {step}: loss {loss.value.item()}, gradient norm {norm}; checkpoint.pt holds the last good step: lower lr or raise lam"
        )
    optimizer.step()
    d = (score - scoring.baseline_of(score))[:, which] * unit
    record = {
        "loss": loss.value.item(),
        "gradient_norm": norm,
        "lr": optimizer.param_groups[0]["lr"],
    }
    share = len(distinct) / (config.prompts * config.group)  # a completion, skipped ones too
    passes = 3 if masks.hidden.any(-1).sum() <= config.slice_size else 4
    record |= {
        "forward_passes": masks.forward_passes * share,
        "forwards": (passes * masks.forward_passes + scoring.forwards) * share,
    }
    lam = config.lam if config.objective == "rspo" else 0.0
    record |= loss.log | gap_summary(d, weight, lam, config.scope_of(d))
    if config.old_views:
        record |= {
            "mask_sd": None,
            "reliability": None,
        }  # replicates share the noise of the many masks, so their spread is not all
    return record, d.mean(0)


def _policies(config, world=ALONE):
    """(trainable policy, frozen reference); global randomness is left alone."""

    def loaded():
        model = _load(config, config.model)
        model.world = world
        return model

    policy = loaded()
    if policy.adapted:
        how = "m = load(folder); m.hf = m.hf.merge_and_unload(); m.save(other)"
        raise ValueError(
            f"{config.model} is a LoRA adapter, and the reference would be the base without it: merge them first ({how})"
        )
    if config.lora != "none":
        add_lora(
            policy, config.lora, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed
        )
    if not world.sharded:
        return policy, reference_of(policy)
    shard(policy)
    if policy.adapted:
        return policy, reference_of(policy)
    frozen = loaded().requires_grad_(
        False
    )  # a copy of its own, read again: there may be no room for two before they are parted
    shard(frozen)
    return policy, torch.no_grad()(frozen)


def _load(config, name):
    return load(
        name, device=config.device, dtype=getattr(torch, config.dtype), attention=config.attention
    )


def _problems(config, task):
    """(training, held-out) problems; a `data` file takes the place of the former, and what is held
    out is dropped from it.
    """
    n = config.eval_problems
    held_out = (
        task.read(config.eval_data, n) if config.eval_data else task.examples("test", n, seed=0)
    )
    problems = (
        task.read(config.data)
        if config.data
        else task.examples("train", task.TRAIN_PROBLEMS, seed=config.seed)
    )
    if config.data or config.eval_data:  # a task's own splits share nothing
        seen = {task.split_key(e) for e in held_out}
        problems = [e for e in problems if task.split_key(e) not in seen]
    if len(problems) < config.prompts:
        where = config.data or f"the training split of {config.task}"
        raise ValueError(
            f"{where} holds {len(problems)} problems that are not held out, fewer than prompts = {config.prompts}"
        )
    return problems, held_out


def _format(config):
    return {"style": config.style, "length": config.length, "block": config.block}


def _evaluate(config, policy, task, held_out):
    """Greedy held-out solve rate."""
    return solve_rate(
        policy, task, held_out, seed=config.seed, steps=config.eval_steps, **_format(config)
    )


def _cosine(share: float) -> float:
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))


def _peak_gib(device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
