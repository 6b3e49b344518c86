"""Saved policies: one loader, which places them as the run did, or says why it cannot."""

import json

import pytest
import torch
from test_training import Folder, config

from rspo_lab import policies
from rspo_lab.policies import load_trained, trained_run
from rspo_lab.training import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with LoRA in bfloat16, the policy saved at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    chosen = config(
        "base-sudoku", steps=2, lora="all-linear", lora_rank=2, dtype="bfloat16", lr=1e-2
    )
    train(chosen, Folder(folder))
    return folder


def test_policy_and_reference_are_placed_as_in_the_run(run, monkeypatch):
    asked = []
    load = policies.load

    def recording(name, **how):
        asked.append(how)
        return load(name, **how)

    monkeypatch.setattr(policies, "load", recording)
    trained = load_trained(run)
    assert asked == [{"device": "cpu", "dtype": torch.bfloat16, "attention": "sdpa"}] * 2
    assert trained.step == 2 and trained.policy.hf.get_base_model().dtype == torch.bfloat16
    assert load_trained(run, 1).step == 1


def test_step_0_is_the_base_and_none_the_last(run):
    trained = trained_run(run)
    assert sorted(trained.folders) == [0, 1, 2]
    assert trained.step_or_last(None) == 2 and trained.step_or_last(0) == 0
    base = load_trained(run, 0)
    assert not base.policy.adapted
    with pytest.raises(ValueError, match="no policy was saved at step 7; there are 0, 1, 2"):
        trained.policy(7)


def test_folders_that_are_no_run_or_of_another_version_say_so(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no training run at .*config.json and snapshots/"):
        trained_run(tmp_path)
    values = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(FileNotFoundError, match="no snapshots yet: let its training reach step 1"):
        trained_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"common_masks": False}))
    with pytest.raises(ValueError, match="another version, which had common_masks.*train it again"):
        trained_run(tmp_path)
