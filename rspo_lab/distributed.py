"""The processes of one training run: one alone, or those that `accelerate launch` or torchrun
started, each on its device.

All of them hold the same rollouts, masks and records and decide alike; what they share out is the
forwards.  n rows go to the processes in equal runs, the last row repeated where they do not come
out even, so that all do equally many forwards (FSDP2 needs that).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    sharded: bool = (
        False  # FSDP2: each process holds a part of the weights; else each holds all of them
    )
    device: str = "cpu"

    def share(self, rows: int) -> slice | Tensor:
        """Which of `rows` rows this process has."""
        if self.size == 1:
            return slice(None)
        each = -(-rows // self.size)
        return (torch.arange(each) + self.rank * each).clamp(max=rows - 1)

    def gather(self, mine: Tensor, rows: int) -> Tensor:
        """All `rows` rows from the processes' shares; a gradient flows to this process's own.

        Every process computes the same loss from what it gathers, so the sum of their parameters'
        gradients is that of the loss.
        """
        return mine if self.size == 1 else _Gather.apply(mine, self)[:rows].clone()

    def any(self, flag: bool) -> bool:
        """Whether it is true on any process."""
        if self.size == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def first(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, on all: for what may not come out the same twice."""
        if self.size == 1:
            return make()
        box = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, device=torch.device(self.device))
        return box[0]

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Adds up the processes' gradients, each of which is of its own rows."""
        for gradient in (p.grad for p in parameters if p.grad is not None):
            if self.sharded:
                gradient.mul_(self.size)  # FSDP2 has averaged them
            elif self.size > 1:
                dist.all_reduce(gradient)


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that the launcher's environment describes; `accelerate launch --use_fsdp` asks for
    sharded weights.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device.startswith("cuda:"):
        raise ValueError(
            f"device {device!r} would be that of all processes: give cuda, and each takes its own"
        )
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = (
        "false"  # else transformers loads weights in one process only, for accelerate to spread
    )
    patience = timedelta(
        hours=2
    )  # the others wait while the first one judges completions or writes large weights
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=patience)
    try:
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
        yield World(dist.get_rank(), dist.get_world_size(), sharded, "cuda" if on_gpu else "cpu")
    finally:
        dist.destroy_process_group()


def whole(value: Any, *, keep: bool = True) -> Any:
    """A tensor, or each in a dict, with all its parts; parted ones are gathered one by one, to the
    CPU of processes that `keep` them.
    """
    if isinstance(value, dict):
        return {key: whole(v, keep=keep) for key, v in value.items()}
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


def parted(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor held as `like` is."""
    return (
        distribute_tensor(tensor, like.device_mesh, like.placements)
        if isinstance(like, DTensor)
        else tensor
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine, world):
        ctx.rank, ctx.each = world.rank, len(mine)
        parts = [torch.empty_like(mine) for _ in range(world.size)]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, slope):
        return slope[ctx.rank * ctx.each : (ctx.rank + 1) * ctx.each], None
