"""The policy that a run trains, its frozen reference, and the policies that a run has saved."""

import copy

import torch

from rspo_lab.models.diffusion_lm import DiffusionLM


def reference_of(model: DiffusionLM):
    """The frozen policy of this moment as a denoiser: adapters switched off under LoRA, else a
    copy.
    """
    if not model.adapted:
        frozen = copy.deepcopy(model).requires_grad_(False)
        return torch.no_grad()(frozen)

    @torch.no_grad()
    def reference(batch, hidden):
        with model.hf.disable_adapter():
            return model(batch, hidden)

    return reference
