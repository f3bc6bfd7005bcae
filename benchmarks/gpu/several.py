"""Several GPUs: ranks that read a batch each, against one process that reads all batches.

Weights and losses have to be equal bit for bit, with a copy of the model on every rank and with shards of
fully_shard. With one GPU this says that it was not measured. On a CPU two processes under gloo stand for it.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import zokern

from ..ranks import launch
from .run import Run

STEPS = 5
KINDS = ("copies", "shards")


def net(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 8)).to(
        device
    )


def train(model: nn.Module, batches: range, device: str, group: Any) -> dict[str, Any]:
    """Returns losses and whole weights, on the CPU, of a run with one micro-batch for each batch number."""
    opt = zokern.ZOAdam(model, lr=1e-3, seed=5, evaluation="master", group=group)
    inputs = [torch.randn(16, 64, generator=torch.Generator().manual_seed(k)).to(device) for k in batches]
    read = [lambda x=x: model(x).square().mean() for x in inputs]
    losses = [loss for _ in range(STEPS) for loss in zokern.step(opt, read).losses[0]]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {"losses": losses, "weights": [p.detach().cpu() for p in whole]}


def on_rank(device: str, kind: str, group: Any) -> dict[str, Any]:
    """Runs in a process that torchrun's agent started: one rank."""
    rank = int(os.environ["RANK"])
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60))
    model = net(device)
    if kind == "shards":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    found = train(model, range(rank, rank + 1), device, group)
    dist.barrier()
    dist.destroy_process_group()
    return found


def several(run: Run, group: Any = "auto") -> None:
    """Checks each kind. group: what the ranks' optimizers are given; None would leave them apart."""
    size = torch.cuda.device_count() if run.device == "cuda" else 2
    for kind in KINDS:
        name = f"{size} ranks with {kind} of the model: bits of one process"
        if size < 2:
            run.skip(name, "there is one GPU: several were not measured")
        else:
            run.check(name, lambda kind=kind, size=size: compare(run.device, kind, size, group))


def compare(device: str, kind: str, size: int, group: Any) -> None:
    right = train(net(device), range(size), device, None)
    for rank, found in launch(size, on_rank, device, kind, group).items():
        assert found["losses"] == right["losses"], f"rank {rank} has other losses than one process"
        equal = all(map(torch.equal, found["weights"], right["weights"]))
        assert equal, f"rank {rank} has other weights than one process"


__all__ = ["several"]
