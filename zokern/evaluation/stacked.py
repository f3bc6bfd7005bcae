"""Stacked: one pass of a model over the rows of all sides, [x_1; x_2; ...], for a loss in the form of an Objective.

A use of a trained parameter is done for each side's rows with that side's copy: large matrices in one product for all of them, as
where sides meet (meeting.py), the vectors of norms and elementwise products in one call with the vectors of all sides, everything
else side by side. What has no rows of the batch to go by is left to meetings.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .copies import Copies
from .meeting import Unpairable
from .objective import Objective, part, repeated, run
from .substitution import Substitution, is_taped
from .surroundings import Surroundings
from .uses import DATA_ATTRIBUTES, METADATA, PRODUCTS, stacked_product


class Stacked(TorchFunctionMode):
    def __init__(self, copies: Copies, rows: int) -> None:
        super().__init__()
        self.copies, self.rows, self.sides = copies, rows, len(copies.points)
        self.one = Substitution(copies)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        table = self.copies.table
        values = [*args, *kwargs.values()]
        if not any(id(v) in table or (type(v) in (list, tuple) and any(id(u) in table for u in v)) for v in values):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in METADATA or (name == "__get__" and attribute not in DATA_ATTRIBUTES):
            return func(*args, **kwargs)
        self.copies.refuse_stale(values)
        done = None
        if not is_taped(table, args, kwargs):
            done = stacked_product(self.copies, func, args, kwargs, self.sides)
            done = done if done is not None else self._vectors(func, args, kwargs)
        return done if done is not None else self._each(func, name, args, kwargs)

    def _vectors(self, func, args: tuple, kwargs: dict) -> Tensor | None:
        """A layer norm, or an elementwise product or sum, with a vector of each side along the last dimension."""
        if func is F.layer_norm:
            names = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args)) | kwargs
            x, vectors = names["input"], [v for v in (names.get("weight"), names.get("bias")) if v is not None]
        elif func in PRODUCTS and len(args) == 2 and not kwargs:
            x, vectors = (args[1], [args[0]]) if id(args[0]) in self.copies.table else (args[0], [args[1]])
        else:
            return None
        if not self._mine(x) or x.dim() < 2 or any(v.dtype != x.dtype for v in vectors):
            return None
        if any(id(v) not in self.copies.table or not self.copies.is_resident(v) or v.shape != x.shape[-1:] for v in vectors):
            return None
        # copies of vectors are float32, and so is what they meet
        copy = partial(self.copies.copy, cast=torch.float32)
        stacks = [torch.stack([copy(v, side=side).float() for side in range(self.sides)]).unsqueeze(1) for v in vectors]
        rows = x.reshape(self.sides, -1, x.shape[-1]).float()
        if func is F.layer_norm:
            rows = F.layer_norm(rows, rows.shape[-1:], eps=names.get("eps", 1e-5))
            if names.get("weight") is not None:
                rows = rows * stacks[0]
            if names.get("bias") is not None:
                rows = rows + stacks[-1]
        else:
            rows = func(stacks[0], rows) if vectors[0] is args[0] else func(rows, stacks[0])
        return rows.to(x.dtype).view(x.shape)

    def _mine(self, value) -> bool:
        return (
            isinstance(value, Tensor)
            and id(value) not in self.copies.table
            and value.dim() > 0
            and value.shape[0] % (self.sides * self.rows) == 0
        )

    def _each(self, func, name: str, args: tuple, kwargs: dict) -> Tensor:
        """The call for each side's rows, and the results one below the other."""
        values = [*args, *kwargs.values()]
        lookup = (
            name == "embedding" and isinstance(values[0], Tensor) and values[0].shape[:1] == (1,)
        )  # the same positions for all rows
        if not lookup and not any(self._mine(v) for v in values):
            raise Unpairable(f"{name} reads a parameter and no rows of the batch")
        found = []
        for side in range(self.sides):
            self.copies.side = side
            mine = [v.chunk(self.sides)[side] if self._mine(v) else v for v in args]
            named = {k: v.chunk(self.sides)[side] if self._mine(v) else v for k, v in kwargs.items()}
            result = self.one._substitute(func, tuple(mine), named)
            if not isinstance(result, Tensor) or result.dim() == 0:
                raise Unpairable(f"{name} returns no rows")
            found.append(result.expand(self.rows, *result.shape[1:]) if lookup else result)
        return torch.cat(found)


def read(copies: Copies, objective: Objective) -> list[float]:
    """The losses of all points of the copies, from one pass of the model."""
    rows, sides = objective.rows(), len(copies.points)
    if rows == 0:
        raise Unpairable("its batch has no rows")
    with torch.no_grad(), Stacked(copies, rows):
        outputs = run(objective.model, repeated(objective.inputs, rows, sides))
    if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
        raise Unpairable(
            "the model computes a loss of its own, over the rows of all sides: keep the labels from it with withhold='labels'"
        )
    losses = []
    for side in range(sides):
        copies.side = side
        mine = part(outputs, rows, sides, side)
        losses.append(Surroundings.body(partial(objective.loss_fn, mine, objective.batch), Substitution(copies)))
    return losses
