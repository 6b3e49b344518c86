"""What to watch in relative-score training: gap to the target, calibration, mask noise, intervals.

Shapes: R replicates, B sequences.  Log-ratios in nats, in the unit that `lam` was chosen for.
"""

import math

from jaxtyping import Float, Int
from torch import Tensor

from rspo_lab.objectives import centre
from rspo_lab.statistics import correlation, ratio


def gap_summary(
    d: Float[Tensor, "R B"],
    advantage: Float[Tensor, " B"],
    lam: float,
    scope: Int[Tensor, " B"] | str = "batch",
) -> dict[str, float | None]:
    """One training step's estimate against its target; None where a quantity is not defined (lam =
    0, R = 1, no spread).

    d_mean: mean estimate of log pi/pi_ref.  For completions drawn in random order its exact
    counterpart would be a KL
        divergence, hence >= 0; confidence-ordered rollouts give no such bound, but a mean that
        falls steadily below 0 says that the ELBO's gap to the likelihood grows (notebook 04
        measures it).
    target_rms, gap_*: A/lam, and A/lam - d_hat with d_hat the estimate centred over `scope`, as in
    the objective.
    target_correlation: of A/lam with d_hat.   calibration_ratio: lam sd(d_hat) / sd(A); far below
    1, lam does nothing.
    mask_sd: standard deviation of one replicate of d around its sequence's mean.
    reliability: share of the variance of d_hat that is not mask noise, 1 - (variance of one centred
    replicate)/R / Var(d_hat).
    """
    d, advantage = d.double(), advantage.double()
    estimate = d.mean(0)
    centred = d - centre(d, scope)
    d_hat = centred.mean(0)
    own = d_hat.std(correction=1).item()
    record = {
        "d_mean": estimate.mean().item(),
        "d_sd": estimate.std(correction=1).item(),
        "calibration_ratio": ratio(lam * own, advantage.std().item()),
        "target_correlation": correlation(d_hat, advantage),
        "mask_sd": None,
        "reliability": None,
        "target_rms": None,
    } | {f"gap_{k}": None for k in ("mean", "rms", "q05", "q50", "q95")}
    if len(d) > 1:
        one, own_one = (x.var(0, correction=1).mean().item() for x in (d, centred))
        record |= {
            "mask_sd": math.sqrt(one),
            "reliability": None if own == 0 else 1 - own_one / len(d) / own**2,
        }
    if lam > 0:
        gap = advantage / lam - d_hat
        quantiles = gap.quantile(gap.new_tensor([0.05, 0.5, 0.95])).tolist()
        record |= dict(zip(("gap_q05", "gap_q50", "gap_q95"), quantiles))
        record |= {
            "target_rms": _rms(advantage / lam),
            "gap_mean": gap.mean().item(),
            "gap_rms": _rms(gap),
        }
    return record


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
