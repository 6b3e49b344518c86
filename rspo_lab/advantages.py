"""Advantages of the completions of one prompt against each other.

Shapes: B = prompts x `group` completions, group-major: rows g*group .. (g+1)*group - 1 answer
prompt g.
"""

from jaxtyping import Float
from torch import Tensor


def mean_centred(reward: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """Reward minus its group mean.  (Dr. GRPO, arXiv:2503.20783)"""
    reward = _grouped(reward, group)
    return (reward - reward.mean(1, keepdim=True)).flatten()


def standardized(reward: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """Mean-centred over the group's unbiased standard deviation; 0 where all its rewards agree.

    (GRPO, arXiv:2402.03300, without its epsilon: the degenerate case is a case, not a small
    divisor)
    """
    grouped = _grouped(reward, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    differ = (grouped != grouped[:, :1]).any(1, keepdim=True)
    std = grouped.std(1, keepdim=True).where(differ, 1.0)
    return (centred / std * differ).flatten()


def leave_one_out(reward: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """Reward minus the mean of the group's other rewards, an unbiased baseline.

    (RLOO, arXiv:2402.14740)
    """
    return mean_centred(reward, group) * (group / (group - 1))


def softmax(reward: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """softmax(A) - softmax(-A) in the group, A mean-centred; sums to 0.  (wd1, arXiv:2507.08838)"""
    centred = mean_centred(reward, group).reshape(-1, group)
    return (centred.softmax(1) - (-centred).softmax(1)).flatten()


def uninformative(reward: Float[Tensor, " B"], group: int) -> Float[Tensor, " G"]:
    """1 for every group whose rewards all agree (no signal in it), else 0."""
    grouped = _grouped(reward, group)
    return (grouped == grouped[:, :1]).all(1).to(reward.dtype)


ADVANTAGES = {
    "standardized": standardized,
    "mean_centred": mean_centred,
    "leave_one_out": leave_one_out,
    "softmax": softmax,
}


def _grouped(reward: Float[Tensor, " B"], group: int) -> Float[Tensor, "P group"]:
    """One row per prompt; ValueError where the rewards do not form groups."""
    if group < 2 or len(reward) % group:
        raise ValueError(
            f"{len(reward)} rewards do not form groups of {group} "
            "(a group needs at least 2 completions)"
        )
    return reward.reshape(-1, group)
