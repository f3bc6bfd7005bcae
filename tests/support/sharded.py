"""Runs of sharded models on four processes with gloo: `python sharded.py FOLDER` leaves what they found.

A case trains a model that is sharded in one way with one method. The tests compare it with the same training
in one process. Some cases run a wrong version of zokern, which a comparison has to tell apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zokern
import zokern.methods

WORLD, LONG, SHORT = 4, 20, 5
X = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))


class Layers(nn.Sequential):
    """Three linear layers. On four ranks some hold no row, and a bias lies on one of them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
        self.to(dtype)


class Gathered(nn.Module):
    """Matrices, a vector and a stack of matrices, which the forward gathers where they are DTensors."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(7, 6) / 3), nn.Parameter(torch.randn(6))
        self.c, self.d = nn.Parameter(torch.randn(4, 6, 5) / 3), nn.Parameter(torch.randn(2, 9) / 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (whole(p) for p in (self.a, self.b, self.c, self.d))
        h = torch.tanh(x @ a + b)
        return torch.einsum("ni,eij->nj", h, c).sum(1, keepdim=True).tanh() * d.sum() + d.square().mean()


def whole(p: Tensor) -> Tensor:
    """Returns all elements of a tensor; gloo gathers no int16.

    torch 2.11 gathers columns into other strides, for which products are summed in another order."""
    if not hasattr(p, "full_tensor"):
        return p
    found = p.int().full_tensor().short() if p.dtype == torch.int16 else p.full_tensor()
    return found.contiguous()


# How a method is built, its steps and the dtype of the weights.
BF16, FP32 = torch.bfloat16, torch.float32
METHODS: dict[str, tuple[Callable[..., Any], int, torch.dtype]] = {
    "MeZO": (lambda m, **k: zokern.MeZO(m, lr=1e-2, **k), LONG, FP32),
    "Adam": (lambda m, **k: zokern.ZOAdam(m, lr=1e-2, weight_decay=0.1, **k), SHORT, FP32),
    "LOZO": (lambda m, **k: zokern.LOZO(m, lr=1e-2, rank=2, interval=3, momentum=0.9, **k), SHORT, FP32),
    "SubZero": (lambda m, **k: zokern.SubZero(m, lr=1e-2, rank=2, interval=3, **k), SHORT, FP32),
    "PGAP": (lambda m, **k: zokern.PGAP(m, lr=1e-2, rank=2, probes=2, interval=3, **k), SHORT, FP32),
    "residual": (lambda m, **k: zokern.MeZO(m, lr=1e-2, rounding="residual", **k), SHORT, BF16),
    "stochastic": (lambda m, **k: zokern.ZOAdam(m, lr=1e-3, rounding="stochastic", **k), SHORT, BF16),
}  # fmt: skip


def closure(model: nn.Module, coarse: bool = False) -> Callable[[], Tensor]:
    """Returns the loss. coarse: rounded to 2**-10, so that sums in another order read the same one."""
    dtype = next(model.parameters()).dtype
    exact = lambda: model(X.to(dtype)).float().square().mean()  # noqa: E731
    return (lambda: (exact() * 1024).round() / 1024) if coarse else exact


def built(method: str, model: nn.Module, **options: Any) -> Any:
    return METHODS[method][0](model, **{"eps": 1e-2, "seed": 3, **options})


def train(
    method: str, model: nn.Module, steps: int | None = None, opt: Any = None, coarse: bool = False,
    **options: Any
) -> dict[str, Any]:  # fmt: skip
    """Returns whole weights and states, and the losses. The third step has lr = 0: states move alone."""
    opt = built(method, model, **options) if opt is None else opt
    losses, lr = [], opt.param_groups[0]["lr"]
    for _ in range(METHODS[method][1] if steps is None else steps):
        opt.param_groups[0]["lr"] = 0.0 if opt.steps == 2 else lr
        losses += zokern.step(opt, closure(model, coarse)).losses[0]
    opt.param_groups[0]["lr"] = lr
    found = opt.state_dict()
    names = found["param_groups"][0]["param_names"]
    states = {
        f"{name}.{key}": whole(value)
        for number, name in enumerate(names) for key, value in found["state"].get(number, {}).items()
        if isinstance(value, Tensor)
    }  # fmt: skip
    weights = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "states": states, "losses": losses, "evaluation": opt.result.evaluation}


def reference(method: str, kind: type[nn.Module], **options: Any) -> dict[str, Any]:
    """Returns the same of one process, with evaluation 'master'."""
    return train(method, kind(METHODS[method][2]), evaluation="master", **options)


# Ways to shard ----------------------------------------------------------------------------------------------


def fsdp(mesh: Any, dtype: torch.dtype, place: Callable[[nn.Parameter], Any] | None = None) -> nn.Module:
    """Returns the layers, each with a group of its own; the last one is in that of the root.

    place  the dimension that a parameter is sharded along; None: the first"""
    from torch.distributed.fsdp import fully_shard

    model = Layers(dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    return fully_shard(model, mesh=mesh)


def placed(mesh: Any, dtype: torch.dtype, **placements: Any) -> nn.Module:
    """Returns Gathered with parameters of these placements."""
    from torch.distributed.tensor import distribute_tensor

    model = Gathered(dtype)
    for name, where in placements.items():
        setattr(model, name, nn.Parameter(distribute_tensor(getattr(model, name).data, mesh, where)))
    return model


def tensor_parallel(mesh: Any, rows: bool) -> nn.Module:
    """Returns the layers with the first two sharded by columns, or by columns and then by rows."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = Layers()
    plan = (
        {"0": ColwiseParallel(), "2": RowwiseParallel()}
        if rows
        else {name: ColwiseParallel(output_layouts=Replicate()) for name in ("0", "2")}
    )
    return parallelize_module(model, mesh, plan)


def both(mesh: Any) -> nn.Module:
    """Returns tensor parallel layers in fully_shard: rows are cut twice."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(tensor_parallel(mesh["right"], rows=False), mesh=mesh["left"])


def ways() -> dict[str, Callable[[torch.dtype], nn.Module]]:
    """Returns the ways to shard a model over the four ranks, by name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    line = init_device_mesh("cpu", (WORLD,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("left", "right"))
    r, s0, s1, s2 = Replicate(), Shard(0), Shard(1), Shard(2)
    return {
        "fsdp 4": lambda dtype: fsdp(line, dtype),
        "fsdp 2": lambda dtype: fsdp(square["right"], dtype),
        "fsdp columns": lambda dtype: fsdp(line, dtype, lambda p: s1 if p.shape == (6, 8) else s0),
        "hybrid": lambda dtype: fsdp(square, dtype),
        "rows": lambda dtype: placed(line, dtype, a=[s0], b=[s0], c=[s0], d=[s0]),
        "columns": lambda dtype: placed(line, dtype, a=[s1], b=[s0], c=[s1], d=[s1]),
        "inner": lambda dtype: placed(line, dtype, a=[r], b=[r], c=[s2], d=[r]),
        "mesh": lambda dtype: placed(square, dtype, a=[s0, s1], b=[r, s0], c=[s0, s2], d=[s1, s1]),
        "column-wise": lambda dtype: tensor_parallel(line, rows=False),
        "row-wise": lambda dtype: tensor_parallel(line, rows=True),
        "both": lambda dtype: both(square),
    }  # fmt: skip


# What runs --------------------------------------------------------------------------------------------------

COARSE = ("both",)  # whose products are split, and have other last bits on some processors
LAYERS = ("fsdp 4", "fsdp 2", "fsdp columns", "hybrid", "both")
CASES = [("fsdp 4", method) for method in METHODS]
CASES += [("fsdp 2", "MeZO"), ("fsdp 2", "residual"), ("fsdp columns", "Adam"), ("hybrid", "Adam")]
CASES += [("mesh", method) for method in ("Adam", "LOZO", "residual", "stochastic")]
CASES += [("columns", "Adam"), ("both", "LOZO"), ("rows", "Adam"), ("inner", "Adam")]

REFUSED = {"FGD", "SparseMeZO", "HiZOO", "DiZO", "AdaMeZO", "Addax", "Hybrid"}
OTHERS = sorted(set(zokern.methods.METHODS) - REFUSED - {"MeZO"})


def in_brief(name: str, model: nn.Module, **options: Any) -> dict[str, Any]:
    """Returns the weights and losses of two steps of a method as it is built by default."""
    read = closure(model)
    full = {"full": read} if name == "MeZOSVRG" else {}
    opt = zokern.methods.METHODS[name](model, lr=1e-3, eps=1e-2, seed=3, **full, **options)
    asked = (lambda: model(X).square().mean(1)) if name == "DPZO" else read
    losses = [zokern.step(opt, asked).losses for _ in range(2)]
    weights = {key: whole(p).detach().clone() for key, p in model.named_parameters()}
    return {"weights": weights, "states": {}, "losses": losses}


@contextlib.contextmanager
def swapped(name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Puts a wrong version in the place of a function of zokern.shards."""
    right = getattr(zokern.shards, name)
    setattr(zokern.shards, name, make(right))
    try:
        yield
    finally:
        setattr(zokern.shards, name, right)


def local_numbers(right: Callable[..., Any]) -> Callable[..., Any]:
    """Numbers a block from 0 on every rank."""
    return lambda *block: right(*block)._replace(first=0)


# The sharding and the method, and what stands for which function of zokern.shards.
WRONG: dict[str, tuple[str, str, str, Callable[[Any], Any]]] = {
    "local numbers": ("rows", "Adam", "block", local_numbers),
    "local numbers of a factored z": ("rows", "LOZO", "block", local_numbers),
    "consecutive rows": ("columns", "Adam", "block", lambda right: lambda *a: right(*a)._replace(pitch=None)),
    "gathered weights stay": ("fsdp 4", "Adam", "reshard", lambda right: lambda modules: None),
}


def averaged(model: nn.Module, rank: int) -> dict[str, Any]:
    """Returns what a run finds whose ranks read a batch each, and average the loss."""
    opt = built("Adam", model)

    def shared() -> Tensor:
        loss = model(X + rank).square().mean()
        dist.all_reduce(loss)
        return loss / WORLD

    losses = [loss for _ in range(SHORT) for loss in zokern.step(opt, shared).losses[0]]
    weights = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "states": {}, "losses": losses}


def grouped(model: nn.Module, rank: int | None) -> dict[str, Any]:
    """Returns what a run finds whose ranks read a batch each, under group='auto'; rank None: one process that
    reads all batches."""
    opt = built("Adam", model, evaluation="master", group=None if rank is None else "auto")
    read = [lambda k=k: model(X + k).square().mean() for k in (range(WORLD) if rank is None else [rank])]
    losses = [loss for _ in range(SHORT) for loss in zokern.step(opt, read).losses[0]]
    weights = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "states": {}, "losses": losses}


def own_batch(model: nn.Module, rank: int) -> None:
    """Takes a step whose loss is that of one rank's batch."""
    zokern.step(built("MeZO", model), lambda: model(X + rank).square().mean())


# Ranks that go their own way: each has to be an error on every rank.
APART: dict[str, Callable[[nn.Module, int], Any]] = {
    "own seed": lambda model, rank: train("MeZO", model, 1, seed=rank),
    "one other seed": lambda model, rank: train("MeZO", model, 1, seed=int(rank == 3)),
    "own batch": own_batch,
}


def refused(run: Callable[..., Any], *given: Any) -> Any:
    """Returns what a run found, or the words with which every rank refused it."""
    try:
        return run(*given)
    except (RuntimeError, ValueError) as problem:
        words = [""] * WORLD
        dist.all_gather_object(words, f"{type(problem).__name__}: {problem}")
        return words


class Sent(TorchDispatchMode):
    """Adds up the bytes of all tensors that collectives take or fill."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def sent(model: nn.Module) -> dict[str, int]:
    """Returns the bytes that a step and two forwards send, and those of the copy and of the shards."""
    opt = built("Adam", model)
    zokern.step(opt, closure(model))  # the first step reads losses twice
    with Sent() as step:
        zokern.step(opt, closure(model))
    with torch.no_grad(), Sent() as forwards:
        for _ in range(2):
            zokern.shards.reshard(model.modules())
            closure(model)()
    shards = sum(zokern.shards.local(p).nbytes for p in model.parameters())
    copy = opt.result.scratch_bytes
    return {"step": step.bytes, "forwards": forwards.bytes, "copy": copy, "shards": shards}


def resumed(way: str, make: dict[str, Callable[..., nn.Module]], method: str, folder: Path) -> dict[str, Any]:
    """Returns what a run of 'fsdp 4' finds that is saved after three steps and goes on otherwise sharded."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    first, dtype, path = make["fsdp 4"](METHODS[method][2]), METHODS[method][2], folder / f"{way} {method}"
    opt = built(method, first)
    train(method, first, 3, opt)
    weights, state = get_state_dict(first, opt)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=path)
    other = make[way](dtype)
    for p in other.parameters():
        p.data.zero_()
    again = built(method, other, seed=4)
    if method == "LOZO":  # its state begins with a step
        again.param_groups[0]["lr"] = 0.0
        zokern.step(again, closure(other))
    weights, state = get_state_dict(other, again)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=path)
    set_state_dict(other, again, model_state_dict=weights, optim_state_dict=state)
    return train(method, other, METHODS[method][1] - 3, again)


def kept(make: dict[str, Callable[..., nn.Module]], method: str, file: Path) -> dict[str, Any]:
    """Returns what a run finds that every rank saved and loaded for itself."""
    first = make["mesh"](METHODS[method][2])
    opt = built(method, first)
    train(method, first, 3, opt)
    torch.save((first.state_dict(), opt.state_dict()), file)
    weights, state = torch.load(file, weights_only=False)
    other = make["mesh"](METHODS[method][2])
    other.load_state_dict(weights)
    again = built(method, other)
    again.load_state_dict(state)
    return train(method, other, METHODS[method][1] - 3, again)


def counted(found: dict[str, Any]) -> dict[str, Any]:
    """Adds how many different weights and states the ranks have."""
    bits = [t.contiguous().view(torch.uint8).numpy().tobytes() for part in ("weights", "states")
            for t in found[part].values()]  # fmt: skip
    several: list[Any] = [None] * WORLD
    dist.all_gather_object(several, hashlib.sha256(b"".join(bits)).hexdigest())
    return {**found, "ranks": len(set(several))}


def on_rank(rank: int, folder: str) -> None:
    """Runs all cases on one rank, and saves what rank 0 found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    here = Path(folder)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{here / 'store'}", rank=rank, world_size=WORLD)
    make, found = ways(), dict[Any, Any]()
    for way, method in CASES:
        found[way, method] = counted(train(method, make[way](METHODS[method][2]), coarse=way in COARSE))
    for name in OTHERS:
        found[name] = counted(in_brief(name, make["fsdp columns"](torch.float32)))
    found["averaged"] = counted(averaged(make["hybrid"](torch.float32), rank))
    for way in ("hybrid", "fsdp 4"):
        found["grouped", way] = counted(grouped(make[way](torch.float32), rank))
    for name, (way, method, function, wrong) in WRONG.items():
        with swapped(function, wrong), swapped("agree", lambda right: lambda *a: None):
            found[name] = refused(train, method, make[way](METHODS[method][2]))
    for name, wrong_rank in APART.items():
        found[name] = refused(wrong_rank, make["mesh"](torch.float32), rank)
    for name in ("column-wise", "row-wise"):
        found[name] = train_coarsely(make[name](torch.float32))
    for way in ("fsdp 4", "row-wise"):
        found["sent", way] = sent(make[way](torch.float32))
    for way, method in (("hybrid", "Adam"), ("fsdp 2", "LOZO"), ("fsdp 2", "residual")):
        found["resumed", way, method] = resumed(way, make, method, here)
    for method in ("Adam", "residual"):
        found["kept", method] = kept(make, method, here / f"{rank} {method}.pt")
    if rank == 0:
        torch.save(found, here / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_coarsely(model: nn.Module) -> dict[str, Any]:
    """Returns weights after steps whose losses are rounded; and 50 losses of other inputs as they are, before
    the steps."""
    with torch.no_grad():
        exact = [model(X * k).square().mean().item() for k in range(1, 51)]
    opt = zokern.MeZO(model, lr=1e-2, eps=1e-1, seed=3, evaluation="master")
    losses = [zokern.step(opt, closure(model, coarse=True)).losses[0] for _ in range(SHORT)]
    weights = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "losses": losses, "exact": exact}


if __name__ == "__main__":
    for late in ("fsdp", "tensor.parallel", "tensor.experimental", "checkpoint.state_dict"):
        importlib.import_module(f"torch.distributed.{late}")  # once, and not in every process
    torch.multiprocessing.start_processes(on_rank, (sys.argv[1],), nprocs=WORLD, start_method="fork")
