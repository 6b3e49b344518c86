"""The vectorised sampler against a slow one written from the published description, and against its
stated law.
"""

import itertools
import math
from functools import partial

import pytest
import torch

from rspo_lab.models.loading import tiny
from rspo_lab.sampler import generate


def slow(model, prompt, prompt_valid, length, block, steps):
    """One row, greedy: plain loops over LLaDA's published procedure (its released generate.py,
    block by block).
    """
    ids = torch.cat([prompt, torch.full((length,), model.mask_id)])
    order, blocks = [None] * length, length // block
    per_block = steps // blocks
    for b in range(blocks):
        here = range(len(prompt) + b * block, len(prompt) + (b + 1) * block)
        base, extra = divmod(block, per_block)
        for n in range(per_block):
            prob = model.logits(ids[None], prompt_valid[None], 0, len(ids))[0].softmax(-1)
            masked = [i for i in here if ids[i] == model.mask_id]
            masked.sort(key=lambda i: -prob[i].max().item())
            for i in masked[: base + (n < extra)]:
                ids[i] = prob[i].argmax()
                order[i - len(prompt)] = b * per_block + n
    return ids[len(prompt) :], order


@pytest.fixture(scope="module")
def model():
    return tiny("0123456789=", seed=3, layers=2, width=32)


@pytest.mark.parametrize(
    "length, block, steps", [(8, 8, 8), (8, 4, 4), (8, 4, 8), (9, 9, 2), (12, 4, 9)]
)
def test_greedy_equals_the_slow_sampler(model, length, block, steps):
    prompt, prompt_valid = model.encode(["12=", "345678=", "9="])
    rollout = generate(
        model.logits,
        prompt,
        prompt_valid,
        canvas=torch.full((3, length), model.mask_id),
        mask_id=model.mask_id,
        block=block,
        steps=steps,
        temperature=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    for row in range(3):
        ids, order = slow(model, prompt[row], prompt_valid[row], length, block, steps)
        assert rollout.completion[row].tolist() == ids.tolist()
        assert rollout.step[row].tolist() == order
    assert model.mask_id not in rollout.completion


def test_tokens_on_the_canvas_stay_and_cost_no_step(model):
    """Greedy filling in equals the slow sampler started from the same tokens, in as many steps as
    there are gaps.
    """
    prompt, prompt_valid = model.encode(["12="])
    canvas = model.encode_canvas(["3?5??8?0"])
    rollout = generate(
        model.logits,
        prompt,
        prompt_valid,
        canvas=canvas,
        mask_id=model.mask_id,
        block=8,
        steps=8,
        temperature=0.0,
        generator=torch.Generator(),
    )
    given = canvas != model.mask_id
    assert (rollout.completion == canvas)[given].all() and (rollout.step == -1).equal(given)
    assert (
        sorted(rollout.step[~given].tolist()) == [0, 1, 2, 3]
        and (rollout.confidence[given] == 1).all()
    )
    ids = torch.cat([prompt, canvas], 1)
    for _ in range(4):
        prob = model.logits(ids, prompt_valid, 3, 11)[0].softmax(-1).max(-1)
        best = prob.values.masked_fill(ids[0, 3:] != model.mask_id, -1).argmax()
        ids[0, 3 + best] = prob.indices[best]
    assert ids[0, 3:].tolist() == rollout.completion[0].tolist()


def test_threshold_writes_what_is_sure_at_once(model):
    """At threshold 0 everything is above it: one step, every token the arg max of the first
    forward.
    """
    prompt, prompt_valid = model.encode(["12=", "9="])
    canvas = torch.full((2, 8), model.mask_id)
    rollout = generate(
        model.logits,
        prompt,
        prompt_valid,
        canvas=canvas,
        mask_id=model.mask_id,
        block=8,
        steps=8,
        temperature=0.0,
        threshold=0.0,
        generator=torch.Generator(),
    )
    first = model.logits(torch.cat([prompt, canvas], 1), prompt_valid, 3, 11).argmax(-1)
    assert (rollout.step == 0).all() and rollout.completion.equal(first)


def test_padding_does_not_change_a_completion(model):
    alone, together = model.encode(["9="]), model.encode(["9=", "0123456789="])
    rollouts = [
        generate(
            model.logits,
            *encoded,
            canvas=torch.full((len(encoded[0]), 8), model.mask_id),
            mask_id=model.mask_id,
            block=4,
            steps=8,
            temperature=0.0,
            generator=torch.Generator(),
        )
        for encoded in (alone, together)
    ]
    assert rollouts[0].completion[0].tolist() == rollouts[1].completion[0].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_stated_law(temperature):
    """Two positions, three ids, two steps: every string's frequency against the law summed over
    tokens and order by hand.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(
        4, 4, 2, 3, generator=generator
    )  # logits given what stands at both positions (3 = mask)

    def logits(ids, prompt_valid, start, stop):
        return table[ids[:, 1], ids[:, 2]]

    law = dict.fromkeys(itertools.product(range(3), repeat=2), 0.0)
    first = (table[3, 3] / temperature).softmax(-1)
    confidence = table[3, 3].softmax(-1)
    for (
        a,
        b,
    ) in (
        law
    ):  # both positions draw; the one with the more confident draw stays, the other is drawn again
        p = first[0, a].item() * first[1, b].item()
        if confidence[0, a] >= confidence[1, b]:
            for other in range(3):
                law[a, other] += p * (table[a, 3, 1] / temperature).softmax(-1)[other].item()
        else:
            for other in range(3):
                law[other, b] += p * (table[3, b, 0] / temperature).softmax(-1)[other].item()
    rows = 40_000
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    before = torch.random.get_rng_state()
    rollout = generate(
        logits,
        prompt,
        prompt == 0,
        canvas=torch.full((rows, 2), 3),
        mask_id=3,
        block=2,
        steps=2,
        temperature=temperature,
        generator=torch.Generator().manual_seed(1),
    )
    assert torch.equal(before, torch.random.get_rng_state())
    seen = torch.bincount(rollout.completion[:, 0] * 3 + rollout.completion[:, 1], minlength=9)
    expected = torch.tensor([law[s] for s in sorted(law)]) * rows
    assert math.isclose(sum(law.values()), 1, abs_tol=1e-6)
    assert ((seen - expected) ** 2 / expected).sum() < 32  # 8 degrees of freedom, 99.99 %


@pytest.mark.parametrize(
    "bad, match",
    [
        (dict(block=3), "multiple of block"),
        (dict(steps=3, block=4), "multiple of the 2 blocks"),
        (dict(steps=16), "from 1 to 8"),
        (dict(temperature=-1.0), "temperature"),
    ],
)
def test_impossible_schedules_are_refused(model, bad, match):
    prompt, prompt_valid = model.encode(["1="])
    schedule = {
        "canvas": torch.full((1, 8), model.mask_id),
        "block": 8,
        "steps": 8,
        "temperature": 0.0,
    } | bad
    with pytest.raises(ValueError, match=match):
        generate(
            model.logits,
            prompt,
            prompt_valid,
            mask_id=model.mask_id,
            generator=torch.Generator(),
            **schedule,
        )


@pytest.mark.parametrize("suffix", [False, True])
@pytest.mark.parametrize(
    "length, block, steps", [(12, 4, 12), (12, 4, 6), (12, 12, 12), (12, 3, 4)]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_logits_are_exact_with_one_layer_and_at_a_blocks_first_step(
    length, block, steps, temperature, suffix
):
    """With one layer, cached keys and values depend on tokens that stand still.

    In deeper models only the steps that begin a block are exact.
    """
    for layers in (1, 3):
        if layers > 1 and steps != length // block:
            continue
        model = tiny("0123456789=", seed=3, layers=layers, width=32)
        prompt, prompt_valid = model.encode(["12=", "345678=", "9="])
        how = dict(
            canvas=torch.full((3, length), model.mask_id),
            mask_id=model.mask_id,
            block=block,
            steps=steps,
            temperature=temperature,
        )
        exact, fast = (
            generate(
                model.logits,
                prompt,
                prompt_valid,
                generator=torch.Generator().manual_seed(1),
                cached_logits=cached,
                **how,
            )
            for cached in (None, partial(model.cached_logits, suffix=suffix))
        )
        assert torch.equal(exact.completion, fast.completion) and torch.equal(exact.step, fast.step)
        assert torch.equal(exact.forwards, fast.forwards)
        torch.testing.assert_close(exact.confidence, fast.confidence, rtol=0, atol=1e-6)


def test_cached_logits_are_those_of_the_ids_that_were_there(model):
    """They see the block as it is and all else as it was, nearer the truth than the logits from
    before it changed.
    """
    prompt, prompt_valid = model.encode(["12=", "345678="])
    width = prompt.shape[1]
    ids = torch.cat([prompt, torch.full((2, 8), model.mask_id)], 1)
    changed = ids.clone()
    changed[:, width + 3] = model.encode(["7"])[0][0, 0]
    for suffix in (False, True):
        now, again = model.cached_logits(ids, prompt_valid, width + 2, width + 6, suffix=suffix)
        torch.testing.assert_close(
            now, model.logits(ids, prompt_valid, width + 2, width + 6), rtol=0, atol=0
        )
        torch.testing.assert_close(again(ids), now, rtol=0, atol=1e-5)
        stale = (
            (again(changed) - model.logits(changed, prompt_valid, width + 2, width + 6))
            .nan_to_num()
            .abs()
            .max()
        )
        assert (
            1e-4
            < stale
            < (now - model.logits(changed, prompt_valid, width + 2, width + 6))
            .nan_to_num()
            .abs()
            .max()
        )
        torch.testing.assert_close(
            again(ids), now, rtol=0, atol=1e-5
        )  # it kept nothing of the others
    elsewhere = changed.clone()
    elsewhere[:, width + 7] = 5
    torch.testing.assert_close(
        again(elsewhere), again(changed), rtol=0, atol=0
    )  # dual: what stands behind the block is not read


def test_a_row_that_is_full_is_left_alone_beside_a_cache():
    """The others are drawn from their own logits: with one layer all is as without a cache."""
    model = tiny("0123456789=", seed=3, layers=1, width=32)
    prompt, prompt_valid = model.encode(["12=", "3="])
    canvas = model.encode_canvas(["12345?78", "????????"])
    exact, fast = (
        generate(
            model.logits,
            prompt,
            prompt_valid,
            canvas=canvas,
            mask_id=model.mask_id,
            block=4,
            steps=8,
            temperature=1.0,
            generator=torch.Generator().manual_seed(0),
            cached_logits=cached,
        )
        for cached in (None, partial(model.cached_logits, suffix=True))
    )
    given = canvas != model.mask_id
    assert (fast.completion == canvas)[given].all() and (fast.step == -1).equal(given)
    assert fast.forwards.tolist() == [1, 8] and model.mask_id not in fast.completion
    assert torch.equal(fast.completion, exact.completion) and torch.equal(fast.step, exact.step)
    torch.testing.assert_close(fast.confidence, exact.confidence, rtol=0, atol=1e-6)
