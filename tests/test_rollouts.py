"""Rollouts know which completions are equal and which prompt each answers."""

import pytest
import torch

from rspo_lab.config import TrainConfig
from rspo_lab.models.loading import load
from rspo_lab.random_streams import generator
from rspo_lab.rollouts import fixed_rollouts, roll_out
from rspo_lab.tasks import sudoku


def test_a_stream_is_named_by_its_key_in_32_bits():
    """The same key gives the same stream, another key another one; torch keeps 32 bits of a seed,
    on which the docstring's probability rests.
    """

    def numbers(generator):
        return torch.rand(4, generator=generator).tolist()

    assert numbers(generator(0, 1, "masks")) == numbers(generator(0, 1, "masks"))
    keys = [(0, 1, "masks"), (1, 1, "masks"), (0, 2, "masks"), (0, 1, "rollout"), (0, "1", "masks")]
    assert len({tuple(numbers(generator(*key))) for key in keys}) == len(keys)
    five, also = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert numbers(five) == numbers(also)


@pytest.fixture(scope="module")
def policy():
    return load("base-sudoku")


def config(**changes):
    return TrainConfig(model="base-sudoku", task="sudoku", device="cpu", **changes)


def test_equal_completions_are_named_once(policy):
    rollouts = fixed_rollouts(config(), policy, prompts=8, group=8, seed=0)
    assert len(rollouts) == 64 > len(rollouts.distinct)
    assert torch.equal(rollouts.distinct.rows(rollouts.which).key(), rollouts.batch.key())
    assert len(rollouts.distinct.key().unique(dim=0)) == len(rollouts.distinct)
    assert rollouts.group.tolist() == [i // 8 for i in range(64)]
    assert rollouts.examples[9] is rollouts.examples[15]
    again = fixed_rollouts(config(), policy, prompts=8, group=8, seed=0)
    assert torch.equal(rollouts.batch.completion, again.batch.completion)


def test_silent_groups_are_left_out_on_request_and_counted_all_the_same(policy):
    problems = sudoku.examples("train", 12, seed=0)
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    kept = roll_out(config(group=4), policy, problems, draw[0])
    skipped = roll_out(config(group=4, zero_variance="skip"), policy, problems, draw[1])
    assert skipped.record == kept.record and 0 < len(skipped) < len(kept)
    silent = kept.record["zero_variance_groups"]
    assert len(skipped) == 48 * (1 - silent) and (skipped.advantage != 0).all()
    rows = (kept.advantage != 0).nonzero()[:, 0]
    assert torch.equal(skipped.group, kept.group[rows])
    assert torch.equal(skipped.batch.completion, kept.batch.completion[rows])
    assert skipped.examples == [kept.examples[i] for i in rows.tolist()]


def test_a_rollout_of_silent_groups_alone_is_empty(policy):
    """At temperature 0 all completions of a prompt are one."""
    problems = sudoku.examples("train", 2, seed=0)
    chosen = config(group=2, temperature=0.0, zero_variance="skip")
    rollouts = roll_out(chosen, policy, problems, torch.Generator())
    assert len(rollouts) == len(rollouts.distinct) == len(rollouts.which) == 0
    assert rollouts.record["zero_variance_groups"] == 1
