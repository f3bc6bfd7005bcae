"""Parallel: one step on several micro-batches, and on several processes of torch.distributed.

    L(point) = (1 / B) sum_b L_b(point)      float64, summed in the order of b, over all ranks' micro-batches

Ranks exchange losses and nothing else: z is made from the stream on each of them, and all write the same
update. Between an evaluation and an estimator stands Together. It reads what is this rank's to read, and
gathers what the others have read. Estimators and rules do not know how many ranks there are.

A question of the estimator is one message of 256 bytes a rank. It opens with seven numbers: whether the rank
has failed, the step, the question, its micro-batches, how many losses follow, whether updates wait, and a
checksum of points, options and all coefficients so far. Ranks that differ in them stop together, before any
of them writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import whole_number
from .evaluation import Evaluation, Point
from .parameters import processes, spread_modules
from .plan import Plan
from .transport import RankFailed, Transport, connect, differing, texts

SPLITS = ("batch", "points")
FRAME = 32  # numbers of 8 bytes in a message
TEXT = 1024  # bytes of an error that is told to other ranks
RESTART = (
    "Start all ranks again from the last saved state, as torchrun --max-restarts=N does by itself"
    " (docs/processes.md)"
)


class MicroBatches:
    """The closures of one step, each of which computes the loss of a part of the batch.

    parts  the closures. Calling the object returns the mean of what they return"""

    def __init__(self, parts: Sequence[Callable[[], Any]]) -> None:
        self.parts = tuple(parts)

    def __call__(self) -> Any:
        return sum(part() for part in self.parts) / len(self.parts)


def micro_batches(closure: Any) -> Callable[[], Any]:
    """Returns a closure, or several as one. Raises TypeError for anything else."""
    if callable(closure):
        return closure
    parts = closure if isinstance(closure, (list, tuple)) else ()
    if not parts or not all(map(callable, parts)):
        raise TypeError(
            f"closure is {type(closure).__name__} {closure!r:.80}; expected a function without arguments "
            "that computes the loss, which is read at more than one point, or a list of them, one for each "
            "micro-batch: zokern.step(optimizer, lambda: model(**batch).loss)"
        )
    return MicroBatches(parts)


def parts_of(closure: Callable[[], Any]) -> tuple[Callable[[], Any], ...]:
    """Returns the closures of micro-batches; of any other closure, itself."""
    return closure.parts if isinstance(closure, MicroBatches) else (closure,)


class Parallel:
    """Shares the steps of a run between processes: `group=` of every optimizer.

    group  'auto': all processes of torch.distributed, where it runs; a ProcessGroup, which this process is
           in; or an object with rank, size, sent, name(rank) and gather(message) (zokern.transport.Transport)
    split  what the ranks share. 'batch': every rank's closure reads a part of the batch, and losses are means
           over ranks. 'points': every rank's closure reads the same batch, and the distinct points of a
           question are divided. Of n of them, rank r of R reads those from n r // R up to n (r + 1) // R
    check  steps between two comparisons of all weights, options and states; None: in the first step alone

    Where torch.distributed does not run, or runs one process, a step is that of group=None. Raises
    ValueError for arguments out of range."""

    def __init__(self, group: Any = "auto", split: str = "batch", check: int | None = 500) -> None:
        if group is None or (isinstance(group, str) and group != "auto"):
            raise ValueError(f"group is {group!r}; expected 'auto' or a torch.distributed ProcessGroup")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected one of {list(SPLITS)}")
        self.group, self.split = group, split
        self.check = (
            None if check is None else whole_number("check", check, 1, expected="None or an integer, from 1")
        )


class Head(NamedTuple):
    """What opens a message."""

    failed: int  # 1: the rank has raised; 2: it has raised while it wrote weights
    step: int
    question: int  # of a rank that has raised: how often it has begun to write in the step
    closures: int
    length: int
    waits: int
    word: int


class Ranks:
    """The ranks of one optimizer's run.

    options   None: this process is alone
    identity  returns what has to be equal on all ranks, by name"""

    def __init__(self, given: Any, identity: Callable[[], dict[str, str]]) -> None:
        if given is not None and not isinstance(given, Parallel):
            given = Parallel(given)
        self.options: Parallel | None = given
        self.identity = identity
        self.chain = ""  # checksum of all coefficients so far
        self._transport: Transport | None = None
        self._step = self._question = 0  # under way
        self._writes, self._is_writing = 0, False  # how often the step has begun to write weights
        self._agreed = -1  # the step after the last one that went well
        self._asked = ""  # what the last question was about

    @property
    def transport(self) -> Transport | None:
        """What connects this process with the others; None: it is alone."""
        if self._transport is None and self.options is not None:
            self._transport = connect(self.options.group)
        return self._transport

    @property
    def split(self) -> str:
        return "batch" if self.options is None else self.options.split

    def check(self, optimizer: Any) -> None:
        """Raises ValueError for what several processes cannot do right."""
        if self.transport is None:
            return
        estimator, way = type(optimizer.estimator).__name__, optimizer.evaluation.name
        if optimizer.estimator.backpropagates:
            raise ValueError(
                f"estimator is {estimator}, which back-propagates, and gradients are not averaged over "
                f"{self.transport.size} ranks; expected an estimator that reads losses alone, or group=None"
            )
        if self.split == "points" and not optimizer.evaluation.exact:
            raise ValueError(
                f"evaluation is {way!r} with split='points': it moves the weights to each point and back, "
                "with rounding, and ranks that read other points would drift apart; use evaluation='master'"
            )

    def check_spread(self) -> None:
        """Raises RuntimeError where a model of several processes is trained by each of them alone."""
        if self.transport is None and processes() > 1:
            raise RuntimeError(
                f"the model is wrapped in DistributedDataParallel and {processes()} processes run, and group "
                "is None: each would move along its own losses, and the weights would drift apart. Give the "
                "optimizer group='auto', which averages the losses over the processes; or, to train a model "
                "in each process by itself, give it and the closure model.module"
            )

    def _meet(self, module: Any) -> None:
        """Before a forward of DistributedDataParallel in the first step: refuses it for a process alone.

        With others it sends no buffers around in forwards without gradients. A step puts buffers back, and a
        rank without a point to read has no forward."""
        self.check_spread()
        module.require_forward_param_sync = False

    @contextmanager
    def telling(self, step: int) -> Iterator[None]:
        """Inside, an exception of this rank stops the others too, at their next question."""
        self._step, self._question, self._writes, self._is_writing = step, 0, 0, False
        is_first = self._agreed < 0 and (self.transport is not None or processes() > 1)
        try:
            with spread_modules(self._meet) if is_first else nullcontext():
                yield
        except RankFailed:
            raise
        except Exception as problem:
            if self.transport is not None:
                self._tell(self.transport, problem)
            raise

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, weights are written: after an exception they may differ from those of other ranks."""
        self._writes, self._is_writing = self._writes + 1, True
        yield
        self._is_writing = False

    def _tell(self, transport: Transport, problem: Exception) -> None:
        try:
            self._gather(transport, Head(1 + self._is_writing, self._step, self._writes, 0, 0, 0, 0), [])
            said = texts(self._carry, _line(problem), TEXT)
        except RankFailed:  # the others have ended
            return
        others = [
            f"{transport.name(rank)}: {text}"
            for rank, text in enumerate(said)
            if text and rank != transport.rank
        ]
        if hasattr(problem, "add_note"):
            problem.add_note(
                f"This is {transport.name(transport.rank)}; all {transport.size} ranks stop."
                + (f" Others raised too: {'; '.join(others)}" if others else "")
            )

    def exchange(self, plan: Plan, values: Tensor, about: str, closures: int = 1) -> list[Tensor]:
        """Returns the values of all ranks, float64 [count] each, in rank order.

        values  float64, of any shape and number, of this rank
        about   what has to be equal on all ranks for the values to belong together

        Raises RankFailed on every rank where one has failed, has ended, or is about something else."""
        assert self.transport is not None
        self._question, self._asked = self._question + 1, about
        flat = values.detach().reshape(-1).double().cpu().view(torch.int64)
        options = [(g.eps, float(g.options["lr"]), float(g.options["weight_decay"])) for g in plan.groups]
        word = _word(f"{plan.seed} {self.split} {self.chain} {options} {about}")
        head = Head(0, plan.step, self._question, closures, len(flat), int(plan.deferred), word)
        room = FRAME - len(head)
        frames = self._gather(self.transport, head, flat[:room].tolist())
        heads = [Head(*row) for row in frames[:, : len(head)].tolist()]
        self._compare(self.transport, heads)
        found = frames[:, len(head) :]
        if (longest := max(each.length for each in heads)) > room:
            rest = torch.zeros(longest - room, dtype=torch.int64, device="cpu")
            rest[: max(0, len(flat) - room)] = flat[room:]
            found = torch.cat([found, self._carry(rest)], 1)
        return [row[: each.length].contiguous().view(torch.float64) for row, each in zip(found, heads)]

    def _gather(self, transport: Transport, head: Head, values: Sequence[int]) -> Tensor:
        message = torch.zeros(FRAME, dtype=torch.int64, device="cpu")
        message[: len(head) + len(values)] = torch.tensor([*head, *values], dtype=torch.int64, device="cpu")
        return self._carry(message)

    def _carry(self, message: Tensor) -> Tensor:
        transport = self.transport
        assert transport is not None
        try:
            return transport.gather(message)
        except Exception as problem:
            raise RankFailed(
                f"{transport.name(transport.rank)} could not exchange losses with the others: a rank has "
                "ended, or did not answer within the group's timeout (init_process_group(timeout=...)): "
                f"{_line(problem)}. It has written nothing since the last losses of all ranks. {RESTART}"
            ) from problem

    def _compare(self, transport: Transport, heads: Sequence[Head]) -> None:
        """Raises RankFailed where a rank has failed, or where the ranks do not do the same."""
        if any(head.failed for head in heads):
            said = enumerate(texts(self._carry, "", TEXT))
            failed = "; ".join(f"{transport.name(rank)} raised {text}" for rank, text in said if text)
            here = (1, self._step, self._writes)
            weights = (
                "Their weights are equal: none has written since the last losses that all ranks have"
                if all(head[:3] == here for head in heads if head.failed)
                else "It raised as weights were written, and its own may differ from those of the others"
            )
            raise RankFailed(
                f"step {self._step}: {failed}. All {transport.size} ranks stop. {weights}. {RESTART}"
            )
        for field, what, way_out in FIELDS:
            numbers = [getattr(head, field) for head in heads]
            if len(set(numbers)) > 1:
                each = ", ".join(f"{number} on {transport.name(i)}" for i, number in enumerate(numbers))
                raise RankFailed(f"step {heads[0].step}: the ranks have other {what}: {each}. {way_out}")
        if len({head.word for head in heads}) > 1:
            self._explain(transport, heads[0].step)

    def _explain(self, transport: Transport, step: int) -> None:
        """Raises RankFailed with what differs between the ranks."""
        own = {"split": self.split, "check": str(self.options and self.options.check), **self.identity()}
        own |= {"what a question asks for": self._asked, "the checksum of all coefficients": self.chain}
        found = differing(self._carry, transport.name, own) or "the ranks differ, and no longer say in what"
        raise RankFailed(
            f"step {step}: the ranks do not do the same. {found}. Nothing was written in this question. "
            "Build all optimizers alike. Before the first step give every rank the weights of rank 0: "
            "torch.distributed.broadcast(p.data, 0) for each parameter. Weights that change later are to "
            f"change on every rank. {RESTART}"
        )

    def agree(self, plan: Plan) -> None:
        """Compares weights, options and states of all ranks where that is due, before a step writes.

        Raises RankFailed on every rank; it names the rank and what differs."""
        check = None if self.options is None else self.options.check
        is_due = plan.step != self._agreed or (check is not None and plan.step % check == 0)
        if self.transport is not None and is_due:
            about = _word(str(sorted(self.identity().items())))
            self.exchange(plan, torch.empty(0, dtype=torch.float64, device="cpu"), f"weights {about}")
        self._agreed = plan.step + 1

    def note(self, step: int, numbers: Any) -> None:
        """Adds a step's coefficients to the checksum."""
        if self.transport is not None:
            self.chain = f"{_word(f'{self.chain} {step} {numbers}') & 0xFFFFFFFFFFFFFFFF:016x}"


FIELDS = (
    ("step", "step numbers", "Load the same saved state on every rank"),
    ("question", "numbers of questions", "Build all optimizers alike"),
    ("closures", "numbers of micro-batches", "Give zokern.step as many closures on every rank"),
    (
        "waits",
        "deferred updates (1: waiting, 0: written)",
        "Call flush() or state_dict() on every rank, and not on one; a forward on one rank goes into "
        "`with optimizer.evaluating():`; or build the optimizers with defer=False",
    ),
)


class Together:
    """An evaluation that reads the losses of all micro-batches, on all ranks. It is one evaluation to others.

    inner  reads the losses of one closure; ranks  the processes that share a question"""

    def __init__(self, inner: Evaluation, ranks: Ranks) -> None:
        self.inner, self.ranks = inner, ranks

    def __getattr__(self, name: str) -> Any:
        if name == "slopes" and hasattr(self.inner, "slopes"):
            return self._slopes
        return getattr(self.inner, name)

    def losses(self, plan: Plan, points: Sequence[Point], closure: Callable[[], object]) -> Tensor:
        """Returns the mean losses at the points, float64 [len(points)]; see Evaluation.losses.

        Where a plan asks for the losses of examples, those of all micro-batches: [len(points), examples]"""

        def read(part: Plan, mine: Sequence[Point], one: Callable[[], object]) -> Tensor:
            return self.inner.losses(part, mine, one).view(len(mine), -1)

        if self.ranks.transport is None and not isinstance(closure, MicroBatches):
            return self.inner.losses(plan, points, closure)
        table = self._table(plan, points, closure, read)
        return table if plan.rows else _mean(table)

    def _slopes(
        self, plan: Plan, words: Sequence[int], closure: Callable[[], object]
    ) -> tuple[Tensor, Tensor]:
        """Returns mean losses and mean slopes; see Differentiates.slopes."""

        def read(part: Plan, mine: Sequence[int], one: Callable[[], object]) -> Tensor:
            return torch.stack(self.inner.slopes(part, mine, one), 1)  # type: ignore[attr-defined]

        table = self._table(plan, words, closure, read)
        return _mean(table[:, 0::2]), _mean(table[:, 1::2])

    def _table(self, plan: Plan, asked: Sequence[Any], closure: Any, read: Callable[..., Tensor]) -> Tensor:
        """Returns what every micro-batch says of every point, float64 [points, columns].

        Columns are in the order of ranks, and of the micro-batches of a rank."""
        transport, parts = self.ranks.transport, parts_of(closure)
        shared = transport is not None and self.ranks.split == "points"
        each = list(dict.fromkeys(asked)) if shared else list(asked)
        size = transport.size if transport is not None and shared else 1
        bounds = [len(each) * rank // size for rank in range(size + 1)]
        place = transport.rank if transport is not None else 0
        mine = each[bounds[place] : bounds[place + 1]] if shared else each
        first = 0 if shared else place * len(parts)  # the number of a micro-batch starts its dropout masks
        found = [read(replace(plan, part=first + i), mine, one) for i, one in enumerate(parts) if mine]
        device = found[0].device if found else torch.device("cpu")
        table = (
            torch.cat([one.to(device) for one in found], 1)
            if found
            else torch.empty(0, 1, dtype=torch.float64, device=device)
        )
        if transport is None:
            return table
        flat = self.ranks.exchange(plan, table, f"{asked} {plan.rows}", len(parts))
        if not shared:
            return torch.cat([one.view(len(each), -1).to(device) for one in flat], 1)
        heights = [high - low for low, high in zip(bounds, bounds[1:])]
        rows = torch.cat([one.view(n, -1) for one, n in zip(flat, heights) if n]).to(device)
        return rows[[each.index(one) for one in asked]]


def _mean(table: Tensor) -> Tensor:
    """Returns the mean of the columns, summed in their order."""
    first, *rest = table.unbind(1)
    for column in rest:
        first = first + column
    return first / table.shape[1] if rest else first


def _word(text: str) -> int:
    """Returns 64 bits of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:300]


__all__ = ["MicroBatches", "Parallel", "RankFailed", "Ranks", "Together", "micro_batches", "parts_of"]
