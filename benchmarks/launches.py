"""Host time of a launch that is made again: what a verb costs before its kernel, through stubs.

`python -m benchmarks.launches` needs no GPU. A module that does nothing stands in the place of zokern._cuda,
and compiled kernels that do nothing in the place of Triton's, on CPU tensors: what is left is the Python of a
call. The figures are microseconds of this machine, and multiples of a bare call of the stub with the
arguments of axpy_. A real call adds what the driver takes, which asks the current stream and launches.

    model    290 float32 tensors, as a Llama of 32 layers has, in lists that their caller keeps
    single   one tensor, in such lists
    loose    one tensor, in lists that are made for the call
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from .gpu import use_tree

use_tree()  # before backend triton looks for its kernels

from zokern.backends import (  # noqa: E402
    Batch,
    Noise,
    Outer,
    Span,
    SpanList,
    TensorList,
    Terms,
    Update,
    cuda,
    triton,
)  # fmt: skip
from zokern.directions import resolve  # noqa: E402

TENSORS, RANK, REPEATS, CALLS = 290, 16, 60, 50
NORMAL, ONE = resolve("normal"), torch.ones(1)
ADAM = torch.ones(9)


def _nothing(*arguments: Any, **named: Any) -> None:
    return None


class Module:
    """Stands for zokern._cuda: its functions take what the real ones take, and return."""

    axpy = perturb = update = lowrank_tiles = staticmethod(_nothing)


class OnStub(cuda.Cuda):
    """Backend cuda on CPU tensors, with the stub for a module."""

    device_type = "cpu"

    def _call(self, verb: str, device: torch.device, held: Any, *arguments: Any, **named: Any) -> None:
        getattr(MODULE, verb)(*arguments, 0, 0, **named)


class Compiled:
    """Stands for a compiled Triton kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return _nothing


class Kernel:
    """Stands for a kernel of Triton's JIT, which returns what it compiled."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names, self.params = kernel.arg_names, getattr(kernel, "params", ())
        self.pre_run_hooks: list = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return lambda *arguments, **constants: Compiled()


MODULE = Module()


KERNELS = {"elementwise": ("axpy", "perturb"), "update": ("update",), "lowrank": ("product", "element")}


@contextmanager
def on_stubs() -> Iterator[dict[str, Any]]:
    """Gives the GPU backends with stubs; Triton's where it is installed."""
    with ExitStack() as stack:
        found: dict[str, Any] = {"cuda": OnStub()}
        if not triton._missing:
            found["triton"] = made = triton.Triton()
            made.is_interpreted, made.valid.device_type = False, "cpu"
            for file, names in KERNELS.items():
                module = getattr(triton, file)
                for name in names:
                    stub = Kernel(getattr(module, name))
                    stack.enter_context(patch.object(module, name, stub))
        yield found


class Lists:
    """Tensors with results, states and factors, in lists that are kept or in loose ones."""

    def __init__(self, count: int, kept: bool) -> None:
        made: Callable[[Sequence[Tensor]], Any] = TensorList.lasting if kept else list
        shapes = [(32, 48) if i % 2 else (64, 8) for i in range(count)]
        self.thetas = made([torch.zeros(shape) for shape in shapes])
        self.sides = [made([torch.zeros(shape) for shape in shapes]) for _ in range(2)]
        self.spans: Any = (SpanList if kept else list)([Span(i) for i in range(count)])
        self.lefts = made([torch.zeros(m, RANK) for m, _ in shapes])
        self.rights = made([torch.zeros(n, RANK) for _, n in shapes])
        self.kept = kept

    @property
    def batch(self) -> Batch:
        return Batch(self.thetas if self.kept else list(self.thetas), self.spans)


def noise(step: int) -> Noise:
    return Noise(NORMAL, 5, [(step, 0)])


VERBS: dict[str, Callable[[Any, Lists, int], Any]] = {
    "axpy_": lambda on, x, step: on.axpy_(x.batch, noise(step), Terms(ONE)),
    "perturb": lambda on, x, step: on.perturb(x.batch, noise(step), [1e-3, -1e-3], x.sides),
    "update_": lambda on, x, step: on.update_(x.batch, noise(step), Update(ONE, "adam", ADAM, x.sides)),
    "lowrank_": lambda on, x, step: on.lowrank_(
        x.batch, Outer(x.lefts, x.rights, [1.0] * len(x.lefts)), Noise(None, 5, [(step, 0)])
    ),
}
LISTS = {"model": (TENSORS, True), "single": (1, True), "loose": (1, False)}


def microseconds(call: Callable[[int], Any], repeats: int = REPEATS) -> float:
    """Returns the mean time of a call in the fastest of some runs: others share the processor.

    The call is told its number."""
    call(0), call(1)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for step in range(CALLS):
            call(step)
        times.append((time.perf_counter() - start) / CALLS)
    return 1e6 * min(times)


def measured(repeats: int = REPEATS) -> dict[tuple[str, str, str], float]:
    """Returns microseconds by backend, verb and kind of list."""
    found = {}
    with on_stubs() as backends:
        for name, backend in backends.items():
            for kind, (count, kept) in LISTS.items():
                lists = Lists(count, kept)
                for verb, run in VERBS.items():
                    found[name, verb, kind] = microseconds(partial(run, backend, lists), repeats)
    return found


def main() -> None:
    torch.set_num_threads(1)
    named = dict(clock=0, device_draws=0, coefficients=1)
    bare = microseconds(lambda step: MODULE.axpy(1, 1, 1, 0, 5, 1, 1, 1, 0, 1, 0, 0, **named))
    print(f"bare call of the stub {bare:.2f} us; beside it microseconds, and multiples of the bare call")
    print(f"{'':18}" + "".join(f"{kind:>18}" for kind in LISTS))
    found = measured()
    for name, verb in dict.fromkeys((name, verb) for name, verb, _ in found):
        row = [found[name, verb, kind] for kind in LISTS]
        print(f"{name:8}{verb:10}" + "".join(f"{us:10.1f}{us / bare:7.0f}x" for us in row))


if __name__ == "__main__":
    main()
