"""Meeting: several readings of a loss that go through a model together.

Each side runs the user's closure, unmodified, in a greenlet of its own on the same thread. Where a side uses a large parameter it
waits until the others come to the same use; then one computation serves all of them, so that the weights are read once and z is
generated once. State that torch keeps per thread (grad mode, inference mode, autocast, the default generators) belongs to a side
and is put in place whenever the side runs.

Sides that take another way (a mixture that sends tokens to other experts) are let through one at a time until they meet again.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

try:
    import greenlet
except ImportError:  # where it cannot be installed, evaluation 'paired' says so when it is asked for
    greenlet = None


class Unpairable(Exception):
    """Something in the closure cannot be interleaved; the reading is done again, one side after the other."""


class _Thread:
    """What torch keeps per thread, for one side."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = devices
        self.guard: Any = None
        self.generators: tuple[torch.Tensor, list[torch.Tensor] | None] | None = None
        self.grad = False
        self.autocast: list[tuple[bool, torch.dtype]] = []
        self.cache = True

    def leave(self) -> None:
        """Take this side's state off the thread and keep it."""
        self.grad = torch.is_grad_enabled()
        self.autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in self.devices]
        self.cache = torch.is_autocast_cache_enabled()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self.generators = (torch.get_rng_state(), cuda)
        if torch.is_inference_mode_enabled():  # its guard object restores what it found: nested in this side's stay away
            self.guard = torch._C._InferenceMode(False)
            self.guard.__enter__()

    def enter(self) -> None:
        """Put it back."""
        if self.guard is not None:
            self.guard.__exit__(None, None, None)
            self.guard = None
        torch._C._set_grad_enabled(self.grad)
        for device, (enabled, dtype) in zip(self.devices, self.autocast):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cache)
        assert self.generators is not None
        torch.set_rng_state(self.generators[0])
        if self.generators[1] is not None:
            torch.cuda.set_rng_state_all(self.generators[1])


class Meeting:
    """Runs bodies side by side. `select(side)` is told which one runs."""

    def __init__(self, select: Callable[[int], None]) -> None:
        self.select = select
        self.requests: dict[int, tuple[Hashable, Any, Callable, tuple]] = {}
        self.passed: list[list[Hashable]] = []  # per side, the uses that it made alone since it last met the others
        self.kinds = ["cpu", *(["cuda"] if torch.cuda.is_initialized() else [])]
        self.depths = self._depths()

    @staticmethod
    def _depths() -> tuple[int, int]:
        return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()

    def join(self, key: Hashable, use: Any, compute: Callable) -> Any:
        """Called by a side: wait for the others at this use, and return this side's result of compute([(side, use), ...])."""
        if self._depths() != self.depths:
            raise Unpairable("it runs under a torch function or dispatch mode of its own")
        hub = greenlet.getcurrent().parent
        return hub.switch((key, use, compute, self._modes()))

    def _modes(self) -> tuple:
        """What the sides must agree on for a joint computation."""
        autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self.kinds]
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tuple(autocast)

    def run(self, bodies: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of all bodies. An exception of one ends the others and is raised."""
        base = _Thread(self.kinds)
        base.leave()
        inference = base.guard is not None  # the caller's mode, which leave() took off
        sides = [greenlet.greenlet(torch.inference_mode()(body) if inference else body) for body in bodies]
        states = [_Thread(self.kinds) for _ in bodies]
        results: list[Any] = [None] * len(bodies)
        self.passed = [[] for _ in bodies]
        for side, state in zip(sides, states):
            side.gr_context = contextvars.copy_context()
            state.grad, state.autocast, state.cache, state.generators = base.grad, base.autocast, base.cache, base.generators

        there = -1  # whose state is on the thread: it stays until another side needs the place

        def enter(i: int) -> None:
            nonlocal there
            if i != there:
                if there >= 0:
                    states[there].leave()
                there = i
                states[i].enter()
                self.select(i)

        def go(i: int, value: Any = None, error: BaseException | None = None) -> None:
            enter(i)
            outcome = sides[i].throw(error) if error is not None else sides[i].switch(*(() if value is None else (value,)))
            if sides[i].dead:
                results[i] = outcome
            else:
                self.requests[i] = outcome

        try:
            for i in range(len(bodies)):
                go(i)
            while self.requests:
                members = self._next()
                key, _, compute, _ = self.requests[members[0]]
                waiting = [(i, self.requests.pop(i)[1]) for i in members]
                if len(members) < len(bodies):
                    for i in members:
                        self.passed[i].append(key)
                else:
                    self.passed = [[] for _ in bodies]
                enter(there if there in members else members[0])
                try:
                    found, error = compute(waiting), None
                except Exception as problem:  # raised again where the side stands, so that the traceback shows the user's line
                    found, error = [None] * len(members), problem
                for i, value in sorted(
                    zip(members, found), key=lambda served: served[0] != there
                ):  # who is on the thread first
                    go(i, value, error)
            return results
        finally:
            for i, side in enumerate(sides):
                if not side.dead:  # an exception elsewhere: unwind this side's own `with` and `finally`
                    enter(i)
                    try:
                        side.throw(greenlet.GreenletExit)
                    except BaseException:  # noqa: B036 - the first exception is the one that the user should see
                        pass
            self.requests.clear()
            if there >= 0:
                states[there].leave()
            base.enter()

    def _next(self) -> list[int]:
        """Which of the waiting sides are served now: all of one use, or the one that the others are ahead of."""
        waiting = sorted(self.requests)
        groups: dict[Hashable, list[int]] = {}
        for i in waiting:
            groups.setdefault(self.requests[i][0], []).append(i)
        if len(groups) == 1:
            members = waiting
        else:
            behind = [i for i in waiting if any(self.requests[i][0] in self.passed[j] for j in waiting if j != i)]
            least = min(
                behind or waiting, key=lambda i: len(self.passed[i])
            )  # or the first would run to the end of the model alone
            members = groups[self.requests[least][0]]
        modes = self.requests[members[0]][3]
        members = [i for i in members if self.requests[i][3] == modes]
        return members
