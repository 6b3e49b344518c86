"""Exact scores in place of estimated ones, on Sudokus short enough for it: noise or bias?

A plugin (`-p plugins notebooks/studies/exact_scores.py`).  A completion of u tokens is scored on
all 2^u - 1 of its masks, so the ELBO has no noise, and the random-order log-likelihood is a
function of the same log-probs.  `task` sudoku_short has 6 blanks: 63 forwards per completion.
"""

import math
from types import ModuleType

import torch

from rspo_lab.masks.base import Masks, used_tokens
from rspo_lab.masks.designs import DESIGNS
from rspo_lab.objectives import METHODS, Evidence, Loss, Method, reinforce
from rspo_lab.oracle import table_logp
from rspo_lab.tasks import TASKS, sudoku

SHORT = 6  # blanks of a puzzle


def all_subsets(valid, views, *, generator) -> Masks:
    """Every non-empty set of tokens hidden once: the exact ELBO.

    Weight 1 / (l C(u, l)) for l tokens.  One replicate without noise, of 2^u - 1 views: view s of a
    row hides the tokens whose bits s has, in the order of the row's valid tokens.
    """
    used = used_tokens(valid, views, most=1.0)
    most = int(used.max())
    place = (valid.cumsum(1) - 1).clamp(min=0)
    subset = torch.arange(1, 2**most)[:, None, None]
    hidden = ((subset >> place) & 1).bool() & valid & (subset < 2 ** used[:, None])
    size = hidden.sum(-1)
    weight = torch.zeros(size.shape, dtype=torch.float64)
    for u in used.unique().tolist():
        chance = [0.0] + [1 / (n * math.comb(u, n)) for n in range(1, u + 1)] + [0.0] * (most - u)
        weight[:, used == u] = torch.tensor(chance, dtype=torch.float64)[size[:, used == u]]
    return Masks(hidden, weight, torch.zeros(len(subset), dtype=torch.long))


def exact_elbo(e: Evidence) -> Loss:
    """-mean A ELBO without noise; needs design all_subsets."""
    return reinforce(e)


def random_order_logp(e: Evidence) -> torch.Tensor:
    """log p(y) of decoding in uniformly random order, per completion, from all of its subsets."""
    scores = []
    for row, valid in enumerate(e.valid.cpu()):
        subsets = 2 ** int(valid.sum()) - 1
        table = e.policy[:subsets, row, valid].double()
        scores.append(table_logp(torch.cat([table.new_zeros(1, table.shape[1]), table])))
    return torch.stack(scores)


def exact_random_order(e: Evidence) -> Loss:
    """-mean A log p, log p exact for random-order decoding; needs design all_subsets."""
    score = random_order_logp(e)
    return Loss(-(e.advantage.double() * score).mean(), {})


def short_sudoku() -> ModuleType:
    """The Sudoku task with puzzles of SHORT blanks."""
    task = ModuleType("sudoku_short")
    vars(task).update(vars(sudoku))
    vars(task).update(examples=_short_examples, TRAIN_PROBLEMS=1024)
    return task


def _short_examples(split: str, n: int, *, seed: int) -> list[sudoku.Example]:
    """n puzzles of SHORT blanks: those among the task's own, which have 6 to 11."""
    drawn = sudoku.examples(split, 10 * n + 100, seed=seed)
    return [example for example in drawn if example.puzzle.count("0") == SHORT][:n]


DESIGNS["all_subsets"] = all_subsets
METHODS["exact_elbo"] = Method(exact_elbo, design="all_subsets", views=1)
METHODS["exact_random_order"] = Method(exact_random_order, design="all_subsets", views=1)
TASKS["sudoku_short"] = short_sudoku()  # pyright: ignore[reportArgumentType]
