"""Messages between the processes of a torch.distributed group, and the error in which all of them stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

PIECE = 1 << 20  # elements that are summed at a time
Gather = Callable[[Tensor], Tensor]


class RankFailed(RuntimeError):
    """Stops all ranks in the same step: one of them raised, ended, or does something else than the others.

    The message names the rank, its error and the way out."""


class Transport(Protocol):
    """What carries messages. `Parallel(group=...)` takes an object of your own that has these.

    rank, size  the number of this process, and how many there are
    sent        bytes of the messages that this rank has handed over"""

    rank: int
    size: int
    sent: int

    def gather(self, message: Tensor) -> Tensor:
        """Returns the messages of all ranks, int64 [size, n], in rank order.

        message  int64 [n] on the CPU, of one length on every rank. It waits for all ranks, and raises where
                 one of them has ended"""

    def name(self, rank: int) -> str:
        """Returns what messages call a rank."""


class Group:
    """A torch.distributed process group as a Transport. Collectives: all_gather alone."""

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        self.group, self.sent = group, 0
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                "group is a process group that this process does not belong to; expected one that it is in, "
                "or group='auto' for all processes"
            )
        config = dist.get_backend_config(group)
        on_cpu = "cpu:" in config or config in ("gloo", "mpi")
        self.device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()

    def gather(self, message: Tensor) -> Tensor:
        """Returns the messages of all ranks. See Transport."""
        import torch.distributed as dist

        own = message.to(self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        self.sent += message.nbytes
        return torch.stack(found).cpu()

    def name(self, rank: int) -> str:
        """Returns the rank's number among all processes."""
        import torch.distributed as dist

        return f"rank {rank if self.group is None else dist.get_global_rank(self.group, rank)}"


def connect(group: Any) -> Transport | None:
    """Returns the transport of a group; None where this process is alone.

    group  'auto': all processes of torch.distributed, where it runs; a ProcessGroup; or a Transport"""
    if hasattr(group, "gather") and hasattr(group, "size") and not callable(group.size):
        return group if group.size > 1 else None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    found = Group(None if group == "auto" else group)
    return found if found.size > 1 else None


def texts(gather: Gather, text: str, longest: int | None = None) -> list[str]:
    """Returns a text of every rank, in rank order.

    gather   Transport.gather, or what calls it
    longest  bytes of each; None: of the longest one, for which the ranks exchange lengths first"""
    raw = text.encode()
    if longest is None:
        longest = int(gather(torch.tensor([len(raw)], dtype=torch.int64, device="cpu")).max())
    raw = raw[:longest].ljust((longest + 7) // 8 * 8, b"\0")
    message = torch.frombuffer(bytearray(raw or bytes(8)), dtype=torch.int64)
    return [
        row.contiguous().numpy().tobytes().rstrip(b"\0").decode(errors="replace") for row in gather(message)
    ]


def differing(gather: Gather, name: Callable[[int], str], items: dict[str, str]) -> str:
    """Returns which ranks have another value of which item than most ranks have; '' where none has.

    Of several values that as many ranks have, the one of the lowest rank is that of the most."""
    found = [json.loads(text) for text in texts(gather, json.dumps(items))]
    for key in dict.fromkeys(key for each in found for key in each):
        values = [each.get(key, "nothing") for each in found]
        common = max(dict.fromkeys(values), key=values.count)
        if others := [rank for rank, value in enumerate(values) if value != common]:
            first, reference = others[0], values.index(common)
            names = ", ".join(map(name, others))
            return f"{names}: {key} is {values[first]:.200}, and on {name(reference)} it is {common:.200}"
    return ""


def checksum(tensor: Tensor) -> int:
    """Returns a 64-bit sum of a tensor's bits, each element times an odd number of its own, modulo 2^64.

    It is equal on every device, and one changed element always changes it. The tensor is read once; 16 MB
    are held beside it."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(kinds[flat.element_size()])
    factors, total = _factors(bits.device), torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(PIECE):
        total = total * 0x2545F4914F6CDD1D + (piece.long() * factors[: len(piece)]).sum()
    return int(total)


@cache
def _factors(device: torch.device) -> Tensor:
    """Returns an odd number for every place in a piece: a hash of the place."""
    numbers = torch.arange(1, PIECE + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB
    numbers = (numbers ^ (numbers >> 30)) * -0x40A7B892E31B1A47
    return (numbers ^ (numbers >> 27)) | 1


__all__ = ["Group", "RankFailed", "Transport", "checksum", "connect", "differing", "texts"]
