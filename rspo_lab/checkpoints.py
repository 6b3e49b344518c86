"""What a training run keeps on disk: checkpoint.pt to go on from, snapshots/ to measure, and jsonl
records of its steps.

Every file is whole or not there; after a kill the records are cut back to the checkpoint, so that a
resumed run is the same.
"""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd
import torch
from torch.distributed.tensor import DTensor

from rspo_lab.config import TrainConfig
from rspo_lab.distributed import World, parted, whole
from rspo_lab.runs.files import replacing

RECORDS = (
    "metrics",
    "sequences",
    "timing",
    "profile",
)  # the jsonl files of a run, a line a step or evaluation


def save(config, folder: Path, step: int, parameters, optimizer, world: World) -> None:
    """checkpoint.pt, whole or not at all, and the same from any number of processes."""
    first = world.rank == 0
    state = {
        "config": asdict(config),
        "step": step,
        "parameters": [whole(p.detach(), keep=first) for p in parameters],
    }
    state |= {"optimizer": whole(optimizer.state_dict(), keep=first)}
    if first:
        with replacing(folder / "checkpoint.pt") as path:
            torch.save(state, path)


def resume(config, folder: Path, parameters, optimizer) -> int:
    """Loads checkpoint.pt if there is one; the number of finished steps."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    sharded = isinstance(
        parameters[0], DTensor
    )  # then the first process alone reads the weights, to part them
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=sharded)
    defaults = {
        f.name: f.default for f in fields(config)
    }  # a field that is younger than the checkpoint had its default
    differ = [k for k, v in asdict(config).items() if state["config"].get(k, defaults[k]) != v]
    if differ:
        raise ValueError(
            f"{path} was made with another {', '.join(differ)}: use another run folder"
        )
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(parted(saved, parameter))
    for i, parameter in enumerate(parameters):
        moments = state["optimizer"]["state"].get(i, {})  # empty before the first update
        moments |= {
            name: parted(t, parameter) for name, t in moments.items() if t.shape == parameter.shape
        }
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def save_snapshot(policy, folder: Path) -> None:
    """A policy as a Hugging Face folder that appears under its name only when complete."""
    if policy.world.first(folder.exists):
        return
    partial = folder.with_suffix(".partial")
    policy.save(partial)
    if policy.world.rank == 0:
        os.replace(partial, folder)


def append(path: Path, record: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kept(files: dict[str, Path], done: int) -> tuple[list[dict], list[dict]]:
    """(metrics, profiles) of the finished steps; what a killed run wrote after its checkpoint is
    dropped from all files.
    """
    for path in files.values():
        _keep_steps(path, done)
    return read(files["metrics"]), read(files["profile"])


def _keep_steps(path: Path, done: int) -> None:
    """Drops the steps after `done`, and a half-written last line."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = (
        [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        if done
        else []
    )
    with replacing(path) as partial:
        partial.write_text("".join(kept))


def pairs(folder: Path) -> pd.DataFrame:
    """A row a (evaluated step, sequence) of a run: step, d (the estimate, nats), advantage, reward;
    none before the first evaluation.
    """
    frames = [pd.DataFrame(record) for record in read(folder / "sequences.jsonl")]
    return (
        pd.concat(frames, ignore_index=True)
        if frames
        else pd.DataFrame(columns=["step", "d", "advantage", "reward"], dtype=float)
    )


def trained_run(folder: str | Path) -> tuple[TrainConfig, dict[int, Path]]:
    """(config, {step: saved policy}) of a training run; the base counts as step 0."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no training run at {folder}: give the folder that holds its config.json and snapshots/"
        )
    config = TrainConfig(**json.loads((folder / "config.json").read_text()))
    saved = {
        int(path.name): path
        for path in sorted((folder / "snapshots").glob("*"))
        if path.suffix != ".partial"
    }
    if not saved:
        raise FileNotFoundError(
            f"{folder} has no snapshots yet: let its training reach step {config.snapshot_steps[0]}"
        )
    return config, {0: Path(config.model)} | saved


def saved_policy(policies: dict[int, Path], step: int) -> tuple[int, Path]:
    """(step, folder) of one of `trained_run`'s policies; step 0 is the last one."""
    step = step or max(policies)
    if step not in policies:
        raise ValueError(
            f"no policy was saved at step {step}; there are {', '.join(map(str, sorted(policies)))}"
        )
    return step, policies[step]
