"""A state_dict: what zokern adds to torch's, and whether one that is to be loaded fits the optimizer. Refused before anything changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stream import VERSION, check_seed, check_word


def own_entry(optimizer: Any) -> dict[str, Any]:
    """Stream version, seed and counters, and the recipe: what has to be the same for a resumed run to be the same run."""
    return {
        "stream": VERSION, "seed": optimizer.seed, "step": optimizer.steps, "skips": optimizer.skips, "dead": optimizer.dead,
        "evaluation": getattr(optimizer.evaluation, "choice", None), "recipe": recipe(optimizer),
    }  # fmt: skip


def recipe(optimizer: Any) -> dict[str, Any]:
    """The parts of a run that its options do not hold."""
    factored = optimizer.factored
    kept = {what: getattr(factored, what) for what in ("rank", "interval") if isinstance(getattr(factored, what, None), int)}
    return {
        "direction": optimizer.direction.name if factored is None else factored.name, "rule": getattr(optimizer.rule, "name", "?"),
        "queries": optimizer.queries, "stencil": list(optimizer.stencil.offsets), "rounding": optimizer.rounding, **kept,
    }  # fmt: skip


def check(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The entry 'zokern' of a state_dict that fits; ValueError says what does not, and the way out."""
    own = state_dict.get("zokern")
    if own is None:
        raise ValueError("state_dict has no entry 'zokern'; expected the state_dict of a zokern optimizer")
    if own["stream"] != VERSION:
        raise ValueError(f"state_dict was written with stream version {own['stream']}; this zokern draws version {VERSION}")
    check_seed(own["seed"])
    check_word("step", own["step"])
    here = recipe(optimizer)
    for what, value in (own.get("recipe") or {}).items():  # version 0.1.0 wrote none at first
        if here.get(what) != value:
            raise ValueError(
                f"state_dict was written with {what}={value!r} and this optimizer has {here.get(what)!r}; build it alike, or, to go on "
                "with another recipe, set state_dict['zokern']['recipe'] = None"
            )
    saved = [name for group in state_dict["param_groups"] for name in group.get("param_names", [])]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    if saved != names:
        missing, extra = sorted(set(saved) - set(names)), sorted(set(names) - set(saved))
        raise ValueError(f"state_dict names other parameters: missing here {missing}, not in it {extra}, or in another order")
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state_dict["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                _check_fits(optimizer, names[index], tensors[index], key, value)
    return own


def _check_fits(optimizer: Any, name: str, tensor: Tensor, key: str, value: Tensor) -> None:
    """The kernels read what is kept of each element by its address: another shape would be memory that is not theirs."""
    small = key != "residual" and optimizer.factored is not None and optimizer.factored.shape(tensor) is not None
    dtype = torch.int16 if key == "residual" else torch.float32
    if value.dtype != dtype or (value.shape != tensor.shape and not small):
        expected = f"{dtype}" if small else f"{dtype}{list(tensor.shape)}"
        raise ValueError(
            f"state_dict holds {key!r} of parameter {name!r} as {value.dtype}{list(value.shape)}; expected {expected}, as the "
            "parameter: load the state of the same model"
        )


__all__ = ["check", "own_entry", "recipe"]
