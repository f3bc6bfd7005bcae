"""Run: what a part is given. It tells where to work and how long, and takes what the part finds, line by
line.

    check    name, problem (None where it passed), seconds    skip     name, why
    group    title, rows (those of measure.Group.rows)        figure   key, value: what goals.py judges, and
             others
    step     model, batch, length, tokens, ratios             memory   name, forward, extra, scratch: bytes
    trace    model, batch, length, traces (trace.py) by method
    device   facts by name                                    counters name (of a kernel), metrics

Record (record.py) is the one reader of these lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zokern import backends
from zokern.backends import Backend


@dataclass
class Run:
    """One part's errand.

    say     takes a line: its kind and its fields
    device  where to work: 'cuda', or 'cpu' for everything but the times
    quick   small sizes and few rounds
    until   time.monotonic() at which the part should be through
    """

    say: Callable[..., None]
    device: str = "cuda"
    quick: bool = False
    until: float = float("inf")

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def check(self, name: str, body: Callable[[], None]) -> bool:
        """Says whether `body` raised. Whatever it raised is the verdict: a launch that fails is no pass."""
        start, problem = time.monotonic(), None
        try:
            body()
            synchronize(self.device)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            problem = f"{kind}{error}"[:2000]
        self.say("check", name=name, problem=problem, seconds=round(time.monotonic() - start, 2))
        return problem is None

    def attempt(self, name: str, body: Callable[[], object]) -> bool:
        """Whether `body` ran, for what is measured: no memory for it is said, and any other exception is a
        failed check."""
        try:
            body()
            synchronize(self.device)
        except torch.OutOfMemoryError as error:
            self.skip(name, str(error).split(". ")[0])
        except Exception as error:
            self.say(
                "check", name=f"{name}: runs", problem=f"{type(error).__name__}: {error}"[:2000], seconds=0
            )
        else:
            return True
        return False

    def skip(self, name: str, why: str) -> None:
        self.say("skip", name=name, why=why)

    def figure(self, key: str, value: float) -> None:
        self.say("figure", key=key, value=value)

    def backend(self, name: str) -> Backend | None:
        """The backend; None where it is off, which is a failure: what was to be checked on it was not."""
        if (why := backends.why_off(name)) is not None:
            self.say("check", name=f"{name}: is on", problem=why, seconds=0)
            return None
        return backends.get(name)

    def backends(self) -> dict[str, Backend]:
        """What is measured: those of the GPU's two backends that are on, or the CPU's own."""
        names = ("cuda", "triton") if self.device == "cuda" else ("cpu",)
        return {name: backends.get(name) for name in names if backends.why_off(name) is None}


def judge() -> Backend:
    """Who is right: the CPU backend, which the test suite holds to the definition, or the definition
    itself."""
    return backends.get("cpu" if backends.why_off("cpu") is None else "reference")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free_bytes(device: str) -> int:
    """Memory that can still be taken; on a CPU, as much as anyone asks for here."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 1 << 40


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(device, copy=True) for t in tensors]
