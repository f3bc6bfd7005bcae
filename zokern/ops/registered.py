"""Verbs as operations of torch.library, zokern::<verb>, which compiled graphs and dispatch modes see.

An operation has its verb's arguments by the same names, in types that a schema knows:

    tensors, who, first  lists
    direction            its name
    seed                 signed, as two's complement
    draws                two lists, steps and draws
    residuals            a list, empty for None
    states               one list, rule state after rule state
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import backends, directions
from ..backends import Backend, Batch, Noise

_SEEDS = 1 << 64


def register(
    name: str, verb: Callable, schema: str, fake: Callable[[SimpleNamespace], Any] | None = None
) -> None:
    """Registers an operation that calls its verb, which checks the arguments.

    schema  arguments and results; what is written is marked as in `Tensor(a!) out`
    fake    the results for arguments without values; None: the operation has no result"""
    names = re.findall(r"(\w+)(?:=\w+)?[,)]", schema.partition("->")[0])

    def run(*flat: Any) -> Any:
        return verb(**_decoded(dict(zip(names, flat))))

    written = re.findall(r"\(\w!\)\S* (\w+)", schema)
    operation = torch.library.custom_op(f"zokern::{name}", run, mutates_args=written, schema=schema)
    if fake is not None:
        operation.register_fake(lambda *flat: fake(SimpleNamespace(**dict(zip(names, flat)))))


def _decoded(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns an operation's arguments as its verb takes them."""
    if "seed" in flat:
        flat["seed"] %= _SEEDS
    if "steps" in flat:
        steps = flat.pop("steps")
        if len(steps) != len(flat["draws"]):
            raise ValueError(f"{len(steps)} steps and {len(flat['draws'])} draws; expected as many of each")
        flat["draws"] = list(zip(steps, flat["draws"]))
    if "residuals" in flat:
        flat["residuals"] = flat["residuals"] or None
    # a backend itself, and not its name: the verb does not call the operation again
    flat["backend"] = backends.get(flat["backend"])
    return flat


def operation(
    verb: str, backend: Backend, noise: Noise | None, batch: Batch | None = None, **rest: Any
) -> Any:
    """Calls an operation with the arguments of a launch, and with those that the tuples do not hold."""
    if noise is not None:
        rest["seed"] = noise.seed - _SEEDS if noise.seed >= _SEEDS >> 1 else noise.seed
        rest |= {} if noise.direction is None else {"direction": noise.direction.name}
    if batch is not None:
        rest |= {"tensors": list(batch.tensors), "residuals": list(batch.residuals or ())}
        rest |= {"who": [span.who for span in batch.spans], "first": [span.first for span in batch.spans]}
    return getattr(torch.ops.zokern, verb)(backend=backend.name, **rest)


def lists_of(noise: Noise) -> dict[str, Any]:
    """Returns the draws of a launch as two lists."""
    return {"steps": [step for step, _ in noise.draws], "draws": [draw for _, draw in noise.draws]}


def traced(given: str | Backend | None, direction: Any = None) -> bool:
    """Tells whether a graph or a dispatch mode records operations, so that a verb has to call its own.

    An operation has no name for a backend that was given itself, or for a direction of the user's own."""
    if not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0):
        return False
    return (given is None or isinstance(given, str)) and (
        direction is None or direction.name in directions.DIRECTIONS
    )


def count_of_nonfinite(given: SimpleNamespace) -> Tensor:
    """Returns the fake result of a verb that counts what is inf or NaN."""
    return torch.empty(1, dtype=torch.int64, device=given.tensors[0].device)


__all__ = ["count_of_nonfinite", "lists_of", "operation", "register", "traced"]
