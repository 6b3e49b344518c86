"""Completions by the published semi-autoregressive sampler: block by block, the most confident
tokens first.

Shapes: B sequences, P prompt tokens (left-padded), L completion tokens in L/block blocks of n
tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rspo_lab.distributed import ALONE, World

# Probabilities held at a time: on a CPU so few that they stay in its caches, else so many that
# launching pieces costs nothing.
CPU_CHUNK, CHUNK = 2**20, 2**26
# logits(ids, prompt_valid, start, stop) -> (B, stop - start, V): next-token logits of positions
# start..stop of `ids` (B, P+L)
Logits = Callable[[Tensor, Tensor, int, int], Tensor]
# hold(ids, prompt_valid, start, stop) -> (the same, a function that gives them again for ids that
# differ in start..stop only)
Hold = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class Rollout:
    completion: Int[Tensor, "B L"]
    step: Int[
        Tensor, "B L"
    ]  # the denoising step, counted from 0, that unmasked the token; -1 if it stood there before
    confidence: Float[
        Tensor, "B L"
    ]  # probability that the model gave the token when it was unmasked; 1 if it stood there
    forwards: Int[Tensor, " B"]  # denoising steps that the row took


def generate(
    logits: Logits,
    prompt: Int[Tensor, "B P"],
    prompt_valid: Bool[Tensor, "B P"],
    *,
    canvas: Int[Tensor, "B L"],
    mask_id: int,
    block: int,
    steps: int,
    temperature: float,
    generator: torch.Generator,
    threshold: float = 1.0,
    hold: Hold | None = None,
    world: World = ALONE,
) -> Rollout:
    """Low-confidence remasking in blocks.  (LLaDA, arXiv:2502.09992, Alg. 5; the schedule of its
    released sampler)

    `canvas` is the completion to start from: `mask_id` where a token is to be written, others stay
    as they stand.  Each block of `block` tokens takes n = steps * block / L steps.  A step draws a
    token for every masked position of the block from softmax(logits / temperature), the arg max at
    temperature 0, and keeps those with the highest untempered
    probability: of m masked positions at first, m // n a step, one more in the first m % n steps.
    Ties go to the left.

    Below 1, `threshold` also keeps every token more probable than it (Fast-dLLM, arXiv:2505.22618);
    `hold` gives the logits of all but a block's first step from keys and values of that one.
    Neither is the published sampler; what they change is measured in notebook 01.  Without `hold`,
    rows that stand equal share a forward, and a row whose block is full costs none.

    The draw is by inverse CDF with one uniform number a position: the law of the published Gumbel
    arg max at 1/V of its random numbers, and the same numbers on every device.  Logits of -inf are
    never drawn.  Each process of `world` decodes its share of the rows with the numbers that they
    have in one process, and all get all of them.
    """
    (rows, length), width = canvas.shape, prompt.shape[1]
    blocks, per_block = _schedule(length, block, steps, temperature)
    mine = world.share(rows)
    prompt_valid, canvas = prompt_valid[mine], canvas[mine]
    ids = torch.cat([prompt[mine], canvas], 1)
    unmasked_at = torch.full_like(canvas, -1)
    confidence = torch.ones(canvas.shape, device=canvas.device)
    forwards = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
    for b in range(blocks):
        here, start = slice(b * block, (b + 1) * block), width + b * block
        masked = canvas[:, here] == mask_id
        to_write = masked.sum(1, keepdim=True)
        for n in range(per_block):
            uniform = torch.rand(rows, block, generator=generator, dtype=torch.float64)[mine].to(
                canvas.device
            )
            open_rows = masked.any(1).nonzero()[:, 0]
            if not world.any(len(open_rows) > 0):
                break
            if hold and n == 0:
                held_logits, again = hold(ids, prompt_valid, start, start + block)
            elif hold:
                held_logits = again(ids)
            elif not len(
                open_rows
            ):  # others go on, and with sharded weights they need this process in every forward
                if world.sharded:
                    logits(ids[:1], prompt_valid[:1], start, start + block)
                continue
            most = (to_write // per_block + (n < to_write % per_block))[open_rows]
            if hold:
                block_logits, which = held_logits, open_rows
            else:
                states, which = torch.cat([ids[open_rows], prompt_valid[open_rows]], 1).unique(
                    dim=0, return_inverse=True
                )
                block_logits = logits(
                    states[:, : width + length],
                    states[:, width + length :].bool(),
                    start,
                    start + block,
                )
            left = masked[open_rows]
            token, prob = _draw_where(left, block_logits, which, uniform[open_rows], temperature)
            rank = prob.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            keep = left & ((rank < most) | (prob > threshold))
            ids[open_rows, start : start + block] = token.where(
                keep, ids[open_rows, start : start + block]
            )
            unmasked_at[open_rows, here] = unmasked_at[open_rows, here].masked_fill(
                keep, b * per_block + n
            )
            confidence[open_rows, here] = prob.where(keep, confidence[open_rows, here])
            masked[open_rows] = left & ~keep
            forwards[open_rows] += 1
    return Rollout(
        *(world.gather(mine, rows) for mine in (ids[:, width:], unmasked_at, confidence, forwards))
    )


def _schedule(length, block, steps, temperature) -> tuple[int, int]:
    """(blocks, steps a block); one clear error for a schedule that does not come out even."""
    if length % block:
        raise ValueError(f"length {length} is not a multiple of block {block}")
    blocks = length // block
    if steps % blocks or not blocks <= steps <= length:
        raise ValueError(
            f"steps {steps} must be a multiple of the {blocks} blocks, from {blocks} to {length}"
        )
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, not {temperature}")
    return blocks, steps // blocks


def _draw_where(
    left: Bool[Tensor, "B n"],
    logits: Float[Tensor, "U n V"],
    which: Int[Tensor, " B"],
    uniform: Float[Tensor, "B n"],
    temperature: float,
) -> tuple[Int[Tensor, "B n"], Float[Tensor, "B n"]]:
    """(a token, its untempered probability) where `left`; (0, -1) elsewhere.  Row b's logits are
    logits[which[b]].

    At most a chunk of probabilities is held at a time.
    """
    chunk = CPU_CHUNK if left.device.type == "cpu" else CHUNK
    token, prob = [], []
    for r, i in (
        piece.unbind(1) for piece in left.nonzero().split(max(1, chunk // logits.shape[-1]))
    ):
        some = logits[which[r], i].float()
        token.append(_draw(some, uniform[r, i], temperature))
        prob.append(some.softmax(-1).gather(-1, token[-1][:, None])[:, 0])
    tokens = torch.zeros_like(left, dtype=torch.long).masked_scatter(left, torch.cat(token))
    return tokens, torch.full_like(uniform, -1, dtype=torch.float32).masked_scatter(
        left, torch.cat(prob)
    )


def _draw(
    logits: Float[Tensor, "n V"], uniform: Float[Tensor, " n"], temperature: float
) -> Int[Tensor, " n"]:
    """One token a row from softmax(logits / temperature), as the first whose cumulated probability
    exceeds `uniform`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0]
