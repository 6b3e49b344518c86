"""Running the points of a study: on this machine, a slot a point, or as Slurm arrays; what is done
is skipped, the rest resumes.

A point's folder alone says how it stands, so a sweep can be killed and called again, here or
elsewhere.  Jobs are submitit's.
"""

import os
import shutil
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

import submitit

from rspo_lab.runs.files import read_json, write_json
from rspo_lab.runs.interrupts import children, terminable
from rspo_lab.runs.parameters import complete, declared
from rspo_lab.runs.run import alive
from rspo_lab.sweeps.jobs import Here, NotebookJob
from rspo_lab.sweeps.progress import Board
from rspo_lab.sweeps.study import Point, Study

POLL = 0.2  # seconds between looks at a local slot
POLL_SLURM = 5.0  # and at the queue
CLUSTERS = ("local", "slurm", "debug")
JOBS = "jobs.json"  # in the sweep's folder: which Slurm job has which point


@dataclass(frozen=True)
class Resources:
    """Where points run: `slots` side by side, each with one of `gpus` (its id) if there are any."""

    cluster: str = "local"
    slots: int = 1
    gpus: tuple[str, ...] = ()
    timeout_min: float | None = (
        # of one point; on Slurm of one allocation, after which it is requeued, at most 3 times
        None
    )
    slurm: tuple[tuple[str, str | bool], ...] = ()  # options of sbatch


def resources(
    cluster: str,
    *,
    jobs: int | None = None,
    gpus: int | None = None,
    timeout_min: float | None = None,
    slurm: tuple[str, ...] = (),
) -> Resources:
    """Resources as the command line names them: `jobs` points side by side, or one on each of
    `gpus` GPUs.

    Local GPUs are those of CUDA_VISIBLE_DEVICES, else 0, 1, ...  ValueError if they cannot be had.
    """
    if cluster not in CLUSTERS:
        raise ValueError(f"the cluster is one of {', '.join(CLUSTERS)}, not {cluster!r}")
    if jobs is not None and gpus is not None:
        raise ValueError(
            "--jobs counts slots of CPU cores, --gpus slots of a GPU each: give one of them"
        )
    if any(number is not None and number < 1 for number in (jobs, gpus)):
        raise ValueError("--jobs and --gpus must be at least 1")
    if timeout_min is not None and timeout_min <= 0:
        raise ValueError(f"--timeout must be more than 0 minutes, not {timeout_min:g}")
    if slurm and cluster != "slurm":
        raise ValueError("--slurm goes with --cluster slurm")
    options = []
    for word in slurm:
        key, equals, value = word.partition("=")
        if not key or key.startswith("-"):
            raise ValueError(
                f"--slurm takes KEY=VALUE (or KEY) of sbatch's --KEY=VALUE, not {word!r}"
            )
        options.append((key.replace("_", "-"), value if equals else True))
    ids: tuple[str, ...] = ()
    if gpus and cluster == "local":
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        ids = (
            tuple(map(str, range(_local_gpus())))
            if named is None
            else tuple(filter(None, named.split(",")))
        )
        if len(ids) < gpus:
            raise ValueError(f"--gpus {gpus}: this machine shows {len(ids)}")
    elif gpus:
        ids = tuple(map(str, range(gpus)))
    slots = gpus or jobs or (os.cpu_count() or 1 if cluster == "local" else 64)
    return Resources(
        cluster, 1 if cluster == "debug" else slots, ids[: gpus or 0], timeout_min, tuple(options)
    )


def sweep(
    study: Study, root: Path, on: Resources, *, said: Callable[[str], None] = print
) -> dict[Path, str]:
    """Run what is not done; the state of every point at the end: done, failed, stopped, dead or
    waiting.

    sweep.json in `root` lists the points for `report`, with the error of one that failed before it
    had a folder.
    """
    listed = [
        {"name": p.name, "key": p.path.name, "params": complete(declared(p.notebook), p.given)}
        for p in study.points
    ]
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "sweep.json", {"title": study.title, "points": listed})
    board = Board(study.points, said)
    left = [point for point in study.points if board.state(point) != "done"]
    said(
        f"{len(study.points)} points in {root}: {len(study.points) - len(left)} done, {len(left)} to run"
    )
    try:
        if left:
            with terminable():
                (_slurm if on.cluster == "slurm" else _local)(study, left, root, on, board)
    finally:
        board.close()
        errors = {
            path: remark for path, (state, remark) in board.noted.items() if state == "failed"
        }
        listed = [
            point | ({"error": errors[p.path]} if p.path in errors else {})
            for point, p in zip(listed, study.points)
        ]
        write_json(root / "sweep.json", {"title": study.title, "points": listed})
    return {point.path: board.state(point) for point in study.points}


def plan(study: Study, root: Path, on: Resources) -> str:
    """The points, how they stand, and what those left would cost."""
    board = Board(study.points, print)
    states = {point.path: board.state(point) for point in study.points}
    left = [point for point in study.points if states[point.path] != "done"]
    lines = [f"{board.label(point)}: {states[point.path]}  {point.path}" for point in study.points]
    lines.append(
        f"{len(study.points)} points in {root}, {len(left)} to run in {len({p.wave for p in left})} waves on {on.slots} slots"
    )
    if not left:
        lines.append("nothing to pay")
    elif cost := study.cost(on.slots, left):
        slot = "GPU" if on.gpus else "core"
        lines.append(
            f"estimated cost: {cost[0]:.0f} {slot} minutes, {cost[1]:.0f} minutes on the clock"
        )
    else:
        lines.append("estimated cost: unknown (there is a point without minutes)")
    return "\n".join(lines)


def summary(states: dict[Path, str]) -> str:
    """The last line: how many points are in which state."""
    counts = Counter(states.values())
    parts = [
        f"{counts[state]} {state}"
        for state in ("done", "failed", "stopped", "dead", "waiting", "running")
        if counts[state]
    ]
    return f"{len(states)} points: {', '.join(parts)}"


def _executor(root: Path, on: Resources) -> submitit.Executor:
    """submitit's, with its trap mended: without a limit it would end local jobs after 2 minutes."""
    folder = root / ".jobs"
    executor = (
        submitit.LocalExecutor(folder) if on.cluster == "local" else submitit.SlurmExecutor(folder)
    )
    executor.update_parameters(
        **{"timeout_min": 60 * 24 * 365}
        if on.cluster == "local"
        else {"time": ceil(on.timeout_min or 60 * 24)}
    )
    return executor


def _submit(executor: submitit.Executor, root: Path, job: NotebookJob) -> submitit.Job:
    with children(stderr=root / ".jobs" / "controllers.log"):
        return executor.submit(job)


def _job(point: Point, root: Path, on: Resources, environment: dict[str, str]) -> NotebookJob:
    limit = 60 * on.timeout_min if on.timeout_min and on.cluster != "slurm" else None
    return NotebookJob(str(point.notebook), point.given, str(root), point.name, limit, environment)


def _local(study: Study, left: list[Point], root: Path, on: Resources, board: Board) -> None:
    """A slot a point; what another process runs is waited for."""
    pending, submit = (
        deque(left),
        Here if on.cluster == "debug" else partial(_submit, _executor(root, on), root),
    )
    free, busy = deque(on.gpus or range(on.slots)), {}
    threads = str(
        max(1, (os.cpu_count() or 1) // on.slots) if on.gpus else 1
    )  # one: results do not depend on the slots
    try:
        while pending or busy:
            for point in list(pending):
                if not free:
                    break
                needed = [other for other in study.points if other.path in point.needs]
                if any(
                    board.state(other) != "done" and (other in pending or other.path in busy)
                    for other in needed
                ):
                    continue
                pending.remove(point)
                if missing := [other.name for other in needed if board.state(other) != "done"]:
                    board.note(point, "waiting", f"needs {missing[0]}, which is not done")
                    continue
                slot = free.popleft()
                if alive(point.path):
                    busy[point.path] = (point, slot, None)
                    board.note(point, "running", "in another process, waited for")
                    continue
                visible = {"CUDA_VISIBLE_DEVICES": slot if on.gpus else ""}
                busy[point.path] = (
                    point,
                    slot,
                    submit(_job(point, root, on, visible | {"OMP_NUM_THREADS": threads})),
                )
                board.note(point, "running", "")
            for point, slot, job in list(busy.values()):
                if job.done() if job else not alive(point.path):
                    del busy[point.path]
                    free.append(slot)
                    if job:
                        _ended(point, job, board)
                    if (
                        alive(point.path) or not job and board.forget(point) != "done"
                    ):  # another process has it, or left it
                        pending.appendleft(point)
            board.show()
            if busy:
                time.sleep(POLL)
    except BaseException:
        for _, _, job in busy.values():
            if job:
                job.cancel()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and any(
            job and not job.done() for _, _, job in busy.values()
        ):
            time.sleep(POLL)
        for point, _, _ in busy.values():
            board.forget(point)
        raise


def _ended(point: Point, job: submitit.Job | Here, board: Board) -> None:
    """Take down how a job ended: its folder says it, unless the job never got there."""
    try:
        code, message = job.result()
    except Exception as error:  # submitit's, of a process that died or could not load the job
        code, message = (
            1,
            f"the job's process died: {str(error).strip().splitlines()[-1]}; its log: {job.paths.stderr}",
        )
    board.forget(point)
    if code and board.state(point) not in (
        "done",
        "failed",
        "stopped",
    ):  # done: by another sweep, which had its lock
        board.note(point, "failed", message)


def _slurm(study: Study, left: list[Point], root: Path, on: Resources, board: Board) -> None:
    """An array a wave, each after the one before; points already in the queue are waited for, not
    submitted again.
    """
    if not shutil.which("sbatch"):
        raise ValueError(
            "there is no sbatch here: call this on a Slurm login node, or use --cluster local"
        )
    known = read_json(root / JOBS)
    queue = _queue(set(known.values()))
    jobs = {
        point.path: known[key]
        for point in left
        if (key := _key(point)) in known and known[key] in queue
    }
    executor, own = _executor(root, on), {"requeue": True, "kill-on-invalid-dep": "yes"}
    own |= {"gpus-per-node": 1} if on.gpus else {}
    after = None
    for wave in study.waves:
        points = [point for point in wave if point in left and point.path not in jobs]
        if points:
            options = own | dict(on.slurm) | ({"dependency": f"afterany:{after}"} if after else {})
            executor.update_parameters(
                job_name=f"rspo-{root.name}",
                array_parallelism=on.slots,
                additional_parameters=options,
            )
            submitted = executor.submit_array(
                [_job(point, root, on, _seen(on)) for point in points]
            )
            jobs |= {point.path: job.job_id for point, job in zip(points, submitted)}
            write_json(
                root / JOBS,
                known | {_key(point): jobs[point.path] for point in left if point.path in jobs},
            )
        waiting = sorted({jobs[point.path].split("_")[0] for point in wave if point.path in jobs})
        after = ":".join(waiting) or after
    arrays = sorted({job.split("_")[0] for job in jobs.values()})
    board.said(
        f"Slurm jobs {', '.join(arrays)}: this may be ended; call it again to look on, `scancel {' '.join(arrays)}` to end them"
    )
    waiting = {point.path: point for point in left if point.path in jobs}
    while waiting:
        queue = _queue(set(jobs.values()))
        for path, point in list(waiting.items()):
            state = queue.get(jobs[path])
            if state is None:
                del waiting[path]
                if board.forget(point) in ("waiting", "running", "dead"):
                    log = root / ".jobs" / f"{jobs[path]}_0_log.err"
                    board.note(
                        point,
                        "dead",
                        f"Slurm job {jobs[path]} is over and the run is not; its log: {log}",
                    )
            else:
                board.note(
                    point,
                    "running" if state == "RUNNING" else "queued",
                    "" if state == "RUNNING" else state.lower(),
                )
        board.show()
        if waiting:
            time.sleep(POLL_SLURM)


def _seen(on: Resources) -> dict[str, str]:
    """No GPU by accident on a node that shows its own to all: none unless one was asked for, and
    then those that Slurm gives.
    """
    asked = on.gpus or any("gpu" in f"{key}={value}" for key, value in on.slurm)
    return {} if asked else {"CUDA_VISIBLE_DEVICES": ""}


def _queue(ids: set[str]) -> dict[str, str]:
    """{job: state} of those still in the queue; `squeue` needs no accounting, unlike `sacct`."""
    if not ids:
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--user={os.getuid()}"]
    for attempt in range(5):
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode == 0:
            rows = (line.split() for line in found.stdout.splitlines())
            return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in ids}
        time.sleep(2**attempt)
    raise RuntimeError(
        f"squeue failed: {found.stderr.strip()}; the jobs go on, call this again to look on"
    )


def _key(point: Point) -> str:
    return f"{point.name}/{point.path.name}"


def _local_gpus() -> int:
    """What nvidia-smi counts; 0 where there is none."""
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except FileNotFoundError:
        return 0
    return len(found.stdout.splitlines()) if found.returncode == 0 else 0
