"""Shards: parameters of which this process holds a block, as fully_shard and parallelize_module make them.

Such a parameter is a DTensor. A launch gets the block as plain memory, with the numbers that its elements
have in the whole parameter: z, weights and states are those of one process, whatever the sharding is.
Nothing is sent.

    a block [r0:r1, c0:c1] of (m, n)    first = r0 n + c0,   pitch = n,   element (i, j): first + i n + j
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .checks import says

WAY_OUT = "shard it along one dimension, such as Shard(0), or freeze it with requires_grad_(False)"


class Block(NamedTuple):
    """The elements of a parameter that this process holds, as a launch addresses them.

    memory  these elements, without a graph: in their own shape, or (rows, columns) where a pitch is given
    first   number of the first one in the whole parameter, row-major
    pitch   numbers between two rows of memory; None: they follow one another (backends.Span)"""

    memory: Tensor
    first: int = 0
    pitch: int | None = None


def is_sharded(tensor: Any) -> bool:
    """Tells whether a tensor is a DTensor. One that is replicated on every process is one too."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Returns the memory that this process holds of a tensor: the tensor itself, unless it is a DTensor.

    It has the version counter of what the DTensor holds: both tell of the same writes."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def block(name: str, tensor: Tensor) -> Block:
    """Returns the block that this process holds of a parameter; of a plain tensor it is the whole.

    Raises ValueError, by name, for partial sums, and for blocks that are no rows of equal distance."""
    held = local(tensor).detach()
    if not is_sharded(tensor):
        return Block(held)
    placements, shape = tensor.placements, tuple(tensor.shape)  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"parameter {name!r} has placements {placements}, a sum that is not made yet; expected Shard or "
            "Replicate: redistribute it"
        )
    if not held.numel():
        return Block(held)
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    offsets, sizes = tuple(chunk.offsets), tuple(held.shape)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]  # in numbers of the whole parameter
    # up to the last dimension that is cut, an index of the dimensions before it is a row
    cut = max((d for d, size in enumerate(sizes) if size != shape[d]), default=0)
    before, rows = [d for d in range(cut) if sizes[d] != 1], math.prod(sizes[:cut])
    even = all(strides[a] == sizes[b] * strides[b] for a, b in pairwise(before))
    if tuple(chunk.sizes) != sizes or not even or (rows > 1 and len(shape) > 2 and not held.is_contiguous()):
        raise ValueError(
            f"parameter {name!r} of shape {list(shape)} has placements {placements}, and here the elements "
            f"{list(sizes)} from {list(offsets)}; expected rows of equal distance in contiguous memory: "
            f"{WAY_OUT}"
        )
    first = sum(at * stride for at, stride in zip(offsets, strides))
    if rows == 1:
        return Block(held, first)
    return Block(held if held.dim() == 2 else held.view(rows, -1), first, strides[before[-1]])


def reshard(modules: Iterable[nn.Module]) -> None:
    """Has modules of fully_shard hold their shards again, where a forward left the gathered weights in place.

    The next forward gathers them anew, and so reads what was written since."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    for module in modules if kind is not None else ():
        if isinstance(module, kind):
            module.reshard()


def saved(tensor: Tensor, state: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Returns a parameter's state for a state_dict: what is kept of each element is sharded as it is."""
    from torch.distributed.tensor import DTensor

    held, found = local(tensor), dict(state)
    for key in keys if is_sharded(tensor) else ():
        if isinstance(found.get(key), Tensor):
            found[key] = DTensor.from_local(
                found[key].view(held.shape), tensor.device_mesh, tensor.placements, run_check=False,  # type: ignore[attr-defined]
                shape=tensor.shape, stride=tensor.stride(),
            )  # fmt: skip
    return found


def loaded(name: str, tensor: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a parameter's state from a state_dict, as launches take it: the block that this process holds.

    Raises ValueError, by name, where it is sharded otherwise than the parameter."""
    found = dict(state)
    for key, value in state.items():
        if not is_sharded(value):
            continue
        if not is_sharded(tensor) or (value.placements, value.shape) != (tensor.placements, tensor.shape):  # type: ignore[attr-defined]
            raise ValueError(
                f"state {key!r} of parameter {name!r} has placements {value.placements} and shape "
                f"{list(value.shape)}; expected those of the parameter: load it with "
                "torch.distributed.checkpoint, which reshards"
            )
        found[key] = local(value).view(block(name, tensor).memory.shape)
    return found


def agree(tensors: Iterable[Tensor], seed: int, step: int, losses: Sequence[float]) -> None:
    """Raises RuntimeError where two ranks differ in seed, step or losses: their blocks would move apart. All
    ranks of the parameters' meshes raise it.

    Every rank gathers 8 (len(losses) + 3) bytes of each rank of a mesh dimension, for one after the other."""
    meshes = {t.device_mesh: None for t in tensors if is_sharded(t)}  # type: ignore[attr-defined]
    bits = torch.tensor([*losses], dtype=torch.float64, device="cpu").view(torch.int64)
    mine = torch.cat([torch.tensor([0, seed - 2**63, step], dtype=torch.int64, device="cpu"), bits])
    for mesh in meshes:
        for dim in range(mesh.ndim):
            group, here = mesh.get_group(dim), mine.to(mesh.device_type)
            every = [torch.empty_like(here) for _ in range(mesh.size(dim))]
            torch.distributed.all_gather(every, here, group=group)
            found = torch.stack(every).cpu()
            # a rank whose group agrees learns of others in the next dimension
            mine[0] |= int((found != found[0]).any() or found[:, 0].any())
    if mine[0]:
        raise RuntimeError(
            f"rank {torch.distributed.get_rank()} has seed {seed}, step {step} and losses {list(losses)}; "
            "expected the same ones on every rank of a mesh, or its shards move apart: give every rank the "
            "same seed and the same batch, or average the loss inside the closure "
            "(torch.distributed.all_reduce)"
        )


class Parts(Protocol):
    """The parts of an optimizer, as check() looks at them."""

    evaluation: Any
    rule: Any
    estimator: Any
    factored: Any
    scaled: Any
    tape: Any
    ranks: Any


def check(optimizer: Parts) -> None:
    """Raises ValueError, by its argument, for a part of an optimizer that needs whole parameters."""
    evaluation, rule, estimator = optimizer.evaluation, optimizer.rule, optimizer.estimator
    reads = evaluation.name == "auto" or not (evaluation.stands_in or hasattr(evaluation, "slopes"))
    # a diagonal rule forms quotients of whole matrices
    moves = says(rule, "shards") and not (optimizer.factored and rule.diagonal)
    for fits, argument, value, way_out in (
        (reads, "evaluation", evaluation.name, "use 'master', 'inplace' or 'auto'"),
        (moves, "rule", rule.name, "use zokern.Sgd(), zokern.Momentum() or, with a dense z, zokern.Adam()"),
        (not optimizer.scaled, "direction", optimizer.scaled and optimizer.scaled.name, "use 'normal'"),
        (estimator.shards, "estimator", type(estimator).__name__, "use one of losses alone: zokern.Spsa()"),
        (optimizer.tape is None, "the step", "captured in a graph", "call zokern.step"),
        # a forward of shards is one of all ranks, and with points of its own each rank has another number
        (optimizer.ranks.split == "batch", "split", optimizer.ranks.split, "use zokern.Parallel()"),
    ):
        if not fits:
            raise ValueError(
                f"{argument} is {value!r}, which needs whole parameters, and some are sharded (DTensor): "
                f"{way_out}, or leave the model unsharded"
            )


__all__ = ["Block", "agree", "block", "check", "is_sharded", "loaded", "local", "reshard", "saved"]
