"""Keys and values of a sequence, held while a block of it is decoded: approximate, for they see the
tokens that stood there before.

Shapes: B sequences of S tokens, h heads, D width of a head.
"""

import torch
from transformers import DynamicCache

KINDS = (
    "none",
    "prefix",
    "dual",
)  # what is held: nothing, what stands before the block, or also what stands behind it


class Held(DynamicCache):
    """Filled by one forward; once `closed` it is read by others, and they add nothing to it.
    (Fast-dLLM, arXiv:2505.22618)
    """

    closed = False

    def close(self, first: int, end: int) -> None:
        """Drops positions first..end, which the forwards to come bring along."""
        for layer in self.layers:
            layer.keys, layer.values = (
                torch.cat([kv[:, :, :first], kv[:, :, end:]], 2)
                for kv in (layer.keys, layer.values)
            )
        self.closed = True

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """(held and new keys, held and new values) of a layer, (B, h, S, D); the new ones stand
        last, which attention does not mind.
        """
        if not self.closed:
            return super().update(keys, values, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, keys], 2), torch.cat([layer.values, values], 2)
