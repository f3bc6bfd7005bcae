"""Exchange: stand-ins in the trained parameters while graphs of torch.compile read them (compiled.py).

A graph is made of plain weights, and another one of stand-ins. Which of them runs is for dynamo's guards to
say, which look at the parameters before each call. Those of torch 2.11 let the graph of plain weights run on
stand-ins, where it reads memory that they do not have; those of 2.13 and 2.14 do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..fingerprint import memory_of, versions_of
from ..modules import same
from .compiled import Mapped, Unmade, reading
from .copies import Copies
from .loss import loss_tensor, one_number
from .standin import places_of, swap, writes


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@cache
def guards_see_stand_ins() -> bool:
    """Returns whether a compiled function is compiled again when a stand-in comes into a parameter of it.

    It is tried once in a process, on a module of one weight."""
    made = 0

    def backend(graph: Any, inputs: Any) -> Callable:
        nonlocal made
        made += 1
        return graph.forward

    module, x = _Scale(), torch.ones(1, dtype=torch.float32, device="cpu")
    run = torch.compile(module, backend=backend)
    for _ in range(3):
        run(x)
    stand_in = Mapped(torch.ones(2, 1, dtype=torch.float32, device="cpu"))
    with _inside([module.weight], [stand_in], [_attributes(stand_in)]):
        run(x)
    return made == 2


def losses(copies: Copies, closure: Callable[[], object]) -> Tensor:
    """Returns the losses of all sides, from one call of the closure."""
    with standing_in(copies):
        loss = closure()
        if not isinstance(loss, Tensor):
            raise one_number(loss)
        found = loss_tensor(loss, copies.plan.rows)
    return found._stack if isinstance(found, Mapped) else found.expand(copies.sides, *found.shape)


@contextmanager
def standing_in(copies: Copies) -> Iterator[None]:
    """Puts stand-ins into the trained parameters; on the way out takes them back and looks whether the
    closure wrote to one."""
    parameters, made, attributes, where = _stand_ins(copies)
    stacks = list(copies.resident.values())
    reading.append((copies, where))
    try:
        with _inside(parameters, made, attributes):
            versions = versions_of(stacks)
            yield
            for (g, i), now, then in zip(copies.resident, versions_of(stacks), versions):
                if now != then:
                    raise writes(copies.plan.groups[g].names[i])
    finally:
        reading.pop()


@contextmanager
def _inside(parameters: list[Tensor], made: list[Tensor], attributes: list[dict]) -> Iterator[None]:
    """Puts tensors into parameters, with their class and attributes, and takes them out again."""
    before, done = list(map(type, parameters)), 0
    try:
        for parameter, stand_in, own in zip(parameters, made, attributes):
            swap(parameter, stand_in)
            done += 1
            parameter.__class__ = type(stand_in)
            vars(parameter).update(own)
        yield
    finally:
        for parameter, stand_in, own, kind in list(zip(parameters, made, attributes, before))[:done]:
            for name in own:
                vars(parameter).pop(name, None)
            parameter.__class__ = kind
            swap(parameter, stand_in)


def _attributes(stand_in: Tensor) -> dict[str, Any]:
    """Returns those of a stand-in, and what nn.Parameter looks at."""
    return vars(stand_in) | {"_is_param": True}


def _stand_ins(copies: Copies) -> tuple[list[Tensor], list[Tensor], list[dict], dict[int, tuple[int, int]]]:
    """Returns the trained parameters, what goes inside each, the attributes of these, and the place of each
    large matrix by its address; prepared once for the same copies."""
    groups, stacks = copies.plan.groups, list(copies.resident.values())
    memo, key = groups[0].memo, ("graphs", copies.sides)
    if key not in memo or not same(stacks, memo[key][0]):
        _, _, places, _ = places_of(copies, stacks)
        made: list[Tensor] = []
        for _, g, i in places:
            theta, stack = groups[g].theta[i], copies.resident.get((g, i))
            made.append(Unmade(theta, copies.sides) if stack is None else Mapped(stack, theta.dtype))
        attributes = [_attributes(stand_in) for stand_in in made]
        large = [place for place in places if place[1:] not in copies.resident]
        addresses, *_ = memory_of([groups[g].theta[i] for _, g, i in large])
        where = {address: (g, i) for address, (_, g, i) in zip(addresses, large)}
        memo[key] = stacks, ([parameter for parameter, _, _ in places], made, attributes, where)
    return memo[key][1]


__all__ = ["guards_see_stand_ins", "losses", "standing_in"]
