"""Gradient identities in float64, and each method in the limit where it becomes its neighbour."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import completions, table_denoiser
from evidence import evidence_of_draws as seen
from test_estimators import count_support

from rspo_lab.advantages import (
    ADVANTAGES,
    leave_one_out,
    mean_centred,
    softmax,
    standardized,
    uninformative,
)
from rspo_lab.estimators import log_ratio_draws
from rspo_lab.masks.base import Masks
from rspo_lab.masks.designs import DESIGNS
from rspo_lab.objectives import (
    METHODS,
    Loss,
    Method,
    log_ratio,
    reinforce,
    relative_score,
    rspo,
    score,
)
from rspo_lab.oracle import exact_elbo
from rspo_lab.runs import parameters
from rspo_lab.runs.parameters import own_hyperparameters


def features(replicates, rows, seed=0):
    """A linear model of the draws: d = phi @ theta, so that gradients with respect to theta are
    plain sums.
    """
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(replicates, rows, 5, dtype=torch.float64, generator=generator)
    theta = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    return phi, theta, torch.randn(rows, dtype=torch.float64, generator=generator)


def gradient(value, theta):
    return torch.autograd.grad(value, theta)[0]


SCOPES = {
    "batch": torch.zeros(6, dtype=torch.long),
    "group": torch.tensor([0, 0, 1, 1, 1, 2]),
    "none": None,
}


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("lam", [0.01, 0.5, 3.0])
def test_gradient_is_that_of_the_squared_gap(name, lam):
    """grad L = lam grad 1/2 mean (d_hat - A/lam)^2, to 1e-10."""
    phi, theta, advantage = features(1, 6)
    d = (phi @ theta)[0]
    if name == "none":
        centre = torch.zeros_like(d)
    else:
        centre = torch.stack([d[SCOPES[name] == SCOPES[name][i]].mean() for i in range(6)]).detach()
    square = lam * 0.5 * ((d - centre - advantage / lam) ** 2).mean()
    evidence = seen(phi @ theta, advantage, group=SCOPES["group"])
    loss = rspo(evidence, lam=lam, scope=name)
    assert torch.allclose(gradient(loss.value, theta), gradient(square, theta), atol=1e-10, rtol=0)


def test_lam_zero_is_reinforce_on_the_elbo():
    phi, theta, advantage = features(3, 6)
    advantage = advantage - advantage.mean()
    reference = torch.full((3, 6), 1.7, dtype=torch.float64)
    plain = rspo(seen(phi @ theta, advantage, reference=reference), lam=0.0)
    ascent = reinforce(seen(phi @ theta, advantage))
    assert torch.allclose(gradient(plain.value, theta), gradient(ascent.value, theta), atol=1e-12)


def test_update_vanishes_at_the_target():
    """If every d_hat is A/lam there is nothing left to learn, however large the advantage."""
    advantage = torch.tensor([3.0, -1.0, -2.0], dtype=torch.float64)
    d = (advantage / 0.25)[None].requires_grad_()
    loss = rspo(seen(d, advantage), lam=0.25)
    assert torch.allclose(gradient(loss.value, d), torch.zeros_like(d), atol=1e-12)
    assert loss.log == {"weight_rms": pytest.approx(0, abs=1e-12), "sign_flips": 0.0}


def test_sign_flips_counts_overshot_rows():
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    d = torch.tensor([[30.0, 1.0, -1.0, -30.0]], dtype=torch.float64)
    assert rspo(seen(d, advantage), lam=0.1).log["sign_flips"] == 0.5


@pytest.mark.parametrize("which", [[0, 1, 2], [0, 0, 1]], ids=["apart", "merged"])
@pytest.mark.parametrize(
    "residual, lam", [("shared", 0.4), ("leave_one_out", 0.4), ("shared", 0.0)]
)
def test_the_expected_gradient_of_equal_completions(residual, lam, which):
    """Completions a a b of two tokens, on masks apart or, as in training, on one draw for each
    distinct one; exact, over all sets of masks of two replicates.

    The target is the gradient on exact ELBOs.  With the shared residual lam / 2B sum_i
    (1 - n_i / B) grad Var[d_i] / R comes on top, n_i the rows on the draws of row i: merging takes
    part of it away.  "leave_one_out" and lam = 0 have the target either way.
    """
    policy, reference = table_denoiser(2, 2, 0), table_denoiser(2, 2, 1)
    rows = torch.tensor([0, 0, 1])
    advantage = torch.tensor([0.9, -0.2, -1.1], dtype=torch.float64)
    masks, law = count_support(2)
    d = [log_ratio_draws(policy, reference, completions([y]), masks) for y in ([0, 1], [1, 1])]
    d = torch.cat(d, 1)  # (sets, 2)
    pairs = list(itertools.product(range(len(law)), repeat=2))  # the views of one draw
    draws = list(itertools.product(pairs, repeat=max(which) + 1))
    slope = torch.zeros_like(d)
    for drawn in draws:
        chance = torch.stack([law[list(pair)].prod() for pair in drawn]).prod()
        views = torch.tensor([drawn[i] for i in which]).T  # (R, B)
        terms = relative_score(d[views, rows].detach(), advantage, lam=lam, residual=residual)
        part = -chance * terms.weight / terms.weight.numel()
        slope.index_put_((views, rows.expand_as(views)), part, accumulate=True)
    (found,) = torch.autograd.grad((slope * d).sum(), policy.logits, retain_graph=True)

    elbo = (law[:, None] * d).sum(0)
    terms = relative_score(elbo[rows].detach()[None], advantage, lam=lam)
    wanted = -(terms.weight[0] * elbo[rows]).mean()
    if residual == "shared":
        variance = ((law[:, None] * d.square()).sum(0) - elbo.square())[rows]
        copies = torch.tensor([which.count(i) for i in which])
        wanted = wanted + lam / 2 * ((1 - copies / 3) * variance / 2).mean()
    (wanted,) = torch.autograd.grad(wanted, policy.logits)
    assert torch.allclose(found, wanted, atol=1e-12) and wanted.abs().max() > 1e-3


@pytest.mark.parametrize("residual, bias", [("leave_one_out", False), ("shared", True)])
def test_leave_one_out_is_unbiased_for_the_true_square_and_shared_is_not(residual, bias, small):
    """Expectation over every pair of count masks, on a real model: gradient of lam/2 (E d -
    A/lam)^2, plus, if shared,
    lam/2 grad Var[d] / R."""
    batch, advantage, lam = small.batch.rows([0]), torch.tensor([0.7], dtype=torch.float64), 0.4
    masks, law = count_support(4)
    d = log_ratio_draws(small.policy, small.reference, batch, masks)[:, 0]
    first, second = torch.meshgrid(torch.arange(len(d)), torch.arange(len(d)), indexing="ij")
    pairs = torch.stack(
        [d[first.flatten()], d[second.flatten()]]
    )  # two replicates, one column a pair of masks
    probability = law[first.flatten()] * law[second.flatten()]
    each = [
        rspo(seen(pairs[:, i : i + 1], advantage), lam=lam, scope="none", residual=residual).value
        for i in range(pairs.shape[1])
    ]
    (mean_gradient,) = torch.autograd.grad(
        (torch.stack(each) * probability).sum(), small.policy.logits, retain_graph=True
    )
    exact = exact_elbo(small.policy, batch)[0] - exact_elbo(small.reference, batch)[0].detach()
    (target,) = torch.autograd.grad(
        lam * 0.5 * (exact - advantage[0] / lam) ** 2, small.policy.logits, retain_graph=True
    )
    variance = (law * d**2).sum() - (law * d).sum() ** 2
    (extra,) = torch.autograd.grad(lam * 0.5 * variance / 2, small.policy.logits)
    assert torch.allclose(mean_gradient, target + extra if bias else target, atol=1e-12)
    assert extra.abs().max() > 1e-3


def test_leave_one_out_centres_the_other_replicates_estimate():
    """Against loops: replicate r of row i is weighed by A_i - lam (mean of the other draws of i,
    minus that over all rows).
    """
    phi, theta, advantage = features(3, 4)
    d, lam = phi @ theta, 0.7
    total = 0.0
    for r in range(3):
        others = torch.stack([d[k] for k in range(3) if k != r]).mean(0).detach()
        for i in range(4):
            total = total - (advantage[i] - lam * (others[i] - others.mean())) * d[r, i] / 12
    loss = rspo(seen(phi @ theta, advantage), lam=lam, residual="leave_one_out")
    assert torch.allclose(gradient(loss.value, theta), gradient(total, theta), atol=1e-12)


def test_relative_score_by_hand():
    """d of (2, 0, 1) and (0, 0, 3): estimate (1, 0, 2), centred (0, -1, 1); A/lam = (2, -4, 2)."""
    d = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 3.0]], requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 1.0])
    terms = relative_score(d, advantage, lam=0.5)
    assert terms.estimate.tolist() == [0, -1, 1] and terms.target.tolist() == [2, -4, 2]
    assert terms.gap.tolist() == [2, -3, 1]
    assert terms.weight.tolist() == [[1.0, -1.5, 0.5]] * 2 and not terms.weight.requires_grad
    assert not terms.flipped.any()
    assert torch.equal(terms.d_hat.detach(), d.detach() - torch.tensor([[1.0], [1.0]]))
    assert torch.autograd.grad(terms.d_hat.sum(), d)[0].eq(1).all()  # the centre has no gradient
    apart = relative_score(d, advantage, lam=0.5, residual="leave_one_out")
    assert apart.weight.tolist() == [[1.5, -1.5, 0.0], [0.5, -1.5, 1.0]]
    strong = relative_score(d, advantage, lam=3.0)
    assert strong.flipped.tolist() == [False, True, True]
    raw = relative_score(d, advantage, lam=0.0)
    assert raw.target is None and raw.gap is None and raw.weight[0].tolist() == [1, -2, 1]


def test_relative_score_centres_over_its_scope():
    d = torch.tensor([[1.0, 3.0, 10.0, 20.0, 30.0]])
    advantage, group = torch.zeros(5), torch.tensor([0, 0, 7, 7, 7])
    by_scope = {
        scope: relative_score(d, advantage, lam=1.0, scope=scope, group=group).estimate.tolist()
        for scope in ("batch", "group", "none")
    }
    assert by_scope["group"] == [-1, 1, -10, 0, 10] and by_scope["none"] == d[0].tolist()
    assert by_scope["batch"] == pytest.approx([x - 12.8 for x in d[0].tolist()], rel=1e-6)
    with pytest.raises(ValueError, match="'group' with ids"):
        relative_score(d, advantage, lam=1.0, scope="group")


def test_score_and_log_ratio_of_evidence():
    """Two replicates, one of a pair of views: weighted sums of log-probs, per token on request."""
    masks = Masks(
        torch.tensor([[[1, 1, 0]], [[0, 0, 1]], [[1, 1, 1]]]).bool(),
        torch.tensor([[2.0], [3.0], [0.5]], dtype=torch.float64),
        torch.tensor([0, 0, 1]),
    )
    policy = torch.tensor([[[-1.0, -2.0, -9.0]], [[-9.0, -9.0, -4.0]], [[-1.0, -1.0, -1.0]]])
    some = seen(torch.zeros(1, 1), torch.zeros(1))
    valid = torch.ones(1, 3, dtype=torch.bool)
    evidence = replace(
        some, policy=policy, reference=policy / 2, old=policy / 4, masks=masks, valid=valid
    )
    assert score(evidence).tolist() == [[-18.0], [-1.5]]
    assert score(evidence, "token").tolist() == [[-6.0], [-0.5]]
    assert log_ratio(evidence).tolist() == [[-9.0], [-0.75]]
    two_levels = replace(evidence, reference=None, old_log_ratio=torch.tensor([5.0]))
    assert log_ratio(two_levels).tolist() == [[-18 * 0.75 + 5], [-1.5 * 0.75 + 5]]


def test_a_method_knows_its_own_hyperparameters():
    def clipped(evidence, *, lam: float, scope: str = "batch", bound: float = 5.0):
        return Loss(evidence.policy.sum(), {})

    method = Method(clipped)
    assert list(method.hyperparameters) == ["lam", "scope", "bound"]
    assert list(method.own({"lam", "scope"})) == ["bound"]
    assert method.own({"lam", "scope"})["bound"].default == 5.0
    for name, row in METHODS.items():
        assert row.loss.__doc__ and row.advantage in ADVANTAGES and row.views > 0
        given = own_hyperparameters(name, parameters.OBJECTIVES, {"lam", "scope", "residual"})
        own = row.own({"lam", "scope", "residual"})
        assert {key: p.default for key, p in given.items()} == {k: own[k].default for k in own}
        assert all(p.comment for key, p in given.items() if key != "score_unit"), name


def test_the_page_of_methods_names_all_methods_and_what_goes_with_them():
    page = (Path(__file__).parent.parent / "docs/methods.md").read_text()
    table = page[page.index("## All methods") :]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \| (.*) \| (\d+) \|.*\|$", table, re.M)
    assert [name for name, *_ in rows] == list(METHODS)
    for name, score_of, advantage, updates in rows:
        row = METHODS[name]
        design = re.match(r"`(.*)`, (\d+)", score_of)
        said = (design[1], int(design[2])) if design else ("path", 1)
        assert said == (row.design, row.views) and int(updates) == row.inner_steps, name
        assert row.advantage == advantage.split(",")[0] or advantage == "none", name
    assert set(DESIGNS) == {name for name in DESIGNS if f"`{name}`" in page or f"`{name}(" in page}


def test_bad_input_is_refused():
    d, advantage = torch.zeros(1, 2), torch.zeros(2)
    with pytest.raises(ValueError, match="at least 2 replicates"):
        rspo(seen(d, advantage), lam=0.1, residual="leave_one_out")
    with pytest.raises(ValueError, match="lam must be >= 0"):
        rspo(seen(d, advantage), lam=-1.0)


def test_advantages_by_hand():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    third = 1 / 3
    assert mean_centred(reward, 3).tolist() == pytest.approx([2 * third, -third, -third, 0, 0, 0])
    assert leave_one_out(reward, 3).tolist() == pytest.approx([1, -0.5, -0.5, 0, 0, 0])
    assert standardized(reward, 3).tolist() == pytest.approx(
        [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5, 0, 0, 0]
    )
    assert uninformative(reward, 3).tolist() == [0, 1]
    weights = torch.tensor([2 * third, -third, -third], dtype=torch.float64)
    assert softmax(reward, 3)[:3].tolist() == pytest.approx(
        (weights.softmax(0) - (-weights).softmax(0)).tolist()
    )


@pytest.mark.parametrize("name", ADVANTAGES)
def test_agreeing_groups_have_exactly_no_advantage(name):
    """Also if the mean reward is no binary fraction; every group's advantages sum to 0."""
    reward = torch.tensor([0.1] * 3 + [0.7, 0.1, 0.3])
    advantage = ADVANTAGES[name](reward, 3)
    assert (advantage[:3].abs() < 1e-7).all() and abs(advantage[3:].sum().item()) < 1e-6
    if name == "standardized":
        assert (advantage[:3] == 0).all()
    with pytest.raises(ValueError, match="groups of 4"):
        ADVANTAGES[name](reward, 4)
