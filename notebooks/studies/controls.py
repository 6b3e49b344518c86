"""Controls of the comparison of methods: what learning is left when the reward says nothing.

A plugin (`-p plugins notebooks/studies/controls.py`).  Rows are group-major, groups of equal size.
"""

from dataclasses import replace

from rspo_lab.objectives import METHODS, Evidence, Loss, Method, rspo, score


def shuffled(e: Evidence) -> Evidence:
    """Every completion with the advantage of one of the next prompt: independent of its own."""
    size = int((e.group == e.group[0]).sum())
    return replace(e, advantage=e.advantage.roll(size), reward=e.reward.roll(size))


def shuffled_rspo(e: Evidence, *, lam: float) -> Loss:
    """`rspo` on shuffled advantages."""
    return rspo(shuffled(e), lam=lam)


def shuffled_raw(e: Evidence) -> Loss:
    """The raw advantage, shuffled, times the ELBO."""
    e = shuffled(e)
    return Loss(-(e.advantage * score(e)).mean(), {})


def shuffled_positives(e: Evidence) -> Loss:
    """Positive advantages alone, shuffled: imitation of some of its own samples."""
    e = shuffled(e)
    return Loss(-(e.advantage.clamp(min=0) * score(e)).mean(), {})


def own_samples(e: Evidence) -> Loss:
    """A constant reward as weight 1: imitation of all of its own samples."""
    return Loss(-score(e).mean(), {})


METHODS["shuffled_rspo"] = Method(shuffled_rspo)
METHODS["shuffled_raw"] = Method(shuffled_raw)
METHODS["shuffled_positives"] = Method(shuffled_positives)
METHODS["own_samples"] = Method(own_samples)
