"""What a sweep costs beside the same notebooks run one after the other in one process; no test.

`python tests/bench_sweep.py`.  12 points of a notebook that sleeps for a second, 2 slots.  Overhead
per point: (2 slots x sweep - back to back) / 12 seconds of a slot.
"""

import sys
import tempfile
import time
from pathlib import Path

from throwaway import make

from rspo_lab.runs.notebook import run_notebook
from rspo_lab.sweeps.resources import resources
from rspo_lab.sweeps.study import grid_study
from rspo_lab.sweeps.sweep import sweep

POINTS, SLOTS = 12, 2


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "notebooks").mkdir()
        notebook = make(home / "notebooks", "import time; time.sleep(1)", "run.finish()")
        seconds = {}
        for name in ("back to back", "sweep"):
            study = grid_study(notebook, {}, {"steps": list(range(POINTS))}, home / name)
            began = time.monotonic()
            if name == "sweep":
                states = sweep(
                    study, home / name, resources("local", jobs=SLOTS), say=lambda line: None
                )
                assert set(states.values()) == {"done"}
            else:
                for point in study.points:
                    outcome = run_notebook(
                        notebook,
                        point.given,
                        runs=home / name,
                        name=point.name,
                        report=lambda line: None,
                    )
                    assert outcome.code == 0, outcome
            seconds[name] = time.monotonic() - began
    overhead = (SLOTS * seconds["sweep"] - seconds["back to back"]) / POINTS
    ratio = seconds["sweep"] / seconds["back to back"]
    print(
        f"{POINTS} points: back to back in one process {seconds['back to back']:.1f} s, "
        f"sweep on {SLOTS} slots {seconds['sweep']:.1f} s"
    )
    print(f"ratio {ratio:.2f}; overhead of the sweep {overhead:.2f} seconds of a slot per point")
    return 0


if __name__ == "__main__":
    sys.exit(main())
