"""Seconds and bytes of calls on a device, and what the device can do at best."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


class Meter:
    """Measures calls on one device: by a clock on a CPU, by CUDA events on a GPU.

    Args:
        clock: 'wall' or 'cpu', the time of the calling thread alone, where others use the cores, too. A GPU has its
            events; `now` then reads the wall clock after everything that was launched.
    """

    def __init__(self, device: str, clock: str = "wall") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda needs a GPU that torch can see. Got none. Use --device cpu.")
        self.device = device
        self._clock = CLOCKS[clock]

    def now(self) -> float:
        """Seconds on the clock, once the device has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self._clock()

    def seconds(self, function: Callable[[], Any]) -> float:
        """Seconds of one call."""
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        begun = self._clock()
        function()
        return self._clock() - begun

    def medians(self, functions: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
        """Median seconds of each function, run in turn, after one round that is not counted."""
        times: list[list[float]] = [[] for _ in functions]
        for number in range(repeats + 1):
            for function, seconds in zip(functions, times, strict=True):
                taken = self.seconds(function)
                if number:
                    seconds.append(taken)
        return [statistics.median(seconds) for seconds in times]

    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else "CPU, one thread"


def machine_rates(meter: Meter, dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of a matrix product in `dtype`, and bytes per second that a copy reads and writes."""
    size, numbers = (8192, 2**28) if meter.device == "cuda" else (1024, 2**24)
    left, right, out = (torch.randn(size, size, device=meter.device).to(dtype) for _ in range(3))
    source, target = torch.randn(numbers, device=meter.device), torch.empty(numbers, device=meter.device)
    product, copy = meter.medians([lambda: torch.mm(left, right, out=out), lambda: target.copy_(source)], 15)
    return {"matmul_flops": 2 * size**3 / product, "copy_bytes": 2 * source.nbytes / copy}


def gpu_peak_bytes(function: Callable[[], Any]) -> int:
    """Bytes that a call allocates at most on the GPU, above what is held when it starts."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held
