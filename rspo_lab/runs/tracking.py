"""Records of training sent to a local trackio project as well, if $RSPO_LAB_TRACK names one.

It needs the extra `[track]`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

VARIABLE = "RSPO_LAB_TRACK"


@contextmanager
def tracking(config, path: Path) -> Iterator[Callable[[dict], None]]:
    """A function that takes the record of a step, and drops it without a project.

    So do all processes but the first.  The run is called as its folder; a resumed one goes on under
    that name, and repeats the steps since its checkpoint.  RuntimeError: trackio is not installed.
    """
    project = os.environ.get(VARIABLE)
    if not project or os.environ.get("RANK", "0") != "0":
        yield lambda record: None
        return
    try:
        import trackio  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(
            f"{VARIABLE} is set and trackio is not there: pip install -e .[track], or unset it"
        ) from error
    from accelerate import PartialState
    from accelerate.tracking import TrackioTracker

    PartialState()  # the tracker's own log asks for it
    tracker = TrackioTracker(
        project, name=f"{path.parent.name}/{path.name}", resume="allow", config=asdict(config)
    )
    tracker.start()
    try:
        yield lambda record: tracker.log(
            {k: v for k, v in record.items() if k != "step" and v is not None}, step=record["step"]
        )
    finally:
        tracker.finish()
