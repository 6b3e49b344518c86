"""Held-out solve rates by decoding.

Shapes: B sequences, L completion tokens.
"""

from types import ModuleType

from rspo_lab.keys import generator
from rspo_lab.model import DiffusionLM
from rspo_lab.rollout import generate


def solved(
    model: DiffusionLM, task: ModuleType, examples: list, *, seed: int, temperature: float = 0.0, style: str = "compact",
    length: int | None = None, block: int | None = None, steps: int | None = None,
) -> list[float]:  # fmt: skip
    """Strict rewards of one completion an example: one token a step in one block, greedy, unless said otherwise."""
    length = length or task.COMPACT_LENGTH
    rewards = []
    for start in range(0, len(examples), 256):
        part = examples[start : start + 256]
        prompt, prompt_valid = model.encode([task.prompt(e, style) for e in part])
        rollout = generate(
            model.logits, prompt, prompt_valid, mask_id=model.mask_id, length=length, block=block or length,
            steps=steps or length, temperature=temperature, generator=generator(seed, "evaluate", start),
        )  # fmt: skip
        rewards += [task.reward(text, e, style=style) for text, e in zip(model.decode(rollout.completion), part)]
    return rewards


def solve_rate(model: DiffusionLM, task: ModuleType, examples: list, *, seed: int, **decoding) -> float:
    """The mean of `solved`."""
    rewards = solved(model, task, examples, seed=seed, **decoding)
    return sum(rewards) / len(rewards)
