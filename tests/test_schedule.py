"""The decoding schedule: every one that comes out even is taken, every other refused."""

import pytest

from rspo_lab.schedule import schedule


def test_a_schedule_is_taken_exactly_where_every_block_and_step_has_its_tokens():
    for length in range(9):
        for block in range(9):
            for steps in range(10):
                blocks = length // block if block else 0
                even = blocks > 0 and length == blocks * block
                even = even and steps % blocks == 0 and 1 <= steps // blocks <= block
                if even:
                    assert schedule(length, block, steps) == (blocks, steps // blocks)
                else:
                    with pytest.raises(ValueError, match="multiple of"):
                        schedule(length, block, steps)
