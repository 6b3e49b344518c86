"""Whether two LaTeX answers mean the same, by math-verify in a process of its own.

It cannot hang or fill this one.  math-verify's own time limit is an alarm signal: it works in the
main thread only and cannot end one long multiplication.  Here the system ends the process after
SECONDS of processor time, so a busy machine changes no verdict, and caps its memory at BYTES.
Answers are parsed as LaTeX, never as Python (math-verify's reader of plain expressions is sympy's,
which evaluates).
"""

import atexit
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from functools import lru_cache

SECONDS = 5.0  # processor time of one comparison; math-verify's own default
WALL_SECONDS = 100.0  # for a comparison that waits rather than works
START_SECONDS = 300.0  # to import sympy on a slow disk
BYTES = 4 << 30

_LOCK = threading.Lock()
# by our process id: a fork must not talk into its parent's pipes
_STARTED: dict[int, subprocess.Popen] = {}


@lru_cache(maxsize=65536)
def fault(truth: str, answer: str) -> str | None:
    """None if the answer equals the truth, else "wrong_answer", "unparsable" or "undecided".

    Undecided: ended for its time or memory.  Raises RuntimeError if math-verify does not start.
    """
    if not _balanced(answer):  # it could close the box that it is put into
        return "unparsable"
    with _LOCK:
        return _ask(truth, answer)


def _balanced(text: str) -> bool:
    depth = 0
    for brace in text.replace("\\{", "").replace("\\}", ""):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0


def _ask(truth: str, answer: str) -> str | None:
    process = _process()
    try:
        process.stdin.write(json.dumps([truth, answer, SECONDS]).encode() + b"\n")
        reply = _line(process, WALL_SECONDS)
    except BaseException:  # a later question must not read the reply to an interrupted one
        stop()
        raise
    if not reply:
        stop()
        return "undecided"
    return json.loads(reply)


def _line(process: subprocess.Popen, seconds: float) -> bytes:
    """The next line of its output, b"" if it ended or took too long."""
    pipes = [process.stdout]
    ready = select.select(pipes, [], [], seconds)[0]  # pyright: ignore[reportArgumentType]
    return process.stdout.readline() if ready else b""


def _process() -> subprocess.Popen:
    """The live process of ours, started if there is none."""
    process = _STARTED.get(os.getpid())
    if process is not None and process.poll() is None:
        return process
    stop()
    process = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    _STARTED[os.getpid()] = process
    if _line(process, START_SECONDS) != b'"ready"\n':
        stop()
        raise RuntimeError(
            "math-verify does not start (its error is on stderr); "
            "install it: pip install math-verify"
        )
    return process


def stop() -> None:
    """End the process, if there is one; the next comparison starts another."""
    process = _STARTED.pop(os.getpid(), None)
    if process is not None:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


atexit.register(stop)


def _serve() -> None:
    """The process itself: a line of JSON [truth, answer, seconds] in, a line with its fault out."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # it warns of the time limits that are switched off here
    replies, sys.stdout = sys.stdout, sys.stderr
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = BYTES if hard == resource.RLIM_INFINITY else min(BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, wherever it is
    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", latex, fallback_mode="first_match", parsing_timeout=None)

    print('"ready"', file=replies, flush=True)
    for line in sys.stdin:
        truth, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        given = read(answer)
        if verify(read(truth), given, timeout_seconds=None):
            verdict = None
        elif all(isinstance(reading, str) for reading in given):
            verdict = "unparsable"
        else:
            verdict = "wrong_answer"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
