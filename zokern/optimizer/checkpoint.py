"""A state_dict: what zokern adds to torch's, and whether one that is to be loaded fits the optimizer. Refused
before anything changes."""

from __future__ import annotations

import hashlib
import io
import numbers
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import shards
from ..directions import Direction, LowRank, Scaled
from ..estimator import Estimator
from ..evaluation import Evaluation
from ..guards import Guards
from ..parameters import plain
from ..plan import Run
from ..rule import Rule
from ..stream import VERSION
from ..transport import checksum


class Saved(Protocol):
    """What a state_dict tells of an optimizer."""

    run: Run
    guards: Guards
    estimator: Estimator
    evaluation: Evaluation
    rule: Rule
    direction: Direction
    factored: LowRank | None
    scaled: Scaled | None
    param_groups: list[dict[str, Any]]


def own_entry(optimizer: Saved) -> dict[str, Any]:
    """Stream version, seed and counters, and the recipe:
    what has to be the same for a resumed run to be the same run."""
    run, guards = optimizer.run, optimizer.guards
    learned = {name: on_host(dict(part.state), {}) for name, part in _keepers(optimizer).items()}
    return {
        "stream": VERSION, "seed": run.seed, "step": run.step, "skips": guards.skips, "dead": guards.dead,
        "recipe": recipe(optimizer), "state": learned,
    }  # fmt: skip


def on_host(value: Any, seen: dict[int, float]) -> Any:
    """Returns what a state_dict holds: numbers that a part left in device memory become numbers of the host.

    seen  by id: a number is read once, however many parameters share it"""
    if isinstance(value, Tensor) and value.dtype == torch.float64 and not value.dim():
        return seen.setdefault(id(value), float(value))
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(one, seen) for one in value)
    return {key: on_host(one, seen) for key, one in value.items()} if isinstance(value, dict) else value


def packed(own: dict[str, Any]) -> bytes:
    """Returns the entry as one value for param_groups, which torch.distributed.checkpoint saves."""
    file = io.BytesIO()
    torch.save(own, file)
    return file.getvalue()


def unpacked(pack: bytes) -> dict[str, Any]:
    """Returns the entry that packed() made one value of."""
    return torch.load(io.BytesIO(pack), weights_only=True)


def _keepers(optimizer: Saved) -> dict[str, Any]:
    """Returns the parts that learn something which a resumed run needs."""
    parts = {"estimator": optimizer.estimator, "evaluation": optimizer.evaluation}
    return parts if optimizer.factored is None else {**parts, "direction": optimizer.factored}


def load_parts(optimizer: Saved, own: Mapping[str, Any]) -> None:
    """Gives the parts back what they had learned."""
    for name, part in _keepers(optimizer).items():
        part.state = dict((own.get("state") or {}).get(name) or {})


def recipe(optimizer: Saved) -> dict[str, Any]:
    """The parts of a run that its options do not hold, as plain values.

    The parts describe themselves (`described`),
    so that a new number of theirs is compared without a word here."""
    factored, dense = optimizer.factored, optimizer.direction
    made = factored or optimizer.scaled
    kept = {} if factored is None else {"rank": factored.rank, "interval": factored.interval}
    parts = {
        "direction": made or dense, "dense": dense, "rule": optimizer.rule, "estimator": optimizer.estimator,
    }  # fmt: skip
    return {
        "direction": dense.name if made is None else f"{made.name} and {dense.name}",
        "rule": optimizer.rule.name,
        "rounding": optimizer.run.rounding,
        **kept,
        **{f"{part}.{key}": value for part, it in parts.items() for key, value in described(it).items()},
        "maximize": optimizer.guards.maximize,
        "method": type(optimizer).__name__,
    }


def identity(optimizer: Any) -> dict[str, str]:
    """Returns what the ranks of one run have alike, as text by name: recipe, options, names, weights, states.

    Reads every trained weight and every state of the optimizer once; of shards, which differ, nothing."""
    found: dict[str, Any] = {"seed": optimizer.run.seed, "step": optimizer.run.step, **recipe(optimizer)}
    found |= {"evaluation": optimizer.evaluation.name, **vars(optimizer.guards)}
    keepers = {name: part for name, part in _keepers(optimizer).items() if name != "evaluation"}
    found |= {f"what {name} has learned": dict(part.state) for name, part in keepers.items()}
    for i, (options, entries) in enumerate(zip(optimizer.param_groups, optimizer.work.entries)):
        options = {key: value for key, value in options.items() if key not in ("params", "param_names")}
        found |= {f"{key} of group {i}": value for key, value in options.items()}
        found[f"names of group {i}"] = [entry.name for entry in entries]
        for entry in entries:
            tensor, name = entry.tensor, entry.name
            found[f"form of {name!r}"] = f"{tensor.dtype}{list(tensor.shape)} {tensor.requires_grad}"
            if shards.is_sharded(tensor):  # each rank has a block of its own
                continue
            found[f"checksum of the weights of {name!r}"] = checksum(tensor)
            for key, value in optimizer.state.get(tensor, {}).items():
                own = checksum(value) if isinstance(value, Tensor) else value
                found[f"state {key!r} of {name!r}"] = own
    return {
        key: str(plain_value(value)) for key, value in found.items() if key not in ("skips", "dead")
        and not key.startswith("_")
    }  # fmt: skip


def described(part: Any) -> dict[str, Any]:
    """What a direction or a rule is, as plain values: what its method `described()` returns, else its class
    and all of its attributes."""
    own = getattr(part, "described", None)
    found = (
        own()
        if own is not None
        else {key: value for key, value in vars(part).items() if key != "state" and not key.startswith("_")}
    )
    return {"kind": type(part).__name__, **{str(key): plain_value(value) for key, value in found.items()}}


def plain_value(value: Any) -> Any:
    """A value that a state_dict can hold and compare after it was saved:
    numbers, strings, and lists and dicts of them."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{list(value.shape)} {hashlib.sha256(flat).hexdigest()}"
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): plain_value(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [plain_value(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if hasattr(value, "described") or hasattr(value, "__dict__") and not callable(value):
        return described(value)
    return getattr(value, "__qualname__", type(value).__name__)


def check(optimizer: Saved, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The entry 'zokern' of a state_dict that fits; ValueError says what does not, and the way out."""
    own = state_dict.get("zokern")
    if own is None:
        raise ValueError("state_dict has no entry 'zokern'; expected the state_dict of a zokern optimizer")
    if (stream := own.get("stream")) != VERSION:
        raise ValueError(
            f"state_dict was written with stream version {stream}; this zokern draws version {VERSION}"
        )
    for key, limit in (("seed", 2**64), ("step", 2**32 + 1), ("skips", 2**32), ("dead", 2**32)):
        value = own.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
            raise ValueError(
                f"state_dict['zokern'] has {key} = {value!r}; expected an integer, 0 <= {key} < {limit}: "
                "load the state_dict of a zokern optimizer as it was saved"
            )
    here = recipe(optimizer)
    for what, value in (own.get("recipe") or {}).items():  # states of older versions do not say
        if here.get(what) != value:
            raise ValueError(
                f"state_dict was written with {what}={value!r} and this optimizer has {here.get(what)!r}; "
                "build it alike, or, to go on with another recipe, set state_dict['zokern']['recipe'] = None"
            )
    saved = [name for group in state_dict["param_groups"] for name in group.get("param_names", [])]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    saved, names = list(map(plain, saved)), list(map(plain, names))  # wrapped or not, it is the same run
    if saved != names:
        missing, extra = sorted(set(saved) - set(names)), sorted(set(names) - set(saved))
        way_out = "pass the same model to the optimizer, itself or all of its named_parameters()"
        if missing or extra:
            raise ValueError(
                f"state_dict names other parameters: missing here {missing}, not in it {extra}; {way_out}"
            )
        raise ValueError(
            f"state_dict names the same parameters in another order: {saved} in it, {names} here; {way_out}"
        )
    return own


__all__ = ["check", "identity", "load_parts", "on_host", "own_entry", "packed", "recipe", "unpacked"]
