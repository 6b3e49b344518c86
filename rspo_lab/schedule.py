"""The decoding schedule: how many blocks, how many denoising steps per block, and which cache."""

# What a block's later steps read from a cache of keys and values instead of computing it again:
# nothing; the positions before the block; those behind it too.  (Fast-dLLM, arXiv:2505.22618)
CACHES = ("none", "prefix", "dual")


def schedule(length: int, block: int, steps: int) -> tuple[int, int]:
    """(blocks, steps per block) of a completion of `length` tokens.

    block: tokens per block; steps: denoising steps in all.  Raises ValueError where they do not
    come out even, or where a step would have no token to write.
    """
    if length < 1 or block < 1 or length % block:
        raise ValueError(f"length {length} is not a multiple of block {block}")
    blocks = length // block
    if steps % blocks or not blocks <= steps <= length:
        raise ValueError(
            f"steps {steps} must be a multiple of the {blocks} blocks, from {blocks} to {length}"
        )
    return blocks, steps // blocks
