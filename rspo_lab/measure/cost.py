"""What a call costs: seconds, peak memory of tensors, FLOP of products and attention.

Units: seconds, bytes; a multiply-add is 2 FLOP.
"""

import gc
import math
import time
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

CPU_ATTENTION = {  # torch's counter knows only the kernels of GPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: (
        sdpa_flop_count(*shapes[:3])
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: (
        sdpa_backward_flop_count(*shapes[:4])
    ),
}


def flop(run: Callable[[], object]) -> int:
    """What the call really does, so also what it computes twice."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def timed(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, tuple[list[float], float]]:
    """(seconds of every repeat, peak bytes) per call; ([], nan) if out of memory.

    The calls take turns after a warm-up.
    """
    measured = {}
    for name, run in runs.items():
        try:
            measured[name] = ([], float(peak_bytes(run, device)))
        except torch.OutOfMemoryError:
            measured[name] = ([], math.nan)
    for _ in range(repeats):
        for name, (seconds, peak) in measured.items():
            if not math.isnan(peak):
                began = _clock(device)
                runs[name]()
                seconds.append(_clock(device) - began)
    return measured


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that all tensors of the process took during the second call.

    The first one leaves gradients, moments and kernels.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        run()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    run()
    with LiveTensors() as live:
        run()
    return live.peak


class LiveTensors(TorchDispatchMode):
    """Bytes of the CPU tensors of this process, now and at most, from the `with` on.

    Those that were there before count too.  What torch.cuda.max_memory_allocated is on a GPU, but
    for what an operation needs only inside itself, which is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.ends = {}  # by storage: what is called when it dies

    def __enter__(self):
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor):  # isinstance would ask lazy modules for their class
                self._count(thing)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for end in self.ends.values():
            end.detach()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for thing in tree_leaves(out):
            if isinstance(thing, Tensor):
                self._count(thing)
        return out

    def _count(self, tensor):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.ends:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self.ends[key] = weakref.finalize(storage, self._end, key, storage.nbytes())

    def _end(self, key, size):
        self.now -= size
        del self.ends[key]


def _clock(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
