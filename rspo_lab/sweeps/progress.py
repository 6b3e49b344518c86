"""Tables of runs: a sweep's points while it runs (on a terminal redrawn in place, elsewhere a line
for what changed), and any folder's.
"""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rspo_lab.runs.files import read_json
from rspo_lab.runs.run import alive
from rspo_lab.sweeps.study import Point

if TYPE_CHECKING:
    from pandas import DataFrame

EVERY = 5.0  # seconds between the progress lines of a point where there is no terminal
REDRAW = 0.5  # seconds between drawings on one


class Board:
    """States and progress of points, as their folders tell them or as `note`d by who runs them."""

    def __init__(self, points: list[Point], said: Callable[[str], None]) -> None:
        self.points, self.said = points, said
        self.noted: dict[Path, tuple[str, str]] = {}
        self.live = said is print and sys.stdout.isatty()
        self.lines = 0  # drawn last, to be overwritten
        self.drawn = 0.0
        self.told: dict[Path, tuple[str, float]] = {}  # what was last said of a point, and when
        named: dict[str, list[dict]] = {}
        for point in points:
            named.setdefault(point.name, []).append(point.given)
        self.varies: dict[str, list[str]] = {}  # by name, the parameters in which its points differ
        for name, alike in named.items():
            differ = [
                k
                for k in dict.fromkeys(k for given in alike for k in given)
                if len({repr(given.get(k)) for given in alike}) > 1
            ]
            self.varies[name] = [
                k for k in differ if k != "trained" or len(named) == 1
            ]  # a long path

    def state(self, point: Point) -> str:
        """waiting, queued, running, done, failed, stopped or dead."""
        return self._status(point)[0]

    def note(self, point: Point, state: str, remark: str) -> None:
        """What the folder does not say (yet)."""
        self.noted[point.path] = (state, remark)

    def forget(self, point: Point) -> str:
        """Take the folder's word again; its state."""
        self.noted.pop(point.path, None)
        return self.state(point)

    def label(self, point: Point) -> str:
        """The point's name with the parameters that vary."""
        return " ".join(
            [
                point.name,
                *(
                    f"{name}={point.given[name]}"
                    for name in self.varies[point.name]
                    if name in point.given
                ),
            ]
        )

    def show(self) -> None:
        """Draw what changed."""
        if self.live:
            if time.monotonic() - self.drawn >= REDRAW:
                self._draw()
            return
        done = sum(self.state(point) == "done" for point in self.points)
        for point in self.points:
            state, remark = self._status(point)
            text, now = f"{state}  {remark}".rstrip(), time.monotonic()
            before, when = self.told.get(point.path, (None, 0.0))
            if before is None and state in ("done", "waiting"):  # from the start
                self.told[point.path] = (text, now)
            elif text != before and (
                state != "running"
                or now - when >= EVERY
                or not (before or "").startswith("running")
            ):
                self.told[point.path] = (text, now)
                self.said(f"[{done}/{len(self.points)}] {self.label(point)}: {text}")

    def close(self) -> None:
        """The last drawing stays."""
        self.drawn = 0.0
        self.show()

    def _status(self, point: Point) -> tuple[str, str]:
        status = read_json(point.path / "status.json")
        noted, remark = self.noted.get(point.path, ("", ""))
        progress = status.get("progress")
        ahead = (
            f"{progress['done']}/{progress['total']} {progress['note']}".rstrip()
            if progress
            else ""
        )
        if noted and not (noted == "running" and status.get("state") == "done"):
            return noted, remark or (
                ahead if noted == "running" and status.get("state") == "running" else ""
            )
        state = status.get("state", "waiting")
        if state == "running" and not alive(point.path):
            state = "dead"
        return state, status["error"][
            "message"
        ] if "error" in status and state == "failed" else ahead

    def _draw(self) -> None:
        size = shutil.get_terminal_size()
        rows = [(self.label(point), *self._status(point)) for point in self.points]
        counts = Counter(state for _, state, _ in rows)
        head = ", ".join(f"{n} {state}" for state, n in counts.items())
        moving = [row for row in rows if row[1] not in ("done", "waiting", "queued")]
        shown = rows if len(rows) + 2 <= size.lines else moving[: max(size.lines - 2, 0)]
        width = max(
            min(max((len(row[0]) for row in shown), default=0), size.columns - 10), 1
        )  # the state is always seen
        lines = [
            f"{label:{width}.{width}}  {state:7}  {' '.join(remark.split())}"
            for label, state, remark in shown
        ] + [head]
        lines = [line[: size.columns - 1] for line in lines]
        up = f"\x1b[{self.lines}F" if self.lines else ""
        sys.stdout.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[0J")
        sys.stdout.flush()
        self.lines, self.drawn = len(lines), time.monotonic()


def table(frame: "DataFrame") -> str:
    """Runs (of `runs.load_runs`) as columns of text: the parameters shown are those that differ
    between runs of one name.
    """
    own = ["name", "key", "state", "progress"]
    params = [column for column in frame if column not in [*own, "error", "path"]]
    vary = [p for p in params if frame[p].map(repr).groupby(frame["name"]).nunique().max() > 1]
    columns = [*own, *vary, "error"]
    rows = [columns, *([_cell(row[column]) for column in columns] for _, row in frame.iterrows())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
