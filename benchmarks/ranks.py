"""Bytes that a rank sends in a step, by method and size of the model: `python -m benchmarks.ranks`.

Ranks are processes under gloo, started by torchrun's elastic agent. `handed over` counts messages at the
transport (zokern.transport). `written` is what the process has written in all in the same steps, to sockets
above all (/proc/self/io, wchar): gloo passes every message on around a ring and adds its own headers. Steps
are counted after the first two, which compare weights and choose an evaluation.
"""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zokern

METHODS = ("MeZO", "SubZero", "LOZO", "KerZOO", "FZOO", "PGAP")
WIDTHS = (16, 256, 1024)
STEPS = 20


def launch(
    size: int, work: Callable[..., Any], *args: Any, restarts: int = 0, interval: float = 0.1
) -> dict[int, Any]:
    """Runs work(*args) in `size` processes under torchrun's agent; returns what each rank returned.

    restarts  how often the agent starts all of them again after one has failed
    interval  seconds between two looks of the agent at its processes"""
    import logging
    import multiprocessing

    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # killed ranks are expected
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "zokern"])
    # otherwise ranks that were started again find the addresses of those before them in the agent's store
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        1, 1, size, run_id="zokern", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
        monitor_interval=interval, start_method="forkserver",
    )  # fmt: skip
    return elastic_launch(config, work)(*args)


def join(seconds: float = 120.0) -> int:
    """Joins the group of all processes, under gloo; returns this one's rank."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    return torch.distributed.get_rank()


def written() -> int:
    """Returns the bytes that this process has written so far."""
    lines = Path("/proc/self/io").read_text().splitlines() if os.path.exists("/proc/self/io") else []
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar")), 0)


def count(methods: Sequence[str], widths: Sequence[int]) -> list[tuple[str, int, float, float]]:
    """Returns (method, weights, bytes handed over and bytes written in a step) of this rank."""
    rank, found = join(), []
    for name in methods:
        for width in widths:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
            options = {"probes": 4, "interval": STEPS, "rank": 4} if name == "PGAP" else {}
            opt = getattr(zokern, name)(net, evaluation="master", group="auto", **options)
            x = torch.randn(2, width, generator=torch.Generator().manual_seed(rank))
            for step in range(2 + STEPS):
                if step == 2:
                    start = opt.ranks.transport.sent, written()
                zokern.step(opt, lambda net=net, x=x: net(x).square().mean())
            sent, wrote = opt.ranks.transport.sent - start[0], written() - start[1]
            found.append((name, sum(p.numel() for p in net.parameters()), sent / STEPS, wrote / STEPS))
    torch.distributed.destroy_process_group()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for every method and size: the largest numbers of all ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    args = parser.parse_args(argv)
    rows = launch(args.ranks, count, args.methods, args.widths)
    print(f"bytes of a step and rank, {args.ranks} ranks, one micro-batch each, mean of {STEPS} steps")
    print("| method | weights | handed over | written |\n| --- | --- | --- | --- |")
    for each in zip(*rows.values()):
        name, weights = each[0][:2]
        print(
            f"| {name} | {weights} | {max(row[2] for row in each):.0f} | {max(row[3] for row in each):.0f} |"
        )


if __name__ == "__main__":
    from benchmarks.ranks import main as run  # processes find the functions under this name

    run()
