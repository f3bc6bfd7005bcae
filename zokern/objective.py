"""A loss in the form loss_fn(outputs, batch): a plain closure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn


class Objective:
    """Returns ``loss_fn(model(batch), batch)`` when it is called: a closure for loops that keep the
    model's call and the loss apart.

    model     called with keywords for a mapping, with positions for a tuple or list, else with the batch
              itself
    batch     tensors, or a mapping or sequence of them; never written
    loss_fn   a function of (outputs, batch) that returns a scalar tensor or a Python number
    withhold  keys of a mapping that loss_fn reads and the model is not given

    It is kept for one release: a lambda does the same, and evaluation 'paired' runs a model once for all
    sides from any closure.
    Raises ValueError for a withheld key that the batch does not have."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: Callable[[Any, Any], Any],
        *,
        withhold: str | Sequence[str] = (),
    ) -> None:
        self.model, self.batch, self.loss_fn = model, batch, loss_fn
        withhold = (withhold,) if isinstance(withhold, str) else tuple(withhold)
        keys = list(batch) if isinstance(batch, Mapping) else []
        if unknown := [key for key in withhold if key not in keys]:
            raise ValueError(
                f"Objective: withhold names {unknown}; expected keys of a mapping, and this batch has {keys}"
            )
        self.inputs = {key: batch[key] for key in keys if key not in withhold} if withhold else batch

    def __call__(self) -> Any:
        inputs = self.inputs
        if isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        else:
            outputs = self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)
        return self.loss_fn(outputs, self.batch)


__all__ = ["Objective"]
