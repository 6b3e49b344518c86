"""A batch of prompts and completions, the one value that rollouts make and estimators score.

Shapes: B sequences, P prompt tokens (left-padded), L completion tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token ids with what is text and what is padding.

    `valid` marks the completion tokens up to and including the first end-of-text; only these are
    ever hidden or scored, the others stay visible as they are.  `prompt_valid` is False on left
    padding, which no position attends to.
    """

    prompt: Int[Tensor, "B P"]
    prompt_valid: Bool[Tensor, "B P"]
    completion: Int[Tensor, "B L"]
    valid: Bool[Tensor, "B L"]

    def __len__(self) -> int:
        return self.completion.shape[0]

    def rows(self, index: Tensor | slice | list[int]) -> "Batch":
        """The rows `index` (ids, a slice, or a bool mask) as a batch of its own."""
        return Batch(
            self.prompt[index], self.prompt_valid[index], self.completion[index], self.valid[index]
        )

    def distinct(self) -> tuple["Batch", Int[Tensor, " B"]]:
        """(the rows that differ, which of them each row is).

        What depends on a row alone need be computed once for each of them.
        """
        _, which = self.key().unique(dim=0, return_inverse=True)
        first = torch.full((int(which.max()) + 1,), len(self), device=which.device)
        first = first.scatter_reduce(0, which, torch.arange(len(self), device=which.device), "amin")
        return self.rows(first), which

    def key(self) -> Int[Tensor, "B S"]:
        """One row of numbers per sequence, equal where sequences are equal."""
        return torch.cat([self.prompt, self.prompt_valid, self.completion, self.valid], 1)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(
            *(t.to(device) for t in (self.prompt, self.prompt_valid, self.completion, self.valid))
        )


def valid_until_end(completion: Int[Tensor, "B L"], end_id: int | None) -> Bool[Tensor, "B L"]:
    """True up to and including the first `end_id` of each row, everywhere in a row without one.

    end_id: None for a model without an end-of-text token.
    """
    ended = (completion == (-1 if end_id is None else end_id)).long()
    return (ended.cumsum(1) - ended) == 0
