"""What one call puts on the device: kernels, how long it is busy with them, and how often the host waits.

torch.profiler makes an object of Python for each event when it is asked for events(): seconds for a step. Its
kineto results have the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from .run import Run, synchronize
from .timing import IdleToIdle

# What the runtime is asked for where the host waits. cudaDeviceSynchronize is the profiler's own.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Trace(NamedTuple):
    """kernels  kernels, copies and fills;  busy  seconds in which one runs or more;  waits  of the host
    share    of a call's time, without the profiler, that the device is busy"""

    kernels: int = 0
    busy: float = 0.0
    waits: int = 0
    share: float = 0.0


def summary(events: Iterable[Any], on_device: Callable[[Any], bool]) -> Trace:
    """Returns what kineto's events say."""
    spans, waits = [], 0
    for event in events:
        if on_device(event):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        else:
            waits += event.name() in WAITS
    busy, reached = 0, 0
    for start, stop in sorted(spans):  # several streams may run at once
        busy += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return Trace(len(spans), busy / 1e9, waits)


def trace(run: Run, call: Callable[[], Any]) -> Trace:
    """Returns what a call does on the device; zeros without one."""
    if run.device != "cuda":
        return Trace()
    seconds = IdleToIdle(run.device)(call)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=False) as profile:
        call()
        synchronize(run.device)
    results: Any = profile.profiler
    found = summary(
        results.kineto_results.events(), lambda event: event.device_type() == torch.autograd.DeviceType.CUDA
    )
    return found._replace(share=found.busy / seconds)
