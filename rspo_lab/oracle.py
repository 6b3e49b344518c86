"""The oracle: exact ELBO and log-likelihood of a masked diffusion model, by every subset of tokens.

Shapes: B sequences, u valid tokens of one row, 2^u subsets.  float64 nats.  Shares no code with the
estimators.

The likelihood is that of the decoder that reveals one uniformly random token per step, drawn from
its conditional: Z({}) = 1,  Z(S) = (1/|S|) sum over i in S of q(y_i | x, y without S) Z(S without
i),  p(y|x) = Z(all).  (Where some tokens stand from the start, or follow an end-of-text, it is the
likelihood of the others given them.)  The ELBO is the same recursion with the average inside the
logarithm (Jensen), so ELBO <= log p.  (arXiv:2110.02037)
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rspo_lab.batch import Batch

MOST_TOKENS = 16


def exact_elbo(denoiser: Callable, batch: Batch, *, slice_size: int = 256) -> Float[Tensor, " B"]:
    """ELBO(y|x) = sum over non-empty S of g(S) / (|S| C(u, |S|)).

    g(S): the summed log-probs of the tokens of S, hidden all at once.
    """
    return exact_scores(denoiser, batch, slice_size=slice_size)[0]


def exact_logp(denoiser: Callable, batch: Batch, *, slice_size: int = 256) -> Float[Tensor, " B"]:
    """log p(y|x) of decoding one token per step in random order, by dynamic programming."""
    return exact_scores(denoiser, batch, slice_size=slice_size)[1]


def exact_scores(
    denoiser: Callable, batch: Batch, *, slice_size: int = 256
) -> tuple[Tensor, Tensor]:
    """(ELBO, log p), each (B,), from one pass over the 2^u subsets of every distinct row."""
    tables = subset_tables(denoiser, batch, slice_size=slice_size)
    elbo = torch.stack([table_elbo(table) for table in tables])
    logp = torch.stack([table_logp(table) for table in tables])
    return elbo, logp


def count_moments(
    denoiser: Callable, batch: Batch, *, slice_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Exact (mean, variance), each (B,), of one view of `count`, over all subsets."""
    moments = []
    for table in subset_tables(denoiser, batch, slice_size=slice_size):
        tokens = table.shape[1]
        size, law = (values.to(table.device) for values in _sizes_and_law(tokens))
        draw = table.sum(1)[1:] * tokens / size[1:]
        mean = (law[1:] * draw).sum()
        variance = (law[1:] * (draw - mean) ** 2).sum()
        moments.append(torch.stack([mean, variance]))
    mean, variance = torch.stack(moments, 1)
    return mean, variance


def subset_tables(
    denoiser: Callable, batch: Batch, *, slice_size: int = 256
) -> list[Float[Tensor, "S u"]]:
    """The `subset_table` of every row; equal rows, as greedy samples often are, share one."""
    distinct, which = batch.distinct()
    tables = [
        subset_table(denoiser, distinct, row, slice_size=slice_size) for row in range(len(distinct))
    ]
    return [tables[i] for i in which.tolist()]


def subset_table(
    denoiser: Callable, batch: Batch, row: int, *, slice_size: int = 256
) -> Float[Tensor, "S u"]:
    """log q(y_i | x, y without S) for all 2^u subsets S of a row, 0 outside S.

    Bit j of the index: the j-th valid token is hidden.  Raises ValueError for more than MOST_TOKENS
    valid tokens, or none.
    """
    where = batch.valid[row].nonzero()[:, 0]
    tokens = len(where)
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(
            f"the oracle enumerates 2^u subsets, so it takes 1..{MOST_TOKENS} valid tokens, "
            f"not {tokens}"
        )
    subsets = (torch.arange(2**tokens)[:, None] >> torch.arange(tokens) & 1).bool().to(where.device)
    length = batch.completion.shape[1]
    rows = []
    for part in subsets.split(slice_size):
        hidden = torch.zeros(len(part), length, dtype=torch.bool, device=where.device)
        hidden[:, where] = part
        copies = batch.rows(torch.full((len(part),), row, device=where.device))
        rows.append(denoiser(copies, hidden)[:, where].double().where(part, 0.0))
    return torch.cat(rows)


def table_elbo(table: Float[Tensor, "S u"]) -> Float[Tensor, ""]:
    """The ELBO of the row that a `subset_table` is of."""
    tokens = table.shape[1]
    size, law = _sizes_and_law(tokens)
    return (table.sum(1) * (law * tokens / size.clamp(min=1)).to(table.device)).sum()


def table_logp(table: Float[Tensor, "S u"]) -> Float[Tensor, ""]:
    """log p of the row that a `subset_table` is of."""
    subsets, tokens = table.shape
    size, _ = _sizes_and_law(tokens)
    log_z = table.new_zeros(subsets)
    bit = 2 ** torch.arange(tokens)
    for n in range(1, tokens + 1):
        index = (size == n).nonzero()[:, 0]
        inside = (index[:, None] & bit) > 0
        step = table[index] + log_z[index[:, None] & ~bit]
        step = step.masked_fill(~inside.to(table.device), -torch.inf).logsumexp(1) - math.log(n)
        log_z = log_z.index_put((index.to(table.device),), step)
    return log_z[-1]


def _sizes_and_law(tokens: int) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """|S| and the probability 1/(u C(u, |S|)) of S under `count`, for all 2^u subsets S.

    The empty one has probability 0.
    """
    size = torch.tensor([s.bit_count() for s in range(2**tokens)], dtype=torch.float64)
    of_size = [0.0] + [1 / (tokens * math.comb(tokens, n)) for n in range(1, tokens + 1)]
    return size, torch.tensor(of_size, dtype=torch.float64)[size.long()]
