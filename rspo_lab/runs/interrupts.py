"""How a process of ours is told to end, and where what its children say on the way goes."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def terminable() -> Iterator[None]:
    """Take SIGTERM as KeyboardInterrupt("SIGTERM"), so that what was begun is ended.

    A handler already set is kept.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt("SIGTERM")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def children(stderr: Path) -> Iterator[None]:
    """Processes started inside can be ended by SIGINT, and write stderr to the end of a file.

    In the background of a script they would ignore it; on Ctrl-C a terminal sends it to them too,
    and they say so.
    """
    stderr.parent.mkdir(parents=True, exist_ok=True)
    own = os.dup(2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stderr.open("ab") as other:
            os.dup2(other.fileno(), 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        signal.signal(signal.SIGINT, before)


@contextmanager
def noted(*signals: int) -> Iterator[list[int]]:
    """Signals that come are put into a list instead of ending the process (main thread only)."""
    received: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {
            number: signal.signal(number, lambda n, frame: received.append(n)) for number in signals
        }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
