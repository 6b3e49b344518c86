"""Decoding a task's problems with a model, and solve rates.

Shapes: B sequences, L completion tokens.
"""

from functools import partial

import torch

from rspo_lab.batch import Batch, valid_until_end
from rspo_lab.models.diffusion_lm import DiffusionLM
from rspo_lab.random_streams import generator
from rspo_lab.sampler import Rollout, generate
from rspo_lab.tasks import Task
from rspo_lab.tasks.verdict import PREFILL


def complete(
    model: DiffusionLM,
    task: Task,
    examples: list,
    *,
    style: str,
    length: int,
    block: int,
    steps: int,
    temperature: float,
    threshold: float,
    generator: torch.Generator,
    cache: str = "none",
) -> tuple[Batch, Rollout]:
    """One completion an example, as the batch that estimators score and with how it was decoded.

    In compact style decoding starts from the task's canvas, and only the tokens written are scored;
    else from all masks.
    cache: which keys and values are held while a block is decoded, of `held.KINDS`.
    """
    prompt, prompt_valid = model.encode(prompts(model, task, examples, style))
    if style == "compact":
        canvas = model.encode_canvas([task.canvas(e) for e in examples])
    else:
        canvas = torch.full((len(examples), length), model.mask_id, device=model.device)
    rollout = generate(
        model.logits,
        prompt,
        prompt_valid,
        canvas=canvas,
        mask_id=model.mask_id,
        block=block or canvas.shape[1],
        steps=steps or canvas.shape[1],
        temperature=temperature,
        threshold=threshold,
        generator=generator,
        hold=partial(model.hold, suffix=cache == "dual") if cache != "none" else None,
        world=model.world,
    )
    valid = valid_until_end(rollout.completion, model.tokenizer.eos_token_id) & (
        canvas == model.mask_id
    )
    return Batch(prompt, prompt_valid, rollout.completion, valid), rollout


def prompts(model: DiffusionLM, task: Task, examples: list, style: str) -> list[str]:
    """What the model reads: in words, the message in the tokenizer's chat template (if it has one)
    and the style's prefill.
    """
    read = [task.prompt(e, style) for e in examples]
    if style != "compact" and model.tokenizer.chat_template:
        turns = [[{"role": "user", "content": text}] for text in read]
        read = [
            model.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            for turn in turns
        ]
    return [text + PREFILL[style] for text in read]


def texts(model: DiffusionLM, completion: torch.Tensor, style: str) -> list[str]:
    """Completions as text: compact ones up to the end of text, those in words with its token, which
    d1's Sudoku scorer looks for.
    """
    decoded, end = model.decode(completion), model.tokenizer.eos_token_id
    ended = (completion == end).any(1).tolist() if style != "compact" else [False] * len(decoded)
    return [text + model.tokenizer.eos_token if e else text for text, e in zip(decoded, ended)]


def rewards(
    model: DiffusionLM, task: Task, examples: list, completion: torch.Tensor, *, style: str
) -> list[float]:
    """Strict rewards of completions, one an example.  Of several processes the first judges: a
    limit of time may be met in one only.
    """
    decoded = model.decode(completion)
    return model.world.first(
        lambda: [
            task.reward(text, e, protocol="strict", style=style)
            for text, e in zip(decoded, examples)
        ]
    )


def solve_rate(
    model: DiffusionLM,
    task: Task,
    examples: list,
    *,
    seed: int,
    style: str = "compact",
    length: int = 0,
    block: int = 0,
    steps: int = 0,
) -> float:
    """Share of problems solved with one greedy completion each, one token a step in one block
    unless said otherwise.
    """
    solved = []
    for start in range(0, len(examples), 256):
        part = examples[start : start + 256]
        batch, _ = complete(
            model,
            task,
            part,
            style=style,
            length=length,
            block=block,
            steps=steps,
            temperature=0.0,
            threshold=1.0,
            generator=generator(seed, "evaluate", start),
        )
        solved += [
            reward == 1 for reward in rewards(model, task, part, batch.completion, style=style)
        ]
    return sum(solved) / len(solved)
