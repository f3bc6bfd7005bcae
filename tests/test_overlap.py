"""Tiles made ahead on a second stream (zokern/overlap.py), without a GPU: what would be queued is recorded and played in all orders.

A device made of two queues stands in for CUDA: `wait_stream` is kept as an edge, fills and products are kept as operations with the
memory that they read and write. Then
    races      two operations of different streams that share memory, one of which writes it, must be ordered by edges
    orders     every order that the edges allow is played on real memory and must give the bits of one stream
    overlap    a fill must be free to run beside the product before it, or the second stream is for nothing
and every line of the order is taken out of the source once, which one of the three must notice. Streams, drivers and times are not
shown here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import combinations
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zokern
from zokern import backends, matmul, overlap, products
from zokern.backends import Span, cuda
from zokern.directions import resolve
from zokern.evaluation.arena import Arena
from zokern.evaluation.copies import Copies

SEED, SCALES = 7, (1e-2, -1e-2, 3e-2, -3e-2, 0.0)
HERE = torch.device("cpu")
JUDGE = backends.get("cpu" if backends.why_off("cpu") is None else "reference")


# A device of two queues ---------------------------------------------------------------------------------------------------------


def extent(tensor: Tensor) -> tuple[int, int, int]:
    """Storage, first and last byte: a view counts from its first element to its last."""
    first = tensor.storage_offset() * tensor.element_size()
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()) if size)
    return tensor.untyped_storage().data_ptr(), first, first + (span + 1) * tensor.element_size()


def meet(some: list[tuple[int, int, int]], others: list[tuple[int, int, int]]) -> bool:
    return any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a in some for b in others)


class Operation:
    def __init__(self, name: str, stream: str, run: Callable[[], object], reads: list[Tensor], writes: list[Tensor]) -> None:
        self.name, self.stream, self.run, self.after = name, stream, run, set[int]()
        self.kept = reads, writes  # their memory may not be handed out again while the program exists
        self.reads, self.writes = ([extent(t) for t in tensors if t.numel()] for tensors in (reads, writes))

    def clashes(self, other: Operation) -> bool:
        return meet(self.writes, other.writes + other.reads) or meet(self.reads, other.writes)


class Queue:
    """A stream: what is queued next comes after `edges`."""

    device, cuda_stream = HERE, 0

    def __init__(self, name: str) -> None:
        self.name, self.edges = name, set[int]()

    def wait_stream(self, other: Queue) -> None:
        self.edges |= other.edges


class Program(TorchDispatchMode):
    """Everything that is queued, and by whom; torch's own operations are recorded as they come."""

    def __init__(self, fault: int = 0) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.current, self.side = Queue("current"), Queue("side")
        self.now = self.current
        self.fault = fault  # the product that raises

    @contextmanager
    def on(self, queue: Queue) -> Iterator[None]:
        before, self.now = self.now, queue
        try:
            yield
        finally:
            self.now = before

    def add(self, name: str, run: Callable[[], object], reads=(), writes=()) -> None:
        operation = Operation(name, self.now.name, run, list(reads), list(writes))
        operation.after = set(self.now.edges)
        self.now.edges |= {len(self.operations)}
        self.operations.append(operation)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """An operation on the current queue. What returns new memory writes it again at each playing."""
        kwargs, schema = kwargs or {}, func._schema
        if "mm" in schema.name:
            self.fault -= 1
            if self.fault == 0:
                raise torch.OutOfMemoryError("no memory")
        result = func(*args, **kwargs)
        if any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns):
            return result  # a view
        if "empty" in schema.name:
            return result
        named = dict(zip([argument.name for argument in schema.arguments], args)) | kwargs
        writes = [named[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        reads = [value for value in named.values() if isinstance(value, Tensor)]
        if writes:
            self.add(schema.name, lambda: func(*args, **kwargs), reads, writes)
        else:
            self.add(schema.name, lambda: result.copy_(func(*args, **kwargs)), reads, [result])
        return result

    # What is asked of it

    def ordered(self) -> list[set[int]]:
        """For each operation, all that come before it."""
        before: list[set[int]] = []
        for operation in self.operations:
            before.append(operation.after.union(*(before[i] for i in operation.after)))
        return before

    def races(self) -> list[str]:
        before = self.ordered()
        return [
            f"{a.name} ({a.stream}) and {b.name} ({b.stream})"
            for (i, a), (j, b) in combinations(enumerate(self.operations), 2)
            if i not in before[j] and a.clashes(b)
        ]

    def orders(self) -> Iterator[list[int]]:
        """Every order that the edges allow; the first runs the side stream as far ahead as it may, the last as late."""
        before = self.ordered()
        lines = {name: [i for i, o in enumerate(self.operations) if o.stream == name] for name in ("side", "current")}

        def go(at: dict[str, int], done: list[int]) -> Iterator[list[int]]:
            if len(done) == len(self.operations):
                yield list(done)
            for name, line in lines.items():
                if at[name] < len(line) and before[line[at[name]]] <= set(done):
                    yield from go({**at, name: at[name] + 1}, [*done, line[at[name]]])

        yield from go(dict.fromkeys(lines, 0), [])

    def beside(self) -> list[tuple[int, int]]:
        """Pairs that may run at the same time."""
        before = self.ordered()
        return [(i, j) for i, j in combinations(range(len(before)), 2) if i not in before[j]]


@pytest.fixture(autouse=True)
def torch_products(monkeypatch) -> None:
    """As on a device: no product of the CPU's own."""
    monkeypatch.setattr(matmul, "chooses", lambda x, weight: False)
    monkeypatch.setattr(matmul, "yields", lambda dtype: False)


class Recorded:
    """tiled_linear on the two queues, and what the caller does around it on its own."""

    def __init__(
        self, module=overlap, tiles=4, sides=2, transposed=False, low=False, owned=True, slots=2, fault=0, broken=0
    ) -> None:
        """fault, broken: the product and the fill that raise, where they are not 0; a fill raises when part of it is queued."""
        generator = torch.Generator().manual_seed(tiles + sides)
        rows, width = 8 * tiles - 3, 24  # tiles of 8, the last is smaller
        shape, dtype = (width, rows) if transposed else (rows, width), torch.bfloat16 if low else torch.float32
        self.given = torch.randn(shape, generator=generator).to(dtype)
        self.weight = torch.empty_like(self.given)
        self.low = torch.randint(-99, 99, shape, generator=generator, dtype=torch.int16) if low else None
        xs = [torch.randn(5, width, generator=generator).to(dtype) for _ in range(sides)]
        biases = [torch.randn(rows, generator=generator).to(dtype) for _ in range(sides)]
        moved = [j for j in range(sides) if SCALES[j]]
        fills = [moved[at : at + 2] for at in range(0, len(moved), 2)]
        self.arena, self.owned, self.taken, self.outs = Arena(1 << 16), owned, list[Tensor](), list[Tensor]()
        program, self.broken = Program(fault), broken
        self.program = program
        program.add("update of W", lambda: self.weight.copy_(self.given), [], [self.weight])
        cuda = SimpleNamespace(stream=program.on, current_stream=lambda device: program.current)
        with pytest.MonkeyPatch.context() as patch, program:
            patch.setattr(module, "torch", SimpleNamespace(cuda=cuda))
            patch.setattr(module, "_side_of", lambda device, current: program.side)
            patch.setattr(module, "slots", lambda device, tiles: slots if tiles > 1 else 1)
            patch.setattr(products, "overlap", module)
            arguments = xs, self.weight, Span(3, 5), biases, self.low, fills, self.fill, self.take, self.arena.release
            with pytest.raises(torch.OutOfMemoryError) if fault or broken else nullcontext():
                self.outs = products.tiled_linear(*arguments, 8, transposed)
        assert program.now is program.current
        for tile in self.taken:
            program.add("next user", lambda tile=tile: tile.fill_(77), [], [tile])
        program.add("next update of W", lambda: self.weight.fill_(9), [], [self.weight])

    def fill(self, view: Tensor, span: Span, sides, tiles, low: Tensor | None) -> None:
        scales, lows = [SCALES[j] for j in sides], None if low is None else [low]

        def run() -> None:
            JUDGE.perturb([view], [span], resolve("normal"), SEED, 1, 0, scales, [[tile] for tile in tiles], lows)

        self.program.add("fill", run, [view, *(lows or [])], tiles)
        self.broken -= 1
        if self.broken == 0:
            raise torch.OutOfMemoryError("no memory")

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Memory whose last user is still in the current queue, as torch's allocator and the arena hand it out."""
        tile = self.arena.take(shape, self.weight.dtype, HERE) if self.owned else self.weight.new_empty(shape)
        assert tile is not None
        self.taken.append(tile)
        self.program.add("last user", lambda: tile.fill_(-55), [], [tile])
        return tile

    def play(self, order: list[int]) -> list[Tensor]:
        """What is there at the end, from memory that is not a number at the start."""
        changed = [*self.outs, *self.taken, self.weight]
        for tensor in changed:
            tensor.fill_(torch.nan)
        for number in order:
            self.program.operations[number].run()
        return [tensor.clone() for tensor in changed]


def alone(**options) -> list[Tensor]:
    """The products from one stream, in the order of the program."""
    recorded = Recorded(slots=1, **options)
    assert {operation.stream for operation in recorded.program.operations} == {"current"}
    (order,) = recorded.program.orders()
    return recorded.play(order)[: len(recorded.outs)]


def verdict(recorded: Recorded, expected: list[Tensor]) -> str:
    """Empty, or what is wrong."""
    program = recorded.program
    if races := program.races():
        return f"race: {races[0]}"
    for order in program.orders():
        found = recorded.play(order)
        if not all(torch.equal(a, b) for a, b in zip(found, expected)):
            return "an order with other bits"
        if not all((t == 77).all() for t in found[len(recorded.outs) : -1]) or not (found[-1] == 9).all():
            return "an order that writes after the end"
    fills = [i for i, operation in enumerate(program.operations) if operation.name == "fill"]
    lonely = [
        i for i in fills[1:] if not any(pair[0] == i and "mm" in program.operations[pair[1]].name for pair in program.beside())
    ]
    return f"{len(lonely)} fills have no product beside them" if lonely else ""


# What holds ---------------------------------------------------------------------------------------------------------------------

CASES = {
    "both signs": dict(),
    "two tiles": dict(tiles=2),
    "many tiles": dict(tiles=6),
    "one side": dict(sides=1),
    "two queries and W itself": dict(tiles=3, sides=5),
    "columns": dict(transposed=True),
    "low bits": dict(low=True),
    "memory of torch's allocator": dict(owned=False),
}


@pytest.mark.parametrize("name", CASES)
def test_every_order_gives_the_bits_of_one_stream(name) -> None:
    recorded, expected = Recorded(**CASES[name]), alone(**CASES[name])
    assert len(recorded.outs) == len(expected) > 0 and not any(out.isnan().any() for out in expected)
    assert verdict(recorded, expected) == ""
    assert sum(1 for _ in recorded.program.orders()) > 1
    assert len(recorded.taken) == 2 * min(2, len(expected)), "two slots, and nothing else"


RAISED = [*({"fault": number} for number in range(1, 9)), *({"broken": number} for number in range(1, 5))]


@pytest.mark.parametrize("options", RAISED, ids=lambda options: "{} {}".format(*next(iter(options.items()))))
def test_nothing_is_written_after_something_raised(options) -> None:
    """What was being made is waited for: its memory has a next user."""
    recorded = Recorded(**options)
    assert not recorded.outs and not recorded.program.races()
    for order in recorded.program.orders():
        assert all((tensor == 77).all() for tensor in recorded.play(order)[:-1])


def test_one_tile_is_a_straight_line() -> None:
    recorded = Recorded(tiles=1, sides=4)
    assert {operation.stream for operation in recorded.program.operations} == {"current"} and len(recorded.taken) == 4
    assert [overlap.slots(torch.device(kind), tiles) for kind in ("cuda", "cpu") for tiles in (1, 2)] == [1, 2, 1, 1]


# What is noticed ----------------------------------------------------------------------------------------------------------------

FIRST = "        side.wait_stream(current)  # for what"
WAIT = "            current.wait_stream(side)  # for this tile"
LAST = "        current.wait_stream(side)  # a tile that was made in vain"
STREAM = "        with torch.cuda.stream(side):"
WRONG = {
    "a fill does not wait for what the caller did": ([(FIRST, f"        if number: {FIRST.strip()}")], {}, "race: update of W"),
    "nor for the users of its memory": (
        [("    memory = ", "    side.wait_stream(current)\n    memory = "), (FIRST, f"        if number: {FIRST.strip()}")], {},
        "race: last user",
    ),
    "nor for the product that reads its slot": ([(FIRST, f"        if not number: {FIRST.strip()}")], {}, "race: "),
    "it waits for the first products only": ([(FIRST, f"        if number < 3: {FIRST.strip()}")], {}, "race: "),
    "a product does not wait for its fill": ([(WAIT, "            pass  #")], {}, "race: fill"),
    "it waits for the first fill only": ([(WAIT, f"            if not number: {WAIT.strip()}")], {}, "race: fill"),
    "there is one slot": ([("number % SLOTS", "0")], {}, "race: "),
    "nobody waits at the end": ([(LAST, "        pass  #")], {"fault": 2}, "race: fill (side) and next user"),
    "nor where a fill raised": ([(LAST, "        pass  #")], {"broken": 2}, "race: fill (side) and next user"),
    "a product waits for the next fill": (
        [(WAIT, "            pass  #"), ("            use(job, tiles)\n", f"            {WAIT.strip()}\n            use(job, tiles)\n")], {},
        "3 fills have no product beside them",
    ),
    "fills stay on the current stream": ([(STREAM, "        if True:")], {}, "3 fills have no product beside them"),
}  # fmt: skip


def edited(edits: list[tuple[str, str]]) -> ModuleType:
    source, at = inspect.getsource(overlap), inspect.getsource(overlap).index("def ahead(")
    for old, new in edits:
        place = source.index(old, at)
        source = source[:place] + new + source[place + len(old) :]
    module = ModuleType("edited")
    module.__dict__["__name__"] = overlap.__name__
    exec(compile(source, "edited", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", WRONG)
def test_a_wait_that_is_missing_is_noticed(name) -> None:
    edits, options, what = WRONG[name]
    right = verdict(Recorded(edited([]), **options), [] if options else alone())
    assert right == "" or (options and "beside" in right)  # what raised has no product after it
    assert verdict(Recorded(edited(edits), **options), [] if options else alone()).startswith(what)


BITS = [name for name, (_, options, what) in WRONG.items() if what.startswith("race") and not options]


@pytest.mark.parametrize("name", BITS)
def test_orders_alone_notice_it_too(name, monkeypatch) -> None:
    """The two ways of looking do not lean on each other."""
    monkeypatch.setattr(Program, "races", lambda self: [])
    assert verdict(Recorded(edited(WRONG[name][0])), alone()).startswith("an order")


# Around it ----------------------------------------------------------------------------------------------------------------------


def test_the_side_stream_belongs_to_the_current_one(monkeypatch) -> None:
    made: list[torch.device] = []
    device, current = torch.device("cuda", 0), SimpleNamespace(device=torch.device("cuda", 0), cuda_stream=1)
    fake = SimpleNamespace(current_stream=lambda device: current, Stream=lambda device: made.append(device) or object())
    monkeypatch.setattr(overlap, "torch", SimpleNamespace(cuda=fake))
    overlap._side_of.cache_clear()
    first, again = overlap.streams(device), overlap.streams(device)
    current = SimpleNamespace(device=torch.device("cuda", 0), cuda_stream=2)
    other = overlap.streams(device)
    overlap._side_of.cache_clear()
    assert first[1] is again[1] and other[1] is not first[1] and other[0] is current and made == [device, device]


def test_the_cuda_backend_launches_on_the_current_stream(monkeypatch) -> None:
    launched: list[int] = []
    here = SimpleNamespace(cuda_stream=11)
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(perturb=lambda *arguments: launched.append(arguments[-1])))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    backend = cuda.Cuda()
    backend._call("perturb", HERE, [])
    here = SimpleNamespace(cuda_stream=12)
    backend._call("perturb", HERE, [])
    assert launched == [11, 12]


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(2000, 300, generator=generator) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight) * torch.linspace(-1, 1, 2000)).square().mean()


@pytest.mark.parametrize("budget", [1 << 20, (1 << 20) + 4321, 2 << 20])
@pytest.mark.parametrize("evaluation", [zokern.Scratch, zokern.Paired])
def test_two_slots_stay_in_the_budget(evaluation, budget, monkeypatch) -> None:
    """A step whose tiles are made ahead, on streams that run at once: the losses of one stream, and no memory but the arena's."""
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(2))
    take, widths = Arena.take, set[int]()

    def watched(self, shape, *rest):
        piece = take(self, shape, *rest)
        assert piece is not None, f"{shape} is more than what is left of {self.budget}"
        widths.add(shape[0])
        return piece

    def step() -> tuple[list, int]:
        optimizer = zokern.MeZO(model := Wide(), lr=0.0, seed=1, evaluation=evaluation(budget))
        widths.clear()
        result = zokern.step(optimizer, lambda: model(x))
        assert 0 < result.scratch_bytes <= budget and result.whole == ()
        return [loss for sides in result.losses for loss in sides], max(widths)

    monkeypatch.setattr(Arena, "take", watched)
    expected, whole = step()
    queue = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(overlap, "slots", lambda device, tiles: 2 if tiles > 1 else 1)
    monkeypatch.setattr(overlap, "streams", lambda device: (queue, queue))
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    found, half = step()
    assert found == pytest.approx(expected, rel=1e-6)
    assert half > 300, "flat slots of several rows"
    monkeypatch.setattr(Copies, "tile_rows", lambda self, weight, dimension, sides=1: whole)
    with pytest.raises(AssertionError, match="more than what is left"):
        step()
