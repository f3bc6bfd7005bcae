"""Ranks that are killed at random moments, and runs that go on: `python -m benchmarks.faults --kills 20`.

torchrun's elastic agent runs ranks under gloo. In each life of theirs one rank, drawn at random, is killed
with SIGKILL at a random moment. What has to hold, and is counted:

    clean stop  every other rank ends with zokern.RankFailed, and its weights have the bits of the unbroken
                run at the step that it had reached
    resume      the agent starts all ranks again; they load the last saved state, which has these bits too

The unbroken run is one process that reads the micro-batches of all ranks. At the end all ranks have its last
weights. The command ends with status 1 where one of these does not hold, and says in which phases kills
landed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import zokern
from benchmarks.ranks import join, launch
from zokern.transport import Group

PHASES = ("between steps", "reading", "exchanging", "writing", "saving")
STRIDE = 12  # steps of a life, in which a kill lands; the run has as many for each kill, and once more
SAVES = 3  # steps between two saves
Resume = Callable[[nn.Module, Any, dict[str, Any]], None]


class Report(NamedTuple):
    """What held, in numbers; `phases`: where kills landed; `final`: ranks with the last weights."""

    kills: int
    clean: int
    resumes: int
    final: int
    ranks: int
    phases: dict[str, int]

    @property
    def holds(self) -> bool:
        return self.kills == self.clean == self.resumes and self.final == self.ranks


def build(**options: Any) -> tuple[nn.Module, Any]:
    """Returns a model with dropout, and an optimizer with a state of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Dropout(0.1), nn.Linear(48, 8))
    return net, zokern.MeZO(net, lr=1e-3, seed=3, rule=zokern.Momentum(0.9), **options)


def loss(net: nn.Module, step: int, rank: int, phase: Callable[[int], None] = lambda number: None) -> Any:
    """Returns the closure of a rank's micro-batch."""
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(1000 * step + rank))

    def closure() -> Tensor:
        phase(1)
        found = net(x).square().mean()
        phase(0)
        return found

    return closure


def digest(net: nn.Module) -> str:
    raw = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
    return hashlib.sha256(raw).hexdigest()


def unbroken(size: int, steps: int) -> list[str]:
    """Returns the weights' digests before each step and after the last, of one process."""
    net, opt = build()
    found = [digest(net)]
    for step in range(steps):
        zokern.step(opt, [loss(net, step, rank) for rank in range(size)])
        found.append(digest(net))
    return found


def resume(net: nn.Module, opt: Any, saved: dict[str, Any]) -> None:
    """Goes on from a saved state."""
    net.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])


class Noted(Group):
    """A transport that notes when it exchanges."""

    phase: Callable[[int], None]

    def gather(self, message: Tensor) -> Tensor:
        self.phase(2)
        found = super().gather(message)
        self.phase(0)
        return found


def worker(folder: str, kills: int, steps: int, seed: int, load: Resume) -> bool:
    """One life of a rank. Returns whether its last weights are those of the unbroken run."""
    rank, life = join(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    room, right = Path(folder), json.loads(Path(folder, "right").read_text())
    with open(room / f"phase {life} {rank}", "w+b") as file:
        file.write(b"\0")
        file.flush()
        place = mmap.mmap(file.fileno(), 1)

    def phase(number: int) -> None:
        place[0] = number

    group = Noted()
    group.phase = phase
    net, opt = build(group=zokern.Parallel(group))
    write = opt.rule.update
    opt.rule.update = lambda *args: (phase(3), write(*args), phase(0))[1]
    if (room / "saved").exists():
        load(net, opt, torch.load(room / "saved", weights_only=True))
    note(room, "resumed", life=life, rank=rank, step=opt.steps, right=digest(net) == right[opt.steps])
    lot = random.Random(f"{seed} {life}")
    victim, moment, share = lot.randrange(group.size), opt.steps + 1 + lot.randrange(STRIDE - 1), lot.random()
    took = 0.0
    try:
        for step in range(opt.steps, steps):
            if (rank, step) == (victim, moment) and life < kills:
                threading.Timer(2 * took * share, os.kill, (os.getpid(), signal.SIGKILL)).start()
            start = time.perf_counter()
            zokern.step(opt, loss(net, step, rank, phase))
            if step % SAVES == 0:
                save(room, rank, net, opt, phase)
            took = time.perf_counter() - start
    except zokern.RankFailed as problem:
        equal = digest(net) == right[opt.steps] and "Start all ranks again" in str(problem)
        note(room, "stopped", life=life, rank=rank, step=opt.steps, right=equal, said=str(problem))
        raise SystemExit(1) from None
    return digest(net) == right[-1]


def save(room: Path, rank: int, net: nn.Module, opt: Any, phase: Callable[[int], None]) -> None:
    """Saves the state of all ranks, once: the file is whole at any moment."""
    phase(4)
    state = {"model": net.state_dict(), "optimizer": opt.state_dict()}
    if rank == 0:
        torch.save(state, room / "saving")
        os.replace(room / "saving", room / "saved")
    phase(0)


def note(room: Path, kind: str, life: int, rank: int, **said: Any) -> None:
    (room / f"{kind} {life} {rank}").write_text(json.dumps(said))


def noted(room: Path, kind: str, life: int, ranks: Sequence[int]) -> bool:
    """Whether these ranks have noted something in a life, and it was right."""
    files = [room / f"{kind} {life} {rank}" for rank in ranks]
    return all(file.exists() and json.loads(file.read_text())["right"] for file in files)


def run(kills: int, size: int, seed: int = 0, load: Resume = resume, say: Callable = print) -> Report:
    """Runs ranks that are killed, and returns what held."""
    steps = STRIDE * (kills + 1)
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        (room / "right").write_text(json.dumps(unbroken(size, steps)))
        args = (folder, kills, steps, seed, load)
        ends = launch(size, worker, *args, restarts=kills, interval=2.0)
        clean = resumes = 0
        phases: Counter[str] = Counter()
        for life in range(kills):
            victim = random.Random(f"{seed} {life}").randrange(size)
            others = [rank for rank in range(size) if rank != victim]
            phase = PHASES[(room / f"phase {life} {victim}").read_bytes()[0]]
            stopped = noted(room, "stopped", life, others)
            resumed = noted(room, "resumed", life + 1, range(size))
            clean, resumes, phases[phase] = clean + stopped, resumes + resumed, phases[phase] + 1
            say(f"kill {life + 1}: rank {victim}, {phase}; clean stop: {stopped}; resume: {resumed}")
    return Report(kills, clean, resumes, sum(ends.values()), size, dict(phases))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = run(args.kills, args.ranks, args.seed)
    print(f"phases of the killed ranks: {found.phases}")
    print(
        f"{found.kills} kills, {found.clean} clean stops, {found.resumes} resumes to the same bits, "
        f"{found.final} of {found.ranks} ranks with the last weights of the unbroken run"
    )
    return 0 if found.holds else 1


if __name__ == "__main__":
    from benchmarks.faults import main as start  # processes find the functions under this name

    raise SystemExit(start())
