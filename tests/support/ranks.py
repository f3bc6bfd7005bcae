"""Ranks for tests: threads of one process that take turns, and processes under gloo; and wrong transports."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

import zokern

BATCHES, ROWS = 8, 3


class Hub:
    """Where the threads of some ranks meet. One of them runs at a time: random streams are the process's."""

    def __init__(self, size: int) -> None:
        self.size, self.baton, self.barrier = size, threading.Lock(), threading.Barrier(size)
        self.board: list[dict[int, Tensor]] = [{}, {}]


class Thread:
    """A zokern.transport.Transport of one rank among threads."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank, self.size, self.sent, self.round = hub, rank, hub.size, 0, 0

    def name(self, rank: int) -> str:
        return f"rank {rank}"

    def gather(self, message: Tensor) -> Tensor:
        board = self.hub.board[self.round % 2]  # nobody is two rounds ahead of another
        board[self.rank] = message.clone()
        self.sent, self.round = self.sent + message.nbytes, self.round + 1
        self.hub.baton.release()
        try:
            self.hub.barrier.wait(120)
        finally:
            self.hub.baton.acquire()
        return self.order([board[rank] for rank in range(self.size)])

    def order(self, messages: list[Tensor]) -> Tensor:
        return torch.stack(messages)


class OwnFirst(Thread):
    """Wrong: every rank has its own message first."""

    def order(self, messages: list[Tensor]) -> Tensor:
        return torch.stack(messages[self.rank :] + messages[: self.rank])


class Deaf(Thread):
    """Wrong: every rank hears itself alone."""

    def order(self, messages: list[Tensor]) -> Tensor:
        return torch.stack([messages[self.rank]] * self.size)


class Late(Thread):
    """Wrong: of the last rank, what it said one message ago."""

    before: Tensor | None = None

    def order(self, messages: list[Tensor]) -> Tensor:
        now, found = messages[-1], messages[:-1]
        self.before, late = now, now if self.before is None else self.before
        return torch.stack([*found, late])


class Flip(Thread):
    """Wrong: rank 1 gets the lowest bit of a loss of rank 0 turned over, once."""

    def order(self, messages: list[Tensor]) -> Tensor:
        found = torch.stack(messages)
        if self.rank == 1 and self.round == 6:
            found[0, 7] ^= 1 << 40
        return found


def threads(
    size: int, work: Callable[[int, Any], Any], kind: Callable[[Hub, int], Any] = Thread
) -> list[Any]:
    """Runs work(rank, transport) on every rank. Returns what each returned, or the exception that it
    raised."""
    hub, found = Hub(size), [None] * size

    def run(rank: int) -> None:
        with hub.baton:
            try:
                found[rank] = work(rank, kind(hub, rank))
            except Exception as problem:
                found[rank] = problem
                hub.barrier.abort()

    each = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()
    return found


def process(
    rank: int, size: int, store: str, work: Callable[..., Any], out: Any, args: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")  # for libraries that look for it: the store is a file
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    try:
        out.put((rank, work(rank, *args)))
    except BaseException as problem:
        out.put((rank, f"{type(problem).__name__}: {problem}"))
        traceback.print_exc()


def processes(size: int, work: Callable[..., Any], folder: Any, *args: Any, left: int | None = None) -> list:
    """Runs work(rank, *args) in processes under gloo. Returns what each returned, or the words of what it
    raised; None of ranks that were killed.

    work  a function of a module of tests/support;  left  how many ranks are expected to answer"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "zokern", "accelerate"])  # once for all processes
    out, found = context.Queue(), [None] * size
    store = str(folder / f"store{work.__name__}")
    each = [
        context.Process(target=process, args=(rank, size, store, work, out, args), daemon=True)
        for rank in range(size)
    ]
    for one in each:
        one.start()
    for _ in range(size if left is None else left):
        rank, answer = out.get(timeout=300)
        found[rank] = answer
    for one in each:
        one.join(30)
        assert not one.is_alive()
    return found


# A run ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers and dropout, whose masks belong to micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(nn.functional.dropout(torch.tanh(self.one(x)), 0.1, self.training))


METHODS: dict[str, Callable[..., Any]] = {
    "MeZO": zokern.MeZO,
    "SubZero": lambda net, **options: zokern.SubZero(net, rank=3, interval=6, **options),
    "LOZO": lambda net, **options: zokern.LOZO(net, rank=2, interval=6, **options),
    "KerZOO": zokern.KerZOO,
    "FZOO": lambda net, **options: zokern.FZOO(net, queries=4, **options),
    "PGAP": lambda net, **options: zokern.PGAP(net, rank=3, interval=6, probes=3, **options),
    "ZOAdam": zokern.ZOAdam,
    "BlockMeZO": zokern.BlockMeZO,
    "MeZOSVRG": zokern.MeZOSVRG,
    "DiZO": zokern.DiZO,
    "FGD": zokern.FGD,
    "MeZOGV": zokern.MeZOGV,
}


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def batch(step: int, part: int) -> Tensor:
    """The inputs of a micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    return torch.randn(ROWS, 12, generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x).double().square().mean()  # sums of float32 numbers would be exact


def bits(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def train(
    method: str, steps: int, parts: Callable[[int], Sequence[int]], wrap: Callable = lambda model: model,
    **options: Any
) -> tuple[list[bytes], list[Any]]:  # fmt: skip
    """Returns the weights after some steps, and the losses of each step.

    parts  the micro-batches that this process reads in a step"""
    model = net()
    seen = wrap(model)
    opt = METHODS[method](seen, **{"lr": 1e-3, "seed": 7, **options})
    losses = []
    for step in range(steps):
        result = zokern.step(opt, [loss_of(seen, batch(step, part)) for part in parts(step)])
        losses.append(result.losses)
    opt.flush()
    return bits(model), losses


def alone(method: str, steps: int, size: int, **options: Any) -> tuple[list[bytes], list[Any]]:
    """Returns the same of one process, which reads the micro-batches of all ranks."""
    return train(method, steps, lambda step: range(size), **options)
