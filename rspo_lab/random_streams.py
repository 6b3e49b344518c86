"""Random generators by name: the same seed, step and purpose always give the same stream.

So no generator's state needs saving.
"""

import hashlib

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator for one purpose, e.g. `generator(seed, step, "masks")`.

    Streams of different keys are unrelated, unless their seeds collide: torch's CPU generator keeps
    32 bits of a seed, so two of n keys have one stream with probability n^2 / 2^33, 1e-4 for a run
    of 300 steps (about 1,000 keys).  Then two draws of the run share their random numbers.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
