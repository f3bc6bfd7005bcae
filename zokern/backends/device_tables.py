"""Tables of launches on the device: packed once for a list, uploaded once for a stream, then found again.

A caller that keeps its lists (TensorList.lasting) finds a launch by them, see lists.prepared(). Any other
list is known by where each tensor lies, its dtype, shape, strides and Span, and those of the results. That
key is made anew at each call, so a tensor that moved, was cast or reshaped has another key, and never meets
an old table. An upload is ordered by its stream, so each stream has its own. While a CUDA graph is
captured nothing may be uploaded; then the stream does not matter, because earlier uploads are complete.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .launch import Batch, Span
from .lists import prepared

TABLES = 8192
BYTES = 1 << 26
COUNTS = 64
_ALREADY = nullcontext()


class Upload(NamedTuple):
    """A table on the device.

    buffer  uint8
    places  the address of each part
    """

    buffer: Tensor
    places: tuple[int, ...]

    def part(self, launch: Launch, i: int) -> Tensor:
        """Returns a part of a launch's table as int64."""
        begin = self.places[i] - self.places[0]
        return self.buffer[begin : begin + launch.parts[i].size].view(torch.int64)


class Launch:
    """A launch that was checked and packed.

    device   of its tensors
    parts    its table in host memory; (): there is nothing to do
    facts    what the host wants to know of it
    uploads  by stream
    memo     what a backend prepares beside the table
    """

    def __init__(self, device: torch.device, parts: Sequence[np.ndarray], facts: Any) -> None:
        self.device, self.facts = device, facts
        self.parts = [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts]
        self.uploads: dict[int, Upload] = {}
        self.memo: dict[Any, Any] = {}

    @property
    def bytes(self) -> int:
        return sum([part.nbytes for part in self.parts])


def key_of(
    thetas: Sequence[Tensor] | None,
    spans: Sequence[Span],
    outs: Sequence[Sequence[Tensor]] = (),
    residuals: Sequence[Tensor] | None = None,
    scales: Sequence[Tensor | None] | None = None,
) -> Hashable:
    """Returns all that pack.pack() reads of a list."""
    lists = [() if thetas is None else thetas, *outs, residuals or ()]
    where = [[(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors] for tensors in lists]
    factors = [(i, s.data_ptr(), s.dtype) for i, s in enumerate(scales or ()) if s is not None]
    rows = [(i, s.rows.data_ptr(), s.rows.numel()) for i, s in enumerate(spans) if s.rows is not None]
    return thetas is None, *map(tuple, where), tuple([s[:3] for s in spans]), tuple(rows), tuple(factors)


class Tables:
    """Holds the launches of one backend, and drops the least recently used first.

    A launch that comes again after it was dropped takes no other's place: the limits grow by it. So a model
    of more tensors than `tables` loses its tables in the first step alone."""

    def __init__(self, tables: int = TABLES, bytes: int = BYTES) -> None:
        self.tables, self.limit = tables, bytes
        self.kept: OrderedDict[Hashable, Launch] = OrderedDict()
        self.dropped: set[int] = set()  # hashes of keys
        self.bytes = 0
        self.built = 0  # how often a table had to be packed
        self.captured: dict[int, Upload] = {}  # a captured graph reads these at every replay: never dropped
        self.lock = Lock()

    def find(
        self, name: Hashable, batch: Batch, beside: Sequence[Sequence[Tensor] | None],
        check: Callable[[], torch.device], key: Callable[[], Hashable],
        make: Callable[[], tuple[Sequence[np.ndarray], Any]],
    ) -> Launch:  # fmt: skip
        """Returns the launch of a list: that of the last time, without a look at the tensors, if the caller
        keeps the list and all of `beside`.

        check()  refuses wrong arguments; returns the device
        key()    all that make() reads
        make()   packs; returns the parts of the table, and facts
        """
        return prepared(name, batch, beside, lambda: self.get(check(), key, make))

    def get(
        self,
        device: torch.device,
        key: Callable[[], Hashable],
        make: Callable[[], tuple[Sequence[np.ndarray], Any]],
    ) -> Launch:
        """Returns the launch of a key."""
        place = device, key()
        with self.lock:  # of all that two threads share; what a launch has grows by single writes to a dict
            launch = self.kept.get(place)
            if launch is not None:
                self.kept.move_to_end(place)
                return launch
            launch = self.kept[place] = Launch(device, *make())
            self.built += 1
            self.bytes += launch.bytes
            if hash(place) in self.dropped:
                self.dropped.discard(hash(place))
                self.tables, self.limit = self.tables + 1, self.limit + launch.bytes
            while len(self.kept) > 1 and (len(self.kept) > self.tables or self.bytes > self.limit):
                old, least = self.kept.popitem(last=False)
                self.bytes -= least.bytes
                self.dropped.add(hash(old))
            if len(self.dropped) > 16 * self.tables:
                self.dropped.clear()
            return launch

    def upload(self, launch: Launch) -> Upload:
        """Returns the table of a launch on the device, for a kernel on the current stream.

        Raises RuntimeError while a CUDA graph is captured and the table is not there yet."""
        found = launch.uploads.get(stream := stream_of(launch.device))
        if capturing(launch.device):
            found = found or next(iter(launch.uploads.values()), None)
            if found is None:
                raise RuntimeError(
                    "this list of tensors has no table on the device yet, and none can be uploaded while a "
                    "CUDA graph is captured; "
                    "make the same call on the same tensors once before the capture"
                )
            self.captured[found.places[0]] = found
        elif found is None:
            found = launch.uploads[stream] = upload(launch.parts, launch.device)
        return found


class Counts:
    """Hands out counts of one element that are 0.

    torch.zeros() launches a kernel, so it is asked for many at once; while a CUDA graph is captured for each,
    because a replay needs its count at 0 again. Each lies on 16 bytes, as memory of its own would: Triton
    compiles another kernel for other places."""

    def __init__(self) -> None:
        self.left: dict[tuple[torch.device, int], list[Tensor]] = {}

    def take(self, device: torch.device) -> Tensor:
        if capturing(device):
            return torch.zeros(1, dtype=torch.int64, device=device)
        some = self.left.setdefault((device, stream_of(device)), [])
        try:
            return some.pop()  # one at a time, whatever the thread
        except IndexError:
            with torch.inference_mode(False):
                first, *others = torch.zeros(COUNTS, 2, dtype=torch.int64, device=device)[:, :1].unbind(0)
            some += others
            return first


def why_off_on(device: torch.device | None, lacks: Callable[[tuple[int, int]], str | None]) -> str | None:
    """Returns why a GPU lacks what a backend needs; without a device, why every GPU of the machine does.

    lacks  says of a compute capability what is wrong with it, or None"""
    numbers = range(torch.cuda.device_count()) if device is None else [index_of(device)]
    said = ""
    for number in numbers:
        reason = lacks(torch.cuda.get_device_capability(number))
        if reason is None:
            return None
        said = f"CUDA device {number} ({torch.cuda.get_device_name(number)}) {reason}"
    return said


def index_of(device: torch.device) -> int:
    """Returns the number of a GPU; that of the current one for "cuda"."""
    number: int | None = device.index
    return torch.cuda.current_device() if number is None else number


def capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with on(device):
        return torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> AbstractContextManager:
    """Makes a device the current one; costs next to nothing if it is."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _ALREADY
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """Returns the current stream of a device. torch.cuda.current_stream() makes an object, for ten times the
    time."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def upload(parts: Sequence[np.ndarray], device: torch.device) -> Upload:
    """Uploads arrays end to end by one copy, ordered on the current stream. It does not block."""
    host = torch.from_numpy(np.concatenate(parts))
    buffer = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    begins = np.cumsum([0, *(part.size for part in parts[:-1])])
    return Upload(buffer, tuple((buffer.data_ptr() + begins).tolist()))


__all__ = ["Counts", "Launch", "Tables", "Upload", "capturing", "key_of", "on", "stream_of", "upload"]
