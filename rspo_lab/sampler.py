"""The published semi-autoregressive sampler: block by block, the most confident tokens first.

Shapes: B sequences, P prompt tokens (left-padded), L completion tokens in L/n blocks of n tokens,
V vocabulary.  U <= B sequences that differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rspo_lab.distributed import ALONE, World
from rspo_lab.schedule import schedule

# logits(ids, prompt_valid, start, stop): the logits (B, stop - start, V) of the tokens at
# start..stop, given all of `ids` (B, P+L)
Logits = Callable[[Tensor, Tensor, int, int], Tensor]
# cached_logits(ids, prompt_valid, start, stop): the same logits, and a function that gives them
# again for ids that differ in start..stop only
CachedLogits = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Callable[[Tensor], Tensor]]]

# Probabilities in memory at once, when tokens are drawn: on a CPU few enough for its caches, else
# so many that launching the pieces costs nothing.
CPU_CHUNK = 2**20
GPU_CHUNK = 2**26


@dataclass(frozen=True)
class Rollout:
    """Completions, and how each of their tokens was written.

    step: the denoising step, counted from 0, that unmasked the token; -1 if it stood there before.
    confidence: the token's probability when it was unmasked; 1 if it stood there before.
    forwards: denoising steps that the row took.
    """

    completion: Int[Tensor, "B L"]
    step: Int[Tensor, "B L"]
    confidence: Float[Tensor, "B L"]
    forwards: Int[Tensor, " B"]


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
    cached_logits: CachedLogits | None = None,
    world: World = ALONE,
) -> Rollout:
    """Low-confidence remasking in blocks, on the schedule of LLaDA's released sampler.

    (LLaDA, arXiv:2502.09992, Alg. 5)  `canvas` is the completion to start from: `mask_id` where a
    token is to be written, other tokens stay.  Each block of `block` tokens takes steps * block / L
    steps.  A step draws a token for every masked position of the block from softmax(logits /
    temperature), the arg max at temperature 0, and keeps the most probable of them (untempered).
    Of m masked positions, m // steps are kept per step, and one more in the first m % steps; ties
    go to the left.

    The draw is by inverse CDF with one uniform number per position: the law of the published Gumbel
    arg max at 1/V of its random numbers, and the same numbers on every device.  Logits of -inf are
    never drawn.

    Two options leave the published sampler; notebook 01 measures what they change.  Below 1,
    `threshold` also keeps every token more probable than it.  `cached_logits` gives the logits of
    all but a block's first step from keys and values of that one.  (Fast-dLLM, arXiv:2505.22618)

    Each process of `world` decodes its share of the rows with the numbers that they have in one
    process, and all processes get all rows.  Raises ValueError for a schedule that does not come
    out even and for a negative temperature.
    """
    rows, length = canvas.shape
    width = prompt.shape[1]
    blocks, steps_per_block = schedule(length, block, steps)
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, not {temperature}")
    mine = world.share(rows)
    prompt_valid = prompt_valid[mine]
    ids = torch.cat([prompt[mine], canvas[mine]], 1)
    own = _unwritten(ids[:, width:])
    for b in range(blocks):
        here = slice(b * block, (b + 1) * block)
        span = (width + here.start, width + here.stop)
        step_logits = _step_logits(logits, cached_logits, prompt_valid, *span)
        masked = own.completion[:, here] == mask_id
        quota = quotas(masked.sum(1), steps_per_block)
        for n in range(steps_per_block):
            uniform = torch.rand(rows, block, generator=generator, dtype=torch.float64)[mine]
            open_rows = masked.any(1).nonzero()[:, 0]
            if not world.any(len(open_rows) > 0):
                break
            if not len(open_rows) and not world.sharded:
                continue  # other processes go on; sharded weights need this one in every forward
            block_logits, which = step_logits(ids, open_rows)
            left = masked[open_rows]
            token, prob = _draw_where(
                left, block_logits, which, uniform.to(ids.device)[open_rows], temperature
            )
            keep = _kept(left, prob, quota[n, open_rows], threshold)
            _write(own.completion, open_rows, here, keep, token)
            _write(own.step, open_rows, here, keep, b * steps_per_block + n)
            _write(own.confidence, open_rows, here, keep, prob)
            masked[open_rows] = left & ~keep
            own.forwards[open_rows] += 1
    return Rollout(
        completion=world.gather(own.completion, rows),
        step=world.gather(own.step, rows),
        confidence=world.gather(own.confidence, rows),
        forwards=world.gather(own.forwards, rows),
    )


def _unwritten(completion: Int[Tensor, "B L"]) -> Rollout:
    """The rollout before the first step; writing to its completion writes to the tensor given."""
    return Rollout(
        completion=completion,
        step=torch.full_like(completion, -1),
        confidence=torch.ones(completion.shape, device=completion.device),
        forwards=torch.zeros(len(completion), dtype=torch.long, device=completion.device),
    )


def quotas(masked: Int[Tensor, " B"], steps: int) -> Int[Tensor, "n B"]:
    """How many of its masked tokens each row keeps at each of a block's steps."""
    step = torch.arange(steps, device=masked.device)[:, None]
    return masked // steps + (step < masked % steps)


def _kept(
    left: Bool[Tensor, "B n"],
    prob: Float[Tensor, "B n"],
    quota: Int[Tensor, " B"],
    threshold: float,
) -> Bool[Tensor, "B n"]:
    """Of the tokens `left` in each row the `quota` most probable, and all above the threshold."""
    rank = prob.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return left & ((rank < quota[:, None]) | (prob > threshold))


def _write(
    target: Tensor,
    rows: Int[Tensor, " B"],
    here: slice,
    keep: Bool[Tensor, "B n"],
    value: Tensor | int,
) -> None:
    """Writes `value`, (B, n) or one number, to target[rows, here] where `keep`."""
    target[rows, here] = torch.where(keep, value, target[rows, here])


def _step_logits(
    logits: Logits,
    cached_logits: CachedLogits | None,
    prompt_valid: Bool[Tensor, "B P"],
    start: int,
    stop: int,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What gives the logits of a block at each of its steps.

    It is called with all ids (B, P+L) and the open rows, and returns (logits (U, n, V), for each
    open row which of the U are its own).
    """
    if cached_logits is None:
        return partial(_shared_logits, logits, prompt_valid, start, stop)
    return _CachedBlock(lambda ids: cached_logits(ids, prompt_valid, start, stop))


def _shared_logits(
    logits: Logits,
    prompt_valid: Bool[Tensor, "B P"],
    start: int,
    stop: int,
    ids: Int[Tensor, "B S"],
    open_rows: Int[Tensor, " O"],
) -> tuple[Float[Tensor, "U n V"], Int[Tensor, " O"]]:
    """Logits without a cache: rows that stand equal share a forward, and a full row costs none."""
    rows = open_rows if len(open_rows) else open_rows.new_zeros(1)
    states = torch.cat([ids[rows], prompt_valid[rows]], 1)
    distinct, which = states.unique(dim=0, return_inverse=True)
    tokens, valid = distinct.split([ids.shape[1], prompt_valid.shape[1]], 1)
    return logits(tokens, valid.bool(), start, stop), which[: len(open_rows)]


class _CachedBlock:
    """Logits of a block by a cache, which its first step fills and the later ones read."""

    def __init__(self, open_cache: Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]):
        self.open_cache = open_cache
        self.again: Callable[[Tensor], Tensor] | None = None

    def __call__(self, ids: Tensor, open_rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.again is None:
            logits, self.again = self.open_cache(ids)
            return logits, open_rows
        return self.again(ids), open_rows


def _draw_where(
    left: Bool[Tensor, "B n"],
    logits: Float[Tensor, "U n V"],
    which: Int[Tensor, " B"],
    uniform: Float[Tensor, "B n"],
    temperature: float,
) -> tuple[Int[Tensor, "B n"], Float[Tensor, "B n"]]:
    """(a token, its untempered probability) where `left`; (0, -1) elsewhere.

    Row b's logits are logits[which[b]].  At most a chunk of probabilities is in memory at once.
    """
    chunk = CPU_CHUNK if left.device.type == "cpu" else GPU_CHUNK
    tokens = []
    probs = []
    for places in left.nonzero().split(max(1, chunk // logits.shape[-1])):
        row, column = places.unbind(1)
        piece = logits[which[row], column].float()
        token = _draw(piece, uniform[row, column], temperature)
        tokens.append(token)
        probs.append(piece.softmax(-1).gather(-1, token[:, None])[:, 0])
    token = torch.zeros_like(left, dtype=torch.long).masked_scatter(left, torch.cat(tokens))
    prob = torch.full_like(uniform, -1, dtype=torch.float32)
    return token, prob.masked_scatter(left, torch.cat(probs))


def _draw(
    logits: Float[Tensor, "n V"], uniform: Float[Tensor, " n"], temperature: float
) -> Int[Tensor, " n"]:
    """One token per row from softmax(logits / temperature): the first whose cumulated probability
    exceeds `uniform`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0]
