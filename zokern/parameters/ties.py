"""Tied parameters: tensors of the same elements are one entry, with one z."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from .. import shards
from ..ops.aliasing import shared_memory
from .checks import check_parameter, is_set_aside, view_of


@dataclass
class Trained:
    """One trained tensor: one entry with one z, whatever modules and names share it."""

    name: str
    tensor: Tensor
    who: int
    # other names and tensor objects of the same elements
    aliases: list[tuple[str, Tensor]] = field(default_factory=list)


def trained(named: Iterable[tuple[str, Tensor]], who: dict[str, int]) -> list[Trained]:
    """Returns entries for named tensors. Identical views merge; tensors that overlap in part are refused."""
    entries: dict[tuple, Trained] = {}
    for name, tensor in named:
        aside = is_set_aside(tensor)
        if not aside:
            check_parameter(name, tensor)
        key = (name,) if aside or not shards.local(tensor).numel() else view_of(tensor)
        if key in entries and tensor.requires_grad and not (first := entries[key]).tensor.requires_grad:
            entries[key] = Trained(name, tensor, who[name], [(first.name, first.tensor), *first.aliases])
        elif key in entries:
            entries[key].aliases.append((name, tensor))
        else:
            entries[key] = Trained(name, tensor, who[name])
    check_overlap([(e.name, e.tensor) for e in entries.values()])
    return list(entries.values())


def check_overlap(named: list[tuple[str, Tensor]]) -> None:
    """Refuses distinct tensors that share memory."""
    named = [(name, shards.local(tensor)) for name, tensor in named if not is_set_aside(tensor)]
    if (pair := shared_memory([tensor for _, tensor in named])) is not None:
        first, second = (named[i][0] for i in pair)
        if view_of(named[pair[0]][1]) == view_of(named[pair[1]][1]):
            raise ValueError(
                f"parameters {first!r} and {second!r} are the same elements, which would be moved twice: "
                "give them to one group, or clone one of them"
            )
        raise ValueError(
            f"parameters {first!r} and {second!r} overlap in memory but are not the same view; an update of "
            "one would change the other: clone one of them"
        )


def check_tie(entry: Trained) -> None:
    """Refuses an entry whose names stand for different elements now; only the first would be trained."""
    for name, tensor in entry.aliases:
        if view_of(tensor) != view_of(entry.tensor):
            raise RuntimeError(
                f"parameters {entry.name!r} and {name!r} were the same elements when the optimizer was built "
                "and are no longer (a cast or a move unties tensors): tie them again, or build a new "
                "optimizer"
            )
