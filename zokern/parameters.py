"""Parameters: names, ids, ties and checks. Everything that can be refused is refused here, before any weight is touched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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


def named_groups(source: Any) -> list[dict[str, Any]]:
    """Parameter groups whose ``params`` are (name, tensor) pairs.

    source  a module (its parameters with requires_grad), an iterable of tensors or of (name, tensor) pairs, or of groups
            (dicts with ``params``). Tensors without a name are called ``param.0``, ``param.1``, ... in order, so their z depends
            on that order; pass the module or ``module.named_parameters()`` to make it depend on names alone.
    """
    if isinstance(source, nn.Module):
        return [{"params": [(name, p) for name, p in source.named_parameters() if p.requires_grad]}]
    if isinstance(source, Tensor):
        raise TypeError("params is a tensor; expected a module, or an iterable of tensors, (name, tensor) pairs or groups")
    items = list(source)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    count, named = 0, []
    for group in groups:
        params = group["params"]
        if isinstance(params, nn.Module):
            params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        params = [params] if isinstance(params, Tensor) else list(params)
        names = group.get("param_names")
        pairs = []
        for position, item in enumerate(params):
            if isinstance(item, tuple):
                pairs.append(item)
            else:
                pairs.append((names[position] if names else f"param.{count}", item))
            count += 1
        named.append({**{k: v for k, v in group.items() if k != "param_names"}, "params": pairs})
    return named


def ids(names: Iterable[str], taken: dict[str, int] | None = None) -> tuple[dict[str, int], dict[str, str]]:
    """Ids of parameter names, and the collisions that had to be resolved (name -> the salted name that gave its id).

    Two names share a 32-bit id once in about n^2 / 2^33 models of n tensors. Names are resolved in sorted order, so the
    outcome depends on the set of names and not on their order or on what is frozen; ids that are ``taken`` stay.
    """
    found = dict(taken or {})
    used, salted = set(found.values()), {}
    for name in sorted(set(names) - found.keys()):
        salt, who = 0, parameter_id(name)
        while who in used:
            salt += 1
            salted[name] = f"{name}#{salt}"
            who = parameter_id(salted[name])
        found[name] = who
        used.add(who)
    return found, salted


def view_of(tensor: Tensor) -> tuple:
    """What makes two tensors the same elements: storage, offset, shape, strides."""
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def check_parameter(name: str, tensor: Tensor) -> None:
    """Refuse what cannot be trained exactly, by name, with the way out."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"parameter {name!r} is {type(tensor).__name__}; expected a tensor")
    if type(tensor).__name__ == "DTensor" or hasattr(tensor, "full_tensor"):
        raise TypeError(f"parameter {name!r} is a DTensor; sharded parameters are not supported yet: use the local tensor")
    if tensor.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device; materialise it (model.to_empty, load weights) first")
    if tensor.is_inference():
        raise ValueError(f"parameter {name!r} was created under torch.inference_mode; clone it outside to train it")
    check_tensor("optimizer", f"parameter {name!r}", tensor, hint="cast it, or freeze it with requires_grad_(False)")


def trained(named: Iterable[tuple[str, Tensor]], who: dict[str, int]) -> list[Trained]:
    """Entries for named tensors; identical views merge into one, tensors that overlap in part are refused."""
    entries: dict[tuple, Trained] = {}
    for name, tensor in named:
        check_parameter(name, tensor)
        key = view_of(tensor) if tensor.numel() else (name,)
        if key in entries:
            entries[key].aliases.append((name, tensor))
        else:
            entries[key] = Trained(name, tensor, who[name])
    check_overlap([(e.name, e.tensor) for e in entries.values()])
    return list(entries.values())


def check_overlap(named: list[tuple[str, Tensor]]) -> None:
    """Refuse distinct tensors that share memory in part."""
    if (pair := shared_memory([tensor for _, tensor in named])) is not None:
        first, second = (named[i][0] for i in pair)
        raise ValueError(
            f"parameters {first!r} and {second!r} overlap in memory but are not the same view; "
            "an update of one would change the other: clone one of them"
        )


def check_model(model: nn.Module) -> None:
    """Refuse wrappers under which a perturbation would be lost without a sign."""
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} is a TorchScript module, whose interpreter reads weights where no perturbation can reach; "
                "pass the eager module, or evaluation='walk'"
            )
        if type(module).__name__ in ("FullyShardedDataParallel", "FSDPModule"):
            raise TypeError(
                f"{where} is {type(module).__name__}; its flat parameters hide the weights: train the wrapped module"
            )
        if isinstance(module, nn.DataParallel):
            raise TypeError(f"{where} is DataParallel, whose replicas would not see the perturbation: train the wrapped module")


__all__ = ["Trained", "check_model", "check_overlap", "check_parameter", "ids", "named_groups", "trained", "view_of"]
