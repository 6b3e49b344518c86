"""A small base model: masked-diffusion pretraining on a task's own solutions, and how it decodes.

Shapes: B sequences, L completion tokens.
"""

import math
from collections.abc import Callable
from types import ModuleType

import pandas as pd
import torch

from rspo_lab.batch import Batch
from rspo_lab.decoding import complete, rewards, solve_rate
from rspo_lab.masks.published import count
from rspo_lab.models.diffusion_lm import DiffusionLM
from rspo_lab.models.kv_cache import KINDS
from rspo_lab.random_streams import generator
from rspo_lab.statistics import wilson


def pretrain(
    model: DiffusionLM,
    task: ModuleType,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    stop_at: float,
    eval_every: int,
    problems: int,
    on_eval: Callable[[dict], None] = lambda record: None,
) -> list[dict]:
    """Trains in place on the mean cross-entropy of the hidden tokens (`count` masks); returns one
    record an evaluation.

    Stops at the first evaluation whose greedy solve rate on `problems` training-split problems that
    are not trained on reaches `stop_at`, so that the held-out split is left for measuring.  AdamW
    (.9, .99), cosine over `steps`.
    """
    examples = task.examples("train", task.TRAIN_PROBLEMS, seed=seed)
    check, examples = examples[:problems], examples[problems:]
    pairs = [(e, text) for e in examples for text in task.solutions(e)[:2]]
    prompt, prompt_valid = model.encode([task.prompt(e, "compact") for e, _ in pairs])
    completion, _ = model.encode([text for _, text in pairs])
    to_write = model.encode_canvas([task.canvas(e) for e, _ in pairs]) == model.mask_id
    data = Batch(prompt, prompt_valid, completion, to_write)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    records, losses = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
        draw = generator(seed, "pretrain", step)
        batch = data.rows(torch.randint(len(data), (batch_size,), generator=draw))
        hidden = count(batch.valid, 1, generator=draw).hidden[0]
        loss = -model(batch, hidden).sum() / hidden.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            rate = solve_rate(model, task, check, seed=seed)
            records.append(
                {"step": step + 1, "loss": sum(losses) / len(losses), "solve_rate": rate}
            )
            losses.clear()
            on_eval(records[-1])
            if rate >= stop_at:
                break
    return records


def decoding(model: DiffusionLM, task: ModuleType, example, *, seed: int) -> pd.DataFrame:
    """How one compact problem is decoded greedily, one token a step: a row a position, with token,
    step and confidence.
    """
    batch, rollout = complete(
        model,
        task,
        [example],
        style="compact",
        length=0,
        block=0,
        steps=0,
        temperature=0.0,
        threshold=1.0,
        generator=generator(seed, "decoding"),
    )
    tokens = model.tokenizer.convert_ids_to_tokens(batch.completion[0].tolist())
    return pd.DataFrame(
        {
            "token": tokens,
            "step": rollout.step[0].tolist(),
            "confidence": rollout.confidence[0].tolist(),
        }
    )


def decoding_table(
    model: DiffusionLM, task: ModuleType, *, problems: int, seed: int
) -> pd.DataFrame:
    """Held-out solve rate, 95 % Wilson interval and forwards a completion: fewer steps, confidence
    thresholds, blocks and their caches.
    """
    examples, full = task.examples("test", problems, seed=0), task.COMPACT_LENGTH
    rows = []
    ways = [
        (steps, threshold, full, "none")
        for steps, threshold in ((full, 1.0), (full // 2, 1.0), (full // 4, 1.0))
    ]
    ways += [(full, threshold, full, "none") for threshold in (0.95, 0.9, 0.8)] + [
        (full, 1.0, full // 4, cache) for cache in KINDS
    ]
    for temperature in (0.0, 1.0):
        for steps, threshold, block, cache in ways:
            how = {
                "steps": steps,
                "temperature": temperature,
                "threshold": threshold,
                "block": block,
                "cache": cache,
            }
            batch, rollout = complete(
                model,
                task,
                examples,
                style="compact",
                length=0,
                generator=generator(seed, "evaluate", 0),
                **how,
            )
            rate = (
                sum(
                    r == 1
                    for r in rewards(model, task, examples, batch.completion, style="compact")
                )
                / problems
            )
            low, high = wilson(round(rate * problems), problems)
            forwards = rollout.forwards.double().mean().item()
            rows.append(
                how
                | {
                    "forwards": forwards,
                    "solve_rate": rate,
                    "low": low,
                    "high": high,
                    "n": problems,
                }
            )
    return pd.DataFrame(rows)
