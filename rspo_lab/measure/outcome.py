"""What the saved policies of a training run have learned: solve rates, breadth, and how far they
went from the base.

Shapes: n samples per problem, C clusters of problems that share what no two splits may share (a
Sudoku's solution grid, Countdown's numbers and target).  Rates in [0, 1], divergences in nats.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rspo_lab.batch import Batch
from rspo_lab.config import TrainConfig
from rspo_lab.decoding import complete, rewards
from rspo_lab.estimators import Denoiser
from rspo_lab.models.diffusion_lm import DiffusionLM
from rspo_lab.oracle import exact_scores
from rspo_lab.policies import TrainedRun, trained_run
from rspo_lab.random_streams import generator
from rspo_lab.rollouts import text_format
from rspo_lab.runs.files import replacing
from rspo_lab.statistics import pass_at_k
from rspo_lab.tasks import task as task_named

TEST_SETS = (1, 2, 3, 4, 5)  # seeds of generated test sets; training evaluates on that of seed 0
PROBLEMS = 128  # of each set
SAMPLES = 16  # per problem of the first set, for the last policy
EARLIER_SAMPLES = 4  # the same, for earlier policies
KS = (2, 4, 8)
EXACT = 8  # completions whose log-ratios are exact: the first of each of the first problems
FILE = "outcome.parquet"


def outcome(folder: str | Path) -> pd.DataFrame:
    """`policy_outcome` of every policy that a finished run has saved, one row per step.

    Further columns: step, and final, which is True for the last policy.  Kept in `outcome.parquet`
    in the folder and read from there if it has the steps and the columns of today.  About 10
    seconds per run on one core for the tiny models.  Errors as `policies.trained_run`.
    """
    folder = Path(folder)
    run = trained_run(folder)
    steps = sorted(step for step in run.folders if step > 0)
    if (folder / FILE).is_file():
        kept = pd.read_parquet(folder / FILE)
        if kept["step"].tolist() == steps and set(COLUMNS) == set(kept):
            return kept
    reference = run.reference()
    rows = [
        {"step": step, "final": step == steps[-1]}
        | policy_outcome(run.config, run.policy(step), reference, last=step == steps[-1])
        for step in steps
    ]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    with replacing(folder / FILE) as new:
        frame.to_parquet(new)
    return frame


def base_outcome(run: TrainedRun) -> pd.DataFrame:
    """The row of the base of a run, at step 0: its divergences from itself are 0."""
    row = policy_outcome(run.config, run.policy(0), run.reference(), last=True)
    return pd.DataFrame([{"step": 0, "final": False} | row], columns=COLUMNS)


@torch.no_grad()
def policy_outcome(
    config: TrainConfig, policy: DiffusionLM, reference: Denoiser, *, last: bool
) -> dict[str, Any]:
    """What one policy does on test problems, by name; equal problems and random numbers for all.

    greedy: solve rate of greedy decoding, one token per step, on all TEST_SETS.
    sampled: solve rate of samples of the run's own sampler (its temperature and threshold) on the
        first set; pass_k: share of its problems that k samples solve, unbiased (arXiv:2107.03374);
        distinct_k: expected number of different solved completions among k samples.
    decoding_forwards: denoising steps per sample.
    kl_random_order, elbo_ratio: means over EXACT samples of the exact log-ratio of random-order
        decoding and of the exact ELBO ratio, policy to base.  The samples are of the confidence
        sampler, so neither is a KL divergence, and both may be negative.
    greedy_clusters, sampled_clusters: the solved share per cluster, in the order of their keys, and
        cluster_problems, sampled_problems the number of problems in each.

    Policies that are not the `last` one get what the frontier needs: the samples, fewer of them.
    """
    task = task_named(config.task)
    problems = task.examples("test", PROBLEMS, seed=TEST_SETS[0])
    count = SAMPLES if last else EARLIER_SAMPLES
    batch, solved, forwards = _samples(config, policy, problems, count)
    row = {"decoding_forwards": forwards, "samples": count}
    row |= _breadth(batch, solved, count)
    row |= _by_cluster("sampled", task, problems, [sum(s) / count for s in _parted(solved, count)])
    if not last:
        return row
    sets = [task.examples("test", PROBLEMS, seed=seed) for seed in TEST_SETS]
    every = [example for examples in sets for example in examples]
    row |= _by_cluster("greedy", task, every, _greedy(config, policy, every))
    row |= _exact(policy, reference, batch.rows(torch.arange(EXACT) * count))
    return row


COLUMNS = [
    "step",
    "final",
    "samples",
    "greedy",
    "sampled",
    *(f"pass_{k}" for k in KS),
    *(f"distinct_{k}" for k in KS),
    "decoding_forwards",
    "kl_random_order",
    "elbo_ratio",
    "exact_completions",
    "greedy_clusters",
    "greedy_problems",
    "sampled_clusters",
    "sampled_problems",
]


def _samples(
    config: TrainConfig, policy: DiffusionLM, problems: list, count: int
) -> tuple[Batch, list[bool], float]:
    """(`count` completions per problem, whether each is right, denoising steps of one)."""
    task = task_named(config.task)
    examples = [problem for problem in problems for _ in range(count)]
    batch, rollout = complete(
        policy,
        task,
        examples,
        temperature=config.temperature,
        threshold=config.threshold,
        steps=config.decode_steps,
        generator=generator(0, "outcome", count),
        cache=config.cache,
        **text_format(config),
    )
    verified = rewards(policy, task, examples, batch.completion, style=config.style)
    return batch, [r == 1 for r in verified], rollout.forwards.double().mean().item()


def _greedy(config: TrainConfig, policy: DiffusionLM, examples: list) -> list[float]:
    """1 for every example that greedy decoding of one token per step solves, else 0."""
    task = task_named(config.task)
    solved = []
    for start in range(0, len(examples), 256):
        part = examples[start : start + 256]
        batch, _ = complete(
            policy,
            task,
            part,
            temperature=0.0,
            threshold=1.0,
            steps=config.eval_steps,
            generator=generator(0, "outcome", "greedy", start),
            **text_format(config),
        )
        verified = rewards(policy, task, part, batch.completion, style=config.style)
        solved += [float(r == 1) for r in verified]
    return solved


def _breadth(batch: Batch, solved: list[bool], count: int) -> dict[str, float]:
    """pass_k and distinct_k of `count` samples per problem, for every k up to it."""
    texts = [tuple(tokens) for tokens in batch.completion.tolist()]
    right = [text if good else None for text, good in zip(texts, solved)]
    found = [Counter(text for text in part if text) for part in _parted(right, count)]
    row = {}
    for k in KS:
        if k <= count:
            of_any = [pass_at_k(count, counts.total(), k) for counts in found]
            of_each = [sum(pass_at_k(count, m, k) for m in c.values()) for c in found]
            row |= {f"pass_{k}": _mean(of_any), f"distinct_{k}": _mean(of_each)}
    return row


def _by_cluster(name: str, task: Any, examples: list, solved: list[float]) -> dict[str, Any]:
    """The solve rate, and the share solved and the number of problems of every cluster."""
    clusters: dict[Any, list[float]] = {}
    for example, right in zip(examples, solved, strict=True):
        clusters.setdefault(task.split_key(example), []).append(right)
    parts = [clusters[key] for key in sorted(clusters)]
    return {
        name: _mean(solved),
        f"{name}_clusters": [_mean(part) for part in parts],
        f"{name}_problems": [len(part) for part in parts],
    }


def _exact(policy: Denoiser, reference: Denoiser, batch: Batch) -> dict[str, float]:
    """Means of the exact log-ratios of a few completions."""
    elbo, logp = exact_scores(policy, batch)
    base_elbo, base_logp = exact_scores(reference, batch)
    return {
        "kl_random_order": (logp - base_logp).mean().item(),
        "elbo_ratio": (elbo - base_elbo).mean().item(),
        "exact_completions": len(batch),
    }


def _parted(values: list, count: int) -> list[list]:
    """The values of one problem after the other."""
    return [values[i : i + count] for i in range(0, len(values), count)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
