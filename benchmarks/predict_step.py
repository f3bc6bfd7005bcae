"""What a whole step should take on a GPU, over the two forwards in it: `python -m benchmarks.predict`.

Every time is predicted, none was measured on a GPU. What it is made of, and where each part is from:

    forward   the operations of one forward, recorded on the meta device at the model's own shapes. An
              operation takes max(FLOOR, bytes / bandwidth, flops / rate); views take nothing
    launches  the verbs of a step, recorded there too (benchmarks/recorder.py); a verb takes what its bytes
              and the machine code of its loop take (benchmarks/predict.py)
    host      seconds of Python and of torch's dispatch, measured on the CPU of this machine with models of
              the same number of layers whose arithmetic is next to nothing: the least time of one thread
    step      eager   host outside the forwards + max(host of the forwards, device). The host works while the
                      device runs a forward; what it does before and after the readings, the device waits for
              graph   device + GAP for each launch + START, of the step and of the two forwards

    master    forward, forward, 2 copies of the weights, 2 perturb, axpy_
    paired    every operation once with both sides' bytes; perturb writes copies of both sides, which products
              read: all before the pass where a quarter of the free memory holds them, else each at its use;
              axpy_
    loop      the eager loop: four passes of 16 bytes a 16-bit weight
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zokern
from zokern import backends, devices, underflow
from zokern.evaluation import copies

from . import eager, models
from .on_meta import on_meta
from .predict import Device, Work
from .recorder import Call, Recorder

MODELS = ("Llama-1B", "OPT-1.3B", "Llama-7B", "OPT-13B")
CELLS = ((1, 16), (4, 128), (16, 256))  # batch and length
METHODS = ("master", "paired")
# Seconds and rates that were not measured: of launches that are ready, of a graph's nodes and its start.
FLOOR, GAP, START = 2.5e-6, 1.0e-6, 10e-6
MEMORY = 141e9  # bytes of an H200
PRODUCTS = ((2048, 600e12), (0, 400e12))  # flop/s of 16-bit products from so many rows on, on an H200
LOOP_BYTES, LOOP_OPERATIONS = 64, 18  # of the eager loop: for a weight, and for a parameter, beside forwards
# The loop of one sign is that of both, with a store less.
VERBS = {"axpy_": "axpy_ normal, 16 bits", "perturb": "perturb both signs normal, 16 bits"}
FREE = {
    "view", "_unsafe_view", "t", "transpose", "slice", "unsqueeze", "squeeze", "expand", "permute", "alias",
    "detach", "select", "split", "unbind", "reshape", "lift_fresh", "empty", "empty_like", "new_empty",
}  # fmt: skip


# A forward --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """What torch puts on the device: its flops, and the bytes that it reads and writes.

    weight  elements of the parameter that a product reads; 0: it is none of a parameter"""

    name: str
    bytes: int
    flops: int = 0
    rows: int = 0
    weight: int = 0

    def seconds(self, device: Device, sides: int = 1) -> float:
        """Returns the time of the operation on so many sides at once, which have weights of their own."""
        own = self.bytes * sides / (device.bandwidth * 1e12)
        rate = next(rate for rows, rate in PRODUCTS if self.rows >= rows)
        return max(FLOOR, own, self.flops * sides / rate)


class Operations(TorchDispatchMode):
    """Records what is called below it; nothing is run that has no memory."""

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.found: list[Operation] = []
        self.weights = {weight.numel() for weight in weights if weight.dim() == 2}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        tensors = [a for a in args if isinstance(a, Tensor)]
        listed = [t for a in args if isinstance(a, (list, tuple)) for t in a if isinstance(t, Tensor)]
        if name not in FREE:
            results = result if isinstance(result, (list, tuple)) else [result]
            read = tensors[1:] if name == "embedding" else [*tensors, *listed]
            moved = [*read, *(r for r in results if isinstance(r, Tensor))]
            moved += [result] if name == "embedding" else []
            flops, rows, weight = 0, 0, 0
            if name in ("mm", "addmm", "bmm", "baddbmm"):
                left, right = tensors[-2:]
                flops, rows = 2 * left.numel() * right.shape[-1], left.shape[-2]
                weight = right.numel() if right.dim() == 2 and right.numel() in self.weights else 0
            size = sum(t.numel() * t.element_size() for t in moved)
            self.found.append(Operation(name, size, flops, rows, weight))
        return result

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Stands for F.scaled_dot_product_attention, which is one kernel on a GPU."""
        batch, heads, rows, width = query.shape
        size = sum(t.numel() * t.element_size() for t in (query, query, key, value))
        self.found.append(
            Operation("attention", size, 4 * batch * heads * rows * key.shape[-2] * width, rows)
        )
        return torch.empty_like(query)


@cache
def forward(name: str, batch: int, length: int) -> tuple[Operation, ...]:
    """Returns the operations of one forward at a model's own shapes, in bfloat16."""
    module = models.on_device(name, torch.bfloat16, "meta")
    ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
    with torch.no_grad(), Operations(module.parameters()) as operations:
        with patch.object(F, "scaled_dot_product_attention", operations.attention):
            module(input_ids=ids, labels=ids)
    return tuple(operations.found)


@cache
def weights(name: str) -> tuple[int, int]:
    """Returns the elements and the number of a model's parameters."""
    module = models.on_device(name, torch.bfloat16, "meta")
    sizes = [p.numel() for p in module.parameters()]
    return sum(sizes), len(sizes)


# The launches of a step -------------------------------------------------------------------------------------


@dataclass
class Steps:
    """What a step of one method launches beside the operations of its forwards.

    calls      verbs, in order;  copies  of all weights by torch
    values     how often a value was read, which the host waits for"""

    calls: list[Call] = field(default_factory=list)
    copies: int = 0
    values: int = 0


class _Reads(TorchDispatchMode):
    """Counts copies of lists, and values that reach the host."""

    def __init__(self, found: Steps) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        self.found.copies += name == "_foreach_copy_"
        self.found.values += name in ("_local_scalar_dense", "equal")
        return func(*args, **(kwargs or {}))


def room(name: str) -> int:
    """Returns the bytes that evaluation 'paired' takes for copies beside a model's weights on an H200."""
    return int(devices.GPU.share * (MEMORY - 2 * weights(name)[0]))


def is_held(name: str) -> bool:
    """Whether copies of both sides fit there."""
    return 4 * weights(name)[0] <= room(name)


def _optimizer(module: nn.Module, method: str, budget: int | None, backend: Any = None) -> zokern.MeZO:
    """Returns an optimizer that compares nothing and looks at no number."""
    evaluation: Any = zokern.Master() if method == "master" else zokern.Paired(budget, check=False)
    made = zokern.MeZO(module, lr=1e-6, eps=1e-3, dead_limit=None, force=True, backend=backend,
                       paired_check=None, every=1000, evaluation=evaluation)  # fmt: skip
    made.run.step = 10  # the first ten also sample the weights
    return made


@contextmanager
def like_a_gpu(width: int = copies.RESIDENT) -> Any:
    """Inside, other tensors are taken for a GPU's: whole matrices, made at their use, without a CPU's own
    products.

    width  elements of the largest tensors that are perturbed together"""
    with patch.object(devices, "of", lambda device: devices.GPU), patch.object(copies, "RESIDENT", width):
        yield


def recorded(name: str, method: str, cell: tuple[int, int] = CELLS[0]) -> Steps:
    """Returns the launches of a step at a model's own shapes, the third of a run on the meta device."""
    module, recorder, found = models.on_device(name, torch.bfloat16, "meta"), Recorder(), Steps()
    loss = models.loss_on_meta(module, *cell)
    with on_meta(), like_a_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _optimizer(module, method, room(name), recorder)
        # a run's start samples the weights for what rounding to 16 bits swallows of z
        with patch.object(underflow, "check_perturbation", lambda *_: None):
            zokern.step(made, loss)
        zokern.step(made, loss)
        recorder.calls.clear()
        with _Reads(found):
            zokern.step(made, loss)
    found.calls = list(recorder.calls)
    return found


# Host time, measured here -----------------------------------------------------------------------------------

WIDTH = 64
LAYERS = {"Llama-1B": 16, "OPT-1.3B": 24, "Llama-7B": 32, "OPT-13B": 40}


def narrow(name: str) -> nn.Module:
    """Returns a Llama of as many layers, whose arithmetic is next to nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=172, num_hidden_layers=LAYERS[name], num_attention_heads=4,
        vocab_size=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Host:
    """Seconds of the host for two forwards, and for whole steps by method, forwards included."""

    forwards: float
    steps: Mapping[str, float]


def measured(name: str, rounds: int = 15) -> Host:
    """Returns host times of a narrow model: the least of rounds in which all take turns, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), like_a_gpu(WIDTH):
            warnings.simplefilter("ignore")
            calls = _calls(name)
            times: dict[str, list[float]] = {what: [] for what in calls}
            for _ in range(3 + rounds):
                for what, call in calls.items():
                    begun = time.thread_time()
                    call()
                    times[what].append(time.thread_time() - begun)
    finally:
        torch.set_num_threads(threads)
    found = {what: min(seconds[3:]) for what, seconds in times.items()}
    return Host(found.pop("forwards"), found)


def _calls(name: str) -> dict[str, Callable[[], Any]]:
    module = narrow(name)
    loss = models.loss_of(module, 1, 8)

    @torch.no_grad()
    def forwards() -> None:
        loss()
        loss()

    calls: dict[str, Callable[[], Any]] = {"forwards": forwards}
    # where the copies of a model do not fit, those of the narrow one do not either
    budget = None if is_held(name) else 1 << 20
    for method in METHODS:
        own = models.same_weights(module)
        backend = Recorder(backends.get("cpu")) if backends.why_off("cpu") is None else None
        made, mine = _optimizer(own, method, budget, backend), models.loss_of(own, 1, 8)
        calls[method] = lambda made=made, mine=mine: zokern.step(made, mine)
    other = narrow(name)
    parameters, seeds = list(other.parameters()), itertools.count()
    theirs = models.loss_of(other, 1, 8)
    calls["loop"] = lambda: eager.step(parameters, theirs, next(seeds), 1e-6, 1e-3)
    return calls


# The prediction ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Milliseconds of two forwards and of steps, by method: device alone, eager, in a graph."""

    model: str
    batch: int
    length: int
    forwards: dict[str, float]
    steps: dict[str, dict[str, float]]

    @property
    def label(self) -> str:
        return f"{self.model} {self.batch}x{self.length}"

    def ratio(self, method: str, how: str) -> float:
        return self.steps[method][how] / self.forwards[how]


def verb_seconds(verb: str, elements: int, size: int, works: Mapping[str, Work], device: Device) -> float:
    """Returns the time of one launch: its bytes, or the instructions of its loop."""
    compute = 0.0
    if (case := VERBS.get(verb)) is not None:
        compute = works[case].milliseconds(device)[0] / 1e3 * elements / 1e9
    return max(FLOOR, size / (device.bandwidth * 1e12), compute)


def step_seconds(
    name: str, cell: tuple[int, int], method: str, launched: Steps, works: Mapping[str, Work], device: Device
) -> tuple[float, int]:
    """Returns the device's seconds for a step, and its launches."""
    operations, (count, number) = forward(name, *cell), weights(name)
    sides, passes = (2, 1) if method == "paired" else (1, 2)
    seconds = passes * sum(o.seconds(device, sides) for o in operations)
    launches = passes * len(operations)
    if method == "loop":
        size = LOOP_BYTES * count
        return seconds + max(size / (device.bandwidth * 1e12), FLOOR * LOOP_OPERATIONS * number), launches + (
            LOOP_OPERATIONS * number
        )
    for call in launched.calls:
        seconds += verb_seconds(call.verb, call.elements, call.traffic, works, device)
    seconds += launched.copies * 4 * count / (device.bandwidth * 1e12)
    return seconds, launches + len(launched.calls) + launched.copies


def predicted(
    name: str, cell: tuple[int, int], launched: Mapping[str, Steps], host: Host, works: Mapping[str, Work],
    device: Device
) -> Row:  # fmt: skip
    """Returns the line of a model and a batch."""
    operations = forward(name, *cell)
    plain = 2 * sum(o.seconds(device) for o in operations)
    graphed = plain + 2 * len(operations) * GAP + START
    forwards = {"device": plain, "eager": max(host.forwards, plain), "graph": graphed}
    steps = {}
    for method in (*METHODS, "loop"):
        seconds, launches = step_seconds(name, cell, method, launched.get(method, Steps()), works, device)
        beside = max(0.0, host.steps[method] - host.forwards)
        # one pass of the closure for both sides: its host time is in what was measured for the step
        within, beside = (host.steps[method], 0.0) if method == "paired" else (host.forwards, beside)
        steps[method] = {
            "device": seconds,
            "eager": beside + max(within, seconds),
            "graph": seconds + launches * GAP + START,
        }

    def ms(times: Mapping[str, float]) -> dict[str, float]:
        return {how: 1e3 * value for how, value in times.items()}

    return Row(name, *cell, ms(forwards), {method: ms(times) for method, times in steps.items()})


def rows(works: Mapping[str, Work], device: Device, rounds: int = 15) -> tuple[list[Row], dict[str, Any]]:
    """Returns every line, and what it is made of: host times and launches."""
    found, parts = [], {}
    for name in MODELS:
        host, launched = measured(name, rounds), {}
        for cell in CELLS:
            launched = {method: recorded(name, method, cell) for method in METHODS}
            found.append(predicted(name, cell, launched, host, works, device))
        parts[name] = {"launched": launched, "host": host}
    return found, parts


def launches(steps: Steps) -> str:
    """Returns the launches of a step in words."""
    counts = Counter(call.verb for call in steps.calls)
    named = ", ".join(f"{count} {verb}" for verb, count in sorted(counts.items()))
    return f"{named}; {steps.copies} copies of the weights; {steps.values} values read"


__all__ = ["Host", "Operation", "Row", "Steps", "predicted", "recorded", "rows"]
