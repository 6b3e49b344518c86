"""One training step and what it records: units, scopes, shares and flips, by hand."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import table_denoiser
from evidence import evidence_of_draws
from test_journal import Folder as Place
from test_journal import config as journal_config
from test_measurement import ADVANTAGE, ROWS, fixed
from test_training import Folder, config, recorded

from rspo_lab import rollouts as rollouts_module
from rspo_lab.config import Reading
from rspo_lab.design_choice import CountProfile
from rspo_lab.diagnostics import gap_summary
from rspo_lab.distributed import ALONE
from rspo_lab.estimators import elbo_draws, token_logps
from rspo_lab.journal import Journal, completions_table
from rspo_lab.masks.allocation import allocate
from rspo_lab.masks.base import Masks
from rspo_lab.masks.published import count
from rspo_lab.measure import gradient_noise
from rspo_lab.measure.gap import _against_target
from rspo_lab.models.loading import load
from rspo_lab.objectives import (
    METHODS,
    Evidence,
    Method,
    log_ratio,
    reinforce,
    relative_score,
    rspo,
    score,
)
from rspo_lab.policies import policies, reference_of
from rspo_lab.random_streams import generator
from rspo_lab.rollouts import fixed_rollouts
from rspo_lab.tasks import sudoku
from rspo_lab.training import train
from rspo_lab.update import Diverged, evidence, learning_rate, update, views_of_updates

VALID = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()


@pytest.mark.parametrize("method", ["rspo", "no_reference", "reinforce"])
def test_per_token_is_the_same_loss_of_draws_over_valid_tokens(method):
    """Lengths of 3, 2 and 1 of 3 positions."""
    loss = {
        "rspo": lambda e, unit: rspo(e, lam=0.7, score_unit=unit),
        "no_reference": lambda e, unit: rspo(e, lam=0.7, score_unit=unit, use_reference=False),
        "reinforce": lambda e, unit: reinforce(e, score_unit=unit),
    }[method]
    hidden = torch.zeros(2, 3, 3, dtype=torch.bool)
    hidden[:, :, 0] = True
    masks = Masks(hidden, torch.ones(2, 3, dtype=torch.float64), torch.arange(2))
    draws = torch.tensor([[-6.0, -2.0, -5.0], [-3.0, -8.0, -1.0]])
    policy = torch.zeros(2, 3, 3)
    policy[:, :, 0] = draws
    e = Evidence(
        policy,
        policy * 0.25,
        policy,
        masks,
        advantage=torch.tensor([1.0, -2.0, 0.5]),
        reward=torch.zeros(3),
        group=torch.zeros(3, dtype=torch.long),
        valid=VALID,
    )
    per = policy / torch.tensor([3.0, 2.0, 1.0])[None, :, None]
    divided = replace(e, policy=per, reference=per * 0.25, old=per)
    assert torch.allclose(score(e, "token"), score(divided))
    assert torch.allclose(log_ratio(e, "token"), log_ratio(divided))
    assert loss(e, "token").value.item() == pytest.approx(loss(divided, "sequence").value.item())
    assert loss(e, "token").value.item() != pytest.approx(loss(e, "sequence").value.item())


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_shares_are_of_the_update_in_the_runs_unit_and_scope(scope):
    """Against the plain formula on the second level, with lengths of 2 and 3 and repeated rows."""
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    chosen, rollouts = fixed(ROWS, ADVANTAGE, lam=2.0, scope=scope, score_unit="token")
    valid = torch.tensor([[True, True, i % 2 == 0] for i in range(6)])
    valid[3] = valid[2]
    batch = replace(rollouts.batch, valid=valid)
    distinct, which = batch.distinct()
    rollouts = replace(rollouts, batch=batch, distinct=distinct, which=which)
    advantage = torch.tensor([0.7, -0.7, 0.9, 0.8, 1.0, -1.0], dtype=torch.float64)
    rollouts = replace(rollouts, advantage=advantage)
    chosen = replace(chosen, design="count", views=200, old_views=8, allocate=True)
    (views,) = views_of_updates(chosen, policy, reference, rollouts, None, (0,))
    many = count(distinct.valid, 8, generator=generator(0, "old", "masks"))
    ours = elbo_draws(policy, distinct, many).mean(0)
    d = ours - elbo_draws(reference, distinct, many).mean(0)
    assert torch.allclose(views.old_log_ratio, d)
    tokens = distinct.valid.sum(1)
    ratio = (d / tokens)[which]
    terms = relative_score(ratio[None], advantage, lam=2.0, scope=scope, group=rollouts.group)
    total = torch.stack([terms.weight[0][which == i].sum() for i in range(len(distinct))])
    wanted = allocate((total * ours / tokens).abs(), 200)
    assert len(distinct) == 5 and views.masks.hidden.any(-1).sum(0).tolist() == wanted.tolist()


def moved_update(**changes):
    """(config, policy, rollouts, views) of an update whose policy is not the reference."""
    chosen = config("base-sudoku", **changes)
    policy = load("base-sudoku")
    reference = reference_of(policy)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    rollouts = fixed_rollouts(chosen, policy, prompts=4, group=4, seed=0)
    spread = torch.linspace(-1, 1, 16, dtype=torch.float64)
    rollouts = replace(rollouts, advantage=spread, reward=spread.square())
    views = views_of_updates(chosen, policy, reference, rollouts, None, (0, 1))
    return chosen, policy, rollouts, views[0]


@pytest.mark.parametrize("scope", ["batch", "group", "none"])
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_the_record_has_the_gap_in_the_runs_scope_and_unit(scope, unit):
    chosen, policy, rollouts, views = moved_update(scope=scope, score_unit=unit, lam=0.5)
    with torch.no_grad():
        seen = evidence(rollouts, views, token_logps(policy, rollouts.distinct, views.masks))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    record, _, d = update(chosen, policy, optimizer, rollouts, views, 1)
    wanted = log_ratio(seen, unit)
    assert torch.allclose(d, wanted.mean(0), atol=1e-5)
    summary = gap_summary(wanted, seen.advantage, 0.5, scope, seen.group)
    assert {k: record[k] for k in summary} == pytest.approx(summary, rel=1e-3, abs=1e-4)
    assert torch.allclose(seen.reward.double(), rollouts.reward)


@pytest.mark.parametrize("most", [1e-3, 1e6])
def test_a_step_is_no_longer_than_the_configs_norm(most):
    chosen, policy, rollouts, views = moved_update(max_grad_norm=most)
    before = torch.cat([p.detach().clone().flatten() for p in policy.parameters()])
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    record, _, _ = update(chosen, policy, optimizer, rollouts, views, 1)
    after = torch.cat([p.detach().flatten() for p in policy.parameters()])
    length = (after - before).norm().item() / learning_rate(chosen, 1)
    assert length == pytest.approx(min(most, record["gradient_norm"]), rel=0.05)


def test_a_gradient_that_is_not_finite_stops_before_the_step(monkeypatch):
    def kinked(e, *, lam: float):
        loss = rspo(e, lam=lam)
        return replace(loss, value=loss.value + (0 * e.policy).sum().sqrt())  # slope 0 * inf

    monkeypatch.setitem(METHODS, "kinked", Method(kinked))
    chosen, policy, rollouts, views = moved_update(objective="kinked")
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    with pytest.raises(Diverged, match="step 1: loss -?[0-9.e-]+, gradient norm nan"):
        update(chosen, policy, optimizer, rollouts, views, 1)
    assert all(map(torch.equal, before, policy.parameters()))


def test_old_is_of_the_rollouts_policy_not_of_the_reference(monkeypatch):
    def looking(e, *, lam: float):
        return rspo(e, lam=lam)

    monkeypatch.setitem(METHODS, "looking", Method(looking, inner_steps=2, old=True))
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    chosen, rollouts = fixed(ROWS, ADVANTAGE, objective="looking")
    first, second = views_of_updates(chosen, policy, reference, rollouts, None, (0,))
    assert first.old is None and first.forwards == first.masks.forward_passes
    assert torch.equal(second.old, token_logps(policy, rollouts.distinct, second.masks))
    assert torch.equal(second.reference, token_logps(reference, rollouts.distinct, second.masks))
    assert second.forwards == 2 * second.masks.forward_passes


def test_a_step_records_its_first_update_and_its_last_step_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(sudoku, "TRAIN_PROBLEMS", 64)
    chosen = config("base-sudoku", steps=3, inner_steps=2, lr=1e-4)
    train(chosen, Folder(tmp_path))
    records = recorded(tmp_path)
    assert records[1]["d_sd"] == 0 < records[2]["d_sd"]  # the second update has moved by then
    assert [r["step"] for r in records if "eval_solve_rate" in r] == [0, 2, 3]
    table = completions_table(tmp_path)
    assert set(table["step"]) == {2, 3} and (table["advantage"] != 0).any()
    for step, part in table.groupby("step"):
        assert part["reward"].mean() == pytest.approx(records[step]["reward"])
        assert part["advantage"].std() == pytest.approx(records[step]["advantage_sd"])
        assert part["d"].mean() == pytest.approx(records[step]["d_mean"], abs=1e-6)


def test_fixed_rollouts_keep_silent_groups_and_are_drawn_by_their_seed(tmp_path):
    rows = sudoku.examples("train", 4, seed=0)
    file = tmp_path / "data.csv"
    lines = "".join(f"{e.puzzle},{e.solution}\n" for e in rows)
    file.write_text("Puzzle,Solution\n" + lines)
    chosen = config("base-sudoku", data=str(file), zero_variance="skip")
    policy = load("base-sudoku")
    one, other = (fixed_rollouts(chosen, policy, prompts=4, group=4, seed=s) for s in (0, 1))
    assert len(one) == len(other) == 16 and one.record["zero_variance_groups"] > 0
    assert one.examples == other.examples
    assert not torch.equal(one.batch.completion, other.batch.completion)


def test_measured_updates_are_cut_to_the_configs_norm():
    """A norm far below AdamW's epsilon leaves almost no step."""
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    far, near = (
        gradient_noise._moved(config, policy, reference, rollouts, 2, 0)
        for config, rollouts in (
            fixed(ROWS, ADVANTAGE, lr=0.05, max_grad_norm=most) for most in (1.0, 1e-10)
        )
    )
    assert (far.logits - policy.logits).abs().max() > 0.04
    assert (near.logits - policy.logits).abs().max() < 0.002


def test_rows_of_masks_keep_what_is_scored():
    """Hidden but not scored tokens stay so in the rows that a draw is cut to."""
    hidden = torch.ones(1, 2, 3, dtype=torch.bool)
    scored = hidden.clone()
    scored[0, 1, 2] = False
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    masks = Masks(hidden, weight, torch.zeros(1, dtype=torch.long), scored)
    logp = torch.tensor([[[-1.0, -2.0, -4.0], [-1.0, -2.0, -4.0]]])
    which = torch.tensor([1, 0, 1])
    assert masks.elbo(logp).tolist() == [[-7.0, -6.0]]
    assert masks.rows(which).elbo(logp[:, which]).tolist() == [[-6.0, -7.0, -6.0]]


def test_flips_by_the_exact_ratio_are_its_own():
    _, rollouts = fixed(ROWS[:2], [1.0, -1.0])
    rollouts = replace(rollouts, examples=[type("E", (), {"id": str(i)}) for i in range(2)])
    samples = pd.DataFrame({"d": [0.0, 0.0], "d_exact": [9.0, -9.0]})
    found = _against_target(samples, rollouts, 0.5, Reading(0.5, "batch", "sequence", True))
    assert found["flipped"].tolist() == [False, False]
    assert found["flipped_exact"].tolist() == [True, True]


def test_a_resumed_journal_goes_by_the_last_profile(tmp_path):
    first, last, late = (CountProfile([1.0, 2.0], [s, s], [1, 1], 0.5) for s in (1.0, 2.0, 3.0))
    opened = (journal_config(), Place(tmp_path))
    with Journal(*opened, 0, ALONE, lambda record: None) as journal:
        assert journal.profile is None
        for step, profile in ((1, first), (2, last), (3, late)):
            journal.write({"step": step})
            journal.write_profile(step, profile)
    assert Journal(*opened, 2, ALONE, lambda record: None).profile == last
    assert Journal(*opened, 0, ALONE, lambda record: None).profile is None


def test_adapters_are_drawn_by_the_runs_seed():
    def adapters(seed):
        model, _ = policies(config("base-sudoku", lora="all-linear", lora_rank=2, seed=seed))
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(adapters(0), adapters(0)) and not torch.equal(adapters(0), adapters(1))


def test_flips_are_of_the_mean_weight_among_rows_with_an_advantage():
    """Row 0: weights -1 and 2 (mean 0.5, no flip); row 1: flipped; row 2 has no advantage."""
    d = torch.tensor([[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]])
    advantage = torch.tensor([1.0, 1.0, 0.0])
    log = rspo(evidence_of_draws(d, advantage), lam=0.4, scope="none").log
    assert log["sign_flips"] == 0.5
    apart = torch.tensor([[5.0], [-1.0]])
    terms = relative_score(
        apart, torch.tensor([1.0]), lam=0.4, scope="none", residual="leave_one_out"
    )
    assert terms.weight[:, 0].tolist() == pytest.approx([1.4, -1.0])
    assert terms.flipped.tolist() == [False]
    swapped = relative_score(
        apart.flip(0), torch.tensor([1.0]), lam=0.4, scope="none", residual="leave_one_out"
    )
    assert swapped.flipped.tolist() == [False]


@pytest.mark.parametrize("scope", ["group", "none"])
def test_leave_one_out_centres_over_its_scope(scope):
    d = torch.tensor([[1.0, 3.0, 10.0], [2.0, 6.0, 30.0]])
    group, advantage = torch.tensor([0, 0, 1]), torch.tensor([1.0, -1.0, 0.5])
    terms = relative_score(
        d, advantage, lam=0.5, scope=scope, group=group, residual="leave_one_out"
    )
    other = d.flip(0)
    centre = torch.zeros(2, 3)
    if scope == "group":
        centre = torch.stack([other[:, :2].mean(1), other[:, :2].mean(1), other[:, 2]], 1)
    assert torch.allclose(terms.weight, advantage - 0.5 * (other - centre))


def test_reinforce_has_no_target(tmp_path, monkeypatch):
    monkeypatch.setattr(sudoku, "TRAIN_PROBLEMS", 64)
    first = train(config("base-sudoku", steps=1, objective="reinforce_elbo"), Folder(tmp_path))[1]
    assert first["target_rms"] is None and first["gap_rms"] is None


def test_a_part_of_the_reward_is_not_solved(monkeypatch):
    monkeypatch.setattr(rollouts_module, "rewards", lambda *_, **__: [0.5, 1.0, 0.0, 0.25] * 2)
    made = fixed_rollouts(config("base-sudoku"), load("base-sudoku"), prompts=2, group=4, seed=0)
    assert made.record["solve_rate"] == 0.25 and made.record["reward"] == 0.4375


def test_auto_outlives_a_step_without_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sudoku, "TRAIN_PROBLEMS", 64)
    silent = {"temperature": 0.0, "zero_variance": "skip", "design": "auto"}
    records = train(config("base-sudoku", steps=2, **silent), Folder(tmp_path))
    assert records[2]["forwards"] == 0 and not (tmp_path / "profile.jsonl").exists()
    assert completions_table(tmp_path).empty


def test_the_record_reads_d_as_the_method_does(monkeypatch):
    """A method that takes neither scope nor unit, and RSPO on the score itself."""

    def plain(e, *, lam: float):
        return rspo(e, lam=lam)

    monkeypatch.setitem(METHODS, "plain", Method(plain))
    ways = (
        {"objective": "plain", "scope": "none", "score_unit": "token"},
        {"hyper": {"use_reference": False}},
    )
    for way in ways:
        chosen, policy, rollouts, views = moved_update(lam=0.5, **way)
        with torch.no_grad():
            seen = evidence(rollouts, views, token_logps(policy, rollouts.distinct, views.masks))
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
        _, said, d = update(chosen, policy, optimizer, rollouts, views, 1)
        read = log_ratio(seen) if "objective" in way else score(seen)
        assert torch.allclose(d, read.mean(0), atol=1e-4)
        weight = relative_score(read, seen.advantage, lam=0.5).weight.mean(0)
        assert said["weight_rms"] == pytest.approx(weight.square().mean().sqrt().item(), rel=1e-4)


def test_old_is_there_for_those_who_ask_only():
    chosen, policy, rollouts, views = moved_update()
    token_logp = token_logps(policy, rollouts.distinct, views.masks)
    assert evidence(rollouts, views, token_logp).old is None


def test_a_gradient_without_a_reference_is_measured(monkeypatch):
    def ascent(e, *, score_unit: str):
        return reinforce(e, score_unit=score_unit)

    monkeypatch.setitem(METHODS, "ascent", Method(ascent, reference=False))
    policy, reference = table_denoiser(3, 2, 0), table_denoiser(3, 2, 1)
    chosen, rollouts = fixed(ROWS, ADVANTAGE, objective="ascent")
    frame = gradient_noise.gradient_rows(
        chosen, policy, reference, rollouts, schemes=["count"], views=[2], redraws=3, seed=0
    )
    assert "var_gradient" in set(frame["quantity"]) and "var_d_rollouts" not in set(
        frame["quantity"]
    )


def test_hyperparameters_take_their_declared_type(monkeypatch):
    def loose(e, *, lam: float, bound=5.0):
        return rspo(e, lam=lam)

    monkeypatch.setitem(METHODS, "loose", Method(loose))
    chosen = config("base-sudoku", objective="loose", hyper={"bound": 3})
    assert chosen.hyper == {"bound": 3.0} and type(chosen.hyper["bound"]) is float
    assert config("base-sudoku", steps=1, snapshots=4).snapshot_steps == [1]
