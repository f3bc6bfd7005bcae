"""A state_dict: what zokern adds to torch's, and whether one that is to be loaded fits the optimizer. Refused before anything changes."""

from __future__ import annotations

from typing import Any

from .parameters import plain
from .stream import VERSION


def own_entry(optimizer: Any) -> dict[str, Any]:
    """Stream version, seed and counters, and the recipe: what has to be the same for a resumed run to be the same run."""
    return {
        "stream": VERSION, "seed": optimizer.seed, "step": optimizer.steps, "skips": optimizer.skips, "dead": optimizer.dead,
        "evaluation": getattr(optimizer.evaluation, "choice", None), "recipe": recipe(optimizer),
    }  # fmt: skip


def recipe(optimizer: Any) -> dict[str, Any]:
    """The parts of a run that its options do not hold."""
    factored, dense = optimizer.factored, optimizer.direction.name
    kept = {what: getattr(factored, what) for what in ("rank", "interval") if isinstance(getattr(factored, what, None), int)}
    return {
        "direction": dense if factored is None else f"{factored.name} and {dense}", "rule": getattr(optimizer.rule, "name", "?"),
        "queries": optimizer.queries, "stencil": list(optimizer.stencil.offsets), "rounding": optimizer.rounding, **kept,
    }  # fmt: skip


def check(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The entry 'zokern' of a state_dict that fits; ValueError says what does not, and the way out."""
    own = state_dict.get("zokern")
    if own is None:
        raise ValueError("state_dict has no entry 'zokern'; expected the state_dict of a zokern optimizer")
    if (stream := own.get("stream")) != VERSION:
        raise ValueError(f"state_dict was written with stream version {stream}; this zokern draws version {VERSION}")
    for key, limit in (("seed", 2**64), ("step", 2**32 + 1), ("skips", 2**32), ("dead", 2**32)):
        value = own.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
            raise ValueError(
                f"state_dict['zokern'] has {key} = {value!r}; expected an integer, 0 <= {key} < {limit}: load the state_dict of a zokern "
                "optimizer as it was saved"
            )
    here = recipe(optimizer)
    for what, value in (own.get("recipe") or {}).items():  # states of older versions do not say
        if here.get(what) != value:
            raise ValueError(
                f"state_dict was written with {what}={value!r} and this optimizer has {here.get(what)!r}; build it alike, or, to go on "
                "with another recipe, set state_dict['zokern']['recipe'] = None"
            )
    saved = [name for group in state_dict["param_groups"] for name in group.get("param_names", [])]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    saved, names = list(map(plain, saved)), list(map(plain, names))  # wrapped or not, it is the same run
    if saved != names:
        missing, extra = sorted(set(saved) - set(names)), sorted(set(names) - set(saved))
        way_out = "pass the same model to the optimizer, itself or all of its named_parameters()"
        if missing or extra:
            raise ValueError(f"state_dict names other parameters: missing here {missing}, not in it {extra}; {way_out}")
        raise ValueError(f"state_dict names the same parameters in another order: {saved} in it, {names} here; {way_out}")
    return own


__all__ = ["check", "own_entry", "recipe"]
