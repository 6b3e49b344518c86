"""Policy objectives: pure functions of what one update has measured, and the table of methods."""

from rspo_lab.objectives.contract import (
    Evidence,
    Loss,
    RelativeScore,
    Scope,
    in_unit,
    log_ratio,
    relative_score,
    scope_mean,
    score,
)
from rspo_lab.objectives.table import METHODS, Method
from rspo_lab.objectives.weighted import reinforce, rspo

__all__ = [
    "METHODS",
    "Evidence",
    "Loss",
    "Method",
    "RelativeScore",
    "Scope",
    "in_unit",
    "log_ratio",
    "reinforce",
    "relative_score",
    "rspo",
    "scope_mean",
    "score",
]
