"""Masked-diffusion pretraining of a small base model on a task's own solutions, until it solves a stated share.

Shapes: B sequences, L completion tokens.
"""

import math
from collections.abc import Callable
from types import ModuleType

import torch

from rspo_lab.batch import Batch
from rspo_lab.evaluation import solve_rate
from rspo_lab.keys import generator
from rspo_lab.masks import count
from rspo_lab.model import DiffusionLM


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
    """Trains in place on the mean cross-entropy of the hidden tokens (`count` masks); returns one record an evaluation.

    Stops at the first evaluation whose greedy solve rate on `problems` training-split problems that are not trained on
    reaches `stop_at`, so that the held-out split is left for measuring.  AdamW (.9, .99), cosine over `steps`.
    """
    examples = task.examples("train", task.TRAIN_PROBLEMS, seed=seed)
    check, examples = examples[:problems], examples[problems:]
    pairs = [(e, text) for e in examples for text in task.solutions(e)[:2]]
    prompt, prompt_valid = model.encode([task.prompt(e, "compact") for e, _ in pairs])
    completion, _ = model.encode([text for _, text in pairs])
    to_write = model.encode_canvas([task.canvas(e) for e, _ in pairs]) == model.mask_id
    data = Batch(prompt, prompt_valid, completion, to_write)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    records, losses = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
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
            records.append({"step": step + 1, "loss": sum(losses) / len(losses), "solve_rate": rate})
            losses.clear()
            on_eval(records[-1])
            if rate >= stop_at:
                break
    return records
