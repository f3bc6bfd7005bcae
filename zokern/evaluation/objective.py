"""A loss in the form loss_fn(outputs, batch), whose batch an evaluation may repeat: all sides are then one batch of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Objective:
    """The closure ``loss_fn(model(batch), batch)``, for loops that keep the model's call and the loss apart.

    model     called once a reading: with keywords for a mapping, with positions for a tuple or list, else with the batch itself
    batch     tensors, or a mapping or sequence of them; those whose first dimension is the batch's are repeated for every side
    loss_fn   (outputs, batch) -> a scalar tensor or a Python number. It gets one side's rows of the outputs at a time, and must compute
              the loss itself: a loss that the model averages over its batch would average over the sides
    withhold  keys of a mapping that loss_fn reads and the model is not given: withhold="labels" keeps a transformers model from computing a
              loss of its own

    Any evaluation takes it as an ordinary closure. `paired` runs the model once over the rows of all sides, which saves the second
    pass through its Python code. The model must treat the rows of a batch independently and keep their order (attention and norms do;
    routing tokens among experts and batch normalisation do not): the first step is compared with separate readings, and a model that
    does otherwise is read side by side instead."""

    def __init__(
        self, model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Any], *, withhold: str | Sequence[str] = ()
    ) -> None:
        self.model, self.batch, self.loss_fn = model, batch, loss_fn
        withhold = (withhold,) if isinstance(withhold, str) else tuple(withhold)
        keys = list(batch) if isinstance(batch, Mapping) else []
        if unknown := [key for key in withhold if key not in keys]:
            raise ValueError(f"Objective: withhold names {unknown}; expected keys of a mapping, and this batch has {keys}")
        self.inputs = {key: batch[key] for key in keys if key not in withhold} if withhold else batch

    def __call__(self) -> Any:
        return self.loss_fn(run(self.model, self.inputs), self.batch)

    def rows(self) -> int:
        """Rows of the batch: the first dimension of its first tensor that has one; 0 if there is none."""
        return next((t.shape[0] for t in tensors(self.inputs) if t.dim() > 0), 0)


def under_inference(closure: Callable[[], Any]) -> Callable[[], Any]:
    """The closure in torch.inference_mode(); an Objective stays one."""

    def within(call: Callable[..., Any]) -> Any:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with torch.inference_mode():
                return call(*args, **kwargs)

        return inside

    if not isinstance(closure, Objective):
        return within(closure)
    inner = copy.copy(closure)
    inner.model, inner.loss_fn = within(closure.model), within(closure.loss_fn)
    return inner


def run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(value, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of mappings and sequences with every tensor changed; other objects as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        items = {key: mapped(item, change) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)  # transformers' outputs are mappings of their own
    if isinstance(value, (tuple, list)):
        changed = [mapped(item, change) for item in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return value


def repeated(batch: Any, rows: int, sides: int) -> Any:
    """The batch with its rows once for every side."""
    return mapped(batch, lambda t: torch.cat([t] * sides) if t.dim() > 0 and t.shape[0] == rows else t)


def part(outputs: Any, rows: int, sides: int, side: int) -> Any:
    """One side's rows of the outputs."""
    return mapped(outputs, lambda t: t[side * rows : (side + 1) * rows] if t.dim() > 0 and t.shape[0] == rows * sides else t)


__all__ = ["Objective", "mapped", "part", "repeated", "run", "tensors"]
