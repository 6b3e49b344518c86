"""A block's cache: keys and values of the positions around it, computed once per block.

Approximate: they belong to the tokens that stood in the block when they were computed.

Shapes: B sequences of S tokens, h heads, D width of a head.
"""

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


class BlockCache(DynamicCache):
    """Filled by one forward; once frozen, later forwards read it and add nothing to it.

    (Fast-dLLM, arXiv:2505.22618)
    """

    layers: Any  # each with its keys and values
    frozen = False

    def freeze(self, start: int, stop: int) -> None:
        """Drops the positions start..stop, which the forwards to come bring along."""
        for layer in self.layers:
            layer.keys = torch.cat([layer.keys[:, :, :start], layer.keys[:, :, stop:]], 2)
            layer.values = torch.cat([layer.values[:, :, :start], layer.values[:, :, stop:]], 2)
        self.frozen = True

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """(cached and new keys, cached and new values) of a layer, (B, h, S, D).

        The new ones stand last: attention does not depend on their order.
        """
        if not self.frozen:
            return super().update(keys, values, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, keys], 2), torch.cat([layer.values, values], 2)


@cache
def cache_keyword(model: type[nn.Module]) -> str:
    """What a transformers model calls its cache: `cache`, and `past_key_values` in older versions.

    A model takes any other keyword without a word, and would go on without the cache.  TypeError
    for a model that has neither.
    """
    for name in ("cache", "past_key_values"):
        if name in signature(model.forward).parameters:
            return name
    raise TypeError(f"{model.__name__} takes no cache")
