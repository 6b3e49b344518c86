"""The noise of sampled steps is against the whole path, and that of redraws by the model."""

from dataclasses import replace

import pytest
import torch
from conftest import table_denoiser

from rspo_lab.batch import Batch
from rspo_lab.estimators import elbo_draws
from rspo_lab.masks.designs import path_design
from rspo_lab.measure.path_noise import merged_rows, path_rows


@pytest.fixture
def paths():
    """Five tokens of two ids by three paths, one of them of three steps."""
    completion = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]])
    step = torch.tensor([[3, 0, 4, 1, 2], [0, 1, 2, 3, 4], [0, 2, 2, 0, 1]])
    prompt = torch.zeros(3, 1, dtype=torch.long)
    surprisal = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    return Batch(prompt, prompt == 0, completion, completion >= 0, step, surprisal)


def test_sampled_steps_have_the_paths_mean_and_their_own_variance(paths):
    policy, reference = table_denoiser(5, 2, 0), table_denoiser(5, 2, 1)
    rows = path_rows(
        policy, reference, paths, designs=["path_uniform"], views=[2], redraws=4000, seed=0
    ).set_index("quantity")
    assert abs(rows.loc["bias_path_d", "value"]) < 4 * rows.loc["bias_path_d", "stderr"]
    big = paths.rows(torch.arange(3).repeat_interleave(1000))
    masks = path_design("path_uniform")(
        big.valid, big.step, big.surprisal, 2, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        d = (elbo_draws(policy, big, masks) - elbo_draws(reference, big, masks))[0]
    variance = d.view(3, 1000).var(1).mean().item()
    assert rows.loc["var_path_d", "value"] == pytest.approx(variance, rel=0.1)


def test_scoring_the_whole_path_has_no_noise(paths):
    policy, reference = table_denoiser(5, 2, 0), table_denoiser(5, 2, 1)
    rows = path_rows(
        policy,
        reference,
        paths,
        designs=["path", "path_surprising"],
        views=[1, 5],
        redraws=3,
        seed=0,
    )
    quiet = rows[(rows["design"] == "path") | (rows["views"] == 5)]
    assert set(quiet["design"]) == {"path", "path_surprising"}
    noise = quiet[quiet["quantity"].str.startswith(("bias", "var"))]
    assert noise["value"].abs().max() < 1e-12
    merged = merged_rows(policy, reference, paths, merges=[1, 2])
    assert merged["value"][:2].abs().max() < 1e-12 < merged["value"][2:].abs().min()


def test_rollouts_without_steps_are_refused(paths):
    policy = table_denoiser(5, 2, 0)
    with pytest.raises(ValueError, match="carry their steps"):
        path_rows(
            policy,
            policy,
            replace(paths, step=None),
            designs=["path"],
            views=[1],
            redraws=1,
            seed=0,
        )
