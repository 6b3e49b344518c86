"""The chunked vocabulary head against autograd through the full logits: values, gradients, and what
it leaves out.
"""

import pytest
import torch
from torch.nn import functional

from rspo_lab.models.vocabulary_head import head_logits, token_logp


def example(rows=7, width=5, vocabulary=11, dtype=torch.float64):
    """(states, weight, targets, banned, a slope for each row); two ids are banned and no target."""
    draw = torch.Generator().manual_seed(0)
    states = (
        torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    )
    weight = (
        torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    targets = torch.randint(2, vocabulary, (rows,), generator=draw)
    banned = torch.arange(vocabulary) < 2
    return states, weight, targets, banned, torch.randn(rows, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 11, 33, 76])
def test_pieces_give_the_full_values_and_gradients(chunk):
    states, weight, targets, banned, slope = example()
    full = head_logits(states, weight, banned).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    pieces = token_logp(states, weight, targets, banned, chunk)
    assert "_TokenLogp" in type(pieces.grad_fn).__name__
    assert torch.allclose(pieces, full, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        *(torch.autograd.grad(logp @ slope, [states, weight]) for logp in (pieces, full))
    ):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


def test_gradcheck():
    states, weight, targets, banned, _ = example()
    assert torch.autograd.gradcheck(
        lambda h, w: token_logp(h, w, targets, banned, 22), (states, weight)
    )


def test_equals_torchs_own_chunked_loss():
    """With nothing banned, `linear_cross_entropy` of torch 2.13 is the same number with the other
    sign.
    """
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    states, weight, targets, banned, slope = example()
    mine = token_logp(states, weight, targets, torch.zeros_like(banned), 22)
    theirs = -functional.linear_cross_entropy(states, weight, targets, reduction="none")
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    for a, b in zip(
        *(torch.autograd.grad(logp @ slope, [states, weight]) for logp in (mine, theirs))
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_probabilities_of_the_ids_that_are_not_banned_sum_to_one():
    states, weight, _, banned, _ = example(rows=1)
    ids = torch.arange(11)
    logp = token_logp(states.expand(11, -1), weight, ids, banned, 22)
    assert (logp[banned] == -torch.inf).all() and torch.allclose(
        logp.exp().sum(), torch.tensor(1.0, dtype=torch.float64)
    )


@pytest.mark.parametrize("chunk", [0, 22])
def test_no_rows(chunk):
    states, weight, targets, banned, _ = example(rows=0)
    logp = token_logp(states, weight, targets, banned, chunk)
    logp.sum().backward()
    assert logp.shape == (0,) and states.grad.shape == (0, 5) and (weight.grad == 0).all()


def test_a_frozen_weight_gets_no_gradient():
    states, weight, targets, banned, slope = example()
    (token_logp(states, weight.detach(), targets, banned, 22) @ slope).backward()
    (other,) = torch.autograd.grad(token_logp(states, weight, targets, banned) @ slope, [states])
    assert weight.grad is None and torch.allclose(states.grad, other, rtol=0, atol=1e-12)


def test_half_precision_takes_the_log_softmax_in_float32():
    """bfloat16 logits, summed in float32: both ways agree to float32, where bfloat16 itself would
    be off by 0.01.
    """
    states, weight, targets, banned, _ = example(
        rows=40, width=64, vocabulary=500, dtype=torch.bfloat16
    )
    pieces, full = (
        token_logp(states, weight, targets, banned, 5000),
        token_logp(states, weight, targets, banned),
    )
    exact = (
        (states @ weight.T)
        .double()
        .masked_fill(banned, -torch.inf)
        .log_softmax(-1)
        .gather(-1, targets[:, None])[:, 0]
    )
    assert pieces.dtype == torch.float32 and torch.allclose(pieces, full, atol=1e-5)
    assert torch.allclose(pieces.double(), exact, rtol=0, atol=1e-5)
    mine, theirs = (torch.autograd.grad(logp.sum(), [states])[0] for logp in (pieces, full))
    assert mine.dtype == torch.bfloat16 and torch.allclose(mine.float(), theirs.float(), atol=0.02)


@pytest.mark.parametrize("trained", [True, False])
def test_no_piece_is_larger_than_asked(trained):
    """No tensor that forward or backward makes has more than `chunk` numbers, apart from the
    weight's own gradient.
    """
    states, weight, targets, banned, slope = example(rows=64, vocabulary=100)
    weight.requires_grad_(trained)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        (token_logp(states, weight, targets, banned, 1000) @ slope).backward()
    assert max(size for size in largest if size != weight.numel()) == 1000
