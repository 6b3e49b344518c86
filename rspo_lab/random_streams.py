"""Random generators by name: the same seed, step and purpose always give the same stream.

So no generator's state needs saving.
"""

import hashlib

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator for one purpose, e.g. `generator(seed, step, "masks")`.

    Streams of different keys are unrelated.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
