from rspo_lab.runs.run import start_run

__all__ = ["start_run"]
