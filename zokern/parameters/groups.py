"""Parameter groups of (name, tensor) pairs, from a module or from what torch optimizers take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .names import is_wrapped, plain, plain_names
from .wrappers import inner


class Pair(NamedTuple):
    """A name that named_groups has decided, and its tensor."""

    name: str
    tensor: Tensor


def named_groups(source: Any, names: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Returns parameter groups whose ``params`` are (name, tensor) pairs.

    source  a module (its parameters with requires_grad), an iterable of tensors or of (name, tensor) pairs,
            or of groups (dicts with ``params``). Tensors without a name are called ``param.0``, ``param.1``,
            ... in order, so their z depends on that order; pass the module or ``module.named_parameters()``
            to make it depend on names alone.
    names   plain_names of the module that the optimizer holds, empty where it holds none: pairs get plain
            names. None keeps the names of modules and pairs as they are given, wrappers' prefixes too, and
            looks for ``module.`` in an iterable of pairs and in several groups only: one group may be one
            that is added later.

    Where every name of all pairs starts with ``module.``, as under DistributedDataParallel, that prefix is
    no part of the names. A model that keeps all it trains in an attribute ``module`` of its own is therefore
    to be passed itself, and not as pairs.
    """
    if isinstance(source, nn.Module):
        return [{"params": _of_module(source, names is not None)}]
    if isinstance(source, Tensor):
        raise TypeError(
            "params is a tensor; expected a module, or an iterable of tensors, (name, tensor) pairs or groups"
        )
    if isinstance(source, dict):
        raise TypeError(
            "params is a dict; expected a module, or an iterable such as model.named_parameters() or a list "
            "of groups"
        )
    try:
        items = list(source)
    except TypeError:
        raise TypeError(
            f"params is {source!r:.60}; expected a module, or an iterable of tensors, (name, tensor) pairs "
            "or groups"
        ) from None
    is_grouped = bool(items) and isinstance(items[0], dict)
    groups = items if is_grouped else [{"params": items}]
    count, named = 0, []
    for group in groups:
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(f"params holds the group {group!r:.60}; expected a dict with 'params'")
        pairs = _pairs(group, names is not None, count)
        count += len(pairs)
        named.append({**{k: v for k, v in group.items() if k != "param_names"}, "params": pairs})
    _settle(named, names, looks=names is not None or not is_grouped or len(groups) > 1)
    if not is_grouped:  # a group that is added later may be frozen
        check_trained(named)
    return named


def _pairs(group: dict[str, Any], is_plain: bool, count: int) -> list[tuple[str, Any]]:
    """Returns the (name, tensor) pairs of a group; `count` parameters were in the groups before it."""
    params = group["params"]
    if isinstance(params, nn.Module):
        params = _of_module(params, is_plain)
    given = group.get("param_names")
    pairs: list[tuple[str, Any]] = []
    for position, item in enumerate([params] if isinstance(params, Tensor) else params):
        if isinstance(item, tuple):
            if len(item) != 2 or not isinstance(item[0], str):
                raise TypeError(
                    f"params holds {item!r:.60}; expected (name, tensor) pairs, tensors or groups"
                )
            pairs.append(item)
        else:
            pairs.append((given[position], item) if given else Pair(f"param.{count + position}", item))
    return pairs


def _of_module(module: nn.Module, is_plain: bool) -> list[tuple[str, Tensor]]:
    """Returns the trained parameters of a module, under plain names or under its own."""
    module = inner(module)
    names = plain_names(module) if is_plain else {}
    return [Pair(names.get(name, name), p) for name, p in module.named_parameters() if p.requires_grad]


def _settle(groups: list[dict[str, Any]], names: Mapping[str, str] | None, looks: bool) -> None:
    """Decides the names of all given pairs at once.

    Only all of them together show whether ``module.`` is a wrapper."""
    given = [pair[0] for group in groups for pair in group["params"] if not isinstance(pair, Pair)]
    known = names or {}
    strips = looks and is_wrapped(given) and not any(name in (names or {}) for name in given)

    def settled(pair: tuple[str, Tensor]) -> Pair:
        name, tensor = pair
        if isinstance(pair, Pair) or not isinstance(name, str):
            return Pair(name, tensor)
        if name in known:
            return Pair(known[name], tensor)
        if strips:
            name = plain(name).removeprefix("module.")
        return Pair(name if names is None else plain(name), tensor)

    for group in groups:
        group["params"] = [settled(pair) for pair in group["params"]]


def check_trained(groups: Iterable[dict[str, Any]]) -> None:
    """Refuses groups of pairs of which no parameter is trained."""
    if not any(getattr(tensor, "requires_grad", True) for group in groups for _, tensor in group["params"]):
        raise ValueError(
            "params holds no trainable parameter; set requires_grad on what is to be trained, or add "
            "adapters to a frozen base: peft.get_peft_model"
        )
