"""Parameters: names, ids, ties and checks. Everything that can be refused is refused here, before any weight is touched."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops import check_tensor, shared_memory
from .stream import parameter_id


@dataclass
class Trained:
    """One trained tensor: however many modules and names share it, it is one entry with one z."""

    name: str
    tensor: Tensor
    who: int
    aliases: list[tuple[str, Tensor]] = field(default_factory=list)  # other names and tensor objects of the same elements


class Pair(NamedTuple):
    """A name and a tensor of which named_groups has decided the name."""

    name: str
    tensor: Tensor


def named_groups(source: Any, names: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return parameter groups whose ``params`` are (name, tensor) pairs.

    source  a module (its parameters with requires_grad), an iterable of tensors or of (name, tensor) pairs, or of groups
            (dicts with ``params``). Tensors without a name are called ``param.0``, ``param.1``, ... in order, so their z depends
            on that order; pass the module or ``module.named_parameters()`` to make it depend on names alone.
    names   plain_names of the module that the optimizer holds, empty where it holds none: pairs get plain names.
            None keeps the names of modules and pairs as they are given, wrappers' prefixes too, and looks for ``module.``
            in an iterable of pairs and in several groups only: one group may be one that is added later.

    Where every name of all pairs starts with ``module.``, as under DistributedDataParallel, that prefix is no part of the names.
    A model that keeps all it trains in an attribute ``module`` of its own is therefore to be passed itself, and not as pairs.
    """
    if isinstance(source, nn.Module):
        return [{"params": _of_module(source, names is not None)}]
    if isinstance(source, Tensor):
        raise TypeError("params is a tensor; expected a module, or an iterable of tensors, (name, tensor) pairs or groups")
    if isinstance(source, dict):
        raise TypeError(
            "params is a dict; expected a module, or an iterable such as model.named_parameters() or a list of groups"
        )
    try:
        items = list(source)
    except TypeError:
        raise TypeError(
            f"params is {source!r:.60}; expected a module, or an iterable of tensors, (name, tensor) pairs or groups"
        ) from None
    is_grouped = bool(items) and isinstance(items[0], dict)
    groups = items if is_grouped else [{"params": items}]
    count, named = 0, []
    for group in groups:
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(f"params holds the group {group!r:.60}; expected a dict with 'params'")
        params = group["params"]
        if isinstance(params, nn.Module):
            params = _of_module(params, names is not None)
        params = [params] if isinstance(params, Tensor) else list(params)
        given = group.get("param_names")
        pairs: list[tuple[str, Any]] = []
        for position, item in enumerate(params):
            if isinstance(item, tuple):
                if len(item) != 2 or not isinstance(item[0], str):
                    raise TypeError(f"params holds {item!r:.60}; expected (name, tensor) pairs, tensors or groups")
                pairs.append(item)
            else:
                pairs.append((given[position], item) if given else Pair(f"param.{count}", item))
            count += 1
        named.append({**{k: v for k, v in group.items() if k != "param_names"}, "params": pairs})
    _settle(named, names, looks=names is not None or not is_grouped or len(groups) > 1)
    if not is_grouped:  # a group that is added later may be frozen
        check_trained(named)
    return named


def _of_module(module: nn.Module, is_plain: bool) -> list[tuple[str, Tensor]]:
    """What a module trains, under plain names or under those of the module inside its wrappers."""
    module = inner(module)
    names = plain_names(module) if is_plain else {}
    return [Pair(names.get(name, name), p) for name, p in module.named_parameters() if p.requires_grad]


def _settle(groups: list[dict[str, Any]], names: Mapping[str, str] | None, looks: bool) -> None:
    """Decide the names of all pairs that were given, at once: whether ``module.`` is a wrapper's shows in all of them together."""
    given = [pair[0] for group in groups for pair in group["params"] if not isinstance(pair, Pair)]
    known, strips = names or {}, looks and is_wrapped(given) and not any(name in (names or {}) for name in given)

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
    """Refuse groups of pairs of which no parameter is trained."""
    if not any(getattr(tensor, "requires_grad", True) for group in groups for _, tensor in group["params"]):
        raise ValueError("params holds no trainable parameter; set requires_grad on what is to be trained")


# Wrappers: the class that torch.nn.Module.named_parameters meets, and the attribute that holds the module inside.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "ActivationWrapper": "_checkpoint_wrapped_module",  # checkpoint_wrapper, offload_wrapper
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}
_PREFIX = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def wrapped(module: nn.Module) -> str | None:
    """Return the attribute under which a wrapper of torch's holds the module inside; None for any other module.

    The class decides, so an attribute of the user's own that is called ``module`` is not taken for one."""
    for cls in type(module).__mro__:
        if (attribute := WRAPPERS.get(cls.__name__)) is not None and cls.__module__.partition(".")[0] == "torch":
            return attribute if module._modules.get(attribute) is not None else None
    return None


def inner(module: nn.Module) -> nn.Module:
    """Return the module itself where it comes in wrappers that call it as it is, one inside another in any order.

    DataParallel on several devices calls replicas, and FullyShardedDataParallel holds flat parameters: they stay, for check_model."""
    while (attribute := wrapped(module)) is not None and not _hides(module):
        module = module._modules[attribute]  # type: ignore[assignment]
    return module


def _hides(wrapper: nn.Module) -> bool:
    """Whether a wrapper's forward reads something else than the parameters of the module inside."""
    if isinstance(wrapper, nn.DataParallel):
        return len(getattr(wrapper, "device_ids", None) or ()) > 1
    return any(cls.__name__ == "FullyShardedDataParallel" for cls in type(wrapper).__mro__)


def processes() -> int:
    """Return how many processes torch.distributed runs."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1


def plain(name: str) -> str:
    """Return a parameter's name in the module that was not wrapped: the name that decides its z.

    Where DistributedDataParallel stands does not show in one name; plain_names asks the module."""
    return _PREFIX.sub("", name)


def is_wrapped(names: Collection[str]) -> bool:
    """Whether names without their module are those of a model inside DistributedDataParallel: every one starts with ``module.``."""
    return bool(names) and all([plain(name).startswith("module.") for name in names])


def plain_names(module: nn.Module) -> dict[str, str]:
    """Return the plain name for each name of ``module.named_parameters()``: without the attributes in which wrappers hold modules."""
    inside = {
        f"{path}.{attribute}" if path else attribute
        for path, part in module.named_modules()
        if (attribute := wrapped(part)) is not None
    }

    def without(name: str) -> str:
        parts = name.split(".")
        return ".".join([part for end, part in enumerate(parts, 1) if ".".join(parts[:end]) not in inside])

    # a wrapper around it all may take its prefix off its own named_parameters(), and not off named_modules()
    in_full = nn.Module.named_parameters(module)
    return {name: without(full) for (name, _), (full, _) in zip(module.named_parameters(), in_full)}


def ids(names: Iterable[str], taken: dict[str, int] | None = None) -> tuple[dict[str, int], dict[str, str]]:
    """Ids of parameter names, and the collisions that had to be resolved (name -> the salted name that gave its id).

    Two names share a 32-bit id once in about n^2 / 2^33 models of n tensors. Names are resolved in sorted order, those that are ``taken``
    among them, so the outcome depends on the set of names and not on their order, on the groups that they came in, or on what is frozen.
    Raises ValueError where a taken name would have had another id, had the new ones been known: z of a run must not change on its way.
    """
    taken = taken or {}
    found: dict[str, int] = {}
    used: set[int] = set()
    salted: dict[str, str] = {}
    for name in sorted({*names, *taken}):
        salt, who = 0, parameter_id(plain(name))
        while who in used:
            salt += 1
            salted[name] = f"{name}#{salt}"
            who = parameter_id(plain(salted[name]))
        if taken.get(name, who) != who:
            rival = next(other for other, number in found.items() if number == taken[name])
            raise ValueError(
                f"the name {rival!r} has the 32-bit id of {name!r}, which was there before it and would have drawn another z beside it; give "
                "both to the optimizer when it is built (in any order, in one group or several), or rename one of them"
            )
        found[name] = who
        used.add(who)
    return found, {name: other for name, other in salted.items() if name not in taken}


def storage_of(tensor: Tensor) -> int:
    """What tensors on one piece of memory have in common; a wrapper around others has no memory of its own, and nothing in common."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def view_of(tensor: Tensor) -> tuple:
    """What makes two tensors the same elements: storage, offset, shape, strides."""
    return (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def check_parameter(name: str, tensor: Tensor) -> None:
    """Refuse what cannot be trained exactly, by name, with the way out."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"parameter {name!r} is {type(tensor).__name__}; expected a tensor")
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"parameter {name!r} of a lazy module has no shape yet; run the module once before the optimizer is built"
        )
    if type(tensor).__name__ == "DTensor" or hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"parameter {name!r} is a DTensor; expected a plain tensor. Sharded parameters (fully_shard, tensor parallelism) are not "
            "supported yet: leave the model unsharded, or freeze this parameter with requires_grad_(False)"
        )
    if tensor.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device; materialise it (model.to_empty, load weights) first")
    if tensor.is_inference():
        raise ValueError(f"parameter {name!r} was created under torch.inference_mode; clone it outside to train it")
    if storage_of(tensor) < 0:
        raise TypeError(
            f"parameter {name!r} is {type(tensor).__name__}, a wrapper without memory of its own; train a plain tensor"
        )
    way_out = "freeze it with requires_grad_(False)" if tensor.requires_grad else "leave it out"
    check_tensor("optimizer", f"parameter {name!r}", tensor, hint="cast it, or " + way_out)


def is_set_aside(tensor: Tensor) -> bool:
    """Whether a parameter is frozen and could not be trained either: quantised weights, which stay as they are."""
    if not isinstance(tensor, nn.Parameter) or tensor.requires_grad or nn.parameter.is_lazy(tensor):
        return False
    try:
        check_parameter("", tensor)
    except (TypeError, ValueError):
        return True
    return False


def trained(named: Iterable[tuple[str, Tensor]], who: dict[str, int]) -> list[Trained]:
    """Entries for named tensors; identical views merge into one, tensors that overlap in part are refused."""
    entries: dict[tuple, Trained] = {}
    for name, tensor in named:
        aside = is_set_aside(tensor)
        if not aside:
            check_parameter(name, tensor)
        key = (name,) if aside or not tensor.numel() else view_of(tensor)
        if key in entries and tensor.requires_grad and not (first := entries[key]).tensor.requires_grad:
            entries[key] = Trained(name, tensor, who[name], [(first.name, first.tensor), *first.aliases])
        elif key in entries:
            entries[key].aliases.append((name, tensor))
        else:
            entries[key] = Trained(name, tensor, who[name])
    check_overlap([(e.name, e.tensor) for e in entries.values()])
    return list(entries.values())


def check_overlap(named: list[tuple[str, Tensor]]) -> None:
    """Refuse distinct tensors that share memory."""
    named = [(name, tensor) for name, tensor in named if not is_set_aside(tensor)]
    if (pair := shared_memory([tensor for _, tensor in named])) is not None:
        first, second = (named[i][0] for i in pair)
        if view_of(named[pair[0]][1]) == view_of(named[pair[1]][1]):
            raise ValueError(
                f"parameters {first!r} and {second!r} are the same elements, which would be moved twice: give them to one group, or "
                "clone one of them"
            )
        raise ValueError(
            f"parameters {first!r} and {second!r} overlap in memory but are not the same view; "
            "an update of one would change the other: clone one of them"
        )


def check_tie(entry: Trained) -> None:
    """Refuse an entry whose names have come to stand for different elements: only those of the first would be trained."""
    for name, tensor in entry.aliases:
        if view_of(tensor) != view_of(entry.tensor):
            raise RuntimeError(
                f"parameters {entry.name!r} and {name!r} were the same elements when the optimizer was built and are no longer (a cast "
                "or a move unties tensors): tie them again, or build a new optimizer"
            )


def check_model(model: nn.Module) -> None:
    """Refuse wrappers under which a perturbation would be lost without a sign."""
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} is a TorchScript module, whose interpreter reads weights where no perturbation can reach; "
                "pass the eager module, or use evaluation='master'"
            )
        if type(module).__name__ in ("FullyShardedDataParallel", "FSDPModule"):
            raise TypeError(
                f"{where} is {type(module).__name__}; its flat parameters hide the weights: train the wrapped module"
            )
        if isinstance(module, nn.DataParallel) and _hides(module):
            raise TypeError(
                f"{where} is DataParallel on devices {module.device_ids}, whose replicas would not see the perturbation: train the "
                "wrapped module, or give DataParallel one device"
            )


__all__ = [
    "Trained", "check_model", "check_overlap", "check_parameter", "check_tie", "check_trained", "ids", "inner", "is_wrapped",
    "named_groups", "plain", "plain_names", "processes", "storage_of", "trained", "view_of", "wrapped",
]  # fmt: skip
