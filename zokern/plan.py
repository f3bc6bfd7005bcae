"""What one step works on: the active parameters by group, and the names of its draws."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import autocast, shards, stream
from .backends import Noise
from .device_numbers import Amount, cached_upload, scalar, stacked
from .directions import Direction, LowRank
from .group import Draw, Group
from .modules import Tree

Scopes = dict[tuple[str, ...], list[tuple[Group, Group]]]


@dataclass
class Run:
    """What names the random numbers of a run, and how it rounds. step: the number of the next step."""

    seed: int
    rounding: str
    step: int = 0


EACH = ("each parameter by itself",)  # the scope of Plan.each, which no parameter is called


@dataclass
class Plan:
    """The checked work of one step.

    tree      the modules that a step leaves as they are
    words     draws of the estimate that is applied
    first     draw word of query 0
    readings  how often the closure was called
    scopes    by names: the groups of a part of the plan, each with the group that it is a part of
    earlier   those of the step before, which are taken over if this step names them too
    tape      what a captured step does on the host; None: the step is not captured
    rows      whether the closure returns a vector, the loss of each example
    maximize  whether the loss is a reward: the weights move along + g
    sharded   whether this process holds a block of some parameters (shards.py)
    part      number of the micro-batch that is read, over all ranks: each has dropout masks of its own"""

    groups: list[Group]
    direction: Direction
    seed: int
    step: int
    rounding: str
    tree: Tree
    factored: LowRank | None = None  # the direction of groups with matrices
    words: tuple[Draw, ...] = ()
    first: int = 0
    readings: int = 0
    scopes: Scopes = field(default_factory=dict, repr=False)
    earlier: Scopes = field(default_factory=dict, repr=False)
    rows: bool = False
    maximize: bool = False
    sharded: bool = False
    tape: Any = None  # of a step that is captured (graph.py)
    part: int = 0

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [t for group in self.groups for t in group.tensors]

    @cached_property
    def names(self) -> list[str]:
        """The names of the parameters of all groups."""
        return [name for group in self.groups for name in group.names]

    @property
    def places(self) -> list[int] | None:
        """The addresses of `memory()`; None where this process holds blocks."""
        if self.sharded:
            return None
        return [place for group in self.groups for place in group.theta.places]

    def memory(self) -> list[Tensor]:
        """Returns what this process holds of each of `tensors`."""
        return [shards.local(tensor) for tensor in self.tensors] if self.sharded else self.tensors

    def only(self, scope: Collection[str] | None) -> Plan:
        """Returns the same step of some parameters; None: of all. Raises ValueError if none of them is
        trained."""
        if scope is None:
            return self
        key = tuple(scope)

        def make() -> list[tuple[Group, Group]]:
            members = [[i for i, name in enumerate(group.names) if name in key] for group in self.groups]
            return [(group.only(some), group) for some, group in zip(members, self.groups) if some]

        if not (parts := self._parts(key, make)):
            raise ValueError(
                f"scope is {key!r:.200}; expected names of trained parameters, such as {self.names[:2]}"
            )
        for part, whole in parts:
            part.eps = whole.eps
        return replace(self, groups=[part for part, _ in parts], scopes={}, earlier={})

    def each(self, lengths: Sequence[dict[int, float]] = ()) -> Plan:
        """Returns the same step with a group, and so a launch, for every parameter, in the order of `names`.

        lengths  Group.lengths of every parameter"""
        parts = self._parts(
            EACH, lambda: [(group.only([i]), group) for group in self.groups for i in range(len(group.names))]
        )
        given = lengths or [whole.lengths for _, whole in parts]
        groups = [replace(part, eps=whole.eps, lengths=own) for (part, whole), own in zip(parts, given)]
        return replace(self, groups=groups, scopes={}, earlier={})

    def _parts(
        self, key: tuple[str, ...], make: Callable[[], list[tuple[Group, Group]]]
    ) -> list[tuple[Group, Group]]:
        """Returns parts of groups, each with the group that it is a part of; made once for steps that follow
        each other."""
        if key not in self.scopes:
            self.scopes[key] = self.earlier.pop(key) if key in self.earlier else make()
        return self.scopes[key]

    def along(self, draws: tuple[Draw, ...]) -> Plan:
        """Returns the same step with the draws of an estimate. Raises ValueError where the last is no draw of
        this step."""
        if not draws or self.named(draws[-1])[0] != self.step:
            raise ValueError(
                f"draws is {draws!r:.80}; expected one of this step at the end: it names the bits of "
                "stochastic rounding"
            )
        made = object.__new__(type(self))  # replace() takes as long as a launch
        vars(made).update(vars(self), words=draws)
        return made

    def draw(self, query: int) -> int:
        """Returns the draw word of a query."""
        return self.first + query

    def named(self, draw: Draw) -> tuple[int, int]:
        """Returns (step, draw word) of a draw."""
        return draw if isinstance(draw, tuple) else (self.step, draw)

    def reaches(self, step: int) -> bool:
        """Whether draws of an earlier step are directions of this one: those of a low-rank direction are
        while its basis lasts."""
        return self.factored is None or self.factored.basis_step(step) == self.factored.basis_step(self.step)

    def draws(self) -> list[tuple[int, int]]:
        """Returns (step, draw word) of every draw of the estimate."""
        return [self.named(draw) for draw in self.words]

    def noise(self, draws: Sequence[tuple[int, int]], direction: Any = ...) -> Noise:
        """Returns the random numbers of a launch; direction: that of the plan, unless it is given."""
        direction = self.direction if direction is ... else direction
        noise = Noise(direction, self.seed, draws)
        return noise if self.tape is None else self.tape.noise(noise, self.groups[0].theta[0].device)

    def rates(self, group: Group, lr: float, decay: float) -> tuple[float, float]:
        """Returns lr and decay of a group: those that a rule was given, or in a replay those of now."""
        if self.tape is None:
            return lr, decay
        lr = float(group.options["lr"])
        return lr, 1.0 - lr * float(group.options["weight_decay"])

    def lr_of(self, group: Group, lr: float, decay: float) -> Tensor:
        """Returns the lr of rates() in device memory, float64 []."""
        make = lambda: self.rates(group, lr, decay)[:1]  # noqa: E731
        return self.numbers(make, torch.float64, group.theta[0].device)[0]

    def act(self, action: Callable[[], None]) -> None:
        """Does something on the host: now, and before each replay of a captured step."""
        action() if self.tape is None else self.tape.act(action)

    @property
    def now(self) -> int:
        """The number of the step under way, also where an earlier one was captured."""
        return self.step if self.tape is None else self.tape.now

    def numbers(
        self, make: Callable[[], Sequence[float]], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Returns numbers of the host as a vector on a device, which is only read.

        make  computes them: now, and before each replay of a step that is captured"""
        if self.tape is None:
            return cached_upload(tuple(make()), dtype, device)
        return self.tape.numbers(make, dtype, device)

    def at_hand(self, values: Tensor) -> list[Any]:
        """Returns numbers one by one: those on a CPU as floats, which waits for nothing; others, and those of
        a captured step, as 0-d tensors that are not read."""
        return values.tolist() if self.knows(values) else list(values.unbind(0))

    def knows(self, values: Tensor) -> bool:
        """Whether the host has numbers without waiting: those on a CPU, outside of a captured step."""
        return values.is_cpu and self.tape is None

    def table(self, amounts: Sequence[float | Amount], device: torch.device) -> Tensor:
        """Returns amounts of a point as float32 on a device; nothing is read."""
        if not any(isinstance(amount, Amount) for amount in amounts):
            return self.numbers(lambda: amounts, torch.float32, device)  # type: ignore[arg-type,return-value]
        like = torch.empty(0, dtype=torch.float32, device=device)
        return stacked([scalar(amount) for amount in amounts], like)

    def bits(self, purpose: int, query: int = 0, who: str = "") -> Tensor:
        """Returns the four words of a number that belongs to this step and to no element: int64[1, 4] on the
        CPU."""
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        return stream.words(
            zero, stream.parameter_id(who), self.step, stream.draw_word(query, purpose), self.seed
        )

    @property
    def is_coarse(self) -> bool:
        """Whether losses are rounded to 16 bits on their way: by weights, trained or frozen, or by autocast
        around the step."""
        if any(autocast.is_on(kind) for kind in {t.device.type for t in self.tensors}):
            return True
        held = (p for module in self.tree.modules for p in module._parameters.values() if p is not None)
        return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in [*self.tensors, *held])

    @property
    def deferred(self) -> bool:
        """Whether updates wait in some matrix, so that the weights alone are not theta."""
        return any(matrix.pending is not None for group in self.groups for matrix in group.matrices or ())
