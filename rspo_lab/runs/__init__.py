"""Runs: what notebooks call."""

from rspo_lab.runs.run import load_runs, start_run

__all__ = ["load_runs", "start_run"]
