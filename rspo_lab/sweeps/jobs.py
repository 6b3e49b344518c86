"""One point of a sweep as it crosses to the process that runs it, here or on another node."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from rspo_lab.runs.run import RunError


@dataclass(frozen=True)
class NotebookJob:
    """A call runs the notebook of a point; (exit code, message)."""

    notebook: str
    given: dict[str, Any]
    root: str
    name: str
    timeout: float | None  # seconds
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> tuple[int, str]:
        os.environ.update(self.environment)
        from rspo_lab.runs.notebook import run_notebook

        try:
            report = lambda line: print(line, flush=True)  # noqa: E731
            outcome = run_notebook(
                Path(self.notebook),
                self.given,
                runs=Path(self.root),
                name=self.name,
                timeout=self.timeout,
                report=report,
            )
        except (OSError, RuntimeError, ValueError, RunError) as error:
            return (2 if isinstance(error, ValueError | RunError) else 1), str(error)
        return outcome.code, outcome.message

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Preempted: the same again, which goes on from the run's checkpoint."""
        return submitit.helpers.DelayedSubmission(self)


class Here:
    """A job of the debug cluster: run in this process as soon as it is made (submitit's own would
    start a debugger).
    """

    def __init__(self, job: NotebookJob) -> None:
        before = dict(os.environ)
        try:
            self.value = job()
        finally:
            os.environ.clear()
            os.environ.update(before)
        if self.value[0] in (130, 143):  # the interrupt was of the sweep, not of this point alone
            raise KeyboardInterrupt

    def done(self) -> bool:
        return True

    def result(self) -> tuple[int, str]:
        return self.value
